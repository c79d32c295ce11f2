"""`flashclient chat` and `flashclient run`: lines of standard input, and a person at a terminal."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import make_checkpoint
from daemon import Daemon, serving
from run_here import run_here

from flashclient import FlashClient
from flashclient.cli import main
from flashclient.commands.run import default_store
from weightd import cli

TEMPLATE = (
    "{% if messages[-1]['content'] == 'Bah' %}{{ raise_exception('no such word') }}{% endif %}"
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}a:"
)
ANSWER_S = 60.0
AGAIN_S = 5.0
PASTE_OFF = "\x1b[?2004l"  # what readline writes when a line ends
COMMAND = [sys.executable, "-P", "-m", "flashclient"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_checkpoint("llama", tmp_path_factory.mktemp("chat") / "tiny-chat")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    generation = folder / "generation_config.json"
    generation.write_text(json.dumps(json.loads(generation.read_text()) | {"eos_token_id": None}))
    return folder


@pytest.fixture(scope="module")
def daemon(checkpoint: Path) -> Iterator[Daemon]:
    store = checkpoint.parent / "store"
    assert cli.main(["import", str(checkpoint), "--store", str(store)]) == 0
    base = make_checkpoint("llama", checkpoint.parent / "tiny-base")
    assert cli.main(["import", str(base), "--store", str(store)]) == 0
    with serving(store, "--dram", "64MiB") as started:
        yield started


def chat(daemon: Daemon, lines: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return run_here(main, "flashclient", "chat", "tiny-chat", "--address", daemon.address, *flags, input=lines)


def test_each_line_is_a_message_of_one_conversation(daemon: Daemon) -> None:
    done = chat(daemon, "Hi\n\nGo \\\non\n", "--system", "be brief", "--max-new-tokens", "4", "--json")
    assert done.returncode == 0, done.stderr
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    with FlashClient("tiny-chat", address=daemon.address) as client:
        messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "Hi"}]
        assert first["text"] == client.chat(messages, max_new_tokens=4)
        messages += [{"role": "assistant", "content": first["text"]}, {"role": "user", "content": "Go \non"}]
        assert second["text"] == client.chat(messages, max_new_tokens=4)
    assert second["stats"]["kept_tokens"] > 0


def test_commands(daemon: Daemon) -> None:
    lines = "/help\n/undo\n/again\nHi\n/again\n/undo\n/system be kind\n/reset\n/stats\n/foo\n/exit\nnever\n"
    done = chat(daemon, lines, "--temperature", "0", "--max-new-tokens", "4")
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert "Ctrl-C stops an answer" in said
    assert "there is nothing to undo" in said
    assert "there is no message yet" in said
    assert "removed: Hi" in said
    assert said.count("a new conversation with the system prompt: be kind") == 2
    assert "tokens/s" in said
    assert "there is no command /foo: /help shows the commands" in said


def test_an_error_in_a_script_ends_it(daemon: Daemon) -> None:
    done = chat(daemon, "Hi\nBah\nHi\n", "--max-new-tokens", "4")
    assert done.returncode == 2
    assert done.stderr == "flashclient: the model's chat template refuses the messages: no such word\n"
    assert len(done.stdout) > 1


def test_a_base_model_continues_the_text(daemon: Daemon) -> None:
    lines = "Once there\n/more\nand\n/undo\n/system be brief\n/help\n/reset\n/more\nOnce there\n"
    flags = ("--max-new-tokens", "4", "--temperature", "0")
    done = run_here(main, "flashclient", "chat", "tiny-base", "--address", daemon.address, *flags, input=lines)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("flashclient: model 'tiny-base' has no chat template, as base models have none: it ")
    with FlashClient("tiny-base", address=daemon.address) as client:
        text, pieces = "Once there", []
        for typed in ("", "\nand", None):
            pieces.append(client.generate(text, max_new_tokens=4, do_sample=False))
            text += pieces[-1] + (typed or "")
    said = done.stdout
    assert said.startswith("".join(f"{piece}\n" for piece in pieces) + "removed: and\nthere is no command /system")
    assert said.endswith(f"\na new text\nthere is no text yet: type its beginning\n{pieces[0]}\n")
    assert "/more " in said
    assert "/system TEXT" not in said


def test_a_base_model_has_no_system_prompt(daemon: Daemon) -> None:
    flags = ("--address", daemon.address, "--system", "be brief")
    done = run_here(main, "flashclient", "chat", "tiny-base", *flags, input="Hi\n")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("flashclient: model 'tiny-base' has no chat template")
    assert done.stderr.endswith("leave --system out\n")


class Terminal:
    """A command in a terminal of its own."""

    def __init__(self, *command: str, kind: str = "dumb") -> None:
        self._own, theirs = pty.openpty()
        environment = os.environ | {"TERM": kind}
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
        )
        os.close(theirs)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._own, text.encode())

    def await_text(self, text: str, count: int = 1, within_s: float = ANSWER_S) -> None:
        give_up = time.monotonic() + within_s
        while self.seen.count(text) < count:
            ready, _, _ = select.select([self._own], [], [], max(0.0, give_up - time.monotonic()))
            assert ready, f"no {text!r} in {self.seen!r}"
            self.seen += os.read(self._own, 4096).decode(errors="replace")

    def interrupt_at_prompt(self, text: str, count: int) -> None:
        """Interrupts until the text is there: CPython may notice one only with the next, if it was about to wait."""
        self.interrupt()
        try:
            self.await_text(text, count, AGAIN_S)
        except AssertionError:
            self.interrupt()
            self.await_text(text, count)

    def interrupt(self) -> None:
        self.process.send_signal(2)

    def end(self) -> int:
        try:
            return self.process.wait(ANSWER_S)
        finally:
            self.process.kill()
            self.process.wait()
            os.close(self._own)


def test_at_a_terminal_an_interrupt_stops_the_answer_only(daemon: Daemon) -> None:
    terminal = Terminal(*COMMAND, "chat", "tiny-chat", "--address", daemon.address, "--max-new-tokens", "200")
    terminal.await_text("loading tiny-chat")
    terminal.await_text("Ctrl-D ends.")
    terminal.await_text("> ")
    terminal.type("Hi\n")
    terminal.await_text("Hi\r\n")
    begun = len(terminal.seen)
    while len(terminal.seen) < begun + 5:
        terminal.seen += os.read(terminal._own, 64).decode(errors="replace")
    terminal.interrupt()
    terminal.await_text("> ", 2)
    terminal.type("/undo\n")
    terminal.await_text("removed: Hi")
    terminal.await_text("> ", 3)
    terminal.type("/exit\n")
    assert terminal.end() == 0


def test_at_a_terminal_a_paste_is_one_message_and_an_interrupt_drops_the_line(daemon: Daemon) -> None:
    command = [*COMMAND, "chat", "tiny-chat", "--address", daemon.address, "--max-new-tokens", "4"]
    terminal = Terminal(*command, kind="xterm")
    terminal.await_text("Ctrl-D ends.")
    terminal.await_text("> ")
    terminal.type("\x1b[200~first\n/second\n\nlast\x1b[201~")
    terminal.await_text("last")
    terminal.type("\n")
    terminal.await_text("> ", 2)
    terminal.type("half a li")
    terminal.await_text("half a li")
    terminal.interrupt_at_prompt("> ", 3)
    terminal.type("/undo\n")
    terminal.await_text("removed: first\r\n/second\r\n\r\nlast")
    terminal.await_text("> ", 4)
    terminal.interrupt_at_prompt(PASTE_OFF, terminal.seen.count(PASTE_OFF) + 1)
    assert terminal.end() == 0


def test_only_a_word_behind_a_slash_is_a_command(daemon: Daemon) -> None:
    done = chat(daemon, "/etc/hosts\n/* Hi */\n//\n/undo\n/foo bar\n", "--max-new-tokens", "2")
    assert done.returncode == 0, done.stderr
    assert "removed: //" in done.stdout
    assert done.stdout.count("there is no command") == done.stdout.count("there is no command /foo: ") == 1


def test_bytes_that_are_no_text_are_refused_in_any_locale(daemon: Daemon) -> None:
    done = chat(daemon, "Hi\udcff\n")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "flashclient: standard input is not UTF-8 (invalid start byte at byte 2)\n"


def test_run_imports_starts_a_weightd_and_chats(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    arguments = ["run", str(checkpoint), "--dram", "64MiB", "--max-new-tokens", "4"]
    first = subprocess.run([*COMMAND, *arguments], input="Hi\n", capture_output=True, text=True, check=False)
    second = run_here(main, "flashclient", *arguments, input="Hi\n")
    for done in (first, second):
        assert done.returncode == 0, done.stderr
    assert first.stdout == second.stdout != ""
    assert (tmp_path / "weightd" / "tiny-chat").is_dir()


def test_run_shows_what_an_import_takes(checkpoint: Path, tmp_path: Path) -> None:
    terminal = Terminal(*COMMAND, "run", str(checkpoint), "--store", str(tmp_path / "s"), "--dram", "64MiB")
    terminal.await_text("tiny-chat takes ")
    terminal.await_text("importing: 100%")
    terminal.await_text("of which weightd keeps at most 0.06GiB in memory")
    terminal.type("/exit\n")
    assert terminal.end() == 0


def test_the_default_store() -> None:
    assert default_store({"XDG_DATA_HOME": "/data"}) == Path("/data/weightd")
    assert default_store({}) == Path.home() / ".local/share/weightd"
    assert default_store({"XDG_DATA_HOME": "relative"}) == Path.home() / ".local/share/weightd"


def test_run_says_that_a_model_is_a_base_model_before_its_import(tmp_path: Path) -> None:
    base = make_checkpoint("llama", tmp_path / "tiny-base")
    terminal = Terminal(*COMMAND, "run", str(base), "--store", str(tmp_path / "s"), "--dram", "64MiB")
    terminal.await_text("importing: 100%")
    assert terminal.seen.index("tiny-base has no chat template") < terminal.seen.index("importing: ")
    terminal.await_text("it continues what you type")
    terminal.await_text("> ")
    terminal.type("/exit\n")
    assert terminal.end() == 0
