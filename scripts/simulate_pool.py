#!/usr/bin/env -S bash -c 'PATH="$(realpath "${0%/*}/..")/.venv/bin:$PATH" exec python3 "$0" "$@"'
"""Compares the pool's replacement policy with others on traces of cells: the share of uses that are hits.

The column weightd is the pool's own C++ code. The others are LRU, frequency, W-TinyLFU, S3-FIFO, and Belady's policy,
which knows the future. The traces are: a mixture of experts with published locality (an LRU list that holds 1/2, 1/4
and 1/8 of the experts hits 89, 67 and 45 %), the same with popular experts, a dense model in exact mode, neurons in
predict mode, and recorded ones (--trace).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from benchmarks.native_module import bench_native
from benchmarks.processes import BenchError
from benchmarks.report import Row, Target, machine_facts, report
from flags import FlagParser
from simulation.policies import POLICIES
from simulation.traces import Trace, dense, mixture, neurons, recorded

SHARES = (0.5, 0.25, 0.125)  # of the cells that are in the pool
WARM_UP = 0.25  # of a trace is not counted
LAYERS, EXPERTS, CHOSEN = 16, 64, 8  # OLMoE-1B-7B
POPULARITY = 0.6

Make = Callable[[int], Trace]  # by the number of tokens
TRACES: dict[str, tuple[Make, int]] = {  # and the experts of a layer
    "mixture": (lambda tokens: mixture(LAYERS, EXPERTS, CHOSEN, tokens), EXPERTS),
    "mixture, popular experts": (lambda tokens: mixture(LAYERS, EXPERTS, CHOSEN, tokens, POPULARITY), EXPERTS),
    "dense": (lambda tokens: dense(16, 128, tokens // 4), 0),
    "neurons": (lambda tokens: neurons(4, 512, tokens), 0),
}


def measure(name: str, trace: Trace, experts: int, share: float) -> Row:
    """The hits of each policy on `trace`. `experts`: of a layer; 0 where cells are no experts."""
    cells = int(trace.max()) + 1
    slots = max(1, round(cells * share))
    ours = bench_native().replay(trace, cells, slots, experts).reshape(-1)
    counted = ours != 2  # a row repeats its last cell where it has fewer than others
    counted[: round(len(counted) * WARM_UP)] = False
    uses = trace.reshape(-1)
    row: Row = {"trace": name, "in the pool": share, "weightd": float((ours == 1)[counted].mean())}
    for policy, play in POLICIES.items():
        row[policy] = float(play(uses, slots)[counted].mean())
    return row


def main() -> int:
    options = _options()
    try:
        traces = [(path.stem, recorded(path), options.experts) for path in options.trace] or [
            (name, make(options.tokens), experts) for name, (make, experts) in TRACES.items()
        ]
        rows = [measure(*trace, share) for trace in traces for share in SHARES]
    except (BenchError, OSError, ValueError) as error:
        print(f"simulate_pool: {error}", file=sys.stderr)
        return 1
    worst = float(min(np.subtract(row["weightd"], row["LRU"]) for row in rows))
    target = Target("hits_above_lru_worst", worst, "", 0.0, "higher")
    report(machine_facts(Path(__file__)), rows, [target], options.json)
    return 0


def _options() -> argparse.Namespace:
    parser = FlagParser(__doc__)
    parser.add_argument("--tokens", type=int, default=600, help="of each trace that is made (default: 600)")
    parser.add_argument("--trace", type=Path, nargs="+", default=[], help="recorded traces, instead of those")
    parser.add_argument("--experts", type=int, default=0, help="of a layer, in the recorded traces (default: none)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
