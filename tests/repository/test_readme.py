"""Runs every example of README.md unchanged, on a tiny checkpoint of the name used there, in a new folder."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import pytest
from checkpoints import make_checkpoint
from daemon import serving
from repository import ROOT
from run_here import run_here
from sparse_model import write_text

from flashclient import cli
from weightd.cli import main as weightd_main

README = (ROOT / "README.md").read_text()
MODEL = "opt-1.3b"
INTRODUCTION_LINES_MAX = 120
ADDRESS = "unix:/tmp/weightd.sock"
COMMANDS = re.findall(r"^    ((?:weightd|flashclient) .+)$", README, re.MULTILINE)
PYTHON = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the examples run. The README's first command makes the store in it."""
    folder = tmp_path_factory.mktemp("readme")
    make_checkpoint("opt", folder / MODEL, dtype="float16")
    run(example("weightd import"), folder)
    return folder


def example(start: str) -> list[str]:
    """The README's only command that begins with `start`, without the remark behind it."""
    found = [line for line in COMMANDS if line.startswith(start)]
    assert len(found) == 1, found
    return shlex.split(found[0], comments=True)


def run(command: list[str], folder: Path) -> str:
    """What the command prints. It runs in this process, which has loaded torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done = run_here({"flashclient": cli.main, "weightd": weightd_main}[command[0]], *command)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_script(text: str, folder: Path) -> str:
    """What the script prints."""

    def execute() -> int:
        exec(compile(text, "example.py", "exec"), {"__name__": "__main__"})
        return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return run_here(execute, "example.py").stdout


def test_what_stands_before_the_figures_is_short() -> None:
    assert README[: README.index("## Measured")].count("\n") <= INTRODUCTION_LINES_MAX


@pytest.mark.parametrize("line", [line for line in README.splitlines() if line.startswith("| ")])
def test_a_cell_of_a_table_has_one_number(line: str) -> None:
    for cell in line.split("|")[2:-1]:  # the first says what was measured
        assert not re.search(r"\d[^`]*[/;+=,][^`]*\d", cell), cell


ELSEWHERE = ("top", "--store ./store --metrics")  # test_top, test_metrics


def test_no_command_is_left_out() -> None:
    known = (
        "plan",
        "probe",
        "import",
        "doctor",
        "--store ./store --dram",
        "ls",
        "verify",
        "rm NAME",
        "--store DIR --help",
        *ELSEWHERE,
    )
    left = [line for line in COMMANDS if not line.startswith(tuple(f"weightd {start}" for start in known))]
    assert [line.split()[1] for line in left] == ["run", "generate", "serve", "calibrate", "eval"]


def test_plan_and_probe(folder: Path) -> None:
    assert run(example("weightd plan"), folder).startswith("llama-3-8b: LlamaForCausalLM, ")
    assert run(example("weightd probe"), folder).startswith("opt-1.3b: OPTForCausalLM; ")


def test_run(folder: Path) -> None:
    command = [sys.executable, "-m", *example("flashclient run")]
    checkpoint = make_checkpoint("qwen3", folder / Path(command[-1]).name)
    (checkpoint / "chat_template.jinja").write_text("{{ messages[-1]['content'] }}")
    environment = os.environ | {"XDG_DATA_HOME": str(folder / "data")}
    done = subprocess.run(
        [*command, "--max-new-tokens", "4"],
        cwd=folder,
        env=environment,
        input="Hi\n",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 1


def test_doctor(folder: Path) -> None:
    assert "direct io" in run(example("weightd doctor"), folder)


def test_ls_and_verify(folder: Path) -> None:
    assert MODEL in run(example("weightd ls"), folder)
    assert MODEL in run(example("weightd verify"), folder)


def test_help(folder: Path) -> None:
    assert "--config" in run(["weightd", "--store", "./store", "--help"], folder)


def test_serving_and_generating(folder: Path) -> None:
    serve = example("weightd --store ./store --dram")
    assert serve[serve.index("--listen") + 1] == ADDRESS
    with serving(folder / "store", *serve[3 : serve.index("--listen")]) as daemon:
        generate = [daemon.address if word == ADDRESS else word for word in example("flashclient generate")]
        assert run([*generate, "--max-new-tokens", "4"], folder)
        server = [daemon.address if word == ADDRESS else word for word in example("flashclient serve")]
        assert "opt-1.3b" in answered_by([*server, "--port", "0"], folder)
        (script,) = PYTHON
        assert run_script(script.replace(ADDRESS, daemon.address), folder)


def answered_by(command: list[str], folder: Path) -> str:
    """What the server answers on GET /v1/models."""
    started = [sys.executable, "-m", *command]
    with subprocess.Popen(started, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().rpartition(" ")[2].strip()
        try:
            with urlopen(f"{address}/models", timeout=60) as answer:
                return str(answer.read().decode())
        finally:
            process.terminate()


def test_calibrating_and_evaluating(folder: Path) -> None:
    for seed, name in enumerate(("text.txt", "other.txt")):
        write_text(folder / name, 2000, seed)
    serve = example("weightd --store ./store --dram")
    with serving(folder / "store", *serve[3 : serve.index("--listen")]) as daemon:
        for command, word in (("calibrate", "published as version 1"), ("eval", "predict")):
            words = example(f"flashclient {command}")
            assert word in run([daemon.address if one == ADDRESS else one for one in words], folder)


def test_without_a_daemon(folder: Path) -> None:
    (call,) = re.findall(r"`(FlashClient\(.*store=.*?\))`", README)
    use = "print(client.generate('The', max_new_tokens=4))"
    script = f"from flashclient import FlashClient\nwith {call} as client:\n    {use}\n"
    assert run_script(script, folder)


def test_rm(folder: Path, tmp_path: Path) -> None:
    make_checkpoint("opt", tmp_path / "other", dtype="float16")
    run(["weightd", "import", str(tmp_path / "other"), "--store", "./store"], folder)
    command = [word if word != "NAME" else "other" for word in example("weightd rm")]
    run(command, folder)
    assert "other" not in run(["weightd", "ls", "--store", "./store"], folder)
