#!/usr/bin/env -S bash -c 'PATH="$(realpath "${0%/*}/..")/.venv/bin:$PATH" exec python3 "$0" "$@"'
"""Interrupts a client at random moments, as Ctrl-C does, also while weightd is killed and starts again.

A third of the interrupts hit a client that attaches, the others one that generates. After each, the client that goes on
must give the tokens of an undisturbed one. An interrupt must arrive within seconds, and no descriptors may be left.
"""

from __future__ import annotations

import argparse
import gc
import signal
import sys
import time
from collections import Counter
from collections.abc import Set
from pathlib import Path
from random import Random
from statistics import median
from tempfile import TemporaryDirectory
from threading import Timer
from types import FrameType
from typing import Any

import flashclient  # isort: skip  # before torch, so that torch's idle threads do not spin
import torch
from benchmarks.report import Target, machine_facts, report
from flags import FlagParser
from soak import ATTACHING_ERRORS, PROMPTS, TOKENS, WINDOW, free_port
from soaking.daemons import MortalWeightd
from soaking.store import SHAPES, make_store

ATTACH_SHARE = 1 / 3
KILL_SHARE = 0.1  # of the interrupts, with --kills
AWAY_S = 0.6  # weightd, at most
KILLED_SPAN_S = 4.0  # an interrupt comes within this time after weightd was killed
SPAN = 1.3  # of the time of what is interrupted: some interrupts come after its end
TIMEOUT_S = 60.0  # of the clients, longer than weightd is ever away
LATE_S = 10.0
SPARE_DESCRIPTORS = 6  # gRPC's own come and go; what leaks, leaks with every interrupt
LOCAL_POOL_BYTES = 8 << 20


class InterruptFuzz:
    """One run. `wrong` has a line for each thing that was wrong."""

    def __init__(self, daemon: MortalWeightd, options: argparse.Namespace) -> None:
        self._daemon, self._kills, self._chance = daemon, options.kills, Random(options.seed)
        pool = {"pool_bytes": LOCAL_POOL_BYTES} if options.transport == "grpc" else {}
        asked = {"mode": options.mode, "transport": options.transport, "window": WINDOW, "timeout_s": TIMEOUT_S}
        self._client_of: dict[str, Any] = {"model": options.model, "address": daemon.address, **asked, **pool}
        self._due_s = 0.0
        self.wrong: list[str] = []
        self.counts: Counter[str] = Counter()
        self.latest_s = 0.0
        self.descriptors_left = 0

    def run(self, seconds: float) -> None:
        signal.signal(signal.SIGALRM, self._interrupt)
        with flashclient.FlashClient(**self._client_of) as client:
            client.model.generation_config.eos_token_id = None
            expected = [_generate(client, prompt) for prompt in PROMPTS]
            generating_s = median(_seconds(lambda: _generate(client, PROMPTS[0])) for _ in range(3))
            attaching_s = median(_seconds(self._attach) for _ in range(3))
            descriptors = _descriptors()
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                number = self._chance.randrange(len(PROMPTS))
                if self._chance.random() < ATTACH_SHARE:
                    self._disturbed(attaching_s, self._attach, ATTACHING_ERRORS)
                else:
                    self._disturbed(generating_s, lambda number=number: _generate(client, PROMPTS[number]))
                number = self._chance.randrange(len(PROMPTS))
                self._check(client, number, expected[number])
            gc.collect()
            self.descriptors_left = max(0, _descriptors() - descriptors)

    def _disturbed(self, takes_s: float, act: Any, without_weightd: Set[str] = frozenset()) -> None:
        """Does it, with an interrupt at a random moment, which may come too late for it.

        Args:
            without_weightd: errors that it may raise if weightd is killed.
        """
        span_s = SPAN * takes_s
        allowed: Set[str] = frozenset()
        if self._kills and self._chance.random() < KILL_SHARE:
            self._daemon.kill()
            Timer(self._chance.uniform(0, AWAY_S), self._daemon.start_again).start()
            self.counts["kills"] += 1
            span_s, allowed = KILLED_SPAN_S, without_weightd
        delay_s = max(1e-5, self._chance.uniform(0, span_s))
        self._due_s = time.monotonic() + delay_s
        try:
            signal.setitimer(signal.ITIMER_REAL, delay_s)
            act()
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.counts["undisturbed"] += 1
        except KeyboardInterrupt:
            self.counts["interrupts"] += 1
            self.latest_s = max(self.latest_s, time.monotonic() - self._due_s)
        except Exception as error:
            signal.setitimer(signal.ITIMER_REAL, 0)
            if type(error).__name__ not in allowed:
                self.wrong.append(f"an interrupt after {delay_s:.4f} s became {type(error).__name__}: {error}")

    def _check(self, client: flashclient.FlashClient, number: int, expected: Any) -> None:
        try:
            got = _generate(client, PROMPTS[number])
        except Exception as error:
            self.wrong.append(f"after an interrupt: {type(error).__name__}: {error}")
            return
        self.counts["checked"] += 1
        if got != expected:
            self.wrong.append(f"prompt {number} gave {got}, and undisturbed {expected}")

    def _attach(self) -> None:
        with flashclient.FlashClient(**self._client_of):
            pass

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt


def _generate(client: flashclient.FlashClient, prompt: list[int]) -> Any:
    return client.generate(prompt, max_new_tokens=TOKENS, do_sample=False)


def _seconds(act: Any) -> float:
    begin = time.monotonic()
    act()
    return time.monotonic() - begin


def _descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def main() -> int:
    options = _options()
    torch.set_num_threads(1)
    with TemporaryDirectory(prefix="interrupts-", dir=options.folder) as folder:
        daemon = MortalWeightd(make_store(Path(folder)), Path(folder), free_port())
        try:
            fuzz = InterruptFuzz(daemon, options)
            fuzz.run(options.seconds)
        finally:
            daemon.stop()
        facts = machine_facts(Path(folder))
    for line in fuzz.wrong[:20]:
        print(f"fuzz_interrupts: {line}", file=sys.stderr)
    targets = [
        Target("wrong", len(fuzz.wrong), "", 0, "lower"),
        Target("latest_interrupt", fuzz.latest_s, "s", LATE_S, "lower"),
        Target("descriptors_left", fuzz.descriptors_left, "", SPARE_DESCRIPTORS, "lower"),
    ]
    row = {name: getattr(options, name) for name in ("model", "mode", "transport", "seed")}
    report(
        facts, [row | {name: fuzz.counts[name] for name in ("interrupts", "kills", "checked")}], targets, options.json
    )
    return 0 if all(target.met for target in targets) else 1


def _options() -> argparse.Namespace:
    parser = FlagParser(__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", choices=SHAPES, default="opt")
    parser.add_argument("--mode", choices=("exact", "predict"), default="predict")
    parser.add_argument("--transport", choices=("shm", "grpc"), default="shm")
    parser.add_argument("--kills", action="store_true", help="also kill weightd, and start it again")
    parser.add_argument("--folder", type=Path, help="for the store (default: that of temporary files)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
