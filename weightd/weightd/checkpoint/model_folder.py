"""Restricts a checkpoint's files to regular files inside its folder.

A folder may come from a stranger, and what is copied from it is served to every client. So a name that leads out of the
folder is refused, whether by `..` or by a link, of the file or of a folder on its path. The links of Hugging Face's
cache are the exception: from models--ORG--NAME/snapshots/REVISION/NAME to ../../blobs/SUM, and from there, since
huggingface_hub 2, to blobs/XX/SUM of the cache, which its models share. Links to models--ORG--NAME/blobs/SUM are
followed from copies of a snapshot, too: who knows the checksum of a file knows the file. Pipes and devices, which could
block a reader, are refused.
"""

from __future__ import annotations

import os
import re
import stat
from fnmatch import fnmatchcase
from pathlib import Path

from weightd.errors import CheckpointError

REPOSITORY = "models--"  # begins the name of its folder in the cache
UNFINISHED = "*.incomplete"  # of huggingface_hub
_SHARED_BLOB = re.compile(r"[0-9a-f]{2}/[0-9a-f]{64}")
_BLOB = re.compile(rf".*/{REPOSITORY}[^/]+/blobs/([0-9a-f]{{40}}|[0-9a-f]{{64}})", re.DOTALL)


def _repository_of(root: Path) -> Path | None:
    """That of Hugging Face's cache in which the folder is a snapshot, or one of its folders."""
    for folder in root.parents:
        if folder.name == "snapshots" and (folder == root.parent or folder.parent.name.startswith(REPOSITORY)):
            return folder.parent
    return None


class ModelFolder:
    """A checkpoint's folder. It may itself be a link, because the user has named it.

    Args:
        named: a file in it that the user has named. It may be a link, and other files may lie where it lies.
    """

    def __init__(self, path: Path, named: Path | None = None) -> None:
        self.path = path
        root = path.resolve()
        self._roots = [root] if named is None else [root, named.resolve().parent]
        self._shared_blobs: Path | None = None
        self._downloads = root / ".cache" / "huggingface" / "download"  # of `hf download --local-dir`
        repository = _repository_of(root)
        if repository is not None:
            self._downloads = repository / "blobs"
            self._roots.append(self._downloads)  # not resolved: if it is a link, its target is outside
            if repository.name.startswith(REPOSITORY):
                self._shared_blobs = repository.parent / "blobs"

    def has(self, name: str) -> bool:
        """Whether anything has that name, even if it is a broken link."""
        return os.path.lexists(self._inside(name))

    def file(self, name: str) -> Path:
        """The real path of the file with that name, which may have folders. CheckpointError if it must not be read."""
        path = self._inside(name)
        try:
            resolved = Path(os.path.realpath(path, strict=True))
            mode = resolved.stat().st_mode
        except OSError as error:
            reason = f"a link to nothing ({path.readlink()})" if path.is_symlink() else (error.strerror or "").lower()
            raise CheckpointError(f"{path} cannot be read: {reason}; the download may be incomplete") from error
        if not any(resolved.is_relative_to(root) for root in self._roots) and not self._is_blob(resolved):
            raise CheckpointError(f"{path} is a link out of its folder, to {resolved}: put a copy in its place")
        if not stat.S_ISREG(mode):
            raise CheckpointError(f"{path} is not a regular file: {stat.filemode(mode)}")
        return resolved

    def _is_blob(self, path: Path) -> bool:
        """Whether the file is named by the checksum of what it holds, in a cache of the hub."""
        shared = self._shared_blobs
        if shared is None or not path.is_relative_to(shared):
            return _BLOB.fullmatch(str(path)) is not None
        return _SHARED_BLOB.fullmatch(str(path.relative_to(shared))) is not None

    def unfinished(self) -> int:
        """How many files of an interrupted download lie here."""
        return sum(1 for _ in self._downloads.rglob(UNFINISHED))

    def _inside(self, name: str) -> Path:
        if "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"{self.path} names a file outside of it: {name!r}")
        return self.path / name

    def matching(self, patterns: tuple[str, ...], folder: str = "") -> list[str]:
        """The sorted names of files that match a shell pattern. `folder`: a folder below this one."""
        parent = self.path / folder
        if not parent.is_dir():
            return []
        listed = [path.name for path in parent.iterdir()]
        names = [name for name in listed if any(fnmatchcase(name, pattern) for pattern in patterns)]
        # Unprintable names cannot be in the catalog, and transformers looks for none.
        return sorted(str(Path(folder, name)) for name in names if name.isprintable() and not (parent / name).is_dir())
