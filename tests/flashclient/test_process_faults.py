"""Clients that are killed, frozen and forked: their leases come back, and no other client gets another token."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_checkpoint
from daemon import Daemon, serving
from predictors import lossy, publish_predictors
from soaking.clients import ClientProcesses, Event

from weightd import cli
from weightd.serving.served_models import demand_of
from weightd.store.store import Store
from weightd_proto import weightd_pb2

PROMPTS = [[5, 17, 200, 31, 8], [290, 3, 77], [99, 12, 13, 14, 15, 16, 17, 18]]
WITHIN_S = 60.0  # time for events that take a moment on an idle machine
FORKED = """
import os, sys
from flashclient import FlashClient
from flashclient.errors import ForkedError
client = FlashClient("tiny", address=sys.argv[1])
client.generate([5, 6, 7], max_new_tokens=2)
pid = os.fork()
if pid == 0:
    refused = []
    chunks = client.loaded.source.chunks(0)
    for use in (lambda: client.generate([5]), client.loaded.source.require_open, lambda: next(chunks)):
        try:
            use()
        except ForkedError as error:
            refused.append(str(error))
    print(len(refused), flush=True)
    sys.stdin.read()
    os._exit(0)
client.generate([5, 6, 7], max_new_tokens=2)
print(pid, flush=True)
os.waitpid(pid, 0)
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    make_checkpoint("opt", folder / "tensors", layers=3, hidden=128, neurons=2816)
    assert cli.main(["import", str(folder / "tensors"), "--store", str(folder / "store"), "--name", "tiny"]) == 0
    with serving(folder / "store") as daemon:
        publish_predictors(daemon.address, "tiny", lossy)
    return folder / "store"


@pytest.fixture(scope="module")
def clients() -> Iterator[ClientProcesses]:
    with ClientProcesses() as processes:
        yield processes


@pytest.fixture
def daemon(store: Path, request: pytest.FixtureRequest) -> Iterator[Daemon]:
    """A daemon whose pool holds a third of the FFNs, or the share that the test gives."""
    share = getattr(request, "param", 1 / 3)
    model = Store.open(store, readonly=True).model("tiny")
    dram_bytes = demand_of(model).minimum_bytes + int(model.bundles_file_bytes * share)
    with serving(store, "--dram", str(dram_bytes)) as daemon:
        yield daemon


def start(clients: ClientProcesses, daemon: Daemon, index: int, **what: Any) -> None:
    clients.start(index, address=daemon.address, model="tiny", prompts=PROMPTS, **what)


def wait_for(clients: ClientProcesses, wanted: Callable[[Event], bool]) -> list[Event]:
    """All events up to the wanted one; none of them may be an error."""
    seen: list[Event] = []
    while not seen or not wanted(seen[-1]):
        event = clients.next_event(WITHIN_S)
        assert event is not None, f"nothing for {WITHIN_S} s after {seen[-1:]}"
        assert event["event"] != "error", event
        seen.append(event)
    return seen


def expected(clients: ClientProcesses, daemon: Daemon, mode: str) -> list[list[int]]:
    """The tokens of each prompt, made by a client that uses the daemon alone."""
    start(clients, daemon, 99, mode=mode, generations=len(PROMPTS))
    seen = wait_for(clients, lambda event: event["event"] == "ended")
    return [event["tokens"] for event in seen if event["event"] == "tokens"]


def assert_same(events: list[Event], tokens: list[list[int]]) -> None:
    for event in events:
        if event["event"] == "tokens":
            assert event["tokens"] == tokens[event["prompt"]], event


def stats(daemon: Daemon) -> weightd_pb2.StatsResponse:
    answer: weightd_pb2.StatsResponse = daemon.stub.Stats(weightd_pb2.StatsRequest())
    return answer


def seconds_until(condition: Callable[[], bool]) -> float:
    began_s = time.monotonic()
    while not condition():
        assert time.monotonic() - began_s < WITHIN_S
    return time.monotonic() - began_s


def test_leases_of_a_killed_client_are_back_within_a_second(clients: ClientProcesses, daemon: Daemon) -> None:
    """A client is killed at several moments of a generation. The other client's tokens stay the same."""
    tokens = expected(clients, daemon, "predict")
    chance = random.Random(0)
    start(clients, daemon, 0, mode="predict")
    wait_for(clients, lambda event: event["event"] == "tokens")
    for attempt in range(6):
        start(clients, daemon, 1, mode=chance.choice(["exact", "predict"]))
        seen = wait_for(clients, lambda event: event["client"] == 1 and event["event"] == "ready")
        pid = seen[-1]["pid"]
        give_up_s = time.monotonic() + chance.uniform(0.0, 0.3)
        while (left_s := give_up_s - time.monotonic()) > 0:
            event = clients.next_event(left_s)
            seen += [] if event is None else [event]
        os.kill(pid, signal.SIGKILL)
        assert seconds_until(lambda: stats(daemon).sessions == 1) < 1.0, f"attempt {attempt}"
        assert_same([event for event in seen if event["client"] == 0], tokens)
        assert wait_for(clients, lambda event: event["event"] == "ended")[-1]["status"] == -signal.SIGKILL
        assert_same(wait_for(clients, lambda event: event["client"] == 0), tokens)
        pid = wait_for(clients, lambda event: event["client"] == 0)[-1]["pid"]
    os.kill(pid, signal.SIGTERM)
    wait_for(clients, lambda event: event["event"] == "ended")
    assert stats(daemon).models[0].slots_leased == 0


@pytest.mark.parametrize("mode", ["exact", "predict"])
def test_a_frozen_client_keeps_nobody_and_goes_on_afterwards(
    clients: ClientProcesses, daemon: Daemon, mode: str
) -> None:
    """After a while weightd takes back the leases of a frozen client. When the client runs again, it attaches again."""
    tokens = expected(clients, daemon, mode)
    start(clients, daemon, 0, mode=mode, window=64)
    frozen = wait_for(clients, lambda event: event["event"] == "tokens")[-1]["pid"]
    seconds_until(lambda: stats(daemon).models[0].slots_leased > 2)
    os.kill(frozen, signal.SIGSTOP)
    for other in (1, 2, 3):
        start(clients, daemon, other, mode=mode, window=64, generations=4)
    for _ in (1, 2, 3):
        seen = wait_for(clients, lambda event: event["event"] == "ended")
        assert seen[-1]["client"] in (1, 2, 3)
        assert_same(seen, tokens)
    os.kill(frozen, signal.SIGCONT)
    for _ in range(4):
        assert_same(wait_for(clients, lambda event: event["event"] == "tokens"), tokens)
    os.kill(frozen, signal.SIGTERM)
    wait_for(clients, lambda event: event["event"] == "ended")
    assert (stats(daemon).sessions, stats(daemon).models[0].slots_leased) == (0, 0)


@pytest.mark.parametrize(
    "daemon", [6.0], indirect=True
)  # the rings and shares of eight clients fit, their windows do not
def test_eight_clients_whose_windows_exceed_the_pool_with_one_frozen(clients: ClientProcesses, daemon: Daemon) -> None:
    tokens = expected(clients, daemon, "predict")
    for index in range(8):
        start(clients, daemon, index, mode="predict", window=64)
    pids: dict[int, int] = {}
    seen = []
    while len(pids) < 8:
        seen += wait_for(clients, lambda event: event["event"] == "tokens")
        pids |= {event["client"]: event["pid"] for event in seen if event["event"] == "tokens"}
    os.kill(pids[3], signal.SIGSTOP)
    done = dict.fromkeys(pids, 0)
    while any(count < 3 for index, count in done.items() if index != 3):
        seen += wait_for(clients, lambda event: event["event"] == "tokens")
        done[seen[-1]["client"]] += 1
    os.kill(pids[3], signal.SIGCONT)
    seen += wait_for(clients, lambda event: event["event"] == "tokens" and event["client"] == 3)
    for pid in pids.values():
        os.kill(pid, signal.SIGTERM)
    for _ in pids:
        seen += wait_for(clients, lambda event: event["event"] == "ended")
    assert_same(seen, tokens)
    assert stats(daemon).models[0].slots_leased == 0


def test_a_forked_child_raises_and_does_not_hide_its_parents_death(daemon: Daemon) -> None:
    command = [sys.executable, "-W", "ignore", "-c", FORKED, daemon.address]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        lines = {int(parent.stdout.readline()), int(parent.stdout.readline())}
        assert 3 in lines, "every use of the session in the child is a ForkedError"
        (child,) = lines - {3}
        assert stats(daemon).sessions == 1
        parent.kill()
        assert seconds_until(lambda: stats(daemon).sessions == 0) < 1.0
        assert Path(f"/proc/{child}").exists(), "it lives, and holds its parent's socket"
        assert stats(daemon).models[0].slots_leased == 0
