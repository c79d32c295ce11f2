#!/usr/bin/env -S bash -c 'PATH="$(realpath "${0%/*}/..")/.venv/bin:$PATH" exec python3 "$0" "$@"'
"""Measures what encodings of weights cost in quality: perplexity on a text, against the weights of the checkpoint.

Each model is imported as it is, and in each encoding, and runs in exact mode. "resident" are the matrices outside the
FFNs, which then stay as they are; "plain" is what a quantised file holds, dequantised to fp32 by gguf-py. In the rows
of gguf-py, the FFN weights of transformers' model go through gguf-py's own quantiser, row by row along the hidden size
as in bundles: Q4_0 is what llama.cpp makes of them without an importance matrix. In the row "dequantised",
transformers' model has the numbers that the store holds in the last encoding, which must give the same perplexity as
the client. "keys and values" are those of the cache, and nothing else.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from flags import FlagParser

from flashclient import FlashClient  # isort: skip  # before torch: it tells torch's idle threads to sleep
import gguf
import numpy as np
import torch
from benchmarks.report import Row, Target, machine_facts, report
from gguf.quants import dequantize, quantize
from memory_speed.packages import PACKAGED
from torch import Tensor

from flashclient.calibration.evaluate import Quality, dense_model
from flashclient.calibration.sequences import read_sequences
from weightd.importing.convert import import_checkpoint
from weightd.store.store import Store
from weightd_proto.encodings import QUANTISED_DTYPES, RESIDENT_DTYPES
from weightd_proto.modes import KV_INT8
from weightd_proto.weightd_pb2 import Model

MODELS = Path(__file__).with_name("models")
TEXT = MODELS / "held_out.txt"
SOURCE, PLAIN = "keep", "plain"
BY_GGUF = ("Q8_0", "Q4_0", "Q4_1")
LOSS_MAX = {"int8": 0.001, "int4": 0.03}
FFNS, RESIDENT, KEYS = "ffns", "resident", "keys"
IN_INT8 = "keys and values int8"


def quality_of(model: Any, sequences: Tensor, new_cache: Callable[[], Any] | None = None) -> Quality:
    """
    Args:
        new_cache: makes a cache for each sequence; None: there is none.
    """
    quality = Quality()
    with torch.no_grad():
        for ids in sequences:
            cached = {"use_cache": False} if new_cache is None else {"past_key_values": new_cache()}
            logits = model(input_ids=ids[None], **cached).logits[0].float()
            quality.add(logits, ids, logits.argmax(1))
    return quality


def through_gguf(model: Any, record: Any, format: str) -> None:
    """Quantises the FFN weights of transformers' model along the hidden size."""
    kind = gguf.GGMLQuantizationType[format]
    hidden_size = record.bundle.hidden_size
    for layer in record.layers:
        for name in layer.weights:
            weight = model.get_parameter(f"{layer.module}.{name}")
            along = weight if weight.shape[1] == hidden_size else weight.T
            rows = np.ascontiguousarray(along.detach().float().numpy())
            numbers = torch.from_numpy(np.asarray(dequantize(quantize(rows, kind), kind), np.float32))
            with torch.no_grad():
                weight.copy_(numbers if along is weight else numbers.T)


class Rows:
    """The rows of a model, and what they are measured on."""

    def __init__(self, name: str, source: Path, folder: Path, tokens: int, length: int) -> None:
        self.rows: list[Row] = []
        self._name, self._source, self._folder = name, source, folder
        self._tokens, self._length = tokens, length

    def add(self, encoding: str, quality: Quality, error: float = 0.0, record: Model | None = None) -> None:
        first = self.rows[0]["perplexity"] if self.rows else quality.perplexity
        row = {"model": self._name, "encoding": encoding, "perplexity": quality.perplexity}
        row["loss"] = quality.perplexity / first - 1
        ffn_bytes, resident_bytes = (
            (0, 0) if record is None else (record.bundles_file_bytes, record.resident_file_bytes)
        )
        self.rows.append(row | {"weight_error": error, "ffn_bytes": ffn_bytes, "resident_bytes": resident_bytes})

    def _sequences(self, client: FlashClient) -> Tensor:
        return read_sequences(TEXT, client.tokenizer, self._length, None, self._tokens)

    def of_ffns(self, dtypes: Sequence[str], dense: bool) -> None:
        """A row for each dtype of the FFNs. dense: also rows of transformers' model with the numbers of encodings."""
        for dtype in dtypes:
            store = self._folder / dtype
            with Store.open(store, create=True) as opened:
                record = import_checkpoint(self._source, opened, self._name, dtype)
            with FlashClient(self._name, store=store, mode="exact") as client:
                sequences = self._sequences(client)
                error = max(layer.quantisation_error for layer in record.layers)
                self.add(dtype, quality_of(client.model, sequences), error, record)
                if dense and dtype == SOURCE:
                    for format in BY_GGUF:
                        model = dense_model(client.loaded)
                        through_gguf(model, record, format)
                        self.add(f"gguf {format}", quality_of(model, sequences))
                elif dense and dtype == dtypes[-1]:
                    self.add(f"{dtype}, dequantised", quality_of(dense_model(client.loaded), sequences))

    def of_resident(self) -> None:
        """A row for each dtype of the resident matrices."""
        for resident in RESIDENT_DTYPES:
            store, layout = self._folder / f"resident-{resident}", "neuron" if resident == PLAIN else ""
            with Store.open(store, create=True) as opened:
                record = import_checkpoint(self._source, opened, self._name, layout=layout, resident_request=resident)
            with FlashClient(self._name, store=store, mode="exact") as client:
                error = max(tensor.quantisation_error for tensor in record.resident)
                label = resident if resident == PLAIN else f"resident {resident}"
                self.add(label, quality_of(client.model, self._sequences(client)), error, record)

    def of_keys(self) -> None:
        """A row for keys and values in int8. The model was imported for the first row."""
        with FlashClient(self._name, store=self._folder / SOURCE, mode="exact", kv_dtype=KV_INT8) as client:
            self.add(IN_INT8, quality_of(client.model, self._sequences(client), client.loaded.new_cache))


def rows_of(name: str, source: Path, folder: Path, options: argparse.Namespace) -> list[Row]:
    rows = Rows(name, source, folder, options.tokens, options.length)
    ffns = FFNS in options.kinds
    rows.of_ffns((SOURCE, *QUANTISED_DTYPES) if ffns else (SOURCE,), ffns)
    if RESIDENT in options.kinds:
        rows.of_resident()
    if KEYS in options.kinds:
        rows.of_keys()
    return rows.rows


def targets_of(name: str, rows: list[Row]) -> list[Target]:
    """Those of the rows that were measured."""
    loss = {row["encoding"]: row["loss"] for row in rows}
    targets: list[Target] = []

    def add(what: str, value: float, most: float) -> None:
        targets.append(Target(f"{name}_{what}", value, "relative", most, "lower"))

    if "gguf Q4_0" in loss:
        for dtype, most in (LOSS_MAX | {"int4": min(LOSS_MAX["int4"], max(0.0, loss["gguf Q4_0"]))}).items():
            add(f"{dtype}_loss", loss[dtype], most)
        add("difference_from_dequantised", abs(loss["int4"] - loss["int4, dequantised"]), 1e-4)
    if PLAIN in loss:
        for dtype, most in LOSS_MAX.items():
            add(f"resident_{dtype}_loss", loss[f"resident {dtype}"], most)
        kept = max(abs(loss[PLAIN] - loss[one]) for one in (SOURCE, f"resident {SOURCE}"))
        add("kept_difference_from_dequantised", kept, 1e-5)
    if IN_INT8 in loss:
        add("keys_int8_loss", loss[IN_INT8], LOSS_MAX["int8"])
    return targets


def _shipped(_: Path, target: Path) -> None:
    target.symlink_to(MODELS / "relu-6m")


# Each writes the checkpoint; its first argument is a folder for packages.
SOURCES: dict[str, Callable[[Path, Path], None]] = {"relu-6m": _shipped, **PACKAGED}


def main() -> int:
    parser: argparse.ArgumentParser = FlagParser(__doc__)
    parser.add_argument("--models", nargs="+", choices=tuple(SOURCES), default=list(SOURCES))
    parser.add_argument("--tokens", type=int, default=8192, help="of the text")
    parser.add_argument("--length", type=int, default=256, help="of a sequence")
    parser.add_argument("--folder", type=Path, help="for the stores, which are deleted (default: a temporary one)")
    parser.add_argument("--kinds", nargs="+", choices=(FFNS, RESIDENT, KEYS), default=[FFNS, RESIDENT, KEYS])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    rows, targets = [], []
    for name in options.models:
        with TemporaryDirectory(dir=options.folder) as folder:
            source = Path(folder, name if name == "relu-6m" else f"{name}.gguf")
            SOURCES[name](Path(folder, "packages"), source)
            of_model = rows_of(name, source, Path(folder), options)
        rows += of_model
        targets += targets_of(name, of_model)
    report(machine_facts(Path()) | {"tokens": options.tokens}, rows, targets, options.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
