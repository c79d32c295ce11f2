"""Each hostile client of scripts/hostile_clients.py runs, and honest clients go on."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from checkpoints import make_checkpoint
from daemon import Daemon, free_port, serving
from hostile_clients import ATTACKS, HostileClients
from soaking.daemons import charged_bytes
from soaking.hostile_frames import Target

from flashclient import FlashClient
from weightd.importing.convert import import_checkpoint
from weightd.store.store import Store

DRAM_BYTES = 64 << 20
BESIDE_DRAM_BYTES = 150 << 20
PROMPT = [5, 17, 200, 31, 8]
ATTACK_S = 1.0  # beside each, at least
TIMEOUT_S = 30.0


@dataclass
class Attacked:
    daemon: Daemon
    target: Target
    client: FlashClient  # that was there before
    tokens: list[int]


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    folder = tmp_path_factory.mktemp("hostile")
    checkpoint = make_checkpoint("llama", folder / "llama")
    with Store.open(folder / "store", create=True) as store:
        import_checkpoint(checkpoint, store, "llama")
    with tempfile.TemporaryDirectory() as sockets:
        Path(sockets).chmod(0o711)  # pytest's folders are for one user
        address, port = f"unix:{sockets}/s", free_port()
        flags = ("--dram", str(DRAM_BYTES), "--listen", f"127.0.0.1:{port}")
        with (
            serving(folder / "store", *flags, address=address) as daemon,
            FlashClient("llama", address=address, timeout_s=TIMEOUT_S) as client,
        ):
            tokens = client.generate(PROMPT, max_new_tokens=4, do_sample=False)
            yield Attacked(daemon, Target(f"{sockets}/s", port, "llama"), client, tokens)


def honest_work(attacked: Attacked) -> None:
    """Generates with a client that was attached before, and with one that attaches now."""
    assert attacked.client.generate(PROMPT, max_new_tokens=4, do_sample=False) == attacked.tokens
    with FlashClient("llama", address=attacked.daemon.address, timeout_s=TIMEOUT_S) as client:
        assert client.generate(PROMPT, max_new_tokens=4, do_sample=False) == attacked.tokens


def attack(attacked: Attacked, names: list[str], rounds: int) -> None:
    with HostileClients(attacked.target, names):
        until_s = time.monotonic() + ATTACK_S * rounds
        while time.monotonic() < until_s:
            honest_work(attacked)
            assert charged_bytes(attacked.daemon.process.pid) <= DRAM_BYTES + BESIDE_DRAM_BYTES


@pytest.mark.timeout(300)
def test_honest_clients_go_on_beside_all_hostile_ones_at_once(attacked: Attacked) -> None:
    attack(attacked, list(ATTACKS), rounds=3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTACKS)
def test_honest_clients_go_on_beside(attacked: Attacked, name: str) -> None:
    attack(attacked, [name], rounds=1)


def test_they_are_another_users_where_they_can_be(attacked: Attacked) -> None:
    with HostileClients(attacked.target, ["idle_connections"]) as hostile:
        parent = hostile.pid
        (child,) = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        while (user := Path(f"/proc/{child}").stat().st_uid) == os.geteuid() == 0:
            time.sleep(0.01)
        assert user == (1600 if os.geteuid() == 0 else os.geteuid())
