#!/usr/bin/env -S bash -c 'PATH="$(realpath "${0%/*}/..")/.venv/bin:$PATH" exec python3 "$0" "$@"'
"""Measures the shared-memory path: its cost per token, and a warm ACQUIRE of 300 neurons.

Per token: the same generation of a planted model over the ring and with an engine in the same process
(benchmarks/ipc_generation.py).

ACQUIRE, idle: the cells are in the pool and there is no other client. The gRPC round trip of the same daemon stands
beside it. ACQUIRE, busy: 1 and 4 processes generate text. In each, before every FFN, a second session acquires and
releases 300 random neurons of a random layer, while the daemon reads, verifies and serves the generations. Neurons have
16 KiB, as in OPT-6.7B.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import flashclient  # isort: skip  # before torch, so that torch's idle threads do not spin

import numpy as np
import torch
from benchmarks.ipc_generation import generation_rows
from benchmarks.processes import BenchError
from benchmarks.report import Row, Target, machine_facts, report
from flags import FlagParser
from planted.plan import SHAPES
from transformers import OPTConfig, OPTForCausalLM
from transformers.utils.logging import disable_progress_bar

from flashclient import _native
from flashclient.daemon.channel import Connection
from weightd.serving.served_models import demand_of
from weightd.store.store import Store
from weightd_proto import weightd_pb2

NAME = "ipc"
NEURONS = 300
LAYERS, HIDDEN, WIDTH = 4, 4096, 8192
CALLS = 2000
PAUSE_S = 0.0005  # between idle calls: long enough for the daemon to sleep, as between two layers
BUSY_TOKENS = 40


def main() -> int:
    parser = FlagParser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="opt-1.3b", help="of the planted model")
    parser.add_argument(
        "--folder", type=Path, default=Path("build/bench"), help="on the device to measure; its contents are kept"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--busy-client", nargs=2, metavar=("ADDRESS", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.busy_client:
        print(json.dumps(busy_client(options.busy_client[0], int(options.busy_client[1]))))
        return 0
    try:
        results = measure(options.shape, options.folder)
    except (BenchError, OSError) as error:
        print(f"bench_ipc: {error}", file=sys.stderr)
        return 1
    report(*results, options.json)
    return 0


def measure(shape: str, folder: Path) -> tuple[Row, list[Row], list[Target]]:
    """Machine, rows and targets. Raises BenchError and OSError."""
    generations = generation_rows(shape, folder)
    with TemporaryDirectory(prefix="bench-ipc-", dir=folder) as name:
        store = Path(name) / "store"
        make_store(Path(name), store)
        machine = machine_facts(store)
        with weightd(store, share_of_ffn=1.0) as address:
            idle = idle_row(address)
            grpc_row = round_trip_row(address)
        with weightd(store, share_of_ffn=0.5) as address:
            busy = [busy_row(address, clients) for clients in (1, 4)]
    worst = max(row["shared_memory_over_in_process"] for row in generations)
    targets = [
        Target("shared_memory_over_in_process_ratio", worst, "x", 1.03, "lower"),
        Target("acquire_300_p50_us", idle["acquire_p50_us"], "us", 30.0, "lower"),
    ]
    return machine, [*generations, idle, grpc_row, *busy], targets


def make_store(folder: Path, store: Path) -> None:
    """OPT with the bundles of OPT-6.7B and few, narrow other weights."""
    config = OPTConfig(
        vocab_size=512, hidden_size=HIDDEN, ffn_dim=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=32,
        max_position_embeddings=128, word_embed_proj_dim=HIDDEN, dtype="bfloat16",
    )  # fmt: skip
    disable_progress_bar()  # type: ignore[no-untyped-call]
    model: Any = OPTForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder / NAME)
    import_command = [sys.executable, "-m", "weightd", "import", str(folder / NAME), "--store", str(store)]
    subprocess.run(import_command, check=True, stdout=subprocess.DEVNULL)


@contextmanager
def weightd(store: Path, share_of_ffn: float) -> Iterator[str]:
    """Runs a private daemon whose pool holds this share of the FFN. Gives its address."""
    from flashclient.daemon.private import attach_or_start

    model = Store.open(store, readonly=True).model(NAME)
    dram = demand_of(model).minimum_bytes + int(share_of_ffn * model.bundles_file_bytes)
    address, daemon = attach_or_start(store, dram, timeout_s=60)
    try:
        yield address
    finally:
        if daemon is not None:
            daemon.stop()


def open_probe(connection: Connection) -> tuple[_native.Session, weightd_pb2.Model]:
    model = connection.describe(NAME)
    opened = connection.open_session(model, NEURONS)
    assert opened.share_slots == NEURONS, "the pool has no room for the probe's neurons"
    return _native.Session(opened.data_socket, opened.token, 60.0), model


def acquire_us(session: _native.Session, layer: int, cells: Any) -> tuple[float, float]:
    """Microseconds until an ACQUIRE is granted, and until the RELEASE after it has been sent."""
    start = time.perf_counter_ns()
    granted = session.acquire(layer, cells)
    acquired = time.perf_counter_ns()
    session.release(layer, cells)
    end = time.perf_counter_ns()
    assert granted == len(cells)
    return (acquired - start) / 1e3, (end - start) / 1e3


def percentiles(prefix: str, values: list[float]) -> Row:
    return {f"{prefix}_p50_us": float(np.percentile(values, 50)), f"{prefix}_p99_us": float(np.percentile(values, 99))}


def idle_row(address: str) -> Row:
    connection = Connection(address, 60.0)
    session, _ = open_probe(connection)
    random = np.random.default_rng(1)
    times = []
    warm = [random.choice(WIDTH, NEURONS, replace=False).astype(np.uint32) for _ in range(8)]
    for cells in warm:
        acquire_us(session, 0, cells)
    for i in range(CALLS):
        times.append(acquire_us(session, 0, warm[i % len(warm)]))
        time.sleep(PAUSE_S)
    session.close()
    connection.close()
    row: Row = {"what": "idle, warm", "neurons": NEURONS, "calls": CALLS}
    with_release = percentiles("with_release", [both for _, both in times])
    return row | percentiles("acquire", [first for first, _ in times]) | with_release


def round_trip_row(address: str) -> Row:
    connection = Connection(address, 60.0)
    times = []
    for _ in range(CALLS):
        start = time.perf_counter_ns()
        connection.stub.ListModels(weightd_pb2.ListModelsRequest())
        times.append((time.perf_counter_ns() - start) / 1e3)
    connection.close()
    return {"what": "gRPC round trip, idle", "calls": CALLS} | percentiles("round_trip", times)


def busy_client(address: str, seed: int) -> dict[str, list[float]]:
    """Generates text and times an ACQUIRE of random neurons before every FFN."""
    connection = Connection(address, 60.0)
    session, model = open_probe(connection)
    random = np.random.default_rng(seed)
    times: list[tuple[float, float]] = []

    def probe(*_: object) -> None:
        layer = int(random.integers(LAYERS))
        times.append(acquire_us(session, layer, random.choice(WIDTH, NEURONS, replace=False).astype(np.uint32)))

    with flashclient.FlashClient(NAME, address=address, timeout_s=60.0) as client:
        for layer in model.layers:
            client.model.get_submodule(layer.module).register_forward_pre_hook(probe)
        generation = client.model.generation_config
        assert generation is not None
        generation.eos_token_id = None  # random weights may produce the end token at any time
        start = time.perf_counter()
        client.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=BUSY_TOKENS, do_sample=False)
        seconds = time.perf_counter() - start
    session.close()
    connection.close()
    return {"acquire": [one for one, _ in times], "both": [both for _, both in times], "seconds": [seconds]}


def busy_row(address: str, clients: int) -> Row:
    command = [sys.executable, __file__, "--busy-client", address]
    children = [subprocess.Popen([*command, str(seed)], stdout=subprocess.PIPE, text=True) for seed in range(clients)]
    told = [json.loads(child.communicate()[0]) for child in children]
    row: Row = {"what": "inside a generation, random", "clients": clients, "neurons": NEURONS}
    row["calls"] = sum(len(one["acquire"]) for one in told)
    row |= percentiles("acquire", [value for one in told for value in one["acquire"]])
    row |= percentiles("with_release", [value for one in told for value in one["both"]])
    return row | {"tokens_per_s": BUSY_TOKENS * clients / max(one["seconds"][0] for one in told)}


if __name__ == "__main__":
    sys.exit(main())
