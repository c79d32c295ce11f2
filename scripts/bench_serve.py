#!/usr/bin/env -S bash -c 'PATH="$(realpath "${0%/*}/..")/.venv/bin:$PATH" exec python3 "$0" "$@"'
"""Measures `flashclient serve` by the official client of the interface: requests at once, and a conversation's turns.

A model with random weights is served with a share of them in memory: a dense one (SwiGLU) in exact mode, or with --kind
a planted one in predict mode or a mixture of experts. Each row has so many streams at once, each with a prompt of its
own. Speed is that of decoding: tokens of all streams while all of them decode. Rows take turns, so that a slow drift of
the device affects all alike. Tokens of a planted model are drawn at random, because its greedy texts repeat themselves,
which would flatter the pool; a mixture's streams then share no more experts than chance makes them. The last row is the
second turn of a long conversation: whose prompt is kept in memory, whose prompt came back from flash, because another
conversation took the memory, and a prompt of which nothing is kept.

llama-cpp-python's server answers the same prompts with the same weights in F16, but in predict mode. It has the memory
of weightd and of `flashclient serve` together, and maps the file into it. It answers one request after the other.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import flashclient  # isort: skip  # noqa: F401 - before torch, so that torch's idle threads do not spin
import torch
from bench_import import make_cold
from benchmarks.cgroup import capped_memory
from benchmarks.forced_tokens import random_ids
from benchmarks.llama import READAHEAD_KIB, add_environment_flag, llama_python
from benchmarks.llama_server import llama_served, prompt_of
from benchmarks.openai_server import served
from benchmarks.processes import WEIGHTD, BenchError, serving
from benchmarks.readahead import readahead
from benchmarks.report import Row, Target, machine_facts, report
from flags import FlagParser
from make_planted_model import make_planted_model
from moe.files import MixtureFiles, mixture_files
from openai import AsyncOpenAI
from paper.peers import BESIDE_WEIGHTS_BYTES
from planted.dense import write_tokenizer
from planted.gguf_file import TEXTS_FROM
from planted.mixture import MIXTURES
from planted.plan import SHAPES
from planted.store import PlantedStore, cut, dense_gguf, dense_store, planted_store

OURS, LLAMA = "weightd", "llama.cpp"
EXACT, PREDICT, MIXTURE = "exact", "predict", "mixture"
SHAPE_OF = {EXACT: "llama-1.3b", PREDICT: "opt-1.3b", MIXTURE: "olmoe-1b-7b"}
AT_RANDOM = 100.0  # a temperature with which all tokens are as likely
SEED = 17
TURN_TOKENS = 16  # of the second turn
TURN_TARGET = 10.0
AT_ONCE_TARGET = 8
OVER_LLAMA_TARGET = 1.0
GAIN_TARGETS = {EXACT: 3.0, PREDICT: 2.0, MIXTURE: 2.0}


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
        """While all streams decode; 0 where they were answered one after the other."""
        begin, end = max(times[0] for times in self.times), min(times[-1] for times in self.times)
        return 0.0 if end <= begin else sum(begin < at <= end for times in self.times for at in times) / (end - begin)

    @property
    def answered_tokens_per_s(self) -> float:
        """From the requests on, prompts included, until the last one is answered."""
        return sum(map(len, self.times)) / (max(times[-1] for times in self.times) - self.started_s)


@dataclass(frozen=True)
class Asked:
    """A server and its model. `prompt_of` makes of ids what the server takes."""

    address: str
    model: str
    vocabulary: int
    prompt_of: Callable[[list[int]], list[int] | str] = list

    def prompt(self, tokens: int, seed: int) -> list[int]:
        """Random ids of texts, which both servers take."""
        return [max(one, TEXTS_FROM) for one in random_ids(self.vocabulary, tokens, seed)]

    async def times(self, prompt: list[int], tokens: int, heat: float = 0.0, seed: int = 0) -> list[float]:
        """When each token came."""
        said = self.prompt_of(prompt)
        # llama-cpp-python's server gives no probabilities without keeping those of the whole context.
        counted: dict[str, Any] = {} if isinstance(said, str) else {"logprobs": 0}
        drawn: dict[str, Any] = {"temperature": heat, "top_p": 1.0, "seed": seed}
        drawn["extra_body"] = {"top_k": 0, "min_p": 0.0}
        async with AsyncOpenAI(base_url=self.address, api_key="none", max_retries=0, timeout=3600) as client:
            stream = await client.completions.create(
                model=self.model, prompt=said, max_tokens=tokens, stream=True, **counted, **drawn
            )
            chosen = [(time.perf_counter(), chunk.choices[0]) async for chunk in stream if chunk.choices]
        return [at for at, choice in chosen if (choice.logprobs is not None if counted else choice.text)]


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
    """A row for each number of streams, of each server."""
    planted, vocabulary = _planted(options)
    mode = PREDICT if options.kind == PREDICT else EXACT
    dram_bytes = round(planted.model_bytes * options.memory)
    python = None if options.no_peers or options.kind == PREDICT else llama_python(options.llama_cpp)
    rows: list[Row] = []
    with ExitStack() as opened:
        prefix: Sequence[str] = ()
        if python is not None:
            prefix = opened.enter_context(capped_memory(dram_bytes + BESIDE_WEIGHTS_BYTES)).prefix
        with (
            serving(planted.store, dram_bytes, program=(*prefix, *WEIGHTD)) as daemon,
            served(planted.name, daemon, "--mode", mode, *_kept_flags(options), prefix=prefix) as (address, _),
        ):
            asked = Asked(address, planted.name, vocabulary)
            rows += _rows(OURS, options, asked)
            second = asyncio.run(_second_turns(options, asked)) if options.conversation else []
        if python is not None:
            gguf = _gguf(options, planted)
            make_cold(gguf.parent)
            opened.enter_context(readahead(gguf, READAHEAD_KIB))
            address = opened.enter_context(llama_served(python, gguf, torch.get_num_threads(), prefix))
            rows += _rows(LLAMA, options, Asked(address, str(gguf), vocabulary, prompt_of))
    return rows + second


def _rows(name: str, options: argparse.Namespace, asked: Asked) -> list[Row]:
    turns = asyncio.run(_turns(options, asked))
    return [{"row": name, "kind": options.kind} | row_of(count, of_count) for count, of_count in turns.items()]


def _gguf(options: argparse.Namespace, planted: PlantedStore) -> Path:
    """The same weights for llama.cpp. Makes the file if it is missing."""
    if isinstance(planted, MixtureFiles):
        planted.converted()
        return planted.gguf
    return dense_gguf(planted, options.shape, options.layers)


def _kept_flags(options: argparse.Namespace) -> list[str]:
    """Memory for one conversation, and a file beside the model for more."""
    if not options.conversation:
        return []
    tokens = options.conversation + 4 * TURN_TOKENS
    return ["--kept-tokens", str(tokens), "--kept-folder", str(options.folder)]


def _planted(options: argparse.Namespace) -> tuple[PlantedStore, int]:
    """The model, with a tokenizer, and the size of its vocabulary."""
    if options.kind == EXACT:
        dense = dense_store(options.shape, options.folder, options.layers)
        return dense, cut(options.shape, options.layers)[0].vocabulary
    folder = options.folder / "with-tokenizers"
    folder.mkdir(parents=True, exist_ok=True)
    if options.kind == MIXTURE:
        files = mixture_files(options.shape, options.layers, folder)
        files.planted()
        write_tokenizer(files.shape.vocabulary, files.checkpoint)
        files.imported()
        return files, files.shape.vocabulary
    shape, name = cut(options.shape, options.layers)
    checkpoint = folder / f"planted-{name}"
    if not checkpoint.exists():
        make_planted_model(shape, checkpoint, "bf16")
    write_tokenizer(shape.vocabulary, checkpoint)
    return planted_store(options.shape, folder, options.layers), shape.vocabulary


async def _turns(options: argparse.Namespace, asked: Asked) -> dict[int, list[Turn]]:
    turns: dict[int, list[Turn]] = {count: [] for count in options.at_once}
    heat = 0.0 if options.kind == EXACT else AT_RANDOM
    await asked.times(asked.prompt(options.prompt_tokens, SEED), 2)  # fills the pool
    for number in range(options.rounds):
        for count in options.at_once if number % 2 == 0 else reversed(options.at_once):
            prompts = [asked.prompt(options.prompt_tokens, SEED + 1 + index) for index in range(count)]
            turn = Turn(time.perf_counter())
            turn.times = await asyncio.gather(
                *(asked.times(prompt, options.tokens, heat, seed) for seed, prompt in enumerate(prompts))
            )
            turns[count].append(turn)
    return turns


async def _second_turns(options: argparse.Namespace, asked: Asked) -> list[Row]:
    """When the first token of a conversation's second turn comes: kept, from flash, and with nothing kept."""
    first_s: dict[str, list[float]] = {"kept": [], "new": [], "from flash": []}
    for number in range(options.rounds):
        seed = SEED + 100 + 3 * number
        said, new = asked.prompt(options.conversation, seed), asked.prompt(TURN_TOKENS, seed + 1)
        await asked.times(said, 2)
        other = asked.prompt(options.conversation, seed + 2)
        for kind, prompt in (("kept", [*said, *new]), ("new", [*other, *new]), ("from flash", [*said, *new[1:]])):
            begin = time.perf_counter()
            first_s[kind].append((await asked.times(prompt, 1))[0] - begin)
    return [
        {
            "conversation_tokens": options.conversation,
            "second_turn_first_token_s": median(first_s["kept"]),
            "from_flash_first_token_s": median(first_s["from flash"]),
            "nothing_kept_first_token_s": median(first_s["new"]),
        }
    ]


def row_of(at_once: int, turns: list[Turn]) -> Row:
    """Medians over the turns; percentiles over all tokens."""
    first = [one for turn in turns for one in turn.first_s]
    between = [one for turn in turns for one in turn.between_s]
    return {
        "at_once": at_once,
        "tokens_per_s": median(turn.tokens_per_s for turn in turns),
        "answered_tokens_per_s": median(turn.answered_tokens_per_s for turn in turns),
        "first_token_s": median(first),
        "between_tokens_ms_p50": median(between) * 1e3,
        "between_tokens_ms_p99": quantiles(between, n=100)[-1] * 1e3,
    }


def targets_of(rows: list[Row]) -> list[Target]:
    """The gain of several requests over one, and of a prompt that is kept over one that is not; and over the peer."""
    speeds = {row["at_once"]: row["tokens_per_s"] for row in rows if row.get("row") == OURS}
    answered = {(row["row"], row["at_once"]): row["answered_tokens_per_s"] for row in rows if "at_once" in row}
    targets = [
        Target(name, row["nothing_kept_first_token_s"] / row[figure], "x", TURN_TARGET, "higher")
        for row in rows
        if "conversation_tokens" in row
        for name, figure in (
            ("second_turn_sooner", "second_turn_first_token_s"),
            ("from_flash_sooner", "from_flash_first_token_s"),
        )
    ]
    if {1, AT_ONCE_TARGET} <= speeds.keys():
        gain = speeds[AT_ONCE_TARGET] / speeds[1]
        kind = next(row["kind"] for row in rows if "at_once" in row)
        targets.append(Target("gain_of_8_requests", gain, "x", GAIN_TARGETS[kind], "higher"))
    for count in speeds:
        if (peer := answered.get((LLAMA, count))) is not None:
            faster = answered[OURS, count] / peer
            targets.append(Target(f"over_llama_cpp_ratio_{count}", faster, "x", OVER_LLAMA_TARGET, "higher"))
    return targets


def _options() -> argparse.Namespace:
    parser = FlagParser(__doc__)
    parser.add_argument("--kind", choices=SHAPE_OF, default=EXACT, help="of model and mode (default: exact)")
    parser.add_argument("--shape", help=f"default: {', '.join(SHAPE_OF.values())}, by kind")
    parser.add_argument("--layers", type=int, help="of the model, fewer than the shape has")
    parser.add_argument("--folder", type=Path, default=Path("build/bench"), help="for the files, which are kept")
    parser.add_argument("--memory", type=float, default=0.5, help="share of the model's bytes (default: 0.5)")
    parser.add_argument("--at-once", nargs="+", type=int, default=[1, 4, 8, 16], help="streams of each row")
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=14, help="of a stream")
    parser.add_argument("--conversation", type=int, default=2000, help="tokens of its first turn; 0: without this row")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--no-peers", action="store_true", help="measure weightd only")
    add_environment_flag(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    families = {EXACT: "llama", PREDICT: "opt"}
    known = [name for name, shape in SHAPES.items() if shape.family == families.get(options.kind)]
    if options.kind == MIXTURE:
        known = [name for name, shape in MIXTURES.items() if not shape.blocks]  # a GGUF file has its own tokenizer
    options.shape = options.shape or SHAPE_OF[options.kind]
    if options.shape not in known:
        parser.error(f"--shape {options.shape} is none of --kind {options.kind}: give one of {', '.join(known)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
