"""Fuzz target: the bytes of gRPC messages, sent to a real server of this process.

Every call ends in time, with an answer or a status that says what is wrong with the request, never with a fault of the
daemon; and a client beside it keeps getting the right bytes.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import grpc
from tiny_store import TinyModel, write_model

from weightd import serve
from weightd.call_bounds import SERVICE_NAME
from weightd.config import load_config
from weightd.fetch import Fetcher
from weightd.frontend import Frontend
from weightd.identity import Identities
from weightd.pressure import Triggers
from weightd.served_models import ServedModels
from weightd.server import WeightdService
from weightd.statistics import Statistics
from weightd.store import Store
from weightd_proto import weightd_pb2 as pb
from weightd_proto import weightd_pb2_grpc

DRAM_BYTES = 64 << 20
ANSWER_S = 10
UNARY = ("ListModels", "DescribeModel", "OpenSession", "Stats")
REFUSALS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,  # sessions that nobody attaches to last for seconds
    grpc.StatusCode.DATA_LOSS,  # a calibration that came with other bytes
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.PERMISSION_DENIED,
}
UNPARSED = ("Exception deserializing request!", "Error parsing message")  # gRPC's own answers to what is no message


class Served:
    """A server in a thread, and a channel to it."""

    def __init__(self) -> None:
        folder = Path(tempfile.mkdtemp(prefix="weightd-fuzz-"))
        logging.disable(logging.CRITICAL)
        self.model: TinyModel = write_model(folder / "store")
        address = f"unix:{folder / 'socket'}"
        arguments = ["--store", str(folder / "store"), "--listen", address, "--io-engine", "threads"]
        self._loop = asyncio.new_event_loop()
        self._told = asyncio.Event()
        ready = threading.Event()
        serving = _serve(arguments, folder, ready, self._told)
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(serving,), daemon=True)
        self._thread.start()
        assert ready.wait(60)
        self.channel = grpc.insecure_channel(address)
        self.stub = weightd_pb2_grpc.WeightdStub(self.channel)  # type: ignore[no-untyped-call]

    def stop(self) -> None:
        self.channel.close()
        self._loop.call_soon_threadsafe(self._told.set)
        self._thread.join()
        self._loop.close()
        logging.disable(logging.NOTSET)


async def _serve(arguments: list[str], folder: Path, ready: threading.Event, told: asyncio.Event) -> None:
    config = load_config(arguments)
    store = Store.open(config.store)
    data_socket = str(folder / "data")
    engine = serve._engine(config, DRAM_BYTES, data_socket, Triggers())
    models = ServedModels(store, engine)
    fetcher, statistics = Fetcher(store, models, engine), Statistics(engine, 0.0)
    service = WeightdService(models, fetcher, engine, Identities(config.store), data_socket, DRAM_BYTES, statistics)
    service.set_rules(config.allow, config.allow_publish)
    frontend = Frontend(config, service, None)
    await frontend.start(Identities(config.store))
    ready.set()
    await told.wait()
    await frontend.stop()
    frontend.close()
    service.close()


@cache
def served() -> Served:
    return Served()


def grpc_messages(data: bytes) -> None:
    """The first byte says which call, the rest is its message; PublishCalibration's are parted by their lengths."""
    here = served()
    kind, message = data[:1] or b"\0", data[1:]
    try:
        _call(here, kind[0] % (len(UNARY) + 2), message)
    except grpc.RpcError as error:
        details = error.details() or ""
        unparsed = any(words in details for words in UNPARSED)
        if not unparsed and error.code() not in REFUSALS:
            raise AssertionError(f"{error.code()}: {details}") from error
    _expect_right_bytes(here, len(data))


def _call(here: Served, method: int, message: bytes) -> None:
    raw: Any = here.channel  # whose types know no messages that are bytes
    if method < len(UNARY):
        raw.unary_unary(f"/{SERVICE_NAME}/{UNARY[method]}")(message, timeout=ANSWER_S)
    elif method == len(UNARY):
        for _ in raw.unary_stream(f"/{SERVICE_NAME}/Fetch")(message, timeout=ANSWER_S):
            pass
    else:
        parts = _parted(message, here.model)
        raw.stream_unary(f"/{SERVICE_NAME}/PublishCalibration")(parts, timeout=ANSWER_S)


def _parted(message: bytes, model: TinyModel) -> Iterator[bytes]:
    """Messages of two bytes' length each; the import that the header must name is put in where there is none."""
    while message:
        size_bytes = int.from_bytes(message[:2], "little") % 4096
        part, message = message[2 : 2 + size_bytes], message[2 + size_bytes :]
        try:
            request = pb.PublishCalibrationRequest.FromString(part)
            if request.WhichOneof("part") == "header" and not request.header.calibration.import_id:
                request.header.calibration.import_id = model.record.import_id
            yield request.SerializeToString()
        except Exception:
            yield part


def _expect_right_bytes(here: Served, number: int) -> None:
    neuron = number % len(here.model.bundles[1])
    wanted = pb.FetchRequest(model="tiny", bundles=pb.NeuronSet(layer=1, neurons=[neuron]))
    found = b"".join(part.data for part in here.stub.Fetch(wanted, timeout=ANSWER_S))
    assert found == here.model.bundles[1][neuron].tobytes()
