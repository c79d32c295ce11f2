"""`weightd probe SRC`: what an import would make of a checkpoint.

All is derived, proven and rehearsed as for an import, but no weights are read, except vectors and tied weights, and
nothing is kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from flashclient.standard_streams import say
from weightd.checkpoint.opening import locate_here, open_checkpoint
from weightd.flags import FlagParser
from weightd.importing.client_process import check_runnable, child, derive
from weightd.importing.convert import lay_out, write_files
from weightd.importing.stored_dtype import KEEP
from weightd.importing.tables import TABLES_ABOVE_BYTES
from weightd.planning.outline import (
    activation_text,
    ffns_of,
    left_out_of,
    resident_of,
    stored_bytes,
    tables_of,
    tensors_line,
)
from weightd.sizes import format_size
from weightd.store.device_profile import FULL_SPEED_READ_BYTES_DEFAULT
from weightd.store.store import FILES_FOLDER, model_name_for
from weightd_proto.encodings import (
    COMPUTE_DTYPES,
    LAYOUTS,
    QUANTISED_DTYPES,
    RESIDENT_DTYPES,
    bundle_neurons,
    formats_of,
    layout_of,
    resident_formats_of,
)
from weightd_proto.weightd_pb2 import Model, Recipe

BLOCK_BYTES, SECTOR_BYTES = 4096, 512  # of most devices; a store's own may be larger


def main(arguments: Sequence[str]) -> int:
    """Prints what is found. Raises CheckpointError where an import would be refused: what, where, and what is known."""
    flags = _parser().parse_args(list(arguments))
    path = locate_here(flags.source, flags.revision, flags.file)
    requests = (flags.dtype or KEEP, flags.activation or "", flags.resident_dtype or "", flags.layout or "")
    recipe, record = probe(path, *requests)
    say(json.dumps(_as_json(record, recipe)) if flags.json else "\n".join(_as_text(record, recipe)))
    return 0


def probe(
    path: Path, dtype: str = KEEP, activation: str = "", resident_request: str = "", layout: str = ""
) -> tuple[Recipe, Model]:
    """The recipe of the checkpoint at `path`, with all notes, and the record of the model that an import would make.

    Raises the errors of import_checkpoint() about the checkpoint.
    """
    with child() as ask, TemporaryDirectory(prefix="weightd-probe-") as scratch:
        checkpoint = open_checkpoint(path)
        recipe = derive(checkpoint, ask, activation)
        name = model_name_for(path.resolve())
        sizes = (BLOCK_BYTES, FULL_SPEED_READ_BYTES_DEFAULT, SECTOR_BYTES, TABLES_ABOVE_BYTES)
        laid_out = lay_out(checkpoint, recipe, name, dtype, *sizes, layout, resident_request)
        record = laid_out.record
        recipe.notes.extend(laid_out.notes)
        files = Path(scratch, FILES_FOLDER)
        write_files(checkpoint, recipe, files)
        recipe.notes.extend(check_runnable(record, files, path, ask))
    return recipe, record


def _as_json(record: Model, recipe: Recipe) -> dict[str, Any]:
    return {
        "model": record.name,
        "model_class": record.model_class,
        "dtype": formats_of(record),
        "resident_dtype": resident_formats_of(record),
        "activation": activation_text(record.activation),
        "layout": layout_of(record.bundle),
        "bundle_neurons": bundle_neurons(record.bundle),
        "bundle_bytes": record.bundle.bundle_bytes,
        "ffns": [asdict(each) for each in ffns_of(record)],
        "ffn_bytes": record.bundles_file_bytes,
        "tables": [asdict(each) for each in tables_of(record)],
        "resident_bytes": record.resident_file_bytes,
        "resident_share": _resident_share(record),
        "resident": [asdict(each) for each in resident_of(record)],
        "left_out": [{"reason": reason, "tensors": counts} for reason, counts in left_out_of(recipe.left_out)],
        "notes": list(recipe.notes),
    }


def _as_text(record: Model, recipe: Recipe) -> Iterator[str]:
    yield f"{record.name}: {record.model_class}; a tiny instance computes the same when it is streamed"
    for each in ffns_of(record):
        yield _row("FFNs", each.line())
    neurons = bundle_neurons(record.bundle)
    of = "neuron" if neurons == 1 else f"slab of {neurons} neurons"
    bundle = f"{format_size(record.bundle.bundle_bytes)} a {of}"
    yield _row("activation", f"{activation_text(record.activation)}; {formats_of(record)}, {bundle}")
    whole_bytes, share = stored_bytes(record), _resident_share(record)
    streamed = f"{format_size(record.bundles_file_bytes)}, {record.bundles_file_bytes / whole_bytes:.0%} of the model"
    yield _row("streamed", streamed)
    if record.tables:
        yield _row("tables", f"of which a token reads a row: {tensors_line(tables_of(record))}")
    resident = tensors_line(resident_of(record))
    yield _row("resident", f"{format_size(record.resident_file_bytes)}, {share:.0%}: {resident}")
    for reason, counts in left_out_of(recipe.left_out):
        modules = ", ".join(f"{module} ({count} tensors)" for module, count in counts.items())
        yield _row("left out", f"{modules}: {reason}")
    for note in recipe.notes:
        yield _row("note", note)


def _row(name: str, value: str) -> str:
    return f"{name:10} {value}"


def _resident_share(record: Model) -> float:
    return record.resident_file_bytes / stored_bytes(record)


def _parser() -> FlagParser:
    parser = FlagParser(
        prog="weightd probe", allow_abbrev=False, description="Say what an import would make of a model; write nothing."
    )
    source = "a Hugging Face folder, a .gguf file, or ORGANISATION/NAME of a model in the hub's cache"
    parser.add_argument("source", metavar="SRC", help=source)
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of a model of the hub (default: main)")
    parser.add_argument("--file", metavar="F", help="the .gguf file of a model of the hub that has several")
    parser.add_argument("--dtype", choices=(KEEP, *COMPUTE_DTYPES, *QUANTISED_DTYPES), help="as of `weightd import`")
    parser.add_argument("--resident-dtype", choices=RESIDENT_DTYPES, help="as of `weightd import`")
    parser.add_argument("--layout", choices=LAYOUTS, help="as of `weightd import`")
    parser.add_argument("--activation", metavar="NAME", help="as of `weightd import`")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser
