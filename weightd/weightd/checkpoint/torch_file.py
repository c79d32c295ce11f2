"""Reads torch's .bin files: zip archives of a pickle and raw storages.

Only the pickle is read, with weights_only=True and fake tensors. A fake tensor has a shape, strides and the place of
its storage in the file, but no data. (torch.load documents this use of FakeTensorMode.)
"""

from __future__ import annotations

import pickle
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightd.disk.lfs_pointer import check_no_pointer
from weightd.disk.tensors import SourceTensor, check_extent, check_name
from weightd.errors import CheckpointError
from weightd_proto.encodings import DTYPES, plain

if TYPE_CHECKING:
    import torch

_NAMES = {f"torch.{dtype.torch}": dtype.name for dtype in DTYPES.values()}


def read_torch_file(path: Path) -> dict[str, SourceTensor]:
    """The tensors of the file by name. CheckpointError if the file is incomplete or holds anything else."""
    check_no_pointer(path)
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path} is incomplete or of torch's format before 1.6: download it again, or load and save it with "
            "a current torch"
        )
    _check_archive(path)
    file_bytes = path.stat().st_size
    tensors: dict[str, SourceTensor] = {}
    for name, value in _load_fake(path).items():
        tensor = _tensor(path, name, value)
        check_extent(tensor, file_bytes)
        tensors[name] = tensor
    return tensors


def _check_archive(path: Path) -> None:
    """CheckpointError unless the storages lie in the file as they do in memory, because they are read directly."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            orders = [archive.read(entry) for entry in entries if entry.filename.endswith("/byteorder")]
    except (zipfile.BadZipFile, NotImplementedError, OSError, RuntimeError, zlib.error) as error:
        raise CheckpointError(f"{path} is not a complete zip archive ({error}): download it again") from error
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(f"{path} is compressed: load and save it with a current torch")
    if any(order != b"little" for order in orders):
        raise CheckpointError(f"{path} is in big-endian order: load and save it on this machine")


def _load_fake(path: Path) -> Mapping[str, Any]:
    try:
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode
    except ImportError as error:
        raise CheckpointError(f"{path} needs torch to be read: pip install 'weightd[import]'") from error
    try:
        with FakeTensorMode():
            state = torch.load(path, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(_refusal(path, str(error))) from error
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} holds {type(state).__name__}, not a state_dict")
    return state


def _refusal(path: Path, said: str) -> str:
    """Why torch did not read the file. Its own text goes on with how to run the code that the file holds."""
    code = re.search(r"[Uu]nsupported (?:global: )?GLOBAL (\S+)", said)
    if code is not None:
        return (
            f"{path} holds code ({code[1]}) beside its weights, which is never run: take the model's safetensors "
            "files, or save its state_dict alone"
        )
    return f"{path} cannot be read as weights alone: {(said.splitlines() or ['unknown'])[0]}"


def _tensor(path: Path, name: str, value: torch.Tensor) -> SourceTensor:
    check_name(path, name)
    dtype = _NAMES.get(str(getattr(value, "dtype", None)))
    if dtype is None:
        raise CheckpointError(f"{path} holds {name}, which is not a tensor of a known dtype")
    if not value.is_contiguous():
        raise CheckpointError(f"{path} holds {name} as a strided view: save it again with .contiguous()")
    encoding = plain(dtype)
    storage_offset_bytes = value.untyped_storage()._checkpoint_offset
    assert storage_offset_bytes is not None
    offset_bytes = storage_offset_bytes + int(value.storage_offset()) * encoding.block_bytes
    return SourceTensor(name, tuple(value.shape), encoding, path, offset_bytes)
