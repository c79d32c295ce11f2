#!/usr/bin/env -S bash -c 'PATH="$(realpath "${0%/*}/..")/.venv/bin:$PATH" exec python3 "$0" "$@"'
"""Measures lookups in a table of 1.05 GB on flash, and the memory that it saves.

The table has the size of the input embedding of Llama 3 8B: 128256 rows of 4096 values in bf16. It is the per-layer
embedding of a small Gemma 3n with random weights. A cold lookup is of rows that nobody has read; a warm one is of the
same rows again, which are in the pool. Lookups in a resident tensor of the same size are measured in the same run.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from flashclient import FlashClient  # isort: skip  # before torch: it tells torch's idle threads to sleep
import torch
from benchmarks.report import Row, Target, machine_facts, report
from flags import FlagParser
from planted.noise import write_noise
from torch import Tensor

from weightd_proto import weightd_pb2

ROWS, WIDTH, PER_LAYER = 128256, 4096, 256
LAYERS = WIDTH // PER_LAYER
CONFIG = {
    "model_type": "gemma3n_text",
    "architectures": ["Gemma3nForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": [512] * LAYERS,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1024,
    "vocab_size_per_layer_input": ROWS,
    "hidden_size_per_layer_input": PER_LAYER,
    "activation_sparsity_pattern": [0.0] * LAYERS,
    "num_kv_shared_layers": 0,
}
NAME = "tables"
PROMPT_TOKENS = 512
LOOKUPS = {1: 200, PROMPT_TOKENS: 8}  # by tokens
DRAM = "512MiB"
# A lookup should take less than a hundredth of a token, and a model of this size takes more than 50 ms for one.
TOKEN_US_MAX = 500
SAVED_SHARE_MIN = 0.9


def seconds_of(look_up: Callable[[Tensor], Any], batches: Sequence[Tensor]) -> float:
    """The median of one lookup."""
    times = []
    for ids in batches:
        began_s = time.perf_counter()
        look_up(ids)
        times.append(time.perf_counter() - began_s)
    return median(times)


def measure(embedding: Any, resident: Tensor) -> list[Row]:
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))
    rows: list[Row] = []
    used = 0
    for tokens, count in LOOKUPS.items():
        batches = [order[used + i * tokens : used + (i + 1) * tokens] for i in range(count)]
        used += tokens * count
        row: Row = {"tokens": tokens, "cold_us": 1e6 * seconds_of(embedding, batches)}
        row["warm_us"] = 1e6 * seconds_of(embedding, batches)
        row["resident_us"] = 1e6 * seconds_of(lambda ids: torch.nn.functional.embedding(ids, resident), batches)
        rows.append(row | {"lookups": count})
    return rows


def pool_bytes(client: FlashClient, table: weightd_pb2.Model) -> int:
    models = client.loaded.connection.stats().models
    return next(model.pool_bytes for model in models if model.name == table.name)


def main() -> int:
    parser = FlagParser(__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--folder", type=Path, default=Path(), help="on the device to measure; needs 2.3 GB")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-tables-", dir=options.folder) as name:
        folder = Path(name)
        machine = machine_facts(folder)
        checkpoint = folder / NAME
        checkpoint.mkdir()
        write_noise(CONFIG, checkpoint)
        store = ["--store", str(folder / "store")]
        command = [sys.executable, "-m", "weightd", "import", str(checkpoint), *store, "--json"]
        imported = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        (checkpoint / "model.safetensors").unlink()
        with FlashClient(NAME, store=folder / "store", dram=DRAM) as client:
            (table,) = client.record.tables
            resident = torch.zeros(ROWS, WIDTH, dtype=torch.bfloat16)
            resident.fill_(1)  # so that its pages are there
            rows = measure(client.model.get_submodule(table.layers[0].module), resident)
            kept_bytes = pool_bytes(client, table)
    table_bytes = imported["tables"][0]["bytes"]
    memory: Row = {"table_bytes": table_bytes, "pool_bytes": kept_bytes, "saved_bytes": table_bytes - kept_bytes}
    targets = [
        Target("token_cold_us", rows[0]["cold_us"], "us", TOKEN_US_MAX, "lower"),
        Target("memory_saved_share", memory["saved_bytes"] / table_bytes, "of the table", SAVED_SHARE_MIN, "higher"),
    ]
    report(machine, [*rows, memory], targets, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
