"""What has no room in memory comes back from flash: with a real server, damaged, killed, and on a full disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import openai
import pytest
import torch
from checkpoints import make_checkpoint
from daemon import Daemon, serving
from small_disk import fill, small_disk

from flashclient import FlashClient
from flashclient.batching.kept_file import PAGE_BYTES, KeptFile
from flashclient.cli import main
from weightd import cli

NAME = "tiny"
ASKED: dict[str, Any] = {"model": NAME, "temperature": 0, "max_tokens": 4}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("on-flash")
    checkpoint = make_checkpoint("llama", folder / NAME, max_position_embeddings=512)
    assert cli.main(["import", str(checkpoint), "--store", str(folder / "store")]) == 0
    with serving(folder / "store", "--dram", "64MiB") as started:
        yield started


@contextmanager
def killed_server(daemon: Daemon, *flags: str) -> Iterator[tuple[openai.OpenAI, str, int]]:
    """A client, the server's address and its process, which is killed at the end."""
    command = [sys.executable, "-P", "-m", "flashclient", "serve", NAME, "--address", daemon.address, "--port", "0"]
    with subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().rpartition(" ")[2].strip()
            with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client:
                yield client, address, process.pid
        finally:
            process.send_signal(signal.SIGKILL)


def counts(address: str) -> dict[str, float]:
    with urlopen(f"{address.removesuffix('/v1')}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    found = (line.split() for line in lines if line.startswith("flashclient_kept_") and "_created" not in line)
    return {name.partition("{")[0].removeprefix("flashclient_kept_"): float(value) for name, value in found}


def turn(client: openai.OpenAI, prompt: Sequence[int]) -> tuple[str, int]:
    """The answer, and how many tokens of the prompt were not computed."""
    made = client.completions.create(prompt=list(prompt), **ASKED)
    assert made.usage is not None
    assert made.usage.prompt_tokens_details is not None
    return made.choices[0].text, made.usage.prompt_tokens_details.cached_tokens or 0


def test_turns_after_others(daemon: Daemon, tmp_path: Path) -> None:
    said = [[number, *range(5, 95)] for number in range(5, 9)]
    later = [[*one, 7, 7] for one in said]
    flags = ("--kept-tokens", "100", "--kept-bytes", "8MiB", "--kept-folder", str(tmp_path))
    with killed_server(daemon, *flags) as (client, address, process):
        for one in said:
            turn(client, one)
        assert counts(address)["file_written_bytes_total"] == 6 * PAGE_BYTES, "a prompt and an answer"
        back = [turn(client, one) for one in later[:2]]
        assert [kept for _, kept in back] == [91, 91]
        assert counts(address)["fetched_tokens_total"] == 182
        (file,) = (one for one in Path(f"/proc/{process}/fd").iterdir() if str(tmp_path) in str(one.readlink()))
        with file.open("r+b") as opened:
            opened.write(b"\xff" * os.fstat(opened.fileno()).st_size)
        again = [turn(client, one) for one in later]
        assert [kept for _, kept in again[2:]] == [0, 0]
        assert counts(address)["file_damaged_total"] >= 2
        assert list(tmp_path.iterdir()) == []
    with FlashClient(NAME, address=daemon.address) as alone:
        greedy: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
        made = [alone.generate(torch.tensor([one]), **greedy)[0, len(one) :] for one in later]
        texts = [alone.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in made]
    assert [text for text, _ in again] == texts
    assert [text for text, _ in back] == texts[:2]


def test_a_full_disk(tmp_path: Path) -> None:
    states = [(torch.ones(2, 1000, 64), torch.zeros(2, 1000, 64))]
    with small_disk(tmp_path, 8 << 20) as disk:
        file = KeptFile(disk, 64 << 20)
        first = file.write(states)
        assert first is not None
        ballast = fill(disk)
        while file.write(states) is not None:
            assert file.used_bytes < 8 << 20
        kept = file.read(first)
        assert kept is not None
        assert torch.equal(kept[0][0], states[0][0])
        file.free(first)
        assert file.has_room(states)
        assert file.write(states) is not None, "it goes where another was"
        ballast.unlink()
        file.close()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--kept-bytes", "8X"), "'8X' is not a size such as 8GiB, 512MiB or 0"),
        (("--kept-folder", "missing"), "--kept-folder missing is not a folder: make it first"),
    ],
)
def test_refusals(capsys: pytest.CaptureFixture[str], flags: Sequence[str], message: str) -> None:
    assert main(["serve", NAME, *flags]) == 2
    assert message in capsys.readouterr().err
