#!/usr/bin/env -S bash -c 'PATH="$(realpath "${0%/*}/..")/.venv/bin:$PATH" exec python3 "$0" "$@"'
"""Measures `flashclient serve` by the official client of the interface: requests at once, and a conversation's turns.

A dense model (SwiGLU, random weights) is served in exact mode with a share of its weights in memory. Each row has so
many streams at once, each with a prompt of its own. Speed is that of decoding: tokens of all streams while all of them
decode. Rows take turns, so that a slow drift of the device affects all alike. The last row is the second turn of a long
conversation, whose prompt is kept, and the same prompt with another beginning, of which nothing is kept.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles

import flashclient  # isort: skip  # noqa: F401 - before torch, so that torch's idle threads do not spin
from benchmarks.forced_tokens import random_ids
from benchmarks.openai_server import served
from benchmarks.processes import BenchError, serving
from benchmarks.report import Row, Target, machine_facts, report
from flags import FlagParser
from openai import AsyncOpenAI
from planted.plan import SHAPES
from planted.store import cut, dense_store

DENSE_SHAPES = tuple(name for name, shape in SHAPES.items() if shape.family == "llama")
SEED = 17
TURN_TOKENS = 16  # of the second turn
TURN_TARGET = 10.0
AT_ONCE_TARGET = 8
GAIN_TARGET = 3.0


@dataclass
class Turn:
    """What streams that ran at once were told, and when. Times are those of each token, by stream."""

    started_s: float
    times: list[list[float]] = field(default_factory=list)

    @property
    def first_s(self) -> list[float]:
        return [times[0] - self.started_s for times in self.times]

    @property
    def between_s(self) -> list[float]:
        return [late - early for times in self.times for early, late in pairwise(times)]

    @property
    def tokens_per_s(self) -> float:
        """While all streams decode."""
        begin, end = max(times[0] for times in self.times), min(times[-1] for times in self.times)
        return sum(begin < at <= end for times in self.times for at in times) / (end - begin)


def main() -> int:
    options = _options()
    try:
        rows = measure(options)
    except (BenchError, OSError) as error:
        print(f"bench_serve: {error}", file=sys.stderr)
        return 1
    machine = machine_facts(options.folder) | {"shape": options.shape, "memory": options.memory}
    report(machine, rows, targets_of(rows), options.json)
    return 0


def measure(options: argparse.Namespace) -> list[Row]:
    """A row for each number of streams."""
    dense = dense_store(options.shape, options.folder, options.layers)
    vocabulary = cut(options.shape, options.layers)[0].vocabulary
    with (
        serving(dense.store, round(dense.model_bytes * options.memory)) as daemon,
        served(dense.name, daemon) as (address, _),
    ):
        turns = asyncio.run(_turns(options, address, dense.name, vocabulary))
        second = asyncio.run(_second_turns(options, address, dense.name, vocabulary)) if options.conversation else []
    return [row_of(count, of_count) for count, of_count in turns.items()] + second


async def _turns(options: argparse.Namespace, address: str, name: str, vocabulary: int) -> dict[int, list[Turn]]:
    turns: dict[int, list[Turn]] = {count: [] for count in options.at_once}
    async with AsyncOpenAI(base_url=address, api_key="none", max_retries=0, timeout=3600) as client:
        await _stream(client, name, random_ids(vocabulary, options.prompt_tokens, SEED), 2)  # fills the pool
        for number in range(options.rounds):
            for count in options.at_once if number % 2 == 0 else reversed(options.at_once):
                prompts = [random_ids(vocabulary, options.prompt_tokens, SEED + 1 + index) for index in range(count)]
                turn = Turn(time.perf_counter())
                turn.times = await asyncio.gather(
                    *(_stream(client, name, prompt, options.tokens) for prompt in prompts)
                )
                turns[count].append(turn)
    return turns


async def _second_turns(options: argparse.Namespace, address: str, name: str, vocabulary: int) -> list[Row]:
    """When the first token of a conversation's second turn comes, and when with nothing kept."""
    first_s: dict[str, list[float]] = {"kept": [], "new": []}
    async with AsyncOpenAI(base_url=address, api_key="none", max_retries=0, timeout=3600) as client:
        for number in range(options.rounds):
            seed = SEED + 100 + 3 * number
            said = random_ids(vocabulary, options.conversation, seed)
            new = random_ids(vocabulary, TURN_TOKENS, seed + 1)
            await _stream(client, name, said, 2)
            other = random_ids(vocabulary, options.conversation, seed + 2)
            for kind, prompt in (("kept", [*said, *new]), ("new", [*other, *new])):
                begin = time.perf_counter()
                first_s[kind].append((await _stream(client, name, prompt, 1))[0] - begin)
    return [
        {
            "conversation_tokens": options.conversation,
            "second_turn_first_token_s": median(first_s["kept"]),
            "nothing_kept_first_token_s": median(first_s["new"]),
        }
    ]


async def _stream(client: AsyncOpenAI, name: str, prompt: list[int], tokens: int) -> list[float]:
    """When each token came."""
    stream = await client.completions.create(
        model=name, prompt=prompt, max_tokens=tokens, temperature=0, stream=True, logprobs=0
    )
    return [time.perf_counter() async for chunk in stream if chunk.choices and chunk.choices[0].logprobs is not None]


def row_of(at_once: int, turns: list[Turn]) -> Row:
    """Medians over the turns; percentiles over all tokens."""
    first = [one for turn in turns for one in turn.first_s]
    between = [one for turn in turns for one in turn.between_s]
    return {
        "at_once": at_once,
        "tokens_per_s": median(turn.tokens_per_s for turn in turns),
        "first_token_s": median(first),
        "between_tokens_ms_p50": median(between) * 1e3,
        "between_tokens_ms_p99": quantiles(between, n=100)[-1] * 1e3,
    }


def targets_of(rows: list[Row]) -> list[Target]:
    """The gain of several requests over one, and of a prompt that is kept over one that is not."""
    speeds = {row["at_once"]: row["tokens_per_s"] for row in rows if "at_once" in row}
    targets = [
        Target(
            "second_turn_sooner",
            row["nothing_kept_first_token_s"] / row["second_turn_first_token_s"],
            "x",
            TURN_TARGET,
            "higher",
        )
        for row in rows
        if "conversation_tokens" in row
    ]
    if {1, AT_ONCE_TARGET} <= speeds.keys():
        gain = speeds[AT_ONCE_TARGET] / speeds[1]
        targets.append(Target("gain_of_8_requests", gain, "x", GAIN_TARGET, "higher"))
    return targets


def _options() -> argparse.Namespace:
    parser = FlagParser(__doc__)
    parser.add_argument("--shape", choices=DENSE_SHAPES, default="llama-1.3b")
    parser.add_argument("--layers", type=int, help="of the model, fewer than the shape has")
    parser.add_argument("--folder", type=Path, default=Path("build/bench"), help="for the files, which are kept")
    parser.add_argument("--memory", type=float, default=0.5, help="share of the model's bytes (default: 0.5)")
    parser.add_argument("--at-once", nargs="+", type=int, default=[1, 4, 8, 16], help="streams of each row")
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=14, help="of a stream")
    parser.add_argument("--conversation", type=int, default=2000, help="tokens of its first turn; 0: without this row")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
