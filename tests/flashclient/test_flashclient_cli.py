"""The command `flashclient`: its output streams, exit statuses and refusals."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import make_config, make_model, make_tokenizer
from cut_model import FetchServer, cut

from flashclient import cli


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    model = make_model(make_config("qwen2"))
    model.generation_config.eos_token_id = None
    with FetchServer([cut(model, make_tokenizer())], tmp_path_factory.mktemp("cli") / "socket") as server:
        yield server.address


def run(address: str, *more: str) -> int:
    return cli.main(["generate", "tiny", "hello", "--address", address, "--transport", "grpc", *more])


def test_text_and_nothing_else(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(address, "--max-new-tokens", "6") == 0
    printed = capsys.readouterr()
    assert len(printed.out) > 1
    assert printed.err == ""


def test_a_prompt_from_standard_input(
    address: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(address, "--max-new-tokens", "6") == 0
    expected = capsys.readouterr().out
    command = ["generate", "tiny", "--address", address, "--transport", "grpc", "--max-new-tokens", "6"]
    for more in ([], ["-"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello\n")))
        assert cli.main([*command, *more]) == 0
        assert capsys.readouterr().out == expected
    for given, message in ((b"\xff", "standard input is not UTF-8"), (b"\n", "the prompt on standard input is empty")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        assert cli.main(command) == 2
        assert message in capsys.readouterr().err


def test_sampling_flags(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        assert run(address, "--max-new-tokens", "12", "--temperature", "1.5", "--top-k", "50", "--seed", seed) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert run(address, "--max-new-tokens", "12", "--temperature", "0") == 0
    text = capsys.readouterr().out.removesuffix("\n")
    assert run(address, "--max-new-tokens", "12", "--temperature", "0", "--stop", text[3:5]) == 0
    assert capsys.readouterr().out == text[: text.index(text[3:5])] + "\n"


def test_stats_on_standard_error(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(address, "--max-new-tokens", "6", "--stats") == 0
    told = capsys.readouterr().err
    assert "tokens/s" in told
    assert "mode      exact" in told


def test_json_is_one_object(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(address, "--max-new-tokens", "6") == 0
    text = capsys.readouterr().out
    assert run(address, "--max-new-tokens", "6", "--json") == 0
    printed = capsys.readouterr()
    answer = json.loads(printed.out)
    assert printed.err == ""
    assert answer["text"] == text.removesuffix("\n")
    assert answer["stats"]["new_tokens"] == 6


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["generate"], 2, "the following arguments are required: model"),
        (["generate", "m", "p", "--max-new-tokens", "0"], 2, "'0' must be a whole number of at least 1"),
        (["generate", "m", "p", "--max-new-tokens", "many"], 2, "'many' must be a whole number"),
        (["generate", "m", "p", "--address", "a", "--store", "s"], 2, "not allowed with argument"),
        (["generate", "m", "p", "--dram", "1GiB"], 2, "--dram 1GiB is for a private weightd: pass --store too"),
        (["generate", "m", "p", "--window", "-1"], 2, "'-1' must be a whole number of at least 0"),
        (["generate", "m", "p", "--mode", "fast"], 2, "--mode 'fast' is not known: use 'auto' or 'exact' or 'predict'"),
        (
            ["--address", "a", "generate", "m", "p"],
            2,
            "the command comes first: flashclient generate ... --address ...",
        ),
        (["run", "./none", "--store", "/none"], 1, "no file or folder './none', and a model's name has no slash"),
        (["run", "none", "--store", "/none"], 1, "no file or folder 'none', and there is no store at /none yet"),
        (["server"], 2, "did you mean 'flashclient serve'?"),
        (["generate", "m", "p", "--address", "unix:/nowhere/socket"], 1, "no weightd at unix:/nowhere/socket"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == status
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("flashclient: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize("command", ["generate m p", "calibrate m --text f", "eval m --text f"])
def test_without_torch_and_transformers_it_says_what_to_install(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("torch", "transformers"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(cli, "find_spec", lambda name: sys.modules[name])
    assert cli.main(command.split()) == 1
    printed = capsys.readouterr()
    assert printed.err == "flashclient: this needs torch and transformers: pip install 'weightd[client]'\n"
    assert printed.out == ""


def test_unknown_model(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "large", "p", "--address", address, "--transport", "grpc"]) == 1
    assert "no model 'large': there is tiny" in capsys.readouterr().err


def test_predict_mode_without_calibration(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(address, "--mode", "predict") == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "'tiny' was never calibrated: run `flashclient calibrate tiny --text FILE`" in printed.err


def test_too_many_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(make_config("opt", 1))
    with FetchServer([cut(model, make_tokenizer())], tmp_path / "socket") as server:
        assert run(server.address, "--max-new-tokens", "300") == 2
    assert capsys.readouterr().err.endswith("context of 256 tokens: shorten the prompt or lower --max-new-tokens\n")


def test_help(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["generate", "--help"])
    assert ended.value.code == 0
    assert "--max-new-tokens" in capsys.readouterr().out


QUICK = """
import sys
import warnings
from flashclient import cli
status = cli.main(sys.argv[1:])
assert "torch" not in sys.modules
sys.exit(status)
"""


@pytest.mark.parametrize("wrong", ["mode", "model", "address"])
def test_errors_do_not_wait_for_torch(address: str, wrong: str, tmp_path: Path) -> None:
    given = {"mode": "exact", "model": "tiny", "address": address}
    given |= {"mode": "fast"} if wrong == "mode" else {"model": "none"} if wrong == "model" else {}
    given |= {"address": f"unix:{tmp_path}/none"} if wrong == "address" else {}
    command = ["generate", given["model"], "hello", "--mode", given["mode"], "--address", given["address"]]
    done = subprocess.run([sys.executable, "-c", QUICK, *command], capture_output=True, text=True, check=False)
    named = {"mode": "mode 'fast' is not known", "model": "'none'", "address": "no weightd at"}
    assert done.returncode in (1, 2)
    assert named[wrong] in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("given", "prompt"),
    [
        (["m", "hello", "--seed", "1"], "hello"),
        (["m", "--seed", "1", "hello"], "hello"),
        (["--seed", "1", "m", "hello"], "hello"),
        (["m", "--seed", "1", "-"], "-"),
        (["m", "--seed", "1", "--", "-5 degrees"], "-5 degrees"),
        (["m", "--seed", "1"], None),
    ],
)
def test_a_prompt_may_stand_behind_flags(given: list[str], prompt: str | None) -> None:
    options = cli._parsed(["generate", *given])
    assert (options.model, options.prompt, options.seed) == ("m", prompt, 1)


@pytest.mark.parametrize("given", [["m", "a", "b"], ["m", "a", "--", "b"], ["m", "--seed", "1", "a", "b"]])
def test_what_is_too_much_is_refused(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", *given]) == 2
    assert "unrecognized arguments" in capsys.readouterr().err


def test_own_warnings_are_one_line_with_flags(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def warn(_: object) -> int:
        warnings.warn_explicit("dram='1' has no effect: leave dram= out", UserWarning, cli.__file__, 1)
        warnings.warn_explicit("of another", UserWarning, "/elsewhere.py", 7)
        return 0

    monkeypatch.setattr("flashclient.commands.generate._run", warn)
    with pytest.warns(UserWarning, match="of another") as others:
        assert cli.main(["generate", "m", "Hi"]) == 0
    assert len(others) == 1
    assert capsys.readouterr().err == "flashclient: --dram '1' has no effect: leave --dram out\n"
