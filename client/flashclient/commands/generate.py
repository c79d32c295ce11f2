"""`flashclient generate`: continues a prompt."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from flashclient.commands.arguments import add_command, add_kv_dtype_flag, add_mode_flag, decoding, not_negative, utf8
from flashclient.commands.opening import open_client
from flashclient.commands.sampling import add_sampling_flags, sampling_arguments, seed_sampling
from flashclient.errors import OptionError
from flashclient.generation.stop_texts import until_stop
from flashclient.standard_streams import say


def add(commands: Any) -> None:
    """Adds the command."""
    command = add_command(commands, "generate", _run, "continue a prompt and print the text as it comes")
    command.add_argument("prompt", type=utf8, nargs="?", help="text to continue; without it, or with -, standard input")
    add_mode_flags(command)
    add_sampling_flags(command)


def add_mode_flags(command: Any) -> None:
    """--mode, --window, --kv-dtype and --stats."""
    add_mode_flag(command)
    window = "number of last tokens whose neurons stay leased (default: 4 in mode predict, 0 in mode threshold)"
    command.add_argument("--window", type=not_negative, metavar="K", help=window)
    add_kv_dtype_flag(command)
    command.add_argument("--stats", action="store_true", help="print statistics on standard error")


def _run(options: argparse.Namespace) -> int:
    prompt = _standard_input() if options.prompt in (None, "-") else options.prompt
    arguments = sampling_arguments(options)
    with open_client(options, mode=options.mode, window=options.window, kv_dtype=options.kv_dtype) as client:
        seed_sampling(options)
        pieces = until_stop(client.stream(prompt, **arguments), options.stop)
        if options.json:
            text = "".join(pieces)
            say(json.dumps({"text": text, "stats": client.stats().as_dict()}))
        else:
            for piece in pieces:
                say(piece, end="")
            say("")
        if options.stats:
            print(client.stats().table(), file=sys.stderr)
    return 0


def _standard_input() -> str:
    """All of it, without the last line's end. Raises OptionError for a terminal, and for what is not UTF-8."""
    if sys.stdin.isatty():
        raise OptionError("there is no prompt: pass one, or pipe a text into standard input")
    with decoding("standard input"):
        text = sys.stdin.buffer.read().decode()
    text = text.removesuffix("\n").removesuffix("\r")
    if not text:
        raise OptionError("the prompt on standard input is empty: pass a text")
    return text
