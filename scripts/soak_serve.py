#!/usr/bin/env -S bash -c 'PATH="$(realpath "${0%/*}/..")/.venv/bin:$PATH" exec python3 "$0" "$@"'
"""Many clients of `flashclient serve` at once: each answer must be that of its quiet run, and nothing may be left.

First each question is asked alone. Then clients ask them at random, as streams or not; some leave in the middle, some
send what is broken, and more ask than may wait, so that many are refused with status 429. At the end nothing may run or
wait, the server holds as many descriptors as before, its memory has not grown since the first third, and it stops in
order.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flashclient  # isort: skip  # noqa: F401 - before torch, so that torch's idle threads do not spin
import httpx2 as httpx  # of the openai package
from benchmarks.forced_tokens import random_ids
from benchmarks.openai_server import served
from benchmarks.processes import BenchError, pss_bytes, serving
from benchmarks.report import Target, machine_facts, report
from flags import FlagParser
from planted.store import cut, dense_store

SEED = 23
QUESTIONS = 24
TOKENS_MAX = 24
LEAVING = 0.25  # share of streams whose client leaves
BROKEN = 0.03  # share of requests that are refused
LEAVING_MIN = 100
GROWTH_MIB_MAX = 64.0
SAMPLE_S = 1.0
WARM_SHARE = 1 / 3
QUIET_S = 60.0  # for what was left behind to end
JSON = {"Content-Type": "application/json"}
WAITING_SHARE = 0.16  # of the clients may wait: others are refused, because 16 requests run at once
BROKEN_BODIES = (b"{", b"[]", b'{"model": 5}', b'{"model": "nobody", "prompt": "a"}', b"\xff\xfe", b" " * (9 << 20))


@dataclass
class Seen:
    """What clients have seen."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)  # seconds, MiB of the server


@dataclass(frozen=True)
class Server:
    """The server under test, and what each question is answered with when it is alone."""

    http: httpx.AsyncClient
    bodies: list[dict[str, Any]]
    quiet: list[str]


def main() -> int:
    options = _options()
    try:
        seen, seconds, left = run(options)
    except (BenchError, OSError, httpx.HTTPError) as error:
        print(f"soak_serve: {error}", file=sys.stderr)
        return 1
    for fault in seen.faults[:20]:
        print(f"soak_serve: {fault}", file=sys.stderr)
    memory = [size for at, size in seen.memory if at > seconds * WARM_SHARE]
    counts = {name: seen.counts[name] for name in ("answers", "left", "refused", "broken")}
    row = {"clients": options.clients, "seconds": seconds, **counts, "server_mib": max(memory, default=0.0)}
    targets = [
        Target("faults", len(seen.faults), "", 0, "lower"),
        Target("left_in_the_middle", seen.counts["left"], "", LEAVING_MIN, "higher"),
        Target("left_behind", left, "", 0, "lower"),
        Target("growth", memory[-1] - memory[0] if memory else 0.0, "MiB", GROWTH_MIB_MAX, "lower"),
    ]
    report(machine_facts(options.folder), [row], targets, options.json)
    return 0 if all(target.met for target in targets) else 1


def run(options: argparse.Namespace) -> tuple[Seen, float, int]:
    """What was seen, for how long, and how many requests and descriptors were left behind."""
    dense = dense_store(options.shape, options.folder, options.layers)
    vocabulary = cut(options.shape, options.layers)[0].vocabulary
    waiting = round(options.clients * WAITING_SHARE)
    flags = ("--waiting", str(waiting), "--cache-tokens", "8192", "--kept-tokens", "2048")
    with (
        serving(dense.store, max(round(dense.model_bytes * options.memory), dense.least_bytes)) as daemon,
        served(dense.name, daemon, *flags) as (address, pid),
    ):
        return asyncio.run(_soaked(options, address, pid, _bodies(dense.name, vocabulary)))


def _bodies(name: str, vocabulary: int) -> list[dict[str, Any]]:
    """Questions of many lengths; some begin alike, some are sampled."""
    chance, shared = random.Random(SEED), random_ids(vocabulary, 200, SEED)
    bodies = []
    for number in range(QUESTIONS):
        own = random_ids(vocabulary, chance.choice((1, 5, 40, 200)), SEED + 1 + number)
        sampled = {"temperature": 1.0, "seed": number} if number % 3 == 0 else {"temperature": 0.0}
        prompt = shared[: chance.choice((0, 100, 200))] + own
        bodies.append({"model": name, "prompt": prompt, "max_tokens": chance.randint(1, TOKENS_MAX), **sampled})
    return bodies


async def _soaked(
    options: argparse.Namespace, address: str, pid: int, bodies: list[dict[str, Any]]
) -> tuple[Seen, float, int]:
    limits = httpx.Limits(max_connections=options.clients + 8, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=address, timeout=600, limits=limits) as http:
        quiet = [(await http.post("/completions", json=body)).json()["choices"][0]["text"] for body in bodies]
        descriptors = _descriptors(pid)
        seen, begin = Seen(), time.monotonic()
        server, until = Server(http, bodies, quiet), begin + 60 * options.minutes
        clients = [_client(server, seen, random.Random(SEED + index), until) for index in range(options.clients)]
        watching = asyncio.ensure_future(_watch(pid, seen, begin))
        await asyncio.gather(*clients)
        watching.cancel()
        seconds = time.monotonic() - begin
        left = await _left_behind(http, address, pid, descriptors)
    return seen, seconds, left


async def _client(server: Server, seen: Seen, chance: random.Random, until: float) -> None:
    while time.monotonic() < until:
        number = chance.randrange(len(server.bodies))
        try:
            if chance.random() < BROKEN:
                await _send_broken(server, seen, chance)
            elif chance.random() < 0.5:
                await _ask(server, seen, number)
            else:
                await _stream(server, seen, number, leaves=chance.random() < 2 * LEAVING)
        except httpx.HTTPError as error:
            seen.faults.append(f"question {number}: {type(error).__name__}: {error}")


async def _send_broken(server: Server, seen: Seen, chance: random.Random) -> None:
    answer = await server.http.post("/completions", content=chance.choice(BROKEN_BODIES), headers=JSON)
    seen.counts["broken"] += 1
    if not 400 <= answer.status_code < 500 or "message" not in answer.json()["error"]:
        seen.faults.append(f"a broken body got status {answer.status_code}: {answer.text[:200]}")


async def _ask(server: Server, seen: Seen, number: int) -> None:
    answer = await server.http.post("/completions", json=server.bodies[number])
    if await _refused(answer, seen):
        return
    text = answer.json()["choices"][0]["text"] if answer.status_code == 200 else f"status {answer.status_code}"
    _compare(seen, number, text, server.quiet[number])


async def _stream(server: Server, seen: Seen, number: int, leaves: bool) -> None:
    text = ""
    async with server.http.stream("POST", "/completions", json=server.bodies[number] | {"stream": True}) as answer:
        if await _refused(answer, seen):
            return
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                text += httpx.Response(200, content=line[6:]).json()["choices"][0]["text"]
                if leaves:
                    seen.counts["left"] += 1
                    _compare(seen, number, text, server.quiet[number][: len(text)])
                    return
    _compare(seen, number, text, server.quiet[number])


async def _refused(answer: httpx.Response, seen: Seen) -> bool:
    """Whether too many waited. Then waits as long as it is told to."""
    if answer.status_code != 429:
        return False
    seen.counts["refused"] += 1
    await asyncio.sleep(float(answer.headers["retry-after"]))
    return True


def _compare(seen: Seen, number: int, text: str, expected: str) -> None:
    seen.counts["answers"] += 1
    if text != expected:
        seen.faults.append(f"question {number} was answered with {text!r}, and alone with {expected!r}")


async def _watch(pid: int, seen: Seen, begin: float) -> None:
    while True:
        seen.memory.append((time.monotonic() - begin, pss_bytes(str(pid)) / 2**20))
        await asyncio.sleep(SAMPLE_S)


async def _left_behind(http: httpx.AsyncClient, address: str, pid: int, descriptors: int) -> int:
    """Requests that run or wait, and descriptors above those before, when all clients have gone."""
    end = time.monotonic() + QUIET_S
    while True:
        metrics = (await http.get(address.removesuffix("/v1") + "/metrics")).text
        names = ("flashclient_running{", "flashclient_waiting{")
        busy = sum(float(line.split()[-1]) for line in metrics.splitlines() if line.startswith(names))
        left = int(busy) + max(0, _descriptors(pid) - descriptors)
        if left == 0 or time.monotonic() > end:
            return left
        await asyncio.sleep(SAMPLE_S)


def _descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def _options() -> argparse.Namespace:
    parser = FlagParser(__doc__)
    parser.add_argument("--shape", default="llama-1.3b", help="of a dense model with random weights")
    parser.add_argument("--layers", type=int, default=1, help="of the model")
    parser.add_argument("--folder", type=Path, default=Path("build/bench"), help="for the files, which are kept")
    parser.add_argument("--memory", type=float, default=0.7, help="share of the model's bytes (default: 0.7)")
    parser.add_argument("--clients", type=int, default=200, help="at once")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
