"""Models of the Hugging Face hub: taken from its cache as they lie there, or downloaded into it first.

    HF_HUB_CACHE/models--ORG--NAME/refs/main              the commit that `main` was
                                  /snapshots/COMMIT/...   links to blobs: what is imported
                                  /blobs/...

huggingface_hub downloads, with its own settings: HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE. It comes
with the extra `import`, and only an import loads it. Only files that the import reads are downloaded. A download that
was interrupted goes on with the files that are not there yet; within a file it goes on if the connection was lost, and
begins again if the process ended.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import Any

from weightd.checkpoint.checkpoint import read_json
from weightd.checkpoint.folder import (
    CONFIG_FILE,
    FILE_PATTERNS,
    INDEX_SUFFIX,
    TEMPLATE_PATTERNS,
    TEMPLATES_FOLDER,
    WEIGHTS_FILES,
    configuration_name,
)
from weightd.disk.gguf_names import models_among, parts_of
from weightd.errors import CheckpointError, SpaceError
from weightd.sizes import format_size

MAIN = "main"
FILES_LISTED_MAX = 24
SPARE_BYTES = 64 << 20  # left free on the cache's disk: links, locks and small files


def fetch(name: str, revision: str | None, store: Path, file: str | None = None) -> Path:
    """The folder of the hub's model `name` (ORGANISATION/NAME), complete, or its .gguf file `file`.

    If the hub cannot be reached, what the cache has is taken, and said on standard error unless offline was asked for.

    Args:
        revision: a branch, tag or commit; by default the branch main.
        store: where the model will be imported to. It may share a disk with the cache.

    Raises:
        CheckpointError: there is no such model, it may not be read, or it is neither reachable nor cached.
        SpaceError: the disk has no room for the download and the import.
    """
    folder = _Fetch(name, revision or MAIN, file).run(store)
    return folder if file is None else folder / file


def cached(name: str, revision: str | None, file: str | None = None) -> Path:
    """What fetch() has once downloaded, which may lack files. CheckpointError if that is nothing."""
    folder = _Fetch(name, revision or MAIN, file).cached()
    return folder if file is None else folder / file


def newest_commit(name: str, revision: str | None) -> str | None:
    """The commit of the hub's model `name` that `fetch` would take, without its files; None where that is unknown."""
    return _Fetch(name, revision or MAIN).commit()


class _Fetch:
    """One model's way into the cache."""

    def __init__(self, name: str, revision: str, file: str | None = None) -> None:
        try:
            self._hub: Any = import_module("huggingface_hub")
        except ImportError as error:
            raise CheckpointError(
                f"no file or folder {name}, and the hub needs huggingface_hub: pip install 'weightd[import]'"
            ) from error
        self._constants: Any = import_module("huggingface_hub.constants")
        self._errors: Any = import_module("huggingface_hub.errors")
        self._name = name
        self._revision = revision
        self._file = file
        self._utils: Any = import_module("huggingface_hub.utils")
        self._utils.logging.set_verbosity_error()
        if not sys.stderr.isatty():
            self._utils.disable_progress_bars()

    def run(self, store: Path) -> Path:
        if self._constants.HF_HUB_OFFLINE:
            return self.cached("HF_HUB_OFFLINE is set: unset it to download the model")
        try:
            return self._download(store)
        except (CheckpointError, SpaceError):
            raise
        except OSError as error:
            if error.errno is not None:  # of this machine's disk
                raise
            return self._fall_back(error)
        except Exception as error:  # huggingface_hub and its HTTP libraries, which differ by version, raise many kinds
            return self._fall_back(error)

    def cached(self, reason: str = "nothing is downloaded here") -> Path:
        found = self._cached()
        if found is None:
            raise CheckpointError(f"{self._place} is not in the cache {self._constants.HF_HUB_CACHE}, and {reason}")
        return found

    def commit(self) -> str | None:
        if not self._constants.HF_HUB_OFFLINE:
            with suppress(Exception):  # fetch() says what is wrong
                return str(self._hub.HfApi().model_info(self._name, revision=self._revision).sha)
        cached = self._cached()
        return None if cached is None else cached.name

    def _fall_back(self, error: Exception) -> Path:
        """The cached snapshot, unless the hub has answered that there is no such revision."""
        cached = None if isinstance(error, self._errors.RevisionNotFoundError) else self._cached()
        if cached is None:
            raise CheckpointError(self._explain(error)) from error
        print(f"weightd: {self._explain(error)}; taking the cached {cached}", file=sys.stderr)
        return cached

    @property
    def _place(self) -> str:
        return self._name if self._revision == MAIN else f"{self._name} at {self._revision}"

    def _cached(self) -> Path | None:
        """The snapshot that the cache has, which may lack files; open_checkpoint() says so."""
        repository = Path(self._constants.HF_HUB_CACHE) / f"models--{self._name.replace('/', '--')}"
        commit = self._revision
        reference = repository / "refs" / self._revision
        if reference.is_file():
            commit = reference.read_text().strip()
        snapshot = repository / "snapshots" / commit
        return snapshot if re.fullmatch(r"[0-9a-f]{6,64}", commit) and snapshot.is_dir() else None

    def _download(self, store: Path) -> Path:
        api = self._hub.HfApi()
        info = api.model_info(self._name, revision=self._revision, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings}
        wanted = self._wanted(sizes, info.sha)
        self._check_space(wanted, sizes, info.sha, store)
        # One after the other in this thread: an interrupt ends it at once, and leaves whole files.
        for file in wanted:
            self._hub.hf_hub_download(self._name, file, revision=info.sha)
        self._utils.disable_progress_bars()  # nothing is left to download
        patterns = [re.sub(r"([*?[])", r"[\1]", file) for file in wanted]
        return Path(self._hub.snapshot_download(self._name, revision=self._revision, allow_patterns=patterns))

    def _wanted(self, files: Mapping[str, int], commit: str) -> list[str]:
        """The files that an import reads. Configuration and index are downloaded for this."""
        ggufs = models_among(files)
        if self._file is not None:
            if self._file not in ggufs:
                raise CheckpointError(f"{self._place} has no file {self._file}: its .gguf files are {_listed(ggufs)}")
            return self._parts(self._file, files)
        weights: list[str] = []
        kept = [file for file in files if _matches(file)]
        if CONFIG_FILE in files:
            configuration, config = self._configuration(commit)
            weights = self._weights(config.get("transformers_weights"), files, commit)
            kept = [*dict.fromkeys((*kept, configuration))]
        if weights:
            return [*kept, *weights]
        if len(ggufs) > 1:
            raise CheckpointError(
                f"{self._place} has {len(ggufs)} .gguf files: pick one with --file, of {_listed(ggufs)}"
            )
        if not ggufs:
            raise CheckpointError(f"{self._place} has nothing that can be imported: no safetensors, .bin or .gguf file")
        return self._parts(ggufs[0], files)

    def _parts(self, first: str, files: Mapping[str, int]) -> list[str]:
        """The files of a GGUF model, which may be split."""
        parts = parts_of(first)
        missing = [part for part in parts if part not in files]
        if missing:
            raise CheckpointError(
                f"{self._place} lacks {len(missing)} of the {len(parts)} parts of {first} on the hub: it was not "
                "uploaded whole; take another file or model"
            )
        return parts

    def _configuration(self, commit: str) -> tuple[str, dict[str, Any]]:
        config = read_json(self._small_file(CONFIG_FILE, commit))
        name = configuration_name(config)
        return name, config if name == CONFIG_FILE else read_json(self._small_file(name, commit))

    def _weights(self, named: Any, files: Mapping[str, int], commit: str) -> list[str]:
        """The weights by transformers' rule, as in folder.py. `named`: the file that config.json names, if any."""
        candidates = [*([named] if isinstance(named, str) else []), *WEIGHTS_FILES]
        found = next((candidate for candidate in candidates if candidate in files), None)
        return [] if found is None else [found, *self._shards(found, files, commit)]

    def _shards(self, index: str, files: Mapping[str, int], commit: str) -> list[str]:
        if not index.endswith(INDEX_SUFFIX):
            return []
        weight_map = read_json(self._small_file(index, commit)).get("weight_map")
        shards = sorted({str(shard) for shard in weight_map.values()}) if isinstance(weight_map, dict) else []
        missing = [shard for shard in shards if shard not in files]
        if missing:
            raise CheckpointError(
                f"{self._place} lacks {len(missing)} of its {len(shards)} shards on the hub, first {missing[0]!r}: "
                "it was not uploaded whole; take another revision or model"
            )
        return shards

    def _small_file(self, file: str, commit: str) -> Path:
        return Path(self._hub.hf_hub_download(self._name, file, revision=commit))

    def _check_space(self, wanted: Iterable[str], sizes: Mapping[str, int], commit: str, store: Path) -> None:
        """SpaceError if the download, and the import if it goes to the same disk, do not fit."""
        cache = Path(self._constants.HF_HUB_CACHE)
        missing_bytes = sum(
            sizes[file]
            for file in wanted
            if not isinstance(self._hub.try_to_load_from_cache(self._name, file, revision=commit), str)
        )
        if not missing_bytes:
            return  # the import itself checks the store's disk
        model_bytes = sum(sizes[file] for file in wanted)
        disk, store_disk = _existing(cache), _existing(store)
        shared = disk.stat().st_dev == store_disk.stat().st_dev
        needed_bytes = missing_bytes + (model_bytes if shared else 0) + SPARE_BYTES
        free_bytes = shutil.disk_usage(disk).free
        if needed_bytes > free_bytes:
            also = f" and {format_size(model_bytes)} to import it into {store} on the same disk" if shared else ""
            raise SpaceError(
                f"{self._place} needs {format_size(missing_bytes)} in {cache} to be downloaded{also}, but "
                f"{format_size(free_bytes)} are free: make room, or set HF_HUB_CACHE to a folder on another disk"
            )

    def _explain(self, error: Exception) -> str:
        errors, endpoint = self._errors, self._constants.ENDPOINT
        if isinstance(error, errors.GatedRepoError):
            return (
                f"{self._place} is gated: accept its terms at {endpoint}/{self._name}, then set HF_TOKEN or run "
                "`hf auth login`"
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return f"{self._name} has no revision {self._revision!r} on {endpoint}: give a branch, tag or commit of it"
        if isinstance(error, errors.RepositoryNotFoundError):
            return (
                f"no file or folder {self._name}, and {endpoint} has no such model for you: check the name, or set "
                "HF_TOKEN if it is private"
            )
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status == 401:
            return f"{endpoint} does not accept your token for {self._name}: renew HF_TOKEN, or run `hf auth login`"
        if status is not None:
            return f"{endpoint} answered {status} for {self._place}: try again later"
        reason = (str(error).splitlines() or [""])[0].strip() or type(error).__name__
        return (
            f"no file or folder {self._name}, and it cannot be downloaded from {endpoint} ({reason}): check the "
            "network and run the command again; what has been downloaded is kept"
        )


def _listed(files: list[str]) -> str:
    more = len(files) - FILES_LISTED_MAX
    return ", ".join(files[:FILES_LISTED_MAX]) + (f" and {more} more" if more > 0 else "") if files else "none"


def _matches(file: str) -> bool:
    folder, _, name = file.rpartition("/")
    patterns = {"": FILE_PATTERNS, TEMPLATES_FOLDER: TEMPLATE_PATTERNS}.get(folder, ())
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _existing(path: Path) -> Path:
    """The deepest folder of `path` that exists."""
    return next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
