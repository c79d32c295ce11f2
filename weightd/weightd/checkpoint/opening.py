"""Opens a checkpoint of any kind."""

from __future__ import annotations

from pathlib import Path

from weightd.checkpoint.checkpoint import Checkpoint
from weightd.checkpoint.folder import CONFIG_FILE, has_weights, open_folder
from weightd.checkpoint.gguf import open_gguf
from weightd.checkpoint.gguf_file import MAGIC
from weightd.checkpoint.model_folder import ModelFolder
from weightd.disk.gguf_names import SUFFIX, models_among
from weightd.errors import CheckpointError
from weightd_proto.hub_names import is_hub_name


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`: a Hugging Face folder, a .gguf file, or a folder with one model in .gguf files.

    Reads headers only. CheckpointError if the checkpoint is missing, incomplete or of an unknown kind.
    """
    check_exists(path)
    if path.is_file():
        return open_gguf(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} is neither a file nor a folder: give a Hugging Face folder or a .gguf file")
    gguf = gguf_at(path)
    return open_folder(path) if gguf is None else open_gguf(gguf, ModelFolder(path))


def gguf_at(path: Path) -> Path | None:
    """The GGUF file that open_checkpoint() reads at `path`; of a split one, the first part.

    CheckpointError if there are several, or if one is a link out of its folder.
    """
    if path.is_file():
        return path if path.suffix == SUFFIX or _is_gguf(path) else None
    folder = ModelFolder(path)
    files = models_among(folder.matching((f"*{SUFFIX}",)))
    if not files or has_weights(folder) or (len(files) > 1 and folder.has(CONFIG_FILE)):
        return None  # a config.json may lie beside one model
    if len(files) > 1:
        raise CheckpointError(f"{path} holds {len(files)} models in {SUFFIX} files: give one of {', '.join(files)}")
    folder.file(files[0])
    return path / files[0]  # by its name there: that of a blob does not say where other parts are


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def check_exists(path: Path) -> None:
    if not path.exists():
        raise CheckpointError(f"no checkpoint at {path}: give a Hugging Face folder or a .gguf file")


def locate(source: str, revision: str | None, store: Path, file: str | None = None) -> Path:
    """Where the checkpoint `source` lies: a path that exists, or else a model of the hub, which is downloaded.

    Args:
        revision: of a model of the hub: a branch, tag or commit; by default main.
        store: where it will be imported to.
        file: the .gguf file to take of a model of the hub that has several.

    Raises:
        CheckpointError: it is not there, or cannot be downloaded; says what to do.
        SpaceError: a disk has no room for the download and the import.
    """
    if Path(source).exists() or not is_hub_name(source):
        return _local(source, revision, file)
    from weightd.checkpoint.hub import fetch

    return fetch(source, revision, store, file)


def locate_here(source: str, revision: str | None, file: str | None = None) -> Path:
    """As locate(), but a model of the hub is not downloaded: it is taken from the hub's cache, and may lack files."""
    if Path(source).exists() or not is_hub_name(source):
        return _local(source, revision, file)
    from weightd.checkpoint.hub import cached

    return cached(source, revision, file)


def _local(source: str, revision: str | None, file: str | None) -> Path:
    path = Path(source)
    check_exists(path)
    if revision is not None:
        raise CheckpointError(f"{source} is a path, and a revision is of a model on the hub: leave --revision out")
    if file is not None:
        raise CheckpointError(f"{source} is a path, and --file is for a model on the hub: give the path of the file")
    return _snapshot_of(path)


def _snapshot_of(path: Path) -> Path:
    """The branch main of a model's folder in the hub's cache; any other path as it is."""
    reference = path / "refs" / "main"
    if not (path / "snapshots").is_dir() or not reference.is_file():
        return path
    snapshot = path / "snapshots" / reference.read_text(errors="replace").strip()
    return snapshot if snapshot.is_dir() else path
