"""`weightd plan MODEL --dram SIZE`: what would be resident, what a token would read, and how long it would take.

A configuration is enough: nothing is downloaded, imported or served. The kernels' speed is measured on the spot, the
device's in the folder of --store.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flashclient.memory_limits import memory_limits
from flashclient.standard_streams import say
from weightd.errors import UsageError
from weightd.flags import FlagParser
from weightd.importing.client_process import child
from weightd.machine.budget import check_serves_one, percent_of_memory
from weightd.planning.expectation import EXPERT_HITS, Expectation, expect
from weightd.planning.firing import Firing, assumed_firing, calibrated_firing
from weightd.planning.outline import ffns_of, resident_of, stored_bytes, tables_of, tensors_line
from weightd.planning.published import SLIDES
from weightd.planning.subject import Subject, subject_of
from weightd.serving.config import parse_dram
from weightd.serving.served_models import demand_of
from weightd.sizes import NOTHING_GIVEN, format_enough, format_size
from weightd.store.device_profile import DeviceProfile, assumed_profile, known_profile
from weightd.store.store import Store
from weightd_proto.encodings import (
    COMPUTE_DTYPES,
    QUANTISED_DTYPES,
    bundle_neurons,
    formats_of,
    has_experts,
    resident_formats_of,
)
from weightd_proto.modes import EXACT, PREDICT, THRESHOLD, WINDOW_TOKENS, lossy_mode

DEVICE_GB_PER_S_DEFAULT = 3.0  # of a common NVMe drive


@dataclass(frozen=True)
class Plan:
    """What was planned, and what it was planned with.

    Attributes:
        expectations: by --dram in bytes, ascending.
        device_text: where the device's profile comes from.
        assumptions: one line each.
    """

    subject: Subject
    mode: str
    device: DeviceProfile
    device_text: str
    minimum_bytes: int
    expectations: dict[int, Expectation]
    assumptions: tuple[str, ...]


def main(arguments: Sequence[str]) -> int:
    """Prints the plan. Raises WeightdError for bad input, SpaceError where --dram is too small."""
    flags = _parser().parse_args(list(arguments))
    dram = parse_dram("--dram", flags.dram, NOTHING_GIVEN)
    dram_bytes = dram.bytes if dram.percent is None else percent_of_memory(dram.percent, memory_limits())
    device, device_text = _device(flags.device, flags.store)
    with child() as ask:
        subject = subject_of(flags.model, flags.revision, flags.dtype, device, flags.store, ask, flags.resident_dtype)
    subject, mode, firing = _mode(
        subject, flags.mode, flags.firing, None if flags.window is None else int(flags.window)
    )
    plan = make_plan(subject, mode, firing, device, device_text, dram_bytes)
    say(json.dumps(_as_json(plan)) if flags.json else "\n".join(_as_text(plan)))
    return 0


def make_plan(
    subject: Subject, mode: str, firing: Firing | None, device: DeviceProfile, device_text: str, dram_bytes: int | None
) -> Plan:
    """The plan for `dram_bytes`, or for several sizes where that is None. Raises SpaceError if it is too small."""
    record = subject.record
    demand = demand_of(record)
    if dram_bytes is not None:
        check_serves_one(dram_bytes, [demand])
    sizes = [dram_bytes] if dram_bytes is not None else _usual_sizes(subject)
    expectations = {size: expect(record, subject.cost, device, size, firing) for size in sizes}
    assumptions = [*subject.assumptions]
    if has_experts(record):
        known = ", ".join(f"{hits:.0%} at {share:g}" for share, hits in EXPERT_HITS[1:-1])
        assumptions.append(
            f"the router picks as that of a published mixture of 128 experts: of its picks the pool holds {known} of "
            "the experts"
        )
    return Plan(subject, mode, device, device_text, demand.minimum_bytes, expectations, tuple(assumptions))


def _usual_sizes(subject: Subject) -> list[int]:
    """The smallest, half of the model, all of it, and that of the slides."""
    record, demand = subject.record, demand_of(subject.record)
    sizes = {demand.minimum_bytes, stored_bytes(record) // 2}
    sizes.add(demand.minimum_bytes + record.bundles_file_bytes)
    if subject.name in SLIDES:
        sizes.add(int(SLIDES[subject.name].assisted_gb * 1e9))
    return sorted(size for size in sizes if size >= demand.minimum_bytes)


def _device(gb_per_s: float | None, store: Path | None) -> tuple[DeviceProfile, str]:
    if gb_per_s is not None:
        return assumed_profile(gb_per_s), f"{gb_per_s:g} GB/s, as given with --device"
    if store is not None:
        profile = known_profile(store)
        return profile, f"that of {store}, {profile.sequential_gb_per_s:.2f} GB/s as measured"
    return (
        assumed_profile(DEVICE_GB_PER_S_DEFAULT),
        f"an NVMe drive of {DEVICE_GB_PER_S_DEFAULT:g} GB/s is assumed: --store DIR measures yours",
    )


def _mode(
    subject: Subject, asked: str | None, share: float | None, window: int | None
) -> tuple[Subject, str, Firing | None]:
    """The mode that is planned, and how neurons fire unless that is exact. Raises UsageError, StoreError."""
    calibrated = subject.record.calibration
    mode = asked or (PREDICT if share is not None or calibrated.mode == PREDICT else EXACT)
    if share is not None and mode != PREDICT:
        raise UsageError(f"--firing is for mode predict, not for {mode}: leave one of them out")
    if mode == EXACT:
        return subject, mode, None
    window = WINDOW_TOKENS[mode] if window is None else window
    if has_experts(subject.record):
        raise UsageError(f"{subject.name} is a mixture of experts: only exact mode runs it")
    if bundle_neurons(subject.record.bundle) > 1:
        raise UsageError(f"{subject.name} is stored in slabs: only exact mode runs it; import it with --dtype bf16")
    if share is not None:
        firing, record = assumed_firing(subject.record, share, window)
        assumed = f"{share:.0%} of the neurons are predicted for a token, as unevenly as those of OPT-6.7B"
        return replace(subject, record=record, assumptions=(*subject.assumptions, assumed)), mode, firing
    if subject.store is None:
        raise UsageError(
            f"{mode} mode needs a calibration, and {subject.name} is only a configuration: plan a calibrated model of "
            "a --store, or assume with --firing 0.1 that predict mode predicts a tenth of the neurons"
        )
    if calibrated.version > 0 and lossy_mode(calibrated) != mode:
        raise UsageError(
            f"{subject.name} was calibrated for mode {lossy_mode(calibrated)}: plan that, or run `flashclient "
            f"calibrate --mode {mode}`, which replaces that calibration"
        )
    with Store.open(subject.store, readonly=True) as store:
        return subject, mode, calibrated_firing(store, subject.record, window)


def _as_json(plan: Plan) -> dict[str, Any]:
    subject, record = plan.subject, plan.subject.record
    slides = SLIDES.get(subject.name)
    return {
        "model": subject.name,
        "model_class": record.model_class,
        "dtype": formats_of(record),
        "resident_dtype": resident_formats_of(record),
        "mode": plan.mode,
        "resident_bytes": record.resident_file_bytes,
        "tables": [vars(each) for each in tables_of(record)],
        "ffn_bytes": record.bundles_file_bytes,
        "smallest_dram_bytes": plan.minimum_bytes,
        "device": {"source": plan.device_text, "sequential_gb_per_s": plan.device.sequential_gb_per_s},
        "ffn_ms": subject.cost.ffn_s * 1e3,
        "besides_ms": subject.cost.besides_s * 1e3,
        "kv_bytes_per_token": subject.cost.kv_bytes,
        "kv_int8_bytes_per_token": subject.cost.kv_int8_bytes,
        "plans": [_figures(size, each) for size, each in plan.expectations.items()],
        "assumptions": list(plan.assumptions),
        "slides": None if slides is None else vars(slides),
    }


def _figures(dram_bytes: int, expected: Expectation) -> dict[str, Any]:
    pool = expected.pool
    return {
        "dram_bytes": dram_bytes,
        "pool_bytes": pool.slots * pool.cell_bytes,
        "pool_share": pool.slots / pool.cells,
        "session_share_bytes": pool.share_slots * pool.cell_bytes,
        "read_bytes_per_token": round(expected.reads.read_bytes),
        "read_ms": expected.read_s * 1e3,
        "compute_ms": expected.compute_s * 1e3,
        "token_ms": expected.token_s * 1e3,
        "tokens_per_s": 1 / expected.token_s,
    }


def _as_text(plan: Plan) -> Iterator[str]:
    subject, record = plan.subject, plan.subject.record
    whole = format_size(stored_bytes(record))
    yield f"{subject.name}: {record.model_class}, {formats_of(record)}, {whole}; {plan.mode} mode"
    yield _row("resident", f"{format_size(record.resident_file_bytes)}: {tensors_line(resident_of(record))}")
    if record.tables:
        yield _row("tables", f"of which a token reads a row: {tensors_line(tables_of(record))}")
    ffns = "; ".join(each.line() for each in ffns_of(record))
    yield _row("streamed", f"{format_size(record.bundles_file_bytes)}: {ffns}")
    yield _row("device", plan.device_text)
    computed = f"{subject.cost.picks} experts of each layer" if has_experts(record) else "all FFNs"
    ffn, besides = (_milliseconds(each * 1e3) for each in (subject.cost.ffn_s, subject.cost.besides_s))
    yield _row("computing", f"{ffn} a token for {computed} in memory, {besides} for all else, as measured here")
    if subject.cost.kv_bytes:
        in_int8 = subject.cost.kv_int8_bytes
        less = f", {format_size(in_int8)} with --kv-dtype int8" if in_int8 else ""
        kept = f"keys and values of {format_size(subject.cost.kv_bytes)} a token{less}, in the client beside --dram"
        yield _row("context", kept)
    yield _row("smallest", f"--dram {format_enough(plan.minimum_bytes)}")
    for each in plan.assumptions:
        yield _row("assumed", each)
    if subject.name in SLIDES:
        slides = SLIDES[subject.name]
        yield _row(
            "slides", f"{slides.conventional_gb:g} GB of DRAM, {slides.assisted_gb:g} GB with loading from flash"
        )
    yield ""
    sizes, times = ("--dram", "pool", "of FFNs", "share"), ("reading", "computing", "a token")
    yield "".join([*(f"{name:>9}" for name in sizes), f"{'read':>10}", *(f"{name:>11}" for name in times)])
    for size, expected in plan.expectations.items():
        yield _table_row(_figures(size, expected))


def _table_row(figures: dict[str, Any]) -> str:
    sizes = [format_size(figures[f"{name}_bytes"]) for name in ("dram", "pool", "session_share")]
    read = format_size(figures["read_bytes_per_token"])
    times = [_milliseconds(figures[f"{name}_ms"]) for name in ("read", "compute", "token")]
    shown = f"{sizes[0]:>9}{sizes[1]:>9}{figures['pool_share']:>9.0%}{sizes[2]:>9}{read:>10}"
    return shown + "".join(f"{each:>11}" for each in times) + f"   {figures['tokens_per_s']:.3g} tokens/s"


def _milliseconds(value: float) -> str:
    return f"{value:.{max(0, 2 - int(math.log10(max(1.0, value))))}f} ms"


def _row(name: str, value: str) -> str:
    return f"{name:10} {value}"


def _parser() -> FlagParser:
    parser = FlagParser(
        prog="weightd plan", allow_abbrev=False, description="Say what a model would cost to run, from its config.json."
    )
    model = "a folder or file with config.json, a .gguf file, a model of --store or of the hub's cache, or one of"
    parser.add_argument("model", metavar="MODEL", help=f"{model} {', '.join(SLIDES)}")
    parser.add_argument("--dram", metavar="SIZE|PCT%", help="as of weightd (default: several sizes)")
    parser.add_argument("--store", type=Path, metavar="DIR", help="the store, or a folder on its device: measures that")
    device = f"the device's sequential speed (default: that of --store, or else {DEVICE_GB_PER_S_DEFAULT:g})"
    parser.add_argument(
        "--device", type=_number("a speed above 0", lambda value: 0 < value < math.inf), metavar="GB/s", help=device
    )
    parser.add_argument(
        "--mode", choices=(EXACT, PREDICT, THRESHOLD), help="default: what the calibration decided, or exact"
    )
    parser.add_argument(
        "--dtype", choices=(*COMPUTE_DTYPES, *QUANTISED_DTYPES), help="of the stored weights (default: the model's)"
    )
    parser.add_argument(
        "--resident-dtype",
        choices=tuple(QUANTISED_DTYPES),
        help="of matrices outside the FFNs (default: the model's dtype)",
    )
    firing = "assume that predict mode predicts this share of the neurons for a token"
    parser.add_argument(
        "--firing", type=_number("a share between 0 and 1", lambda value: 0 < value < 1), metavar="SHARE", help=firing
    )
    parser.add_argument(
        "--window",
        type=_number("a number of tokens", lambda value: 0 <= value < math.inf),
        metavar="N",
        help="as of flashclient",
    )
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of a model of the hub (default: main)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _number(wanted: str, holds: Callable[[float], bool]) -> Callable[[str], float]:
    """A type of argparse's."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not holds(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return parse
