#!/usr/bin/env -S bash -c 'PATH="$(realpath "${0%/*}/..")/.venv/bin:$PATH" exec python3 "$0" "$@"'
"""Measures what encodings of weights cost in quality: perplexity on a text, against the weights of the checkpoint.

Each model is imported as it is, and in each encoding, and runs in exact mode. "resident" are the matrices outside the
FFNs, which then stay as they are; "plain" is what a quantised file holds, dequantised to fp32 by gguf-py. In the rows
of gguf-py, the FFN weights of transformers' model go through gguf-py's own quantiser, row by row along the hidden size
as in bundles: Q4_0 is what llama.cpp makes of them without an importance matrix. In the row "dequantised",
transformers' model has the numbers that the store holds in the last encoding, which must give the same perplexity as
the client.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
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
from weightd_proto.weightd_pb2 import Model

MODELS = Path(__file__).with_name("models")
TEXT = MODELS / "held_out.txt"
SOURCE, PLAIN = "keep", "plain"
BY_GGUF = ("Q8_0", "Q4_0", "Q4_1")
LOSS_MAX = {"int8": 0.001, "int4": 0.03}


def quality_of(model: Any, sequences: Tensor) -> Quality:
    quality = Quality()
    with torch.no_grad():
        for ids in sequences:
            logits = model(input_ids=ids[None], use_cache=False).logits[0].float()
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


def rows_of(name: str, source: Path, folder: Path, tokens: int, length: int) -> list[Row]:
    rows: list[Row] = []

    def add(encoding: str, quality: Quality, error: float = 0.0, record: Model | None = None) -> None:
        loss = quality.perplexity / rows[0]["perplexity"] - 1 if rows else 0.0
        row = {"model": name, "encoding": encoding, "perplexity": quality.perplexity, "loss": loss}
        ffn_bytes, resident_bytes = (
            (0, 0) if record is None else (record.bundles_file_bytes, record.resident_file_bytes)
        )
        rows.append(row | {"weight_error": error, "ffn_bytes": ffn_bytes, "resident_bytes": resident_bytes})

    for dtype in (SOURCE, *QUANTISED_DTYPES):
        store = folder / dtype
        with Store.open(store, create=True) as opened:
            record = import_checkpoint(source, opened, name, dtype)
        with FlashClient(name, store=store, mode="exact") as client:
            sequences = read_sequences(TEXT, client.tokenizer, length, None, tokens)
            error = max(layer.quantisation_error for layer in record.layers)
            add(dtype, quality_of(client.model, sequences), error, record)
            if dtype == SOURCE:
                for format in BY_GGUF:
                    dense = dense_model(client.loaded)
                    through_gguf(dense, record, format)
                    add(f"gguf {format}", quality_of(dense, sequences))
            elif dtype == tuple(QUANTISED_DTYPES)[-1]:
                add(f"{dtype}, dequantised", quality_of(dense_model(client.loaded), sequences))
    for resident in RESIDENT_DTYPES:
        store, layout = folder / f"resident-{resident}", "neuron" if resident == PLAIN else ""
        with Store.open(store, create=True) as opened:
            record = import_checkpoint(source, opened, name, layout=layout, resident_request=resident)
        with FlashClient(name, store=store, mode="exact") as client:
            error = max(tensor.quantisation_error for tensor in record.resident)
            label = resident if resident == PLAIN else f"resident {resident}"
            add(label, quality_of(client.model, sequences), error, record)
    return rows


def targets_of(name: str, rows: list[Row]) -> list[Target]:
    loss = {row["encoding"]: row["loss"] for row in rows}
    most = LOSS_MAX | {"int4": min(LOSS_MAX["int4"], max(0.0, loss["gguf Q4_0"]))}
    targets = [Target(f"{name}_{dtype}_loss", loss[dtype], "relative", most[dtype], "lower") for dtype in most]
    targets += [
        Target(f"{name}_resident_{dtype}_loss", loss[f"resident {dtype}"], "relative", LOSS_MAX[dtype], "lower")
        for dtype in LOSS_MAX
    ]
    difference = abs(loss["int4"] - loss["int4, dequantised"])
    kept = max(abs(loss[PLAIN] - loss[one]) for one in (SOURCE, f"resident {SOURCE}"))
    return [
        *targets,
        Target(f"{name}_difference_from_dequantised", difference, "relative", 1e-4, "lower"),
        Target(f"{name}_kept_difference_from_dequantised", kept, "relative", 1e-5, "lower"),
    ]


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
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    rows, targets = [], []
    for name in options.models:
        with TemporaryDirectory(dir=options.folder) as folder:
            source = Path(folder, name if name == "relu-6m" else f"{name}.gguf")
            SOURCES[name](Path(folder, "packages"), source)
            of_model = rows_of(name, source, Path(folder), options.tokens, options.length)
        rows += of_model
        targets += targets_of(name, of_model)
    report(machine_facts(Path()) | {"tokens": options.tokens}, rows, targets, options.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
