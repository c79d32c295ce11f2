"""Commands with standard streams that are closed, full, broken or plain ASCII; errors name a command's own flags."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from checkpoints import make_checkpoint
from daemon import serving
from tiny_store import write_model

from flashclient.commands.keywords import in_flags
from flashclient.daemon import weightd_command
from flashclient.daemon.channel import in_arguments
from flashclient.options import Options
from weightd import cli

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
CLOSED = """
import os, sys
for descriptor in map(int, sys.argv[1].split(",")):
    os.close(descriptor)
os.execv(sys.argv[2], sys.argv[2:])
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    write_model(tmp_path_factory.mktemp("streams") / "störe, 1")
    return tmp_path_factory.getbasetemp() / "streams0" / "störe, 1"


def weightd(*arguments: object, redirect: str = "", environment: dict[str, str] | None = None) -> tuple[int, str, str]:
    """Status, output and errors of the command. `redirect` is the shell's redirection."""
    command = ["sh", "-c", f'exec "$@" {redirect}', "sh", sys.executable, "-m", "weightd", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, env=os.environ | (environment or {}), timeout=60, check=False)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.mark.parametrize("redirect", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_fault(store: Path, redirect: str) -> None:
    status, _, errors = weightd("verify", "--store", store, redirect=redirect)
    assert (status, errors) == (0, "")


@pytest.mark.parametrize("arguments", [["ls"], ["ls", "--json"], ["verify"]])
def test_a_full_disk_is_one_line(store: Path, arguments: Sequence[str]) -> None:
    assert weightd(*arguments, "--store", store, redirect=">/dev/full") == (
        1,
        "",
        "weightd: cannot write to standard output: no space left on device\n",
    )


def test_help_on_a_full_disk_is_one_line() -> None:
    status, _, errors = weightd("--help", redirect=">/dev/full")
    assert (status, errors.count("\n"), "Traceback" in errors) == (1, 1, False)


def test_a_reader_that_has_gone_is_told_nothing(store: Path) -> None:
    reading_end, writing_end = os.pipe()
    os.close(reading_end)
    command = [sys.executable, "-m", "weightd", "ls", "--store", str(store)]
    done = subprocess.run(command, stdout=writing_end, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing_end)
    assert (done.returncode, done.stderr) == (1, "")


def test_standard_error_that_takes_nothing_keeps_the_status(store: Path) -> None:
    assert weightd("rm", "no such", "--store", store, redirect="2>/dev/full")[0] == 1


def test_names_that_the_locale_cannot_write(store: Path, tmp_path: Path) -> None:
    status, output, _ = weightd("ls", "--store", store, environment=ASCII)
    assert (status, output.split(":")[0]) == (0, "tiny")
    for name in (b"caf\xe9", "köpfe".encode(), b"two\nlines"):
        folder = os.path.join(os.fsencode(tmp_path), name)  # noqa: PTH118
        status, _, errors = weightd("ls", "--store", os.fsdecode(folder), environment=ASCII)
        assert (status, errors.count("\n"), "no store at" in errors) == (1, 1, True), errors


def test_an_import_into_a_folder_that_the_locale_cannot_decode(tmp_path: Path) -> None:
    source = make_checkpoint("opt", tmp_path / "modèle", layers=1)
    status, _, errors = weightd("import", source, "--store", tmp_path / "störe", environment=ASCII)
    assert (status, errors) == (0, "")


def test_a_daemon_whose_streams_are_closed_serves_and_keeps_them_free(store: Path, tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/w.sock"
    with serving(store, "--dram", "64MiB", address=address, prefix=(sys.executable, "-c", CLOSED, "0,1")) as daemon:
        targets = [os.readlink(f"/proc/{daemon.process.pid}/fd/{number}") for number in (0, 1)]  # noqa: PTH115
        assert targets == ["/dev/null", "/dev/null"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_an_import_that_is_ended_takes_back_what_it_wrote(
    store: Path,
    tmp_path: Path,
    number: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def ended(*_: object) -> None:
        signal.raise_signal(number)
        raise AssertionError("it goes on")

    monkeypatch.setattr("weightd.importing.convert._check_space", ended)
    before = sorted(path.name for path in store.iterdir())
    source = make_checkpoint("opt", tmp_path / "other", layers=1)
    capsys.readouterr()
    assert cli.main(["import", str(source), "--store", str(store)]) == 128 + number
    assert capsys.readouterr().err == "weightd: interrupted\n"
    assert sorted(path.name for path in store.iterdir()) == before


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("dram=2 is 2 bytes: pass store= too", "--dram 2 is 2 bytes: pass --store too"),
        ("needs 9MiB of dram=8MiB: raise dram= to 9MiB", "needs 9MiB of --dram 8MiB: raise --dram to 9MiB"),
        ("mode='fast' is not known", "--mode 'fast' is not known"),
        ("raise timeout_s=", "raise --timeout-s"),
        ("tls_cert= and tls_key= belong together", "--tls-cert and --tls-key belong together"),
        ("two\nlines of \udce9", "two\\nlines of \\udce9"),
    ],
)
def test_errors_speak_of_flags(words: str, expected: str) -> None:
    assert in_flags(words) == expected


@pytest.mark.parametrize("dram", [2, "2", 50, 0, -1, "nan", "1e3", "2g", "", True, 2.5, "2 XiB", "101%%"])
def test_a_dram_that_was_meant_otherwise_is_refused(dram: object) -> None:
    with pytest.raises(TypeError, match=r"^dram=.*(did you mean|use a size like)"):
        Options(store="s", dram=dram)  # type: ignore[arg-type]


@pytest.mark.parametrize("dram", ["2GB", "2 GiB", "50%", 1 << 20, "1.5 tib", "0.5%"])
def test_a_dram_is_taken_as_weightd_takes_it(dram: str | int) -> None:
    assert Options(store="s", dram=dram).dram == dram


def test_a_store_that_is_no_path_is_refused() -> None:
    with pytest.raises(TypeError, match=r"store=.* is not the path of a folder"):
        Options(store="/tmp/a\0b")


def test_a_private_daemons_flag_becomes_our_argument() -> None:
    assert in_arguments("needs 9MiB of --dram 8MiB: raise --dram to 9MiB") == (
        "needs 9MiB of dram=8MiB: raise dram= to 9MiB"
    )
    assert in_arguments("--dram-floor 9MiB is above --dram 8MiB") == "--dram-floor 9MiB is above dram=8MiB"
    words = ["weightd: serving", "weightd: --dram 1KiB is too small: raise --dram, or `weightd rm m --store s`"]
    assert weightd_command.last_words(words) == "dram=1KiB is too small: raise dram=, or `weightd rm m --store s`"
