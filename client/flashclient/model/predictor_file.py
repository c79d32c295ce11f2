"""The files of a calibration, which `flashclient calibrate` writes and predict mode reads.

predictors.safetensors is a safetensors file, little-endian, with a predictor for each of the L layers of a model, all
of one kind.

- Metadata: `format` "flashclient-calibration", `format_version` "1", `kind` "low_rank", "sign" or "gate", `import_id`
  in hexadecimal: the import of the model that it was made for.
- Rows are by position, not by neuron: row p belongs to the bundle at position p of the layer.
- Kind low_rank, layer i: `layers.{i}.input` [rank, hidden_size] in the model's compute dtype,
  `layers.{i}.output` [neurons, rank] in the same, or I8 with `layers.{i}.scale` [neurons] F32, and `layers.{i}.bias`
  [neurons] F32, into which the threshold is folded. A neuron is wanted for the FFN input x where
  scale * (output . (input . x)) + bias > 0. The rank differs from layer to layer and is at least 1.
- Kind sign, layer i (SparseInfer, arXiv 2411.12692): `layers.{i}.signs` [neurons, ceil(hidden_size / 8)]
  U8, where bit j % 8 of byte j // 8 is the sign bit (1: negative) of coordinate j of the neuron's gate row, or up row
  where there is no gate; bits past the last are 0. `layers.{i}.margin` [neurons] I32. A neuron is wanted where
  (coordinates whose sign is that of x's) - (those whose sign differs) > margin.
- Kind gate, of mode threshold, layer i: `layers.{i}.gate` [neurons, hidden_size] I8, the gate rows, or the up rows
  where there is no gate, with `layers.{i}.scale`, `layers.{i}.bias` and `layers.{i}.threshold`, each [neurons] F32. A
  neuron is wanted where |act(scale * (gate . x) + bias)| >= threshold, act being the model's activation.
- Every tensor begins at a multiple of 64 bytes of the file, so it can be used in place where the file is mapped.
  safetensors allows no gaps, so the bytes between are in tensors `padding.{n}` U8, which have no meaning.
- Refused with CalibrationError: a file that is not a whole safetensors file, another format, a newer version, an
  unknown kind, another import_id than the model's, a tensor that is missing, not aligned, or of another dtype or shape.

statistics.safetensors, same metadata: `layers.{i}.frequency` and `layers.{i}.predicted` [neurons] F32, the shares of
the text's tokens at which a neuron fired and was predicted; `layers.{i}.union` [8] F32, the share of the neurons that
are in the union of the predicted sets of k = 1..8 tokens in a row. Readers ignore other tensors: earlier versions also
wrote `layers.{i}.coactivation` [neurons, 8] I32.

report.json: {"layers": [{"firing", "predicted", "false_negatives", "false_positives", "rank", "bytes", "time_share",
"sign": {...}}], "quality": {...}, "text_tokens", ...}, for people.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashclient.errors import CalibrationError
from weightd_proto import weightd_pb2
from weightd_proto.encodings import DTYPES
from weightd_proto.files import ALIGNMENT_BYTES
from weightd_proto.safetensors_header import LENGTH_BYTES, METADATA, HeaderError, header_of, parse, text_bytes

FORMAT = "flashclient-calibration"
FORMAT_VERSION = 1
UNION_TOKENS_MAX = 8
INT8_MAX = 127

_NUMPY: dict[str, np.dtype[Any]] = {name: np.dtype(dtype.numpy) for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class LowRank:
    """Wanted where scale * (output . (input . x)) + bias > 0.

    Attributes:
        input: [rank, hidden_size] in the model's compute dtype: float32, or the 16 bits as uint16.
        output: [neurons, rank], by position; in the model's compute dtype, or int8.
        bias: [neurons] float32, by position.
        scale: [neurons] float32, by position, of an output of int8; else None, which is 1.
    """

    input: NDArray[Any]
    output: NDArray[Any]
    bias: NDArray[np.float32]
    scale: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Signs:
    """Wanted where (coordinates of equal sign) - (those of different sign) > margin.

    Attributes:
        signs: [neurons, ceil(hidden_size / 8)] uint8, by position.
        margin: [neurons] int32, by position.
    """

    signs: NDArray[np.uint8]
    margin: NDArray[np.int32]


@dataclass(frozen=True)
class GateRows:
    """Wanted where |act(scale * (gate . x) + bias)| >= threshold.

    Attributes:
        gate: [neurons, hidden_size] int8, by position.
        scale, bias, threshold: [neurons] float32, by position.
    """

    gate: NDArray[np.int8]
    scale: NDArray[np.float32]
    bias: NDArray[np.float32]
    threshold: NDArray[np.float32]


Predictor = LowRank | Signs | GateRows
KINDS: dict[str, type[Predictor]] = {"low_rank": LowRank, "sign": Signs, "gate": GateRows}


def quantized(input: NDArray[Any], output: NDArray[np.float32], bias: NDArray[np.float32]) -> LowRank:
    """A predictor whose `output` [neurons, rank] is rounded to int8. Thresholds must be chosen afterwards."""
    rounded, scale = in_bytes(output)
    return LowRank(input, rounded, bias, scale)


def in_bytes(rows: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """`rows` rounded to int8 with a scale for each: half the memory of 16 bits, which leaves more for the pool."""
    scale = np.abs(rows).max(axis=1) / INT8_MAX
    scale[scale == 0] = 1
    return np.rint(rows / scale[:, None]).astype(np.int8), scale.astype(np.float32)


def read_predictors(data: NDArray[np.uint8], model: weightd_pb2.Model) -> list[Predictor]:
    """One predictor for each layer of `model`, as read-only views of `data` (no byte is copied).

    Args:
        data: the whole of predictors.safetensors, as mapped: its address a multiple of 64.

    Raises:
        CalibrationError: the data are not a file of this format for this model; see the refusals above.
    """
    tensors = _Tensors(data, model)
    return [tensors.layer(index) for index in range(len(model.layers))]


def write_predictors(path: Path, predictors: Sequence[Predictor], model: weightd_pb2.Model) -> None:
    """Writes predictors.safetensors: one predictor for each layer, all of one kind."""
    kinds = {_kind(predictor) for predictor in predictors}
    assert len(kinds) == 1
    assert len(predictors) == len(model.layers)
    tensors = {
        f"layers.{index}.{name}": array
        for index, predictor in enumerate(predictors)
        for name, array in arrays_of(predictor).items()
    }
    write_tensors(path, tensors, model, {"kind": kinds.pop()})


def arrays_of(predictor: Predictor) -> dict[str, NDArray[Any]]:
    """The arrays, by their names in the file."""
    return {name: array for name, array in vars(predictor).items() if array is not None}


def _kind(predictor: Predictor) -> str:
    return next(kind for kind, made in KINDS.items() if isinstance(predictor, made))


def write_tensors(
    path: Path, tensors: Mapping[str, NDArray[Any]], model: weightd_pb2.Model, metadata: Mapping[str, str]
) -> None:
    """A safetensors file whose tensors are aligned; uint16 stands for the bits of the model's compute dtype."""
    placed: dict[str, tuple[str, Sequence[int]]] = {}
    for name, array in tensors.items():
        placed[name] = (model.compute_dtype if array.dtype == np.uint16 else _spelling(array.dtype), array.shape)
        if array.nbytes % ALIGNMENT_BYTES:
            placed[f"padding.{len(placed) + 1}"] = ("U8", [_padding_bytes(array)])
    own = {"format": FORMAT, "format_version": str(FORMAT_VERSION), "import_id": model.import_id.hex()}
    with path.open("wb") as file:
        file.write(header_of(placed, ALIGNMENT_BYTES, own | dict(metadata)))
        for array in tensors.values():
            file.write(np.ascontiguousarray(array).tobytes())
            file.write(bytes(_padding_bytes(array)))


def _padding_bytes(array: NDArray[Any]) -> int:
    return -array.nbytes % ALIGNMENT_BYTES


def _spelling(dtype: np.dtype[Any]) -> str:
    return next(name for name in ("F32", "I32", "U8", "I8") if _NUMPY[name] == dtype)


class _Tensors:
    """The tensors of a predictors.safetensors. Each is checked when it is taken."""

    def __init__(self, data: NDArray[np.uint8], model: weightd_pb2.Model) -> None:
        self._model = model
        self._header, self._first = _read_header(data, model.name)
        self._data = data.view()
        self._data.flags.writeable = False
        self._kind = self._check_metadata(self._header.get(METADATA))

    def _check_metadata(self, metadata: object) -> str:
        """Returns the kind."""
        found = metadata if isinstance(metadata, dict) else {}
        if found.get("format") != FORMAT:
            raise self._refusal(f"its format is {found.get('format')!r}, not '{FORMAT}'")
        version = found.get("format_version")
        if version != str(FORMAT_VERSION):
            raise self._refusal(f"it has format version {version}, this flashclient reads {FORMAT_VERSION}")
        if found.get("import_id") != self._model.import_id.hex():
            raise self._refusal("it was made for another import of the model")
        if str(found.get("kind")) not in KINDS:
            raise self._refusal(f"its kind {found.get('kind')!r} is not known")
        return str(found["kind"])

    def layer(self, index: int) -> Predictor:
        neurons, hidden_size = self._model.layers[index].neurons, self._model.bundle.hidden_size
        if self._kind == "sign":
            signs = self._take(f"layers.{index}.signs", "U8", (neurons, -(-hidden_size // 8)))
            return Signs(signs, self._take(f"layers.{index}.margin", "I32", (neurons,)))
        if self._kind == "gate":
            gate = self._take(f"layers.{index}.gate", "I8", (neurons, hidden_size))
            per_neuron = ("scale", "bias", "threshold")
            return GateRows(gate, *(self._take(f"layers.{index}.{name}", "F32", (neurons,)) for name in per_neuron))
        dtype = self._model.compute_dtype
        rows = self._take(f"layers.{index}.input", dtype, (None, hidden_size))
        scaled = f"layers.{index}.scale" in self._header
        output = self._take(f"layers.{index}.output", "I8" if scaled else dtype, (neurons, len(rows)))
        bias = self._take(f"layers.{index}.bias", "F32", (neurons,))
        return LowRank(rows, output, bias, self._take(f"layers.{index}.scale", "F32", (neurons,)) if scaled else None)

    def _take(self, name: str, dtype: str, shape: tuple[int | None, ...]) -> NDArray[Any]:
        """`None` in `shape` means any length of at least 1."""
        entry = self._header.get(name)
        if not isinstance(entry, dict):
            raise self._refusal(f"it has no tensor {name}")
        found: Any = entry.get("shape")
        fits = isinstance(found, list) and len(found) == len(shape) and all(isinstance(one, int) for one in found)
        if not fits or any(one < 1 if want is None else one != want for one, want in zip(found, shape, strict=True)):
            raise self._refusal(f"{name} has shape {found}, the model needs {_spell_shape(shape)}")
        if entry.get("dtype") != dtype:
            raise self._refusal(f"{name} is {entry.get('dtype')}, the model needs {dtype}")
        begin, end = self._extent(name, entry, prod(found) * _NUMPY[dtype].itemsize)
        return self._data[begin:end].view(_NUMPY[dtype]).reshape(found)

    def _extent(self, name: str, entry: dict[str, Any], size_bytes: int) -> tuple[int, int]:
        """The bytes [begin, end) of the tensor in the file."""
        match entry.get("data_offsets"):
            case [int(begin), int(end)] if begin >= 0 and end - begin == size_bytes:
                begin, end = self._first + begin, self._first + end
            case offsets:
                raise self._refusal(f"{name} has data_offsets {offsets}, which do not hold its {size_bytes} bytes")
        if end > len(self._data):
            raise self._refusal(f"it is cut off within {name}, at {len(self._data)} bytes")
        if begin % ALIGNMENT_BYTES:
            raise self._refusal(f"{name} begins at byte {begin}, not at a multiple of {ALIGNMENT_BYTES}")
        return begin, end

    def _refusal(self, reason: str) -> CalibrationError:
        return _refusal(self._model.name, reason)


def _read_header(data: NDArray[np.uint8], model: str) -> tuple[dict[str, Any], int]:
    """The header, and the offset at which the data begin."""
    try:
        end = LENGTH_BYTES + text_bytes(data[:LENGTH_BYTES].tobytes())
    except HeaderError:
        end = len(data) + 1
    if end > len(data):
        raise _refusal(model, f"its {len(data)} bytes are not a whole safetensors file")
    try:
        return parse(data[LENGTH_BYTES:end].tobytes()), end
    except HeaderError as error:
        raise _refusal(model, str(error)) from error


def _refusal(model: str, reason: str) -> CalibrationError:
    return CalibrationError(
        f"the calibration of model '{model}' cannot be used: {reason}; run `flashclient calibrate {model}` again"
    )


def _spell_shape(shape: tuple[int | None, ...]) -> str:
    return "[" + ", ".join("rank" if one is None else str(one) for one in shape) + "]"
