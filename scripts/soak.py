#!/usr/bin/env -S bash -c 'PATH="$(realpath "${0%/*}/..")/.venv/bin:$PATH" exec python3 "$0" "$@"'
"""A soak test: eight clients of one weightd, while clients and weightd are killed and frozen and bundles are corrupted.

    scripts/soak.py --minutes 10 [--clients 8] [--seed N] [--folder DIR] [--no-hostile] [--json]

The clients cover two models, exact and predict mode, shared memory and gRPC. Each generation must give the tokens of an
undisturbed client, or the error that names the bundle that is corrupt at that moment. A client that has attached must
keep running when weightd is killed, and a client may be silent only while it is frozen. At the end there must be no
leases, sessions, descriptors or threads left. weightd's memory must stay within --dram plus a bound for its
interpreter, and the memory of the one client that is never killed must not grow. The exit status is 1 if anything is
wrong.

All hostile clients (hostile_clients.py) run at the same time, as another user if this script runs as root. Afterwards,
honest clients run in turns with and without hostile ones, and nothing is killed: the 99th percentile of a token's time
may at most double.
"""

from __future__ import annotations

import heapq
import json
import os
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from random import Random
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from flags import FlagParser
from hostile_clients import HostileClients
from soaking.clients import SILENT_S, ClientProcesses, Event, Silences, holdings, send_signal
from soaking.comparison import SETTLE_S, TURNS, Comparison
from soaking.daemons import LOOPBACK, MortalWeightd, charged_bytes
from soaking.store import Corruption, corrupt, make_store

from flashclient.daemon.channel import Connection
from weightd.machine.budget import INTERPRETER_BYTES
from weightd.serving.call_bounds import FETCHES_MAX
from weightd.serving.control_plane import WORKERS_MAX

KINDS = [
    ("opt", "exact", "shm"), ("opt", "predict", "shm"), ("llama", "exact", "shm"), ("llama", "predict", "shm"),
    ("opt", "exact", "grpc"), ("opt", "predict", "grpc"),
]  # fmt: skip
WITNESS_KINDS = KINDS[:4]
COMPARED = [
    ("opt", "exact", "shm"),
    ("llama", "predict", "shm"),
]  # few enough to leave a processor to the hostile clients
TURN_SHARE = 0.1  # of the time, for each of four turns
TURN_S_MIN = 10.0  # two such turns have twice the tokens that a 99th percentile needs
TURN_LONGER_MAX = 3  # times as much, where a slow machine has too few tokens yet
PROMPTS = [[5, 17, 200, 31, 8], [290, 3, 77], [99, 12, 13, 14, 15, 16, 17, 18]]
TOKENS = 8
WINDOW = 16
TIMEOUT_S = 120.0  # of the clients; longer than weightd is ever down, so that every loss must be retried
LOCAL_POOL_BYTES = 8 << 20
PAUSE_S = (0.2, 1.2)  # between two events
FROZEN_S = (0.3, 8.0)  # weightd closes a session that has kept others waiting for 5 s
AWAY_S = (0.0, 1.5)
CORRUPT_S = (1.0, 5.0)
QUIET_WITHIN_S = 120.0
CLOSED_WITHIN_S = 30.0  # connections of hostile clients that were killed; those on which nothing is read end by time
WITNESS = 0  # the client that is never killed
GROWTH_MAX = 1.1  # of memory, from the second quarter of the time to the last
GROWTH_SPARE_BYTES = 16 << 20
SPARE_DESCRIPTORS = SPARE_THREADS = 6  # gRPC's own come and go; what leaks, leaks with every event
ATTACHING_ERRORS = {"NoDaemonError", "DaemonLostError", "SessionLostError", "BusyError"}  # while weightd is away


class Soak:
    """One run. `wrong` has a line for each thing that was wrong."""

    def __init__(self, folder: Path, clients: int, seed: int, processes: ClientProcesses) -> None:
        self.chance = Random(seed)
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._store = make_store(folder)
        self.daemon = MortalWeightd(self._store, folder, free_port())
        self.comparison = Comparison()
        self._clients = clients
        self._processes = processes
        self._kinds: dict[int, tuple[str, str, str]] = {}  # of running clients
        self._silences = Silences()  # of clients that are not frozen
        self._excused: set[int] = set()  # processes that may end with a status other than 0
        self._pids: dict[int, int] = {}  # of attached clients
        self._started_s: dict[int, float] = {}
        self._frozen: set[int] = set()
        self._corruptions: list[Corruption] = []
        self._later: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._acts: list[Callable[[], None]] = []  # disturbances to come
        self.witness: list[Event] = []
        self.weightd: list[dict[str, int]] = []
        self.memory: list[int] = []  # bytes that are charged to weightd
        self._expected = self._undisturbed_tokens()
        self._warm_up()
        self.baseline = self._quiet_holdings()

    # ---- expectations ----

    def _undisturbed_tokens(self) -> dict[tuple[str, str], list[list[int]]]:
        """The expected tokens by model and mode. Both transports must give the same."""
        made: dict[tuple[str, str, str], list[list[int]]] = {kind: [] for kind in KINDS}
        for index, kind in enumerate(KINDS):
            self._start(index, kind, generations=len(PROMPTS))
        while self._kinds:
            event = self._next(QUIET_WITHIN_S)
            if event["event"] == "tokens":
                made[self._kinds[event["client"]]].append(event["tokens"])
            elif event["event"] == "ended":
                del self._kinds[event["client"]]
        tokens: dict[tuple[str, str], list[list[int]]] = {}
        for kind, its in made.items():
            if len(its) != len(PROMPTS) or tokens.setdefault(kind[:2], its) != its:
                raise RuntimeError(f"{kind}: an undisturbed client made {its}, another {tokens.get(kind[:2])}")
        return tokens

    def _warm_up(self) -> None:
        """Runs all kinds of calls at once, so that weightd has as many threads as it ever needs."""
        for index in range(self._clients):
            self._start(index, KINDS[index % len(KINDS)], generations=len(PROMPTS))
        while self._kinds:
            self._take(self._next(QUIET_WITHIN_S), replace=False)
        self.witness.clear()

    def _quiet_holdings(self) -> dict[str, int]:
        """Descriptors and threads of weightd while no client is attached."""
        connection = Connection(self.daemon.address, QUIET_WITHIN_S)
        give_up_s = time.monotonic() + QUIET_WITHIN_S
        while (left := connection.stats()).sessions or any(model.slots_leased for model in left.models):
            if time.monotonic() > give_up_s:
                leased = sum(model.slots_leased for model in left.models)
                self.wrong.append(f"{left.sessions} sessions and {leased} leased slots are left without a client")
                break
        connection.close()
        return holdings(self.daemon.pid)

    # ---- disturbances ----

    def run(self, minutes: float) -> None:
        end_s = time.monotonic() + 60 * minutes
        for index in range(self._clients):
            self._start(index, self.chance.choice(WITNESS_KINDS if index == WITNESS else KINDS))
        self._after(PAUSE_S, self._disturb)
        while time.monotonic() < end_s:
            due_s = self._later[0][0] - time.monotonic()
            if due_s <= 0:
                heapq.heappop(self._later)[2]()
            else:
                self._hear(min(due_s, 1.0), replace=True)
            if self.daemon.serves():
                self.weightd.append(holdings(self.daemon.pid))
                self.memory.append(charged_bytes(self.daemon.pid))
        self._calm_down()

    def compare(self, seconds: float) -> None:
        """Runs honest clients in four turns of `seconds`, or longer on slow machines, with and without hostile ones."""
        for index, kind in enumerate(COMPARED):
            self._start(index, kind)
        while len(self._pids) < len(COMPARED):
            self._take(self._next(QUIET_WITHIN_S), replace=False)
        for hostile in TURNS:
            with HostileClients(self.daemon.target) if hostile else nullcontext():
                self._listen(SETTLE_S)
                self.comparison.begin(hostile)
                self._listen(seconds)
                latest_s = time.monotonic() + TURN_LONGER_MAX * seconds
                while not self.comparison.has_enough(COMPARED) and time.monotonic() < latest_s:
                    self._listen(1.0)
                self.comparison.end()
        self.wrong += self.comparison.wrong(COMPARED)
        self._calm_down()

    def _listen(self, seconds: float) -> None:
        end_s = time.monotonic() + seconds
        while (left_s := end_s - time.monotonic()) > 0:
            self._hear(min(left_s, 1.0), replace=False)
            self.memory.append(charged_bytes(self.daemon.pid))

    def _after(self, seconds: tuple[float, float], act: Callable[[], None]) -> None:
        heapq.heappush(self._later, (time.monotonic() + self.chance.uniform(*seconds), next(self._order), act))

    def _disturb(self) -> None:
        """The next of shuffled disturbances, so that a short run has each of them."""
        if not self._acts:
            often = [self._kill_client, self._freeze_client]
            self._acts = 3 * often + 2 * [self._stop_client, self._corrupt] + [self._kill_daemon]
            self.chance.shuffle(self._acts)
        self._acts.pop()()
        self._after(PAUSE_S, self._disturb)

    def _victim(self, *, witness: bool) -> int | None:
        there = sorted(index for index in self._pids if index not in self._frozen and (witness or index != WITNESS))
        return self.chance.choice(there) if there else None

    def _kill_client(self) -> None:
        if (index := self._victim(witness=False)) is not None:
            self._excused.add(self._pids[index])
            send_signal(self._pids.pop(index), signal.SIGKILL)
            self.counts["clients killed"] += 1

    def _stop_client(self) -> None:
        if (index := self._victim(witness=False)) is not None:
            send_signal(self._pids.pop(index), signal.SIGTERM)
            self.counts["clients stopped"] += 1

    def _freeze_client(self) -> None:
        if (index := self._victim(witness=True)) is not None:
            send_signal(self._pids[index], signal.SIGSTOP)
            self._frozen.add(index)
            self.counts["clients frozen"] += 1
            self._after(FROZEN_S, lambda: self._thaw(index))

    def _thaw(self, index: int) -> None:
        send_signal(self._pids[index], signal.SIGCONT)
        self._frozen.discard(index)

    def _kill_daemon(self) -> None:
        if self.daemon.serves():
            self.daemon.kill()
            self.counts["weightd killed"] += 1
            self._after(AWAY_S, self.daemon.start_again)

    def _corrupt(self) -> None:
        if all(made.end_s < float("inf") for made in self._corruptions):
            made = corrupt(self._store, self.chance)
            self._corruptions.append(made)
            self.counts["bundles corrupted"] += 1
            self._after(CORRUPT_S, made.repair)

    def _calm_down(self) -> None:
        """Ends all disturbances, then tells all clients to stop."""
        while self._later:
            act = heapq.heappop(self._later)[2]
            if act != self._disturb:
                act()
        self.daemon.wait()
        for pid in self._pids.values():
            send_signal(pid, signal.SIGTERM)
        give_up_s = time.monotonic() + 2 * SILENT_S
        while self._kinds:
            if time.monotonic() > give_up_s:
                raise RuntimeError(f"still running when all was over: {self._kinds}")
            event = self._hear(1.0, replace=False)
            if event is not None and event["event"] == "ready":  # it was still attaching when the others were told
                send_signal(event["pid"], signal.SIGTERM)

    # ---- events of the clients ----

    def _start(self, index: int, kind: tuple[str, str, str], **what: Any) -> None:
        model, mode, transport = kind
        pool = {"pool_bytes": LOCAL_POOL_BYTES} if transport == "grpc" else {}
        self._kinds[index] = kind
        self._started_s[index] = time.monotonic()
        self._processes.start(
            index, address=self.daemon.address, model=model, prompts=PROMPTS, tokens=TOKENS, mode=mode, window=WINDOW,
            transport=transport, timeout_s=TIMEOUT_S, **pool, **what,
        )  # fmt: skip

    def _next(self, timeout_s: float) -> Event:
        event = self._processes.next_event(timeout_s)
        if event is None:
            for pid in self._processes.pids():
                os.kill(pid, signal.SIGUSR1)
            raise RuntimeError(f"nothing was heard for {timeout_s:g} s of {self._kinds}; their stack traces follow")
        return event

    def _hear(self, timeout_s: float, *, replace: bool) -> Event | None:
        """Handles the next event, if one arrives in time. Time in which this process was frozen counts as a second."""
        began_s = time.monotonic()
        event = self._processes.next_event(timeout_s)
        passed_s = min(time.monotonic() - began_s, 1.0)
        if event is not None:
            self._take(event, replace=replace)
        for index in self._silences.watched():
            if index not in self._frozen and self._silences.passed(index, passed_s):
                self._excused.add(self._silences.pid(index))
                self.wrong.append(
                    f"{self._kinds[index]}: nothing was heard for {SILENT_S:g} s; its stack trace follows"
                )
        return event

    def _take(self, event: Event, *, replace: bool) -> None:
        index = event["client"]
        self._silences.heard(index)
        match event["event"]:
            case "started":
                self._silences.begin(index, event["pid"])
            case "ready":
                self._pids[index] = event["pid"]
                self.counts["clients attached"] += 1
            case "tokens":
                self._take_tokens(index, event)
            case "corruption":
                self._take_corruption(index, event)
            case "error":
                self._excused.add(event["pid"])
                self._take_error(index, event)
            case "ended":
                self._take_end(index, event)
                self._pids.pop(index, None)
                self._silences.end(index)
                kind = self._kinds.pop(index)
                if replace:
                    self._start(index, kind if index == WITNESS else self.chance.choice(KINDS))

    def _take_tokens(self, index: int, event: Event) -> None:
        self.counts["generations"] += 1
        kind = self._kinds[index]
        if event["tokens"] != self._expected[kind[:2]][event["prompt"]]:
            self.wrong.append(f"wrong tokens from {kind}, prompt {event['prompt']}: {event['tokens']}")
        self.comparison.take(kind, event["began_s"], event["made_s"])
        if index == WITNESS:
            self.witness.append(event)

    def _take_end(self, index: int, event: Event) -> None:
        if event["status"] != 0 and event["pid"] not in self._excused:
            self.wrong.append(f"{self._kinds[index]}: a client ended with status {event['status']}")

    def _take_corruption(self, index: int, event: Event) -> None:
        self.counts["corruption errors"] += 1
        model = self._kinds[index][0]
        now_s = time.monotonic()
        if not any(made.explains(model, event["says"], event["began_s"], now_s) for made in self._corruptions):
            self.wrong.append(f"no bundle was corrupt, or another: {event['says']}")

    def _take_error(self, index: int, event: Event) -> None:
        attaching = index not in self._pids
        away = self.daemon.was_down(self._started_s[index], time.monotonic())
        if attaching and away and event["kind"] in ATTACHING_ERRORS:
            self.counts["clients that found no weightd"] += 1
        elif attaching and event["kind"] == "ShareError":
            self.counts["clients that got no share"] += 1
        else:
            self.wrong.append(f"{self._kinds[index]}: {event['kind']}: {event['says']}")

    # ---- checks at the end ----

    def look_for_leaks(self) -> dict[str, Any]:
        left, give_up_s = self._quiet_holdings(), time.monotonic() + CLOSED_WITHIN_S
        while left["descriptors"] > self.baseline["descriptors"] + SPARE_DESCRIPTORS and time.monotonic() < give_up_s:
            time.sleep(1.0)
            left = holdings(self.daemon.pid)
        clients = [{name: event[name] for name in left} for event in self.witness]
        calls = WORKERS_MAX + FETCHES_MAX + self._clients  # weightd keeps a thread for each concurrent call
        for name, spare, of_calls in (("descriptors", SPARE_DESCRIPTORS, 0), ("threads", SPARE_THREADS, calls)):
            self._bound(f"{name} of weightd without clients", left[name], self.baseline[name] + spare + of_calls)
            if clients:
                first = median(client[name] for client in clients[: len(clients) // 4 + 1])
                self._bound(f"{name} of the witness", clients[-1][name], first + spare)
        self._bound("bytes of weightd", max(sample["anonymous_bytes"] for sample in self.weightd), INTERPRETER_BYTES)
        self._bound("bytes charged to weightd", max(self.memory), self.daemon.memory_max_bytes)
        if len(clients) >= 8:
            before, after = (_middle(clients, quarter) for quarter in (1, 3))
            self._bound("bytes of the witness", after, GROWTH_MAX * before + GROWTH_SPARE_BYTES)
        return {"weightd before": self.baseline, "weightd after": left, "witness": clients[-1:]}

    def _bound(self, what: str, value: float, most: float) -> None:
        if value > most:
            self.wrong.append(f"{what}: {value:.0f}, at most {most:.0f} were expected")


def _middle(samples: list[dict[str, int]], quarter: int) -> float:
    """The median of the anonymous memory in a quarter of the time."""
    part = samples[len(samples) * quarter // 4 : len(samples) * (quarter + 1) // 4]
    return median(sample["anonymous_bytes"] for sample in part)


def free_port() -> int:
    """A port that is free."""
    with socket.socket() as free:
        free.bind((LOOPBACK, 0))
        return int(free.getsockname()[1])


def main() -> int:
    parser = FlagParser(__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0, help="of the order of disturbances")
    parser.add_argument("--folder", type=Path, help="on the device to read from; needs 300 MB")
    parser.add_argument("--no-hostile", action="store_true", help="run honest clients only")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    with TemporaryDirectory(prefix="soak-", dir=options.folder) as name, ClientProcesses() as processes:
        soak = Soak(Path(name), options.clients, options.seed, processes)
        try:
            with nullcontext() if options.no_hostile else HostileClients(soak.daemon.target):
                soak.run(options.minutes)
            if not options.no_hostile:
                soak.compare(max(TURN_S_MIN, 60 * options.minutes * TURN_SHARE))
            held = soak.look_for_leaks()
        finally:
            soak.daemon.stop()
    if options.json:
        rows, peak = soak.comparison.rows(), max(soak.memory)
        print(json.dumps({"counts": soak.counts, "held": held, "peak": peak, "compared": rows, "wrong": soak.wrong}))
    else:
        for what, number in sorted(soak.counts.items()):
            print(f"{number:8} {what}")
        for who, what in held.items():
            print(f"{who}: {what}")
        print(f"weightd took {max(soak.memory) >> 20} MiB of {soak.daemon.memory_max_bytes >> 20}")
        for row in soak.comparison.rows():
            print(row)
        for line in soak.wrong or ["nothing is wrong"]:
            print(line)
    return 1 if soak.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
