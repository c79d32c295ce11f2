"""A transformers model cut into bundles and resident bytes by hand: what the client is tested on without a daemon.

Bundles come in a random placement. `ArraySource` gives them from this process's memory, `FetchServer` over gRPC.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
import numpy as np
import torch
from grpc_health.v1 import health, health_pb2_grpc
from numpy.typing import NDArray
from safetensors.torch import save
from torch_threads import one_thread
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flashclient import FlashClient
from flashclient._native import LentMemory, checksum
from flashclient.architectures import architecture_of
from flashclient.source import Chunk, Counters, LeaseRefusedError, SessionLostError
from weightd_proto import weightd_pb2, weightd_pb2_grpc

STORED_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
MESSAGE_BYTES = 2**20


@dataclass(frozen=True)
class CutModel:
    """What a store would hold. bundles[layer] is [neurons, bundle_bytes] uint8, in placement order."""

    record: weightd_pb2.Model
    bundles: list[NDArray[np.uint8]]
    placements: list[NDArray[np.uint32]]
    resident: bytes
    files: dict[str, bytes]

    def save_files(self, folder: Path) -> Path:
        for name, data in self.files.items():
            (folder / name).write_bytes(data)
        return folder


def cut(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, name: str = "tiny") -> CutModel:
    """Cuts `model`, whose FFN matrices are all of one dtype."""
    state = {key: tensor.detach() for key, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    _, architecture = architecture_of(model.config)
    random = np.random.default_rng(0)
    modules = sorted(
        {key[: -len(architecture.weights[0]) - 1] for key in state if key.endswith(architecture.weights[0])}
    )
    bundles, placements, layers = [], [], []
    for module in modules:
        *rows, down = (state.pop(f"{module}.{weight}") for weight in architecture.weights)
        placement = random.permutation(len(rows[0])).astype(np.uint32)
        whole = torch.stack([*rows, down.T], dim=1)[torch.from_numpy(placement.astype(np.int64))]
        bundles.append(whole.contiguous().view(len(placement), -1).view(torch.uint8).numpy())
        placements.append(placement)
        layers.append(weightd_pb2.Layer(module=module, neurons=len(placement)))
    layout = weightd_pb2.BundleLayout(
        dtype=STORED_DTYPES[down.dtype],
        parts=["gate", "up", "down"][-len(architecture.weights) :],
        hidden_size=down.shape[0],
        bundle_bytes=bundles[0].shape[1],
    )
    resident = save({key: tensor.contiguous() for key, tensor in state.items()})
    record = weightd_pb2.Model(name=name, bundle=layout, layers=layers, resident_file_bytes=len(resident))
    record.resident.extend(_tensors(resident))
    files = _files(model, tokenizer)
    for key, data in files.items():
        sum_of = checksum(np.frombuffer(data, np.uint8))
        record.files.append(weightd_pb2.File(name=key, size_bytes=len(data), checksum=sum_of))
    return CutModel(record, bundles, placements, resident, files)


def _tensors(resident: bytes) -> Iterator[weightd_pb2.Tensor]:
    header_bytes = int.from_bytes(resident[:8], "little")
    for key, entry in json.loads(resident[8 : 8 + header_bytes]).items():
        begin, end = entry["data_offsets"]
        yield weightd_pb2.Tensor(
            name=key,
            dtype=entry["dtype"],
            shape=entry["shape"],
            offset_bytes=8 + header_bytes + begin,
            size_bytes=end - begin,
        )


def _files(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.config.save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in folder.iterdir()}


class ArraySource:
    """See BundleSource: chunks of the given sizes, over and over; bundles lie apart by an odd number of elements.

    Cells of `bundles_per_cell` bundles arrive a few at a time, in an order of their own. The test sets `lease_limit`
    and `share_cells`; `refusals` of the next cells asked for are refused, `losses` of the next results are lost.
    """

    def __init__(
        self, model: CutModel, chunk_sizes: Sequence[int], bundles_per_cell: int = 1, predictors: bytes = b""
    ) -> None:
        self._chunk_sizes = chunk_sizes
        gap_bytes = 12
        self._layers = [np.zeros((len(rows), rows.shape[1] + gap_bytes), np.uint8) for rows in model.bundles]
        for stored, rows in zip(self._layers, model.bundles, strict=True):
            stored[:, : rows.shape[1]] = rows
        self._lent = [LentMemory(stored) for stored in self._layers]
        self.resident = np.frombuffer(model.resident, np.uint8).copy()
        self.opened = 0  # iterators not yet closed
        self.idle_calls = 0
        self.bundles_per_cell = bundles_per_cell
        self.stride_bytes = self._layers[0].shape[1]
        self.lease_limit = self.share_cells = 1_000_000
        self.refusals = 0
        self.losses = 0  # of the next results
        self.reattached: list[str] = []
        self.acquired: list[tuple[int, int]] = []  # (layer, cell)
        self.cells_held = self.cells_held_most = 0
        self._tables = [np.zeros(-(-len(rows) // bundles_per_cell), np.uint64) for rows in self._layers]
        self._coming: list[tuple[int, int]] = []
        self._random = np.random.default_rng(0)
        self._predictors = aligned(predictors)

    def chunks(self, layer: int) -> Generator[Chunk, None, None]:
        stored = self._layers[layer]
        addresses = np.uint64(stored.ctypes.data) + np.arange(len(stored), dtype=np.uint64) * np.uint64(stored.shape[1])
        self.opened += 1
        try:
            first = turn = 0
            while first < len(addresses):
                size = self._chunk_sizes[turn % len(self._chunk_sizes)]
                yield Chunk(first, addresses[first : first + size])
                first, turn = first + size, turn + 1
        finally:
            self.opened -= 1

    def predictors(self) -> NDArray[np.uint8]:
        return self._predictors

    def addresses(self, layer: int) -> NDArray[np.uint64]:
        return self._tables[layer]

    def exchange(self, layer: int, acquire: NDArray[np.uint32], release: NDArray[np.uint32]) -> None:
        assert not self._coming, "what was asked for has not been waited for"
        assert self._tables[layer][release].all(), "what is not held cannot be given back"
        assert not self._tables[layer][acquire].any(), "asked for twice"
        self._tables[layer][release] = 0
        self.cells_held -= len(release)
        assert self.cells_held + len(acquire) <= max(self.lease_limit, self.share_cells)
        self._coming = [(layer, int(cell)) for cell in self._random.permutation(acquire)]
        self.acquired += self._coming

    def arrived(self) -> int:
        for _ in range(min(7, len(self._coming))):
            layer, cell = self._coming.pop()
            if self.refusals > 0:
                self.refusals -= 1
                self._coming.clear()
                raise LeaseRefusedError
            first_bundle = self._layers[layer].ctypes.data + cell * self.bundles_per_cell * self.stride_bytes
            self._tables[layer][cell] = first_bundle
            self.cells_held += 1
        self.cells_held_most = max(self.cells_held_most, self.cells_held)
        return len(self._coming)

    def idle(self) -> None:
        self.idle_calls += 1
        self._coming.clear()
        for table in self._tables:
            table[:] = 0
        self.cells_held = 0

    def require_open(self) -> None:
        if self.losses > 0:
            self.losses -= 1
            raise SessionLostError("weightd is gone")

    def reattach(self, lost: SessionLostError) -> None:
        self.reattached.append(str(lost))
        self.idle()

    def counters(self) -> Counters:
        return Counters()

    def close(self) -> None:
        self._layers.clear()


def aligned(data: bytes) -> NDArray[np.uint8]:
    """A copy at an address that is a multiple of 64."""
    padded = np.zeros(len(data) + 64, np.uint8)
    begin = -padded.ctypes.data % 64
    padded[begin : begin + len(data)] = np.frombuffer(data, np.uint8)
    return padded[begin : begin + len(data)]


@contextmanager
def clients_of(models: Sequence[CutModel], folder: Path) -> Iterator[dict[str, FlashClient]]:
    """A client of each model, by the model's name, which computes on one thread."""
    with one_thread(), FetchServer(models, folder / "socket") as server, ExitStack() as opened:
        clients = (FlashClient(model.record.name, address=server.address, transport="grpc") for model in models)
        yield {client.record.name: opened.enter_context(client) for client in clients}


class FetchServer:
    """A gRPC server of cut models on a unix socket: what weightd answers without shared memory."""

    def __init__(self, models: Sequence[CutModel], socket: Path) -> None:
        self._models = {model.record.name: model for model in models}
        self.address = f"unix:{socket}"
        self.bundles_sent: list[tuple[int, int]] = []  # (layer, position)
        self.failures: list[tuple[grpc.StatusCode, str]] = []  # of the next fetches of bundles
        self.calibrations: dict[str, dict[str, bytes]] = {}  # published: files by model

    def __enter__(self) -> FetchServer:
        self._server = grpc.server(ThreadPoolExecutor(8))
        weightd_pb2_grpc.add_WeightdServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        servicer = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(servicer, self._server)
        self._server.add_insecure_port(self.address)
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        self._server.stop(None).wait()

    def Stats(self, request: weightd_pb2.StatsRequest, context: Any) -> weightd_pb2.StatsResponse:
        return weightd_pb2.StatsResponse()

    def ListModels(self, request: weightd_pb2.ListModelsRequest, context: Any) -> weightd_pb2.ListModelsResponse:
        return weightd_pb2.ListModelsResponse(names=list(self._models))

    def OpenSession(self, request: weightd_pb2.OpenSessionRequest, context: Any) -> None:
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "no shared memory here")

    def DescribeModel(self, request: weightd_pb2.DescribeModelRequest, context: Any) -> weightd_pb2.Model:
        if request.name not in self._models:
            context.abort(grpc.StatusCode.NOT_FOUND, f"no model '{request.name}': there is {', '.join(self._models)}")
        return self._models[request.name].record

    def PublishCalibration(
        self, requests: Iterator[weightd_pb2.PublishCalibrationRequest], context: Any
    ) -> weightd_pb2.Calibration:
        header = next(requests).header
        record, offered = self._models[header.model].record, header.calibration
        data = b"".join(request.data for request in requests)
        if offered.import_id != record.import_id:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"a calibration of another import of '{record.name}'")
        if len(offered.files) != 3:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"a calibration of {len(offered.files)} files")
        files = {}
        for file in offered.files:
            files[file.name], data = data[: file.size_bytes], data[file.size_bytes :]
            assert len(files[file.name]) == file.size_bytes
        assert not data
        self.calibrations[header.model] = files
        offered.version = record.calibration.version + 1
        record.calibration.CopyFrom(offered)
        return record.calibration

    def Fetch(self, request: weightd_pb2.FetchRequest, context: Any) -> Iterator[weightd_pb2.FetchResponse]:
        data = self._data(self._models[request.model], request, context)
        for begin in range(0, len(data), MESSAGE_BYTES):
            yield weightd_pb2.FetchResponse(data=data[begin : begin + MESSAGE_BYTES])

    def _data(self, model: CutModel, request: weightd_pb2.FetchRequest, context: Any) -> bytes:
        kind = request.WhichOneof("what")
        if kind == "resident":
            return model.resident[request.resident.offset :][: request.resident.size]
        if kind == "file":
            return model.files[request.file]
        if kind == "placement_of":
            return model.placements[request.placement_of].astype("<u4").tobytes()
        if kind == "calibration":
            return self.calibrations[request.model][request.calibration.name]
        if self.failures:
            context.abort(*self.failures.pop(0))
        layer = request.bundles.layer
        positions = [p for part in request.bundles.positions for p in range(part.begin, part.end)]
        self.bundles_sent += [(layer, position) for position in positions]
        return model.bundles[layer][positions].tobytes()
