"""deploy/ray_serve.py: two replicas share a weightd and its memory; one is killed, and requests go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import openai
import pytest
from checkpoints import make_checkpoint
from daemon import Daemon, free_port, serving
from repository import ROOT

from flashclient import FlashClient
from flashclient.daemon.channel import Connection
from weightd import cli

REPLICAS = 2
STOP_S = 60.0


@contextmanager
def replicas_of(daemon: Daemon, log: Path) -> Iterator[str]:
    """The address of a Ray Serve with two replicas."""
    script = str(ROOT / "tests" / "fixtures" / "ray_cluster.py")
    command = [sys.executable, "-W", "ignore", script, "tiny", daemon.address, str(REPLICAS), str(free_port())]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "deploy"), "RAY_USAGE_STATS_ENABLED": "0"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with log.open("w") as errors, subprocess.Popen(command, env=environment, stderr=errors, **pipes) as process:  # type: ignore[call-overload]
        try:
            port = next((line.strip() for line in process.stdout if line.strip().isdecimal()), None)
            assert port is not None, log.read_text()
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.communicate(timeout=STOP_S)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed: pip install 'weightd[ray]'")
def test_a_file_without_keys_lets_nobody_in(tmp_path: Path) -> None:
    (tmp_path / "keys").touch()
    start = (
        "from ray_serve import Server, Settings; Server(Settings(model='m', address='unix:/m', api_key_file='keys'))"
    )
    command = [sys.executable, "-W", "ignore", "-c", start]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "deploy")}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.endswith("OptionError: the file of API keys keys has no key: write one a line\n")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed: pip install 'weightd[ray]'")
def test_one_of_two_replicas_is_killed(tmp_path: Path) -> None:
    checkpoint = make_checkpoint("llama", tmp_path / "tiny")
    assert cli.main(["import", str(checkpoint), "--store", str(tmp_path / "store")]) == 0
    with serving(tmp_path / "store", "--dram", "64MiB") as daemon:
        connection = Connection(daemon.address, STOP_S)
        prompts = [f"Tale {number}" for number in range(8)]
        with FlashClient("tiny", address=daemon.address) as alone:
            expected = [alone.generate(prompt, max_new_tokens=8, do_sample=False) for prompt in prompts]
            with_one = connection.stats()
        with (
            replicas_of(daemon, tmp_path / "log") as address,
            openai.OpenAI(base_url=address, api_key="none", max_retries=4) as asking,
            ThreadPoolExecutor(len(prompts)) as threads,
        ):

            def ask(prompt: str) -> str:
                made = asking.completions.create(model="tiny", prompt=prompt, max_tokens=8, temperature=0)
                return made.choices[0].text

            assert list(threads.map(ask, prompts)) == expected
            with_two = connection.stats()
            assert len(with_two.attached) == REPLICAS
            assert with_two.dram_resident_bytes == with_one.dram_resident_bytes  # counted once
            os.kill(with_two.attached[0].pid, signal.SIGKILL)
            assert list(threads.map(ask, prompts * 2)) == expected * 2
            stream = asking.completions.create(
                model="tiny", prompt=prompts[0], max_tokens=8, temperature=0, stream=True
            )
            assert "".join(chunk.choices[0].text for chunk in stream) == expected[0]
        connection.close()
