"""A store that holds a planted model, imported and calibrated, for benchmarks to measure."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.processes import BenchError, serving
from make_planted_model import make_planted_model

from planted.calibration import publish_planted, read_plan
from planted.dense import make_dense_model, write_dense_gguf
from planted.plan import SHAPES, Shape
from weightd.serving.served_models import demand_of
from weightd.store.store import Store
from weightd_proto import weightd_pb2

POOL_BYTES = 64 << 20  # room for several sessions


@dataclass(frozen=True)
class PlantedStore:
    """A planted model: the checkpoint, and the store into which it was imported as `name`."""

    checkpoint: Path
    store: Path
    name: str

    @property
    def record(self) -> weightd_pb2.Model:
        return Store.open(self.store, readonly=True).model(self.name)

    @property
    def model_bytes(self) -> int:
        """Bytes of all weights: FFNs, resident part and tables."""
        record = self.record
        return sum(one.bundles_file_bytes + one.resident_file_bytes for one in (record, *record.tables))

    @property
    def least_bytes(self) -> int:
        """The least DRAM for several sessions. For a small model it is more than half of the model."""
        return demand_of(self.record).minimum_bytes + POOL_BYTES


def planted_store(
    shape: str, folder: Path, layers: int | None = None, dtype: str = "bf16", encoding: str | None = None
) -> PlantedStore:
    """The checkpoint, store and calibration of a planted model in `folder`. Makes those that are missing.

    Args:
        layers: of the model, if not those of the shape.
        dtype: bf16 or fp16.
        encoding: int8 or int4, of the store's FFNs and resident matrices; None: as the checkpoint's.

    Raises:
        BenchError: the import or weightd failed; gives the error.
        OSError: the folder holds something else than a planted model, or the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made, shape = cut(shape, layers)
    if dtype != "bf16":
        shape = f"{shape}-{dtype}"
    name = f"planted-{shape}"
    store = folder / f"store-{shape}{'' if encoding is None else f'-{encoding}'}"
    planted = PlantedStore(folder / name, store, name)
    if not planted.checkpoint.exists():
        make_planted_model(made, planted.checkpoint, dtype)
    read_plan(planted.checkpoint)
    import_once(planted, *(() if encoding is None else ("--dtype", encoding, "--resident-dtype", encoding)))
    if not planted.record.HasField("calibration"):
        with serving(planted.store, max(planted.model_bytes // 2, planted.least_bytes)) as daemon:  # predictors, too
            publish_planted(planted.checkpoint, name, daemon.address)
    return planted


def dense_store(shape: str, folder: Path, layers: int | None = None) -> PlantedStore:
    """The checkpoint and store of a dense model of the shape (planted/dense.py) in `folder`. Makes those missing.

    Args:
        layers: of the model, if not those of the shape.

    Raises:
        BenchError, OSError: as planted_store() does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made, shape = cut(shape, layers)
    name = f"dense-{shape}"
    dense = PlantedStore(folder / name, folder / f"store-{name}", name)
    if not dense.checkpoint.exists():
        make_dense_model(made, dense.checkpoint)
    import_once(dense)
    return dense


def dense_gguf(dense: PlantedStore, shape: str, layers: int | None, as_qwen3: bool = False) -> Path:
    """The weights of a dense_store() as a GGUF file (write_dense_gguf), beside the checkpoint. Made if missing."""
    name = f"{dense.name}-qwen3" if as_qwen3 else dense.name
    path = dense.checkpoint.with_name(f"gguf-{name}") / f"{name}.gguf"
    if not path.exists():
        write_dense_gguf(cut(shape, layers)[0], dense.checkpoint, path, as_qwen3)
    return path


def cut(shape: str, layers: int | None) -> tuple[Shape, str]:
    """The shape with so many layers, and its name in names of files."""
    return (SHAPES[shape], shape) if layers is None else (replace(SHAPES[shape], layers=layers), f"{shape}-{layers}")


def import_once(planted: PlantedStore, *flags: str) -> None:
    """Imports the checkpoint unless it was. Raises BenchError with the last line of the import's standard error.

    Args:
        flags: of the import.
    """
    if (planted.store / planted.name).exists():
        return
    done = run_import(str(planted.checkpoint), "--store", str(planted.store), *flags)
    if done.returncode:
        raise BenchError(f"import: {done.stderr.strip().splitlines()[-1]}")


def run_import(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`weightd import` in a process of its own, whose memory is free again when a benchmark measures."""
    return subprocess.run(
        [sys.executable, "-m", "weightd", "import", *arguments], capture_output=True, text=True, check=False
    )
