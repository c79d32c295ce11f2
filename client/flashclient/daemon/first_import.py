"""Imports a checkpoint on its first use."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from flashclient.daemon.weightd_command import WEIGHTD, output_of
from flashclient.errors import ModelNotFoundError, StartError
from weightd_proto.files import BUNDLES_FILE
from weightd_proto.hub_names import is_hub_name

logger = logging.getLogger("flashclient")


def import_if_new(store: Path, model: str, answering: AbstractContextManager[int]) -> str:
    """The name of `model` in `store`. A path of a checkpoint is imported first, unless the store has it unchanged.

    If `model` is both a name in the store and a path, the name counts, unless that model was imported from this path. A
    model of the hub that the store has is not looked for there again.

    Args:
        answering: gives the descriptor for --client-fd.

    Raises:
        ModelNotFoundError: there is no such path, and no model of the hub is named like this.
        StartError: the import failed; repeats its message. For example, the store has another checkpoint of that name.
    """
    try:
        return _imported(store, model, answering)
    except PermissionError as error:
        raise StartError(
            f"cannot use the store {store}: {error.filename}: permission denied: use it as its owner, or name another"
        ) from None


def require_there(store: Path, model: str) -> None:
    """Raises ModelNotFoundError where `model` can be neither a checkpoint nor in the store."""
    if os.path.exists(model) or is_hub_name(model):  # noqa: PTH110
        return
    if "/" in model:
        raise ModelNotFoundError(
            f"no file or folder '{model}', and a model's name has no slash: pass the folder of a checkpoint, or "
            "ORGANISATION/NAME of a model on the hub"
        )
    if not os.path.exists(store):  # noqa: PTH110
        raise ModelNotFoundError(
            f"no file or folder '{model}', and there is no store at {store} yet: pass the folder or the .gguf file of "
            "a checkpoint, or ORGANISATION/NAME of a model on the hub"
        )


def _imported(store: Path, model: str, answering: AbstractContextManager[int]) -> str:
    exists = os.path.exists(model)  # noqa: PTH110
    if not exists and is_hub_name(model):
        return _stored_from(store, model) or _import(store, model, model, answering)
    require_there(store, model)
    if not exists or (_is_stored(store, model) and _stored_from(store, model) != model):
        return model
    return _import(store, model, os.path.abspath(model), answering)  # noqa: PTH100


def _import(store: Path, model: str, source: str, answering: AbstractContextManager[int]) -> str:
    command = [*WEIGHTD, "import", source, "--store", str(store), "--update", "--json"]
    with answering as descriptor, _terminal() as terminal:
        command += ["--client-fd", str(descriptor)]
        command += [argument for number in terminal for argument in ("--progress-fd", str(number))]
        result = json.loads(output_of(command, f"cannot import {model}", descriptor, *terminal))
    if result["done"] == "replaced":
        logger.warning("%s has changed since it was imported as '%s': imported it again", model, result["name"])
    return str(result["name"])


@contextmanager
def _terminal() -> Iterator[tuple[int, ...]]:
    """A descriptor of the terminal that standard error is, for a progress bar; none if it is not one."""
    if not os.isatty(2):
        yield ()
        return
    terminal = os.dup(2)  # the child's own standard error is a pipe
    try:
        yield (terminal,)
    finally:
        os.close(terminal)


def _is_stored(store: Path, name: str) -> bool:
    return os.path.basename(name) == name not in (".", "..") and (store / name / BUNDLES_FILE).exists()  # noqa: PTH119


def _stored_from(store: Path, source: str) -> str | None:
    """The name in `store` of a model that was imported from `source`, a path or a model of the hub; None: it has none.

    If several were, the one that is called `source` comes first.
    """
    if not any(store.glob(f"*/{BUNDLES_FILE}")):
        return None
    models = json.loads(output_of([*WEIGHTD, "ls", "--store", str(store), "--json"], f"cannot list {store}"))["models"]
    path = Path(source).resolve()
    names = [model["name"] for model in models if model["source"] == source or Path(model["source"]).resolve() == path]
    return source if source in names else names[0] if names else None
