"""The client of one row of the paper's tables: it decodes forced tokens and measures the cost of each.

bench_paper runs it as a process: `paper/client.py '{"address": ..., ...}'` (the fields of Task) prints one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import flashclient  # before torch, so that torch's idle threads do not spin
from flashclient.daemon.channel import Connection

# isort: split
import torch
from benchmarks.forced_tokens import ForcedTokens, random_ids
from benchmarks.processes import print_json, pss_bytes
from benchmarks.uncached_pass import read_uncached

from paper.firing import InputTap, compare

TIMEOUT_S = 600.0
COUNTED = ("reads", "read_bytes", "reading_s", "hits", "misses", "prefetched", "prefetched_used")


@dataclass(frozen=True)
class Task:
    """The work of the client. `again_from_flash` is a file that is read again for every token."""

    address: str
    model: str
    daemon_pid: int
    prompt_tokens: int
    new_tokens: int
    seed: int
    options: dict[str, Any] = field(default_factory=dict)  # of FlashClient
    again_from_flash: str | None = None
    checkpoint: str | None = None  # of a planted model: whether its neurons fire as planned is checked


class Probe:
    """Counters of the daemon and of the client between two tokens."""

    def __init__(self, task: Task, client: flashclient.FlashClient, again: AgainFromFlash) -> None:
        self._task, self._client, self._again = task, client, again
        self._connection = Connection(task.address, TIMEOUT_S)
        self.costs: list[dict[str, float]] = []
        self._last = self._counters()

    def between(self) -> None:
        """After each token, while its clock stands still."""
        now = self._counters()
        self.costs.append({name: now[name] - self._last[name] for name in now})
        self._last = now

    def _counters(self) -> dict[str, float]:
        stats = self._connection.stats()
        (model,) = [one for one in stats.models if one.name == self._task.model]
        counted = {name: float(getattr(model, name)) for name in COUNTED}
        counted |= {"again_s": self._again.seconds, "again_bytes": self._again.read_bytes}
        return counted | clock_seconds(self._client)

    def dram(self) -> dict[str, int]:
        """What weightd uses of --dram, in bytes."""
        stats = self._connection.stats()
        return {name: getattr(stats, f"dram_{name}_bytes") for name in ("pool", "resident", "tables")}

    def close(self) -> None:
        self._connection.close()


def clock_seconds(client: flashclient.FlashClient) -> dict[str, float]:
    """The time spent in each part of the forward passes so far; stats() covers whole generations only."""
    return asdict(client.clock)


class AgainFromFlash:
    """For "naive": reads the weights that the daemon keeps in memory again before each token, as if it did not."""

    def __init__(self, path: str | None) -> None:
        self._path = None if path is None else Path(path)
        self.seconds, self.read_bytes = 0.0, 0

    def __call__(self, *_: Any) -> None:
        """As a forward pre-hook of the model."""
        if self._path is not None:
            begin = time.perf_counter()
            self.read_bytes += read_uncached(self._path)
            self.seconds += time.perf_counter() - begin


def run(task: Task) -> dict[str, Any]:
    """The cost of every token. The first is the prompt's."""
    with flashclient.FlashClient(task.model, address=task.address, timeout_s=TIMEOUT_S, **task.options) as client:
        vocabulary = client.model.config.vocab_size
        prompt = torch.tensor([random_ids(vocabulary, task.prompt_tokens, task.seed)])
        tap = None if task.checkpoint is None else InputTap(client)
        again = AgainFromFlash(task.again_from_flash)
        probe = Probe(task, client, again)
        client.model.register_forward_pre_hook(again, prepend=True)  # before the clock of the pass starts
        forced = ForcedTokens(random_ids(vocabulary, task.new_tokens, task.seed + 1), probe.between)
        forced.start()
        client.generate(prompt, max_new_tokens=task.new_tokens, do_sample=False, logits_processor=[forced])
        told: dict[str, Any] = {"stats": client.stats().as_dict(), "memory": memory_of(task.daemon_pid)}
        told["dram"] = probe.dram()
        probe.close()
    if tap is not None and task.checkpoint is not None:
        told["firing"] = compare(Path(task.checkpoint), tap.inputs())
    told["tokens"] = [cost | {"seconds": seconds} for cost, seconds in zip(probe.costs, forced.seconds, strict=True)]
    return told


def memory_of(daemon_pid: int) -> dict[str, int]:
    """The sum of the proportional shares of both processes: a page that both of them map counts half for each."""
    return {"client_bytes": pss_bytes("self"), "daemon_bytes": pss_bytes(str(daemon_pid))}


def main() -> int:
    return print_json(lambda: run(Task(**json.loads(sys.argv[1]))), "paper_client")


if __name__ == "__main__":
    sys.exit(main())
