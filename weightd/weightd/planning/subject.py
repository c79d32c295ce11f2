"""The model that is planned for: of a store, or one of which there is only a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from weightd.checkpoint.checkpoint import read_json
from weightd.checkpoint.folder import CONFIG_FILE, configuration_name, has_weights, with_quantisation
from weightd.checkpoint.gguf import open_gguf
from weightd.checkpoint.model_folder import ModelFolder
from weightd.checkpoint.opening import gguf_at, locate_here, open_checkpoint
from weightd.checkpoint.quantisation.formats import quantisation
from weightd.errors import CheckpointError
from weightd.importing.client_process import Ask, TokenCost, derive, derive_from_config, token_cost
from weightd.importing.convert import lay_out
from weightd.importing.record import lay_out_record
from weightd.importing.stored_dtype import KEEP, PLAIN, bundle_encoding, resident_format
from weightd.importing.tables import TABLES_ABOVE_BYTES, choose_tables, table_record
from weightd.planning.published import SLIDES, shipped_config
from weightd.planning.quantised import checkpoint_of
from weightd.store.device_profile import DeviceProfile
from weightd.store.store import CATALOG_FILE, FILES_FOLDER, Store, model_name_for
from weightd_proto.encodings import COMPUTE_DTYPES, DTYPES, QUANTISED_DTYPES
from weightd_proto.hub_names import is_hub_name
from weightd_proto.weightd_pb2 import Model, Recipe

BLOCK_BYTES, SECTOR_BYTES = 4096, 512  # of most devices
DTYPE_DEFAULT = "bf16"  # of most published models


@dataclass(frozen=True)
class Subject:
    """A model, as an import lays it out.

    Attributes:
        name: in a store, or of the shipped configuration.
        store: that holds it; None: there is only a configuration.
        assumptions: what was taken because nothing says it, one line each.
    """

    name: str
    record: Model
    cost: TokenCost
    store: Path | None = None
    assumptions: tuple[str, ...] = ()


def subject_of(
    model: str,
    revision: str | None,
    dtype: str | None,
    device: DeviceProfile,
    store: Path | None,
    ask: Ask,
    resident_request: str | None = None,
) -> Subject:
    """Raises CheckpointError where `model` names nothing, or what it names cannot be imported; StoreError."""
    if not Path(model).exists() and store is not None and (store / CATALOG_FILE).exists():
        with Store.open(store, readonly=True) as opened:
            if model in opened.names():
                return _stored(opened, model, dtype or resident_request, ask)
    path, config = _configuration(model, revision)
    gguf = gguf_at(path) is not None
    method = None if gguf else quantisation(path, config)
    if dtype is None and (gguf or (method and path.is_dir() and has_weights(ModelFolder(path), config))):
        return _with_its_encodings(path, device, ask, resident_request or "")
    name = model if model in SLIDES else model_name_for(path.parent if path.name == CONFIG_FILE else path)
    if method is None or dtype is not None:
        return _from_config(name, config, path, dtype, device, ask, resident_request or PLAIN)
    return _quantised(name, config, path, method, device, ask, resident_request or "")


def _stored(store: Store, model: str, dtype: str | None, ask: Ask) -> Subject:
    if dtype is not None:
        raise CheckpointError(
            f"{model} is in {store.path} with dtypes of its own: leave --dtype and --resident-dtype out"
        )
    record = store.model(model)
    cost = token_cost(record, store.path / model / FILES_FOLDER, ask)
    return Subject(model, record, cost, store.path)


def _configuration(model: str, revision: str | None) -> tuple[Path, Mapping[str, Any]]:
    """The configuration, and the file or folder that has it."""
    shipped = None if Path(model).exists() else shipped_config(model)
    if shipped is not None:
        return shipped, read_json(shipped)
    if not Path(model).exists() and not is_hub_name(model):
        raise CheckpointError(
            f"no file or folder {model}, and no configuration of that name is shipped: those are {', '.join(SLIDES)}"
        )
    path = locate_here(model, revision)
    gguf = gguf_at(path)
    if gguf is not None:
        return path, open_gguf(gguf).config
    if path.is_file():
        return path, read_json(path)
    if not (path / CONFIG_FILE).is_file():
        raise CheckpointError(f"{path} has no {CONFIG_FILE}: give its path, or one of {', '.join(SLIDES)}")
    config = read_json(path / CONFIG_FILE)
    named = configuration_name(config)
    return path, with_quantisation(ModelFolder(path), config if named == CONFIG_FILE else read_json(path / named))


def _with_its_encodings(path: Path, device: DeviceProfile, ask: Ask, resident_request: str) -> Subject:
    """As an import would lay out a GGUF file or a folder that is quantised."""
    checkpoint = open_checkpoint(path)
    recipe = derive(checkpoint, ask)
    sizes = (BLOCK_BYTES, device.full_speed_bytes, SECTOR_BYTES, TABLES_ABOVE_BYTES)
    laid_out = lay_out(checkpoint, recipe, model_name_for(path), KEEP, *sizes, resident_request=resident_request)
    cost = _cost(recipe, laid_out.record, ask)
    return Subject(laid_out.record.name, laid_out.record, cost, None, (*recipe.notes, *laid_out.notes))


def _cost(recipe: Recipe, record: Model, ask: Ask) -> TokenCost:
    with TemporaryDirectory(prefix="weightd-plan-") as folder:
        Path(folder, CONFIG_FILE).write_bytes(recipe.config_json)
        return token_cost(record, Path(folder), ask)


def _from_config(
    name: str,
    config: Mapping[str, Any],
    path: Path,
    dtype: str | None,
    device: DeviceProfile,
    ask: Ask,
    resident_request: str,
) -> Subject:
    used, assumptions = _dtype(config, None if dtype in QUANTISED_DTYPES else dtype)
    stored = COMPUTE_DTYPES[used]
    recipe = derive_from_config(config, path, ask)
    dtypes = {source.name: "F32" if stored in source.f32_in else stored for source in recipe.resident}
    looked_up, resident = choose_tables(recipe, recipe.resident, dtypes, dtypes, stored, TABLES_ABOVE_BYTES)
    formats = {
        source.name: resident_format(recipe, source, {}, dtypes[source.name], used, resident_request)
        for source in resident
    }
    kinds = {source.name: (formats[source.name], tuple(source.shape)) for source in resident}
    encoding = bundle_encoding(recipe, dtype or used, stored)
    sizes = (BLOCK_BYTES, device.full_speed_bytes, SECTOR_BYTES)
    record, _ = lay_out_record(recipe.model, kinds, name, stored, encoding, *sizes)
    record.tables.extend(table_record(record, source, stored, BLOCK_BYTES) for source in looked_up)
    return Subject(name, record, _cost(recipe, record, ask), None, (*assumptions, *recipe.notes))


def _quantised(
    name: str,
    config: Mapping[str, Any],
    path: Path,
    method: str,
    device: DeviceProfile,
    ask: Ask,
    resident_request: str,
) -> Subject:
    """As an import would lay out what is published in the quantised format `method`."""
    used, assumptions = _dtype(config, None)
    recipe, checkpoint = checkpoint_of(derive_from_config(config, path, ask), config, path, COMPUTE_DTYPES[used])
    sizes = (BLOCK_BYTES, device.full_speed_bytes, SECTOR_BYTES, TABLES_ABOVE_BYTES)
    laid_out = lay_out(checkpoint, recipe, name, KEEP, *sizes, resident_request=resident_request)
    which = f"linear layers are in {method}, but for those that the configuration leaves out, as no weights are there"
    lines = (*assumptions, which, *recipe.notes, *laid_out.notes)
    return Subject(name, laid_out.record, _cost(recipe, laid_out.record, ask), None, lines)


def _dtype(config: Mapping[str, Any], asked: str | None) -> tuple[str, tuple[str, ...]]:
    """The dtype as `weightd import` calls it, and what had to be assumed."""
    if asked is not None:
        return asked, ()
    text = config.get("text_config")
    parts = [config, *([text] if isinstance(text, dict) else [])]  # of a multimodal model
    said = next((part[key] for part in parts for key in ("dtype", "torch_dtype") if part.get(key)), None)
    known = {DTYPES[dtype].torch: name for name, dtype in COMPUTE_DTYPES.items()}
    if isinstance(said, str) and said in known:
        return known[said], ()
    return DTYPE_DEFAULT, (f"weights in {DTYPE_DEFAULT}, as the configuration says no dtype",)
