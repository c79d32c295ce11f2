"""`weightd import --update`: imports a checkpoint if it is new to the store or has changed since."""

from __future__ import annotations

from pathlib import Path

from weightd.checkpoint.hub import newest_commit
from weightd.checkpoint.opening import check_exists
from weightd.errors import ImportingError, StoreError
from weightd.importing.client_process import Ask
from weightd.importing.convert import Tell, import_checkpoint
from weightd.importing.tables import TABLES_ABOVE_BYTES
from weightd.importing.writing import Progress
from weightd.store.origin import origin_of, source_text
from weightd.store.store import CATALOG_FILE, Store, check_model_name, model_name_for
from weightd_proto import weightd_pb2
from weightd_proto.hub_names import is_hub_name

KEPT, IMPORTED, REPLACED = "kept", "imported", "replaced"


def update(
    path: Path,
    store: Store,
    name: str | None = None,
    dtype: str | None = None,
    allow_buffered: bool = False,
    progress: Progress | None = None,
    ask: Ask | None = None,
    activation: str | None = None,
    tell: Tell | None = None,
    tables_above_bytes: int | None = None,
    layout: str | None = None,
    resident_request: str | None = None,
) -> tuple[weightd_pb2.Model, str]:
    """The model of the checkpoint at `path`, and what was done for it: kept, imported or replaced.

    Waits while another process imports it. `name`: of the model; by default the name it has in the store, or that of
    its checkpoint if it is new. `dtype`, `activation`, `tables_above_bytes`, `layout`, `resident_request`: as of
    import_checkpoint; by default those of the last import. `tell`: as of import_checkpoint. Raises the errors of
    import_checkpoint, and StoreError if the name belongs to another checkpoint, or if the checkpoint has changed but
    its model is calibrated.
    """
    check_exists(path)
    while True:
        known = _imported_from(path, store, name)
        target = name if name is not None else known.name if known is not None else _default_name(path)
        if known is None:
            _require_free(store, target, path)
        elif not _has_changed(known, path, dtype, activation, tables_above_bytes, layout, resident_request):
            return known, KEPT
        else:
            _require_replaceable(known, store, path)
        wanted = dtype if dtype is not None else "keep" if known is None else known.origin.dtype
        function = activation if activation is not None else "" if known is None else known.origin.activation
        above_bytes = _tables_above(known) if tables_above_bytes is None else tables_above_bytes
        wanted_layout = layout if layout is not None else "" if known is None else known.origin.layout
        resident = "" if known is None else known.origin.resident_dtype
        resident = resident if resident_request is None else resident_request
        replaces = b"" if known is None else known.import_id
        try:
            more = (progress, replaces, ask, function, tell, above_bytes, wanted_layout, resident)
            model = import_checkpoint(path, store, target, wanted, allow_buffered, *more)
        except ImportingError:
            store.await_import(check_model_name(target))
        else:
            return model, REPLACED if known is not None else IMPORTED


def _tables_above(last: weightd_pb2.Model | None) -> int:
    given = last is not None and last.origin.HasField("tables_above_bytes")
    return int(last.origin.tables_above_bytes) if last is not None and given else TABLES_ABOVE_BYTES


def current_on_hub(
    source: str,
    revision: str | None,
    store: Path,
    name: str | None,
    dtype: str | None,
    activation: str | None,
    tables_above_bytes: int | None = None,
    layout: str | None = None,
    resident_request: str | None = None,
) -> weightd_pb2.Model | None:
    """The model that was imported from the hub's `source`, if it is of the commit that the hub has now.

    Then nothing is downloaded to know that it is current, even if the hub's cache was emptied after the import.
    """
    if Path(source).exists() or not is_hub_name(source) or not (store / CATALOG_FILE).exists():
        return None
    with Store.open(store, readonly=True) as opened:
        for model in opened.models():
            origin = model.origin
            same = dtype in (None, origin.dtype) and activation in (None, origin.activation)
            same = same and tables_above_bytes in (None, _tables_above(model)) and layout in (None, origin.layout)
            same = same and resident_request in (None, origin.resident_dtype)
            if model.source == source and name in (None, model.name) and same:
                return model if origin.commit and origin.commit == newest_commit(source, revision) else None
    return None


def _imported_from(path: Path, store: Store, name: str | None) -> weightd_pb2.Model | None:
    """The model that was imported from `path`, with the given name or, without one, with any name."""
    source = source_text(path)
    for model in store.models():
        if name in (None, model.name) and source in (model.source, source_text(Path(model.source))):
            return model
    return None


def _has_changed(
    model: weightd_pb2.Model,
    path: Path,
    dtype: str | None,
    activation: str | None,
    tables_above_bytes: int | None,
    layout: str | None,
    resident_request: str | None,
) -> bool:
    """Whether an import would give another model. Unknown, and so False, for an import by an older weightd."""
    if not model.HasField("origin"):
        return False
    last = model.origin
    now = origin_of(path, last.dtype if dtype is None else dtype, last.activation if activation is None else activation)
    now.layout = last.layout if layout is None else layout
    now.commit = model.origin.commit  # of a commit with the same files nothing is new
    if last.HasField("tables_above_bytes"):
        now.tables_above_bytes = last.tables_above_bytes
    now.resident_dtype = last.resident_dtype if resident_request is None else resident_request
    return bool(last != now) or tables_above_bytes not in (None, _tables_above(model))


def _default_name(path: Path) -> str:
    """The name of what a symbolic link points to, unless that is a file without a suffix, as in hub caches."""
    resolved = path.resolve()
    return model_name_for(resolved if path.is_dir() or resolved.suffix == ".gguf" else path)


def _require_free(store: Store, name: str, path: Path) -> None:
    """StoreError if the name belongs to another checkpoint, whose path may end in the same name."""
    other = store.catalog.model(name)
    if other is not None:
        raise StoreError(
            f"{store.path} has a model {name!r} already, imported from {other.source or 'an unknown place'}, not from "
            f"{path.resolve()}: to import the latter too, give it another name, with "
            f"`weightd import {path} --store {store.path} --name NAME`"
        )


def _require_replaceable(model: weightd_pb2.Model, store: Store, path: Path) -> None:
    changed = f"{path.resolve()} has changed since it was imported as {model.name!r}"
    if model.calibration.version:
        raise StoreError(
            f"{changed}, and a new import would delete its calibration: use the old import by its name, "
            f"{model.name!r}, remove it with `weightd rm {model.name} --store {store.path}`, or import the new "
            "checkpoint under another name with `weightd import --name`"
        )
