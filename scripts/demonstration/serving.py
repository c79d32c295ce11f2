"""Steps of both parts of the demo: run a command, serve a store with weightd, and ask for its statistics."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from weightd.serving.served_models import demand_of
from weightd.store.store import Store
from weightd_proto import weightd_pb2, weightd_pb2_grpc

START_WITHIN_S = 60
# The minimum of --dram already holds a few cells; without these the pool could exceed half of the FFN by as many.
SPARE_CELLS = 16


def dram_for_half(store: Path, name: str) -> int:
    """The --dram with which the pool holds at most half of the model's FFN weights."""
    model = Store.open(store, readonly=True).model(name)
    return demand_of(model).minimum_bytes + model.bundles_file_bytes // 2 - SPARE_CELLS * model.bundle.cell_bytes


def ffn_bytes(store: Path, name: str) -> int:
    return Store.open(store, readonly=True).model(name).bundles_file_bytes


def run(module: str, *arguments: str) -> str:
    """Runs `python -m module arguments` and returns its standard output. Standard error is passed through."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in (0, 1) or (done.returncode == 1 and not done.stdout):
        sys.exit(done.returncode)
    return done.stdout


@contextmanager
def serving(store: Path, dram_bytes: int, folder: Path) -> Iterator[str]:
    """Runs a weightd that ends with this process. Gives its address."""
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


def stats_of(address: str) -> weightd_pb2.StatsResponse:
    with grpc.insecure_channel(address) as channel:
        stub = weightd_pb2_grpc.WeightdStub(channel)  # type: ignore[no-untyped-call]
        answer = stub.Stats(weightd_pb2.StatsRequest())
        assert isinstance(answer, weightd_pb2.StatsResponse)
        return answer


def facts(rows: list[tuple[str, str]]) -> str:
    """A table with one fact per line."""
    return "\n".join(f"{name:24}{value}" for name, value in rows)
