"""The models of bench_memory_speed, each in the form in which weightd, llama.cpp and transformers load it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from moe.files import mixture_files
from planted.calibration import read_plan
from planted.dense import write_dense_gguf
from planted.gpt2 import write_gpt2_gguf
from planted.mixture import MIXTURES
from planted.plan import FALSE_NEGATIVES, SHAPES
from planted.quantised_dense import QUANTISED, quantised_store
from planted.store import PlantedStore, cut, dense_store, import_once, planted_store

from memory_speed.packages import PACKAGED, packaged_gguf
from memory_speed.plain_gguf import write_plain_gguf
from weightd_proto import weightd_pb2
from weightd_proto.encodings import bundles_in, part_bytes
from weightd_proto.files import PREDICTORS_FILE

DTYPE = "bf16"  # of packaged models, whose files are quantised
KEPT = "-kept"  # after the name of a packaged model: with its quantised numbers
EMBEDDINGS = ("embed_tokens.weight", "embed_positions.weight")  # looked up by row, also where they are resident
HEAD = "lm_head.weight"
TINY = ("llama-tiny", "llama-tiny-q4_0", "opt-tiny", "olmoe-tiny", "olmoe-tiny-q4_0")  # for tests
PLAIN = ("llama-1.3b", "opt-1.3b", "olmoe-1b-7b")
BLOCKS = ("llama-1.3b-q8_0", "llama-1.3b-q4_0", "olmoe-1b-7b-q4_0")
MODELS = (*PLAIN, *BLOCKS, *PACKAGED, *(name + KEPT for name in PACKAGED))
# Of OLMoE-1B-7B's 16: three processes hold the model at once, and its files are three.
LAYERS_OF = {"olmoe-1b-7b": 4}


@dataclass(frozen=True)
class MeasuredModel:
    """A model's files.

    Attributes:
        title: names the model in rows.
        stored: what weightd serves.
        write_gguf: writes the same numbers for llama.cpp, to the path that it is given.
        token_bytes: of the weights that a token needs, in each mode of the client that is measured.
        is_large: whether it has a billion parameters, of which a token need not use all.
        in_transformers: whether transformers is measured. It does not read GGUF files of all architectures.
    """

    name: str
    title: str
    stored: PlantedStore
    write_gguf: Callable[[Path], None]
    token_bytes: Mapping[str, int]
    vocabulary: int
    is_large: bool = True
    in_transformers: bool = True

    @property
    def layers(self) -> int:
        return len(self.stored.record.layers)

    def gguf(self) -> Path:
        """The file for llama.cpp. Writes it if it is missing."""
        path = self.stored.store.with_name(f"gguf-{self.stored.name}") / f"{self.stored.name}.gguf"
        if not path.exists():
            self.write_gguf(path)
        return path

    def loaded(self) -> tuple[str, dict[str, Any]]:
        """The path and the other arguments of transformers' from_pretrained(), for the same numbers."""
        if self.stored.checkpoint.is_dir():
            return str(self.stored.checkpoint), {}
        path = self.gguf()
        return str(path.parent), {"gguf_file": path.name, "dtype": "bfloat16"}


def measured_model(name: str, layers: int | None, folder: Path) -> MeasuredModel:
    """A model of MODELS or TINY in `folder`. Makes what is missing.

    Args:
        layers: of a model that is made here, if not as many as it has by default.

    Raises:
        BenchError, OSError: as planted_store() does.
    """
    if name.removesuffix(KEPT) in PACKAGED:
        return _packaged(name, folder)
    layers = layers or LAYERS_OF.get(name)
    if name in MIXTURES:
        return _mixture(name, layers, folder)
    if name in QUANTISED:
        return _quantised(name, layers, folder)
    return _dense(name, layers, folder) if SHAPES[name].family == "llama" else _planted(name, layers, folder)


def _dense(name: str, layers: int | None, folder: Path) -> MeasuredModel:
    """SwiGLU of random weights."""
    shape, _ = cut(name, layers)
    stored = dense_store(name, folder, layers)

    def write(path: Path) -> None:
        write_dense_gguf(shape, stored.checkpoint, path)

    of_token = {"exact": needed_bytes(stored.record)}
    return MeasuredModel(name, _title(name, layers, SHAPES[name].layers), stored, write, of_token, shape.vocabulary)


def _planted(name: str, layers: int | None, folder: Path) -> MeasuredModel:
    """ReLU, whose neurons fire as planned; predicted and not."""
    shape, _ = cut(name, layers)
    stored = planted_store(name, folder, layers, "fp16")

    def write(path: Path) -> None:
        write_gpt2_gguf(shape, stored.checkpoint, path)

    record = stored.record
    shares = read_plan(stored.checkpoint)["layers"]
    bundles_bytes = _ffn_bytes(record)
    needed = needed_bytes(record)
    up = fmean(one["predicted"] for one in shares)
    down = fmean(one["firing"] for one in shares) * (1 - FALSE_NEGATIVES)
    predictors_bytes = sum(file.size_bytes for file in record.calibration.files if file.name.endswith(PREDICTORS_FILE))
    sparse = needed - bundles_bytes + round(bundles_bytes * (up + down) / 2) + predictors_bytes
    of_token = {"exact": needed, "predict": sparse}
    return MeasuredModel(name, _title(name, layers, SHAPES[name].layers), stored, write, of_token, shape.vocabulary)


def _mixture(name: str, layers: int | None, folder: Path) -> MeasuredModel:
    """A mixture of experts."""
    files = mixture_files(name, layers, folder)
    files.planted()
    files.imported()
    shape = files.shape

    def write(path: Path) -> None:
        if files.gguf == files.checkpoint:
            _link(path, files.gguf)
        files.converted()

    of_token = {"exact": needed_bytes(files.record, shape.chosen)}
    title, plain = _title(name, layers, MIXTURES[name].layers), files.gguf != files.checkpoint
    return MeasuredModel(name, title, files, write, of_token, shape.vocabulary, in_transformers=plain)


def _quantised(name: str, layers: int | None, folder: Path) -> MeasuredModel:
    """SwiGLU of random blocks."""
    shape = QUANTISED[name]
    stored = quantised_store(name, folder, layers)

    def write(path: Path) -> None:
        _link(path, stored.checkpoint)

    of_token, title = {"exact": needed_bytes(stored.record)}, _title(name, layers, shape.layers)
    return MeasuredModel(name, title, stored, write, of_token, shape.vocabulary, in_transformers=False)


def _packaged(name: str, folder: Path) -> MeasuredModel:
    """A real model, with the numbers of its quantised file as they are, or rounded to DTYPE."""
    kept = name.endswith(KEPT)
    source = packaged_gguf(name.removesuffix(KEPT), folder)
    stored = PlantedStore(source, folder / f"store-{name}", name)
    import_once(stored, "--name", name, "--dtype", "keep" if kept else DTYPE)
    record = stored.record
    vocabulary = next(one.shape[0] for one in record.resident if one.name.endswith(EMBEDDINGS[0]))

    def write(path: Path) -> None:
        if kept:
            _link(path, source)
        else:
            write_plain_gguf(source, path)

    of_token = {"exact": needed_bytes(record)}
    return MeasuredModel(name, name, stored, write, of_token, vocabulary, is_large=False)


def _link(path: Path, source: Path) -> None:
    """Makes `path` a link to a file that llama.cpp can read as it is."""
    path.parent.mkdir(parents=True)
    path.symlink_to(source.resolve())


def _title(name: str, layers: int | None, of: int) -> str:
    return name if layers in (None, of) else f"{name}, {layers} of {of} layers"


def needed_bytes(record: weightd_pb2.Model, chosen: int | None = None) -> int:
    """The bytes of the weights that a token needs: all but rows of embeddings that are no head.

    Args:
        chosen: experts of each mixture.
    """
    tied = not any(one.name == HEAD for one in record.resident)
    lookups: Sequence[str] = EMBEDDINGS[1:] if tied else EMBEDDINGS
    resident = sum(one.size_bytes for one in record.resident if not one.name.endswith(tuple(lookups)))
    return resident + _ffn_bytes(record, chosen)


def _ffn_bytes(record: weightd_pb2.Model, chosen: int | None = None) -> int:
    size_bytes = 0
    for layer in record.layers:
        bundles = bundles_in(record.bundle, layer)
        bundles = bundles if chosen is None or not layer.experts else bundles * chosen // layer.experts
        size_bytes += bundles * sum(part_bytes(record.bundle, layer))
    return size_bytes
