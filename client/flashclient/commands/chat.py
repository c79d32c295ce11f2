"""`flashclient chat`: a conversation in a terminal."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from flashclient.commands.arguments import add_command, decoding, utf8
from flashclient.commands.generate import add_mode_flags
from flashclient.commands.keywords import in_flags
from flashclient.commands.opening import open_client
from flashclient.commands.sampling import add_sampling_flags, sampling_arguments, seed_sampling
from flashclient.errors import FlashClientError, OptionError
from flashclient.generation.conversation import Conversation, template_of_texts
from flashclient.generation.stop_texts import until_stop
from flashclient.standard_streams import complain, say

PROMPT, PROMPT_MORE = "> ", "… "
CONTINUES = "\\"  # at the end of a line: the message goes on
COMMAND = re.compile(r"/([A-Za-z]*)(?:\s+(.*))?", re.DOTALL)  # a path and a comment of C are messages
# By command; those of a conversation and those of a text. What Ctrl-C does stands below them.
HELP = {
    "help": "this list",
    "system TEXT": "begin anew with this system prompt; without TEXT, with none",
    "more": "go on with the text",
    "reset": "begin anew",
    "undo": "remove the last message and its answer",
    "again": "another answer to the last message",
    "stats": "speed, bytes read and hit rate of the last answer",
    "exit": "end; so do Ctrl-D, and Ctrl-C at an empty prompt",
}
ONLY_CHATS, ONLY_TEXTS = "system", "more"
KEYS = """\
A line that ends with \\ goes on in the next one; what is pasted is one message. Ctrl-C stops an answer, once its first
word is there, and drops a line."""


def add(commands: Any) -> None:
    """Adds the command."""
    command = add_command(commands, "chat", run, "talk with a model; each line of standard input is a message")
    add_chat_flags(command)


def add_chat_flags(command: Any) -> None:
    """The flags of a chat."""
    command.add_argument("--system", type=utf8, default="", metavar="TEXT", help="system prompt")
    add_mode_flags(command)
    add_sampling_flags(command)


def run(options: argparse.Namespace) -> int:
    """The command, also after `flashclient run` has prepared the model."""
    arguments = sampling_arguments(options)
    with open_client(options, mode=options.mode, window=options.window, kv_dtype=options.kv_dtype) as client:
        from flashclient.generation.prompts import require_tokenizer  # it needs torch, which the client has imported

        tokenizer = require_tokenizer(client.tokenizer, "its ids to generate() in Python")
        is_base = tokenizer.chat_template is None
        if is_base:
            if options.system:
                raise OptionError(f"{_no_template(client)}, so it has no system prompt: leave --system out")
            arguments |= {"chat_template": template_of_texts(tokenizer), "add_generation_prompt": False}
        seed_sampling(options)
        return _Chat(client, arguments, options, is_base).run()


def _no_template(client: Any) -> str:
    return f"model '{client.record.name}' has no chat template, as base models have none"


class _Chat:
    """A conversation, or with a base model a text: what is said and answered, from line to line."""

    def __init__(self, client: Any, arguments: dict[str, Any], options: argparse.Namespace, is_base: bool) -> None:
        self._client = client
        self._options = options
        self._terminal = sys.stdin.isatty()
        self._typed: Callable[[], str] = lambda: ""  # the line under way
        self._conversation = Conversation(
            lambda messages: until_stop(client.chat(messages, stream=True, **arguments), options.stop), options.system
        )
        self._is_base = is_base
        self._commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: say(_help(is_base)),
            "system": self._begin,
            "more": lambda _: self._more(),
            "reset": lambda _: self._begin(self._conversation.system),
            "undo": self._undo,
            "again": self._again,
            "stats": lambda _: say(client.stats().table()),
        }
        del self._commands[ONLY_CHATS if is_base else ONLY_TEXTS]

    def run(self) -> int:
        """Until the end of the input, /exit, or Ctrl-C at an empty line."""
        if self._terminal:
            with suppress(ImportError):
                import readline  # gives input() its line editing and history

                self._typed = readline.get_line_buffer
                if os.environ.get("TERM", "dumb") != "dumb":  # others say where a pasted text ends
                    readline.parse_and_bind("set enable-bracketed-paste on")
            say(_banner(self._client))
        if self._is_base:
            complain("flashclient", f"{_no_template(self._client)}: it continues what you type, line after line")
        status = 0
        while (text := self._read()) is not None:
            asked = COMMAND.fullmatch(text)
            if text.strip() in ("/exit", "/quit"):
                break
            try:
                if asked is None:
                    self._say(text)
                elif asked[1] in self._commands:
                    self._commands[asked[1]]((asked[2] or "").strip())
                else:
                    say(f"there is no command /{asked[1]}: /help shows the commands")
            except FlashClientError as error:
                complain("flashclient", in_flags(str(error)))
                if not self._terminal:
                    return error.exit_status
                status = error.exit_status
                continue
            status = 0
        return status

    def _read(self) -> str | None:
        """The next message or command; None at the end."""
        lines: list[str] = []
        while True:
            try:
                with decoding("standard input"):
                    line = input((PROMPT_MORE if lines else PROMPT) if self._terminal else "")
                    line = line.encode(errors="surrogateescape").decode()  # some locales read any bytes
            except EOFError:
                if self._terminal:
                    say("")
                return "\n".join(lines) if lines else None
            except KeyboardInterrupt:
                say("")
                if not lines and not self._typed():
                    return None
                lines = []
                continue
            lines.append(line.removesuffix(CONTINUES))
            if not line.endswith(CONTINUES) and (text := "\n".join(lines)).strip():
                return text
            if not line.endswith(CONTINUES):
                lines = []

    def _more(self) -> None:
        if self._conversation.turns:
            self._say("")
        else:
            say("there is no text yet: type its beginning")

    def _say(self, text: str) -> None:
        pieces = self._conversation.say(text)
        try:
            if self._options.json:
                answer = "".join(pieces)
                say(json.dumps({"text": answer, "stats": self._client.stats().as_dict()}))
                return
            for piece in pieces:
                say(piece, end="")
        except KeyboardInterrupt:  # stops the answer, not the program
            pass
        finally:
            pieces.close()  # type: ignore[attr-defined]  # a generator; waits until nothing is computed any more
        say("")
        if self._options.stats:
            print(self._client.stats().table(), file=sys.stderr)

    def _begin(self, system: str) -> None:
        self._conversation.system = system
        self._conversation.turns.clear()
        say(
            "a new text"
            if self._is_base
            else "a new conversation" + (f" with the system prompt: {system}" if system else "")
        )

    def _undo(self, _: str) -> None:
        asked = self._conversation.undo()
        say("there is nothing to undo" if asked is None else f"removed: {asked}")

    def _again(self, _: str) -> None:
        before = self._conversation.turns
        asked = self._conversation.undo()
        if asked is None:
            say("there is no message yet")
            return
        try:
            self._say(asked)
        finally:
            if len(self._conversation.turns) < len(before):
                self._conversation.turns = before  # there is no other answer


def _help(is_base: bool) -> str:
    left_out = ONLY_CHATS if is_base else ONLY_TEXTS
    return "\n".join(f"/{name:<15}{what}" for name, what in HELP.items() if name.split()[0] != left_out) + f"\n{KEYS}"


def _banner(client: Any) -> str:
    record = client.record
    model_bytes = record.resident_file_bytes + sum(one.bundles_file_bytes for one in (record, *record.tables))
    limit_bytes = client.loaded.connection.stats().dram_limit_bytes
    memory = f"{model_bytes / 2**30:.2f}GiB, of which weightd keeps at most {limit_bytes / 2**30:.2f}GiB in memory"
    return f"{record.name}: {memory}; mode {client.mode}. /help shows the commands, Ctrl-D ends."
