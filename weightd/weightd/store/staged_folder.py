"""Folders of a store that a process fills before they are published, and folders that are being deleted.

Both have names that no model may have. A process that is killed leaves them behind; the next import deletes them.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from weightd.closing import Closing
from weightd.errors import SpaceError
from weightd.sizes import format_size

MARKER_FILE = ".unpublished"  # in a folder that is not published; the process that fills it holds its flock
STAGED_PREFIX = ".import-"
REMOVED_PREFIX = ".removed-"


class StagedFolder(Closing):
    """A new folder in a store. It is deleted when it is left without being published.

    To publish it: `move` it to its name, write that into the catalog, then `finish`.
    """

    def __init__(self, store_path: Path) -> None:
        """Makes the folder. The caller holds the store's lock."""
        self.store_path = store_path
        self.folder = store_path / f"{STAGED_PREFIX}{secrets.token_hex(8)}"
        self.folder.mkdir()
        self._marker = os.open(self.folder / MARKER_FILE, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
        fcntl.flock(self._marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._published = False

    def mark(self, name: str) -> None:
        """Tells other processes what is being imported."""
        os.write(self._marker, name.encode())

    def close(self) -> None:
        """Deletes the folder unless it was published."""
        try:
            if not self._published:
                delete(set_aside(self.store_path, self.folder))
        finally:
            os.close(self._marker)

    def move(self, target: Path) -> None:
        """Renames the folder to `target` and syncs both folders. Its files must be synced already."""
        for folder in [path for path in self.folder.rglob("*") if path.is_dir()] + [self.folder]:
            sync(folder)
        self.folder = self.folder.rename(target)
        sync(target.parent)

    def finish(self) -> None:
        """Called when the catalog names the folder: from now on it is published."""
        self._published = True
        (self.folder / MARKER_FILE).unlink(missing_ok=True)


def is_held(marker: Path) -> bool:
    """Whether a live process fills the folder of this marker. A missing marker: killed before it wrote anything."""
    with suppress(FileNotFoundError):
        descriptor = os.open(marker, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
    return False


def marker_of(store_path: Path, name: str) -> Path | None:
    """The marker of the live process that imports the model `name`, if there is one."""
    for marker in store_path.glob(f"{STAGED_PREFIX}*/{MARKER_FILE}"):
        with suppress(FileNotFoundError):
            if marker.read_bytes() == name.encode() and is_held(marker):
                return marker
    return None


def set_aside(store_path: Path, folder: Path) -> Path:
    """Renames a folder to one that is to be deleted, in one step. Returns the new path."""
    return folder.rename(store_path / f"{REMOVED_PREFIX}{secrets.token_hex(8)}")


def delete(folder: Path) -> None:
    """Removes a folder that was set aside. Another process may delete the same folder at the same time.

    Of a link only the link is removed.
    """
    while os.path.lexists(folder):
        with suppress(FileNotFoundError):
            if is_folder(folder):
                shutil.rmtree(folder)
            else:
                folder.unlink()


def is_folder(path: Path) -> bool:
    """Whether it is a folder itself, and no link to one."""
    return path.is_dir() and not path.is_symlink()


def sync(path: Path) -> None:
    """fsync of a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def space_errors(path: Path) -> Iterator[None]:
    """Raises SpaceError for the OSError of a full disk. The room that was checked before may be taken meanwhile."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        free_bytes = shutil.disk_usage(path).free
        raise SpaceError(f"no space in {path}: {error}, {format_size(free_bytes)} are free") from error
