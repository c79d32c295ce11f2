"""GrpcSource: the bytes that it gives, what its pool keeps, and what happens when the daemon fails."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from types import FrameType, ModuleType, TracebackType
from typing import Any

import grpc._channel
import numpy as np
import pytest
from cut_model import CutModel, FetchServer
from numpy.typing import NDArray

from flashclient._native import Ffn, LowRankPredictor, PredictStep, Workers
from flashclient.daemon import call_threads
from flashclient.daemon.channel import Connection, SessionLostError
from flashclient.errors import (
    CorruptionError,
    DaemonLostError,
    ModelError,
    ModelNotFoundError,
    NoDaemonError,
    OptionError,
    RefusedError,
)
from flashclient.source import grpc_cells
from flashclient.source.bundle_source import retry_on_loss
from flashclient.source.grpc_chunks import GrpcSource, chunk_bundles_for, cut_spans
from weightd_proto import weightd_pb2
from weightd_proto.encodings import parts_of, plain

BUNDLE_BYTES = 96
LAYERS, NEURONS = 3, 70
FFN_BYTES = LAYERS * NEURONS * BUNDLE_BYTES


@pytest.fixture
def model() -> CutModel:
    random = np.random.default_rng(0)
    bundles = [random.integers(0, 256, (NEURONS, BUNDLE_BYTES), dtype=np.uint8) for _ in range(LAYERS)]
    layout = weightd_pb2.BundleLayout(
        parts=parts_of(("gate", "up", "down"), plain("F32")), hidden_size=8, bundle_bytes=BUNDLE_BYTES
    )
    layers = [weightd_pb2.Layer(module=f"layers.{i}", neurons=NEURONS) for i in range(LAYERS)]
    resident = random.bytes(3 * 2**20)
    record = weightd_pb2.Model(
        name="m", compute_dtype="F32", bundle=layout, layers=layers, resident_file_bytes=len(resident)
    )
    return CutModel(record, bundles, [], resident, {})


@contextmanager
def opened(
    model: CutModel, folder: Path, pool_bytes: int | None = None, timeout_s: float = 10.0
) -> Iterator[tuple[GrpcSource, FetchServer]]:
    with FetchServer([model], folder / "socket") as server:
        connection = Connection(server.address, timeout_s)
        source = GrpcSource(connection, model.record, pool_bytes=pool_bytes)
        try:
            yield source, server
        finally:
            connection.close()
            source.close()


def read_layer(source: GrpcSource, layer: int) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    rows: list[Any] = []
    for chunk in source.chunks(layer):
        assert chunk.first == len(rows)
        rows += [np.frombuffer(ctypes.string_at(int(address), BUNDLE_BYTES), np.uint8) for address in chunk.addresses]
    return np.stack(rows)


@pytest.mark.parametrize("pool_bytes", [2 * BUNDLE_BYTES, FFN_BYTES // 10, FFN_BYTES // 2, FFN_BYTES, None])
def test_gives_every_bundle_in_order(model: CutModel, tmp_path: Path, pool_bytes: int | None) -> None:
    with opened(model, tmp_path, pool_bytes) as (source, _):
        for _ in range(3):
            for layer in range(LAYERS):
                assert np.array_equal(read_layer(source, layer), model.bundles[layer])
            source.idle()
        assert source.resident.tobytes() == model.resident
        counters = source.counters()
        assert counters.read_bytes == counters.misses * BUNDLE_BYTES


def test_layers_in_any_order(model: CutModel, tmp_path: Path) -> None:
    with opened(model, tmp_path, FFN_BYTES // 4) as (source, _):
        for layer in (2, 0, 0, 1, 2, 1):
            assert np.array_equal(read_layer(source, layer), model.bundles[layer])


def test_iterator_left_early(model: CutModel, tmp_path: Path) -> None:
    with opened(model, tmp_path, FFN_BYTES // 4) as (source, _):
        for layer in (0, 1, 0):
            chunks = source.chunks(layer)
            next(chunks)
            chunks.close()
        assert np.array_equal(read_layer(source, 2), model.bundles[2])


def test_a_pool_of_all_fetches_each_bundle_once(model: CutModel, tmp_path: Path) -> None:
    with opened(model, tmp_path, 2 * FFN_BYTES) as (source, server):
        for layer in [0, 1, 2] * 4:
            read_layer(source, layer)
        assert len(server.bundles_sent) == len(set(server.bundles_sent)) == LAYERS * NEURONS


def test_half_a_pool_serves_near_half_of_a_circle(
    model: CutModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "flashclient.source.grpc_chunks.CHUNK_BYTES", 2 * BUNDLE_BYTES
    )  # 105 chunks, so that 4 ahead are few
    with opened(model, tmp_path, FFN_BYTES // 2) as (source, _):
        for layer in [0, 1, 2] * 2:
            read_layer(source, layer)
        before = source.counters()
        for layer in [0, 1, 2] * 10:
            read_layer(source, layer)
        counted = source.counters().since(before)
        assert 0.40 < counted.hits / (counted.hits + counted.misses) <= 0.52


def test_chunks_fit_twice_into_the_pool(model: CutModel) -> None:
    for pool_bytes in (2 * BUNDLE_BYTES, 5 * BUNDLE_BYTES, FFN_BYTES, 2**30):
        size = chunk_bundles_for(model.record, pool_bytes)
        assert 2 * size * BUNDLE_BYTES <= pool_bytes
        spans = cut_spans(model.record, size)
        assert [(s.layer, p) for s in spans for p in range(s.begin, s.end)] == [
            (layer, position) for layer in range(LAYERS) for position in range(NEURONS)
        ]
    with pytest.raises(OptionError, match=r"pool_bytes=191 is too small: two bundles of this model take 192"):
        chunk_bundles_for(model.record, 2 * BUNDLE_BYTES - 1)


def test_corruption_is_raised_and_does_not_stick(model: CutModel, tmp_path: Path) -> None:
    with opened(model, tmp_path) as (source, server):
        server.failures.append(
            (grpc.StatusCode.DATA_LOSS, "model 'm' layer 0 neuron 3: bytes differ from the checksum")
        )
        with pytest.raises(CorruptionError, match="layer 0 neuron 3"):
            [read_layer(source, layer) for layer in range(LAYERS)]  # any of the chunks fetched ahead may fail
        source.idle()
        assert np.array_equal(read_layer(source, 0), model.bundles[0])


def test_an_error_of_a_fetch_ahead_is_not_that_of_the_next_generation(
    model: CutModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, fails = threading.Event(), threading.Event()
    with opened(model, tmp_path) as (source, server):
        answer = server._data

        def data(of: CutModel, request: weightd_pb2.FetchRequest, context: Any) -> bytes:
            if request.bundles.layer == 1 and not asked.is_set():
                asked.set()
                fails.wait()
                context.abort(grpc.StatusCode.DATA_LOSS, "model 'm' layer 1 neuron 3: bytes differ from the checksum")
            return answer(of, request, context)

        monkeypatch.setattr(server, "_data", data)
        read_layer(source, 0)
        asked.wait()
        source.idle()  # the generation ends, and the bundle is repaired
        fails.set()
        assert np.array_equal(read_layer(source, 1), model.bundles[1])


def test_a_daemon_that_comes_back_in_time_is_not_noticed(model: CutModel, tmp_path: Path) -> None:
    with opened(model, tmp_path) as (source, server):
        server.failures += [(grpc.StatusCode.UNAVAILABLE, "stopping")] * 3
        assert np.array_equal(retry_on_loss(source, lambda: read_layer(source, 0)), model.bundles[0])
        assert not server.failures


class FrozenClock:
    """Replaces the module `time`. The test moves `now_s` as if a process had been frozen; sleeping takes no time."""

    now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


def test_a_process_that_was_frozen_does_not_take_that_for_an_absent_daemon(
    model: CutModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FrozenClock()
    attempts = 0

    def attach() -> int:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            clock.now_s += 600  # and weightd, frozen as well, has not come back yet
        if attempts < 4:
            raise SessionLostError("nobody is there")
        return attempts

    with opened(model, tmp_path, timeout_s=30) as (source, _):
        monkeypatch.setattr("flashclient.daemon.channel.time", clock)
        assert source._connection.attach_again(attach, SessionLostError("gone")) == 4


def test_a_daemon_that_does_not_come_back_is_lost(model: CutModel, tmp_path: Path) -> None:
    with opened(model, tmp_path, timeout_s=0.3) as (source, server):
        server.stop()
        with pytest.raises(
            DaemonLostError, match=r"has not come back within 0\.3 s: start it again, or raise timeout_s="
        ):
            retry_on_loss(source, lambda: read_layer(source, 0))


def test_a_daemon_that_is_lost_again_and_again_is_an_error(model: CutModel, tmp_path: Path) -> None:
    with opened(model, tmp_path) as (source, server):
        server.failures += [(grpc.StatusCode.UNAVAILABLE, "stopping")] * 1000
        with pytest.raises(DaemonLostError, match="lost 5 times within one layer"):
            retry_on_loss(source, lambda: read_layer(source, 0))


def test_too_few_bytes_are_refused(model: CutModel, tmp_path: Path) -> None:
    model.bundles[1] = model.bundles[1][:, :90]
    with opened(model, tmp_path) as (source, _), pytest.raises(RefusedError, match=r"sent \d+ of \d+ bytes"):
        read_layer(source, 1)


def test_close_wakes_a_waiting_reader(model: CutModel, tmp_path: Path) -> None:
    with FetchServer([model], tmp_path / "socket") as server:
        connection = Connection(server.address, 60.0)
        source = GrpcSource(connection, model.record)
        server.stop()
        raised: list[BaseException] = []

        def read() -> None:
            try:
                retry_on_loss(source, lambda: read_layer(source, 0))
            except DaemonLostError as error:
                raised.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        connection.close()
        source.close()
        reader.join(10)
        assert not reader.is_alive()
        assert len(raised) == 1


def test_no_daemon_says_how_to_start_one(tmp_path: Path) -> None:
    address = f"unix:{tmp_path / 'none'}"
    with pytest.raises(
        NoDaemonError, match=r"no weightd at unix:.*: start it with `weightd --store DIR`, or pass store="
    ):
        Connection(address, 5.0)


def test_unknown_model_names_those_there_are(model: CutModel, tmp_path: Path) -> None:
    with FetchServer([model], tmp_path / "socket") as server:
        connection = Connection(server.address, 5.0)
        with pytest.raises(ModelNotFoundError, match="no model 'other': there is m"):
            connection.describe("other")
        connection.close()


def test_a_model_that_is_stored_in_an_unknown_way_needs_another_flashclient(model: CutModel, tmp_path: Path) -> None:
    model.record.compute_dtype = "F4"
    with FetchServer([model], tmp_path / "socket") as server:
        connection = Connection(server.address, 5.0)
        with pytest.raises(ModelError, match=r"cannot read model 'm': compute dtype 'F4', .*; upgrade flashclient"):
            connection.describe("m")
        connection.close()


def test_files_may_not_leave_their_folder(model: CutModel, tmp_path: Path) -> None:
    model.record.files.add(name="../escaped")
    model.files["../escaped"] = b"x"
    with FetchServer([model], tmp_path / "socket") as server:
        connection = Connection(server.address, 5.0)
        with pytest.raises(RefusedError, match="would leave its folder"):
            connection.save_files(model.record, tmp_path)
        connection.close()


# ---- cells, as predict mode requests them ----


def settle(source: GrpcSource) -> dict[int, bytes]:
    """Waits for all requested cells. Returns the bytes of each."""
    addresses: dict[int, int] = {}
    while arrived := source.cells.arrived():
        addresses |= dict(arrived)
    return {cell: ctypes.string_at(address, BUNDLE_BYTES) for cell, address in sorted(addresses.items())}


def expected(model: CutModel, layer: int, cells: Iterable[int]) -> dict[int, bytes]:
    return {cell: model.bundles[layer][cell].tobytes() for cell in cells}


def test_cells_are_fetched_once_while_there_is_room(model: CutModel, tmp_path: Path) -> None:
    with opened(model, tmp_path) as (source, server):
        source.cells.exchange(1, [7, 3, 69], [])
        assert settle(source) == expected(model, 1, (3, 7, 69))
        source.cells.exchange(1, [4], [3, 69])
        assert settle(source) == expected(model, 1, [4])
        sent = len(server.bundles_sent)
        source.cells.exchange(1, [3], [])
        assert settle(source) == expected(model, 1, [3])
        assert len(server.bundles_sent) == sent == 4
        assert source.counters().hits == 1


def test_a_full_pool_gives_up_what_is_not_held(model: CutModel, tmp_path: Path) -> None:
    with opened(model, tmp_path, pool_bytes=4 * BUNDLE_BYTES) as (source, server):
        assert source.cells.lease_limit() == source.cells.share_slots() == 4
        source.cells.exchange(0, [0, 1, 2, 3], [])
        first = dict(source.cells.arrived())
        source.cells.exchange(0, [4, 5], [1, 2])
        assert settle(source) == expected(model, 0, (4, 5))
        for cell in (0, 3):
            assert ctypes.string_at(first[cell], BUNDLE_BYTES) == model.bundles[0][cell].tobytes(), "it was held"
        source.cells.exchange(0, [1], [0])
        assert settle(source) == expected(model, 0, [1])
        assert server.bundles_sent[-1] == (0, 1), "it had given way"


def test_chunks_and_cells_take_turns(model: CutModel, tmp_path: Path) -> None:
    with opened(model, tmp_path, pool_bytes=20 * BUNDLE_BYTES) as (source, _):
        for layer in range(LAYERS):
            rows = []
            for chunk in source.chunks(layer):
                rows += [ctypes.string_at(int(address), BUNDLE_BYTES) for address in chunk.addresses]
            assert rows == [row.tobytes() for row in model.bundles[layer]]
            source.cells.exchange(layer, list(range(9)), [])
            assert settle(source) == expected(model, layer, range(9))


def test_cells_are_asked_for_again_when_the_daemon_comes_back(model: CutModel, tmp_path: Path) -> None:
    with opened(model, tmp_path) as (source, server):
        server.failures += [(grpc.StatusCode.UNAVAILABLE, "gone"), (grpc.StatusCode.UNAVAILABLE, "still gone")]

        def acquire() -> dict[int, bytes]:
            source.cells.exchange(0, [5, 6], [])
            return settle(source)

        assert retry_on_loss(source, acquire) == expected(model, 0, (5, 6))
        server.failures.append((grpc.StatusCode.DATA_LOSS, "layer 0 neuron 9 differs"))
        source.cells.exchange(0, [9], [])
        with pytest.raises(CorruptionError, match="neuron 9"):
            settle(source)
        source.cells.exchange(0, [9], [5])
        assert settle(source) == expected(model, 0, [9])


class Interruption:
    """Raises KeyboardInterrupt in this thread at the `line`-th line that it runs of `module`."""

    def __init__(self, module: ModuleType, line: int) -> None:
        self._file = module.__file__
        self._lines_left = line
        self.where = ""  # the place at which it was raised

    def __enter__(self) -> Interruption:
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        sys.settrace(self._before)

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        if code.co_filename != self._file or is_of_destructor(frame):
            return None
        self._lines_left -= event == "line"
        if self._lines_left == 0 and not self.where:
            self.where = f"{code.co_filename}:{frame.f_lineno}"
            raise KeyboardInterrupt
        return self._trace


def is_of_destructor(frame: FrameType | None) -> bool:
    """Whether a destructor runs. Python prints the errors of destructors and does not raise them."""
    while frame is not None:
        if frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of half-made objects
def test_a_fetch_that_is_interrupted_anywhere_harms_no_later_call(model: CutModel, tmp_path: Path) -> None:
    wanted = weightd_pb2.FetchRequest(model="m", resident=weightd_pb2.ByteRange(offset=0, size=100))
    with FetchServer([model], tmp_path / "socket") as server:
        connection = Connection(server.address, timeout_s=10)
        with Interruption(grpc._channel, 1) as never, suppress(KeyboardInterrupt):
            assert b"".join(connection.fetch(wanted)) == model.resident[:100]
        assert not never.where, "gRPC's locks do not bear an interrupt, so its code may not run in this thread"
        for line in count(1):
            with Interruption(call_threads, line) as interruption, suppress(KeyboardInterrupt):
                assert b"".join(connection.fetch(wanted)) == model.resident[:100]
            assert b"".join(connection.fetch(wanted)) == model.resident[:100]
            if not interruption.where:
                break
        connection.close()
    assert line > 10, "no call was interrupted"
    gc.collect()  # an interrupt may come before a cycle of references is broken
    assert not [thread for thread in threading.enumerate() if thread.name == "flashclient-call" and waits(thread)]


def waits(thread: threading.Thread) -> bool:
    """Whether the thread goes on, although it was told to end."""
    thread.join(timeout=10)
    return thread.is_alive()


def test_a_step_that_is_interrupted_anywhere_leaves_nothing_half_done(model: CutModel, tmp_path: Path) -> None:
    """The interrupt comes in Python code that a native step calls. The next step gives the right bits, and the pool has
    room for it."""
    with opened(model, tmp_path, pool_bytes=8 * BUNDLE_BYTES) as (source, _):
        workers, layout = Workers(1), model.record.bundle
        kernels = Ffn(workers, [part.encoding for part in layout.parts], layout.hidden_size, "silu")
        first, second = (wanting(workers, model, cells) for cells in (range(6), range(4, 10)))
        window = source.open_window(2)
        x = np.random.default_rng(0).standard_normal((1, layout.hidden_size)).astype(np.float32)
        y = [np.empty_like(x) for _ in range(3)]

        def step(token: int, predictor: LowRankPredictor, out: NDArray[np.float32]) -> None:
            PredictStep(kernels, window, [predictor]).run(0, token, 1, 1, None, x, out)

        step(0, second, y[0])
        for line in count(1):
            with Interruption(grpc_cells, line) as interruption, suppress(KeyboardInterrupt):
                step(1, first, y[1])
                step(2, second, y[1])
                source.idle()
            step(3, second, y[2])
            assert y[2].tobytes() == y[0].tobytes(), interruption.where
            assert window.cells_held == 6, interruption.where
            source.idle()
            assert window.cells_held == 0, interruption.where
            if not interruption.where:
                break
    assert line > 50, "nothing was interrupted"


def wanting(workers: Workers, model: CutModel, cells: range) -> LowRankPredictor:
    """A predictor that wants these neurons, whatever the input."""
    record = model.record
    bias = np.full(record.layers[0].neurons, -1, np.float32)
    bias[cells.start : cells.stop] = 1
    rows = np.zeros((1, record.bundle.hidden_size), np.float32), np.zeros((len(bias), 1), np.float32)
    return LowRankPredictor(workers, "F32", *rows, bias)
