"""Predictors whose answers are known: made from a model's own rows, and written as a calibration's file."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flashclient.calibration import PREDICTORS_FILE, REPORT_FILE, STATISTICS_FILE, LowRank, write_predictors
from flashclient.channel import Connection
from flashclient.model import DTYPES
from flashclient.publishing import publish
from weightd_proto import weightd_pb2

MARGIN = 1e-3  # far above what the rounding of two sums can differ by
RowsOfLayer = Callable[[int], NDArray[np.float32]]  # layer -> [neurons, hidden_size], by position


def everything(record: weightd_pb2.Model) -> bytes:
    """Every row wants every neuron."""
    hidden = record.bundle.hidden_size
    layers = [
        LowRank(_bits(np.zeros((1, hidden)), record), _bits(np.zeros((layer.neurons, 1)), record), _ones(layer.neurons))
        for layer in record.layers
    ]
    return _file(layers, record)


def oracle(record: weightd_pb2.Model, rows: RowsOfLayer, biases: Sequence[NDArray[np.float32] | None]) -> bytes:
    """A row wants a neuron iff the gate, or the up row where there is none, opens it: all that fires with ReLU."""
    layers = []
    for index, layer in enumerate(record.layers):
        bias = biases[index]
        opening = np.full(layer.neurons, MARGIN, np.float32) + (0 if bias is None else bias)
        unit = _bits(np.eye(record.bundle.hidden_size), record)
        layers.append(LowRank(unit, _bits(rows(index), record), opening.astype(np.float32)))
    return _file(layers, record)


def lossy(record: weightd_pb2.Model, rank: int = 5, bias: float = -0.6, seed: int = 0) -> bytes:
    """A row wants some neurons, and others than another row does."""
    random = np.random.default_rng(seed)
    layers = []
    for layer in record.layers:
        rows = random.standard_normal((rank, record.bundle.hidden_size)) / np.sqrt(record.bundle.hidden_size)
        output = random.standard_normal((layer.neurons, rank)) / np.sqrt(rank)
        layers.append(LowRank(_bits(rows, record), _bits(output, record), np.full(layer.neurons, bias, np.float32)))
    return _file(layers, record)


def described(record: weightd_pb2.Model, predictors: bytes, mode: str = "predict") -> weightd_pb2.Calibration:
    """What the record of a model says of them."""
    file = weightd_pb2.File(name=PREDICTORS_FILE, size_bytes=len(predictors))
    return weightd_pb2.Calibration(version=1, import_id=record.import_id, mode=mode, files=[file])


def publish_predictors(address: str, name: str, make: Callable[[weightd_pb2.Model], bytes]) -> None:
    """Makes what `make` says of model `name` its newest calibration."""
    connection = Connection(address, 20.0)
    record = connection.describe(name)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / PREDICTORS_FILE).write_bytes(make(record))
        (Path(folder) / STATISTICS_FILE).write_bytes(b"none")
        (Path(folder) / REPORT_FILE).write_text("{}")
        publish(connection, record, "predict", Path(folder), (PREDICTORS_FILE, STATISTICS_FILE, REPORT_FILE))
    connection.close()


def _ones(count: int) -> NDArray[np.float32]:
    return np.ones(count, np.float32)


def _bits(values: NDArray[Any], record: weightd_pb2.Model) -> NDArray[Any]:
    """In the model's dtype; those of 16 bits as their bits."""
    kept = torch.from_numpy(np.asarray(values, np.float32)).to(DTYPES[record.bundle.dtype]).contiguous()
    return kept.numpy() if record.bundle.dtype == "F32" else kept.view(torch.uint16).numpy()


def _file(layers: list[LowRank], record: weightd_pb2.Model) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / PREDICTORS_FILE
        write_predictors(path, layers, record)
        return path.read_bytes()
