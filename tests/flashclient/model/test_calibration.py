"""The files of a calibration: a round trip through the format, and every refusal of its specification."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from numpy.typing import NDArray

from flashclient.errors import CalibrationError
from flashclient.model.predictor_file import (
    GateRows,
    LowRank,
    Predictor,
    Signs,
    arrays_of,
    quantized,
    read_predictors,
    write_predictors,
)
from weightd_proto import weightd_pb2

Header = dict[str, Any]


def make_record(dtype: str = "BF16", hidden: int = 52, neurons: tuple[int, ...] = (37, 41)) -> weightd_pb2.Model:
    layout = weightd_pb2.BundleLayout(hidden_size=hidden)
    layers = [weightd_pb2.Layer(neurons=count) for count in neurons]
    return weightd_pb2.Model(name="tiny", compute_dtype=dtype, bundle=layout, layers=layers, import_id=bytes(range(16)))


def low_rank(record: weightd_pb2.Model, ranks: tuple[int, ...] = (3, 16)) -> list[Predictor]:
    random = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> NDArray[Any]:
        if record.compute_dtype == "F32":
            return random.normal(size=(rows, columns)).astype(np.float32)
        return random.integers(0, 2**16, (rows, columns), dtype=np.uint16)

    return [
        LowRank(
            matrix(rank, record.bundle.hidden_size),
            matrix(layer.neurons, rank),
            random.normal(size=layer.neurons).astype(np.float32),
        )
        for rank, layer in zip(ranks, record.layers, strict=True)
    ]


def low_rank_in_bytes(record: weightd_pb2.Model) -> list[Predictor]:
    random = np.random.default_rng(1)
    return [
        quantized(predictor.input, random.normal(size=predictor.output.shape).astype(np.float32), predictor.bias)
        for predictor in low_rank(record)
        if isinstance(predictor, LowRank)
    ]


def signs(record: weightd_pb2.Model) -> list[Predictor]:
    random = np.random.default_rng(0)
    width = -(-record.bundle.hidden_size // 8)
    return [
        Signs(
            random.integers(0, 256, (layer.neurons, width), dtype=np.uint8),
            random.integers(-50, 50, layer.neurons, dtype=np.int32),
        )
        for layer in record.layers
    ]


def gates(record: weightd_pb2.Model) -> list[Predictor]:
    random = np.random.default_rng(0)
    return [
        GateRows(
            random.integers(-127, 128, (layer.neurons, record.bundle.hidden_size), dtype=np.int8),
            *(random.normal(size=layer.neurons).astype(np.float32) for _ in range(3)),
        )
        for layer in record.layers
    ]


def mapped(path: Path) -> NDArray[np.uint8]:
    return np.memmap(path, np.uint8, "r")


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("make", [low_rank, low_rank_in_bytes, signs, gates])
def test_round_trip(make: Callable[[weightd_pb2.Model], list[Predictor]], dtype: str, tmp_path: Path) -> None:
    record = make_record(dtype)
    predictors = make(record)
    write_predictors(tmp_path / "file", predictors, record)
    data = mapped(tmp_path / "file")
    read = read_predictors(data, record)
    for before, after in zip(predictors, read, strict=True):
        assert type(before) is type(after)
        for name, array in arrays_of(before).items():
            view = getattr(after, name)
            np.testing.assert_array_equal(view, array)
            assert view.dtype == array.dtype
            assert view.ctypes.data % 64 == 0
            assert np.shares_memory(view, data)
            assert not view.flags.writeable


def test_other_readers_of_safetensors_accept_the_file(tmp_path: Path) -> None:
    record = make_record("F32")
    predictors = low_rank(record)
    write_predictors(tmp_path / "file", predictors, record)
    tensors = safetensors.numpy.load_file(tmp_path / "file")
    assert isinstance(predictors[1], LowRank)
    np.testing.assert_array_equal(tensors["layers.1.output"], predictors[1].output)


def test_quantized_output_is_within_half_a_step() -> None:
    output = np.random.default_rng(0).normal(size=(40, 9)).astype(np.float32)
    output[3] = 0
    predictor = quantized(np.zeros((9, 4), np.float32), output, np.zeros(40, np.float32))
    assert predictor.scale is not None
    error = np.abs(predictor.output * predictor.scale[:, None] - output).max(axis=1)
    assert (error <= np.abs(output).max(axis=1) / 127 * 0.501).all()


def without(name: str) -> Callable[[Header], None]:
    return lambda header: header.pop(name)


def setting(name: str, key: str, value: object) -> Callable[[Header], None]:
    return lambda header: header[name].update({key: value})


REFUSED_HEADERS = {
    "no metadata": (without("__metadata__"), "its format is None"),
    "another format": (setting("__metadata__", "format", "pt"), "its format is 'pt'"),
    "a newer version": (setting("__metadata__", "format_version", "2"), "format version 2, this flashclient reads 1"),
    "an unknown kind": (setting("__metadata__", "kind", "oracle"), "its kind 'oracle' is not known"),
    "another import": (setting("__metadata__", "import_id", "00"), "it was made for another import"),
    "a missing layer": (without("layers.1.bias"), "it has no tensor layers.1.bias"),
    "an entry that is no object": (
        lambda header: header.update({"layers.0.bias": 3}),
        "it has no tensor layers.0.bias",
    ),
    "another shape": (setting("layers.0.output", "shape", [3, 37]), r"shape \[3, 37\], the model needs \[37, 3\]"),
    "rank zero": (setting("layers.0.input", "shape", [0, 52]), r"the model needs \[rank, 52\]"),
    "a shape of words": (setting("layers.0.input", "shape", ["a", 52]), "layers.0.input has shape"),
    "no shape": (setting("layers.0.input", "shape", None), "layers.0.input has shape None"),
    "another dtype": (setting("layers.0.input", "dtype", "F16"), "layers.0.input is F16, the model needs BF16"),
    "offsets of another size": (setting("layers.0.bias", "data_offsets", [0, 4]), "do not hold its 148 bytes"),
    "offsets before the data": (setting("layers.0.bias", "data_offsets", [-148, 0]), "do not hold its 148 bytes"),
    "offsets past the end": (setting("layers.0.bias", "data_offsets", [6400000, 6400148]), "it is cut off within"),
    "not aligned": (setting("layers.0.bias", "data_offsets", [4, 152]), "not at a multiple of 64"),
}


@pytest.mark.parametrize("fault", REFUSED_HEADERS)
def test_refused_headers(fault: str, tmp_path: Path) -> None:
    change, message = REFUSED_HEADERS[fault]
    record = make_record()
    write_predictors(tmp_path / "file", low_rank(record), record)
    data = (tmp_path / "file").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    text = text.ljust(-(-(8 + len(text)) // 64) * 64 - 8)
    changed = len(text).to_bytes(8, "little") + text + data[8 + length :]
    with pytest.raises(CalibrationError, match=message):
        read_predictors(np.frombuffer(changed, np.uint8), record)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "its 0 bytes are not a whole safetensors file"),
        (b"\x10\0\0\0\0\0\0\0{}", "its 10 bytes are not a whole"),
        (b"\xff" * 40, "its 40 bytes are not a whole"),
        (b"\x04\0\0\0\0\0\0\0{]  ", "its header is not JSON"),
        (b"\x04\0\0\0\0\0\0\0[]  ", "its header is not a JSON object"),
        (b"\x04\0\0\0\0\0\0\0\xff\xfe\xff\xfe", "its header is not JSON"),
    ],
)
def test_refused_bytes(data: bytes, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        read_predictors(np.frombuffer(data, np.uint8), make_record())


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    record = make_record()
    write_predictors(tmp_path / "file", low_rank(record), record)
    data = np.fromfile(tmp_path / "file", np.uint8)
    padding_bytes = 64 - 41 * 4 % 64  # what the last tensor is padded with
    for length in range(0, len(data) - padding_bytes, 97):
        with pytest.raises(CalibrationError, match="run `flashclient calibrate tiny` again"):
            read_predictors(data[:length], record)
