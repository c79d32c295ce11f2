#!/usr/bin/env -S bash -c 'PATH="$(realpath "${0%/*}/..")/.venv/bin:$PATH" exec python3 "$0" "$@"'
"""Measures decoding with everything in memory, beside llama.cpp and transformers, and where a token's time goes.

A model is loaded by all three at once, and they take turns: each decodes some tokens, in the order A, B, C, C, B, A.
Reading memory with the same threads takes turns with them, too. llama.cpp (llama-cpp-python, built for this processor)
maps the same numbers as a GGUF file.

- Llama 1.3B's shape, random weights in bf16; llama.cpp has them as F16
- OPT-1.3B's shape in fp16, with neurons that fire as published (make_planted_model.py), in exact mode and in predict
  mode. llama.cpp does not know OPT: it computes the same matrices as a GPT-2, all of them.
- OLMoE-1B-7B's shape in fp16, a planted mixture of experts (planted/mixture.py), with 4 of its 16 layers
- Llama 1.3B's shape in Q8_0 and Q4_0, and OLMoE-1B-7B's sizes in Q4_0 and Qwen3's architecture: one GGUF file for all
- Gemma 3 270M and SmolLM2-135M, real models, rounded from their quantised files to bf16 for all three; and as they are,
  in Q4_K_M and Q4_1 (-kept), which transformers rounds to bf16

A token needs every weight once, but embeddings that are not the head, experts that it does not pick, and in predict
mode neurons that are not predicted. The files of a model of 1.3 billion parameters take 8 GB, those of the mixture 11,
and the processes as much memory.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from flags import FlagParser

import flashclient  # isort: skip  # noqa: F401 - before torch, so that torch's idle threads do not spin
import torch
from benchmarks.llama import add_environment_flag, llama_python
from benchmarks.processes import BenchError
from benchmarks.report import Row, Target, machine_facts, report
from memory_speed.models import MODELS, TINY, measured_model
from memory_speed.rows import row_of, targets_of
from memory_speed.turns import Turns

TOKENS_LARGE, TOKENS_SMALL = 8, 48  # of a turn: a second or less


def main() -> int:
    options = _options()
    try:
        machine, rows, targets = measure(options)
    except (BenchError, OSError) as error:
        print(f"bench_memory_speed: {error}", file=sys.stderr)
        return 1
    report(machine, rows, targets, options.json)
    return 0


def measure(options: argparse.Namespace) -> tuple[Row, list[Row], list[Target]]:
    """Machine, rows and targets."""
    options.folder.mkdir(parents=True, exist_ok=True)
    machine = machine_facts(options.folder) | {"threads": options.threads}
    python = None if options.no_peers else llama_python(options.llama_cpp)
    rows: list[Row] = []
    targets: list[Target] = []
    for name in options.models:
        model = measured_model(name, options.layers, options.folder)
        tokens = options.tokens or (TOKENS_LARGE if model.is_large else TOKENS_SMALL)
        turns = Turns(options.rounds, tokens, options.prompts, options.prompt_tokens)
        workers, memory_gb_per_s = turns.run(model, options.threads, python)
        of_model = [row_of(worker, model, memory_gb_per_s) for worker in workers]
        rows += of_model
        targets += targets_of(model, of_model)
    return machine, rows, targets


def _options() -> argparse.Namespace:
    parser = FlagParser(__doc__)
    parser.add_argument("--models", nargs="+", choices=(*MODELS, *TINY), default=list(MODELS))
    parser.add_argument("--layers", type=int, help="of models with random weights, fewer than the shape has")
    parser.add_argument("--folder", type=Path, default=Path("build/bench"), help="for the files, which are kept")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--tokens", type=int, help=f"of a turn (default: {TOKENS_LARGE}, of small models {TOKENS_SMALL})"
    )
    parser.add_argument("--rounds", type=int, default=4, help="of two turns each")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--no-peers", action="store_true", help="do not run llama.cpp and transformers")
    add_environment_flag(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
