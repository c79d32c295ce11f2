#!/usr/bin/env -S bash -c 'PATH="$(realpath "${0%/*}/..")/.venv/bin:$PATH" exec python3 "$0" "$@"'
"""Counts equal greedy texts: alone and in a batch, with and without a draft, and compared with transformers.

The model is saved in each dtype and run in exact mode and, if there is a text to calibrate on, in predict mode. Prompts
of different lengths are cut from a text. A row's result depends on that row alone, so all texts of this system must be
equal. Texts of transformers' own batches are counted too; they need not be equal. transformers' dense model rounds sums
in another order, so texts may differ after two tokens that are almost equally likely.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from flags import FlagParser

from flashclient import FlashClient  # isort: skip  # before torch: it tells torch's idle threads to sleep
import torch
from benchmarks.report import Row, Target, machine_facts, report
from torch import Tensor
from transformers import AutoTokenizer
from transformers.models.auto.modeling_auto import AutoModelForCausalLM
from transformers.utils import logging

from flashclient.calibration.calibrate import CalibrationOptions, calibrate, publish_result
from flashclient.calibration.sequences import read_sequences

MODELS = Path(__file__).with_name("models")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PROMPT_TOKENS_MIN, PROMPT_TOKENS_STEP = 3, 2  # 3, 5, 7 ...: batches are ragged
LOOKED_UP_TOKENS = 5
ROWS = (4, 24)  # of a batch

Texts = list[list[int]]
Generate = Callable[..., Tensor]


@dataclass(frozen=True)
class Bench:
    """What every run generates."""

    prompts: Texts
    new_tokens: int
    pad: int

    def run(self, generate: Generate, rows: int = 1, **arguments: Any) -> Texts:
        """The new tokens of each prompt, `rows` prompts in a batch, padded on the left."""
        texts: Texts = []
        for first in range(0, len(self.prompts), rows):
            some = self.prompts[first : first + rows]
            longest = max(map(len, some))
            batch = {
                "input_ids": torch.tensor([[self.pad] * (longest - len(prompt)) + prompt for prompt in some]),
                "attention_mask": torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in some]),
            }
            greedy = {"do_sample": False, "max_new_tokens": self.new_tokens, "eos_token_id": -1}
            made = generate(batch, **greedy, **arguments)
            texts += made[:, longest:].tolist()
        return texts

    def compared(self, facts: Row, what: str, texts: Texts, others: Texts) -> Row:
        equal = sum(one == other for one, other in zip(texts, others, strict=True))
        return facts | {"compared": what, "texts": len(texts), "equal": equal}


def own_rows(bench: Bench, client: FlashClient, facts: Row, draft: Path | None) -> tuple[list[Row], Texts]:
    """Compares the client's texts with each other. Returns the texts of single prompts."""
    alone = bench.run(client.generate)
    rows = [
        bench.compared(facts, f"alone, in batches of {count}", alone, bench.run(client.generate, count))
        for count in ROWS
    ]
    looked_up = bench.run(client.generate, prompt_lookup_num_tokens=LOOKED_UP_TOKENS)
    rows.append(bench.compared(facts, "without, with tokens looked up in the prompt", alone, looked_up))
    if draft is not None:
        drafted = bench.run(client.generate, assistant_model=draft)
        rows.append(bench.compared(facts, "without, with a draft model", alone, drafted))
    return rows, alone


def dense_rows(bench: Bench, dense: Any, facts: Row, exact: Texts) -> list[Row]:
    """Compares transformers' dense model with exact mode, and with itself."""

    def generate(batch: dict[str, Tensor], **arguments: Any) -> Tensor:
        made: Tensor = dense.generate(**batch, **arguments)
        return made

    alone = bench.run(generate)
    rows = [bench.compared(facts, "exact mode, transformers' dense model", exact, alone)]
    facts = facts | {"mode": "transformers"}
    for count in ROWS:
        rows.append(bench.compared(facts, f"alone, in batches of {count}", alone, bench.run(generate, count)))
    return rows


def rows_of_dtype(options: argparse.Namespace, bench: Bench, name: str, folder: Path) -> Iterator[Row]:
    tokenizer: Any = AutoTokenizer.from_pretrained(options.model, **source(options))
    dense: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=DTYPES[name], **source(options))
    dense.eval()
    dense.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    where: dict[str, Any] = {"store": folder / "store", "dram": options.dram}
    with FlashClient(str(folder / name), mode="exact", **where) as client:
        rows, exact = own_rows(bench, client, {"dtype": name, "mode": "exact"}, options.draft)
        yield from rows
    yield from dense_rows(bench, dense, {"dtype": name, "mode": "exact"}, exact)
    if options.calibrate is None:
        return
    with FlashClient(name, mode="exact", **where) as client:
        length_max = dense.config.max_position_embeddings
        text = read_sequences(options.calibrate, tokenizer, length_max, options.calibration_tokens, 65536)
        publish_result(calibrate(client.loaded, text, CalibrationOptions()), client.loaded)
    with FlashClient(name, mode="predict", **where) as client:
        yield from own_rows(bench, client, {"dtype": name, "mode": "predict"}, options.draft)[0]


def source(options: argparse.Namespace) -> dict[str, str]:
    """Further arguments of from_pretrained()."""
    return {} if options.gguf_file is None else {"gguf_file": options.gguf_file}


def prompts_of(options: argparse.Namespace) -> Texts:
    tokenizer: Any = AutoTokenizer.from_pretrained(options.model, **source(options))
    ids = tokenizer(options.text.read_text()).input_ids
    lengths = [PROMPT_TOKENS_MIN + PROMPT_TOKENS_STEP * i for i in range(options.texts)]
    if len(ids) < sum(lengths):
        raise SystemExit(f"bench_equality: {options.text} has {len(ids)} tokens, {options.texts} texts need more")
    step = len(ids) // options.texts
    return [ids[i * step : i * step + length] for i, length in enumerate(lengths)]


def main() -> int:
    parser = FlagParser(__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--model", type=Path, default=MODELS / "relu-6m", help="a checkpoint folder")
    parser.add_argument("--gguf-file", metavar="NAME", help="a .gguf file in that folder")
    parser.add_argument("--draft", type=Path, help="a checkpoint folder of a draft model")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--text", type=Path, default=MODELS / "held_out.txt", help="the text that prompts are cut from")
    parser.add_argument("--calibrate", type=Path, metavar="FILE", help="text to calibrate on, for predict mode")
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--texts", type=int, default=24)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--dram", default="2GiB")
    options = parser.parse_args()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # that no text ends early is meant
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    tokenizer: Any = AutoTokenizer.from_pretrained(options.model, **source(options))
    bench = Bench(prompts_of(options), options.new_tokens, tokenizer.pad_token_id or 0)
    with TemporaryDirectory(prefix="bench-equality-") as folder:
        rows = [row for name in options.dtypes for row in rows_of_dtype(options, bench, name, Path(folder))]
    own = [row for row in rows if row["mode"] != "transformers" and "dense" not in row["compared"]]
    share = min(row["equal"] / row["texts"] for row in own)
    targets = [Target("own_texts_equal_share", share, "x", 1.0, "higher")]
    report(machine_facts(Path()) | {"threads": torch.get_num_threads()}, rows, targets, options.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
