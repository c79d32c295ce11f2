"""Draws what bench_paper measured, as PNG and SVG: `paper/figure.py RESULT.json FOLDER`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paper.table import PAPER_TABLE_2

OURS, PAPERS = "#1f5fa8", "#c8c8c8"
PARTS = (
    ("wait_ms", "waiting for flash", "#1f5fa8"),
    ("compute_ms", "compute", "#76b041"),
    ("management_ms", "management", "#e07b39"),
)
SIZE_INCHES = (11, 4.2)


def draw(result: Mapping[str, Any], title: str, target: Path) -> list[Path]:
    """Writes `target`.png and .svg; returns both paths.

    Args:
        result: what `bench_paper.py --json` printed.
        target: without suffix; its folder is made.
    """
    rows = [row for row in result["rows"] if "row" in row]
    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_reading(left, [row for row in rows if row.get("io_ms")])
    _draw_time(right, rows)
    figure.suptitle(title)
    target.parent.mkdir(parents=True, exist_ok=True)
    paths = [target.with_name(f"{target.name}.{suffix}") for suffix in ("png", "svg")]
    with mpl.rc_context({"svg.fonttype": "none"}):  # text stays text
        for path in paths:
            figure.savefig(path, dpi=144, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths


def _draw_reading(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """I/O per token, step by step, beside the paper's."""
    places = range(len(rows))
    ours = axes.bar([place - 0.2 for place in places], [row["io_ms"] for row in rows], 0.4, color=OURS)
    axes.bar_label(ours, [f"{row['io_ms']:.0f}" for row in rows])
    known = [(place, PAPER_TABLE_2[row["row"]][3]) for place, row in enumerate(rows) if row["row"] in PAPER_TABLE_2]
    papers = axes.bar([place + 0.2 for place, _ in known], [value for _, value in known], 0.4, color=PAPERS)
    axes.bar_label(papers, [f"{value:.0f}" for _, value in known])
    axes.set_xticks(list(places), [row["row"] for row in rows], rotation=20)
    axes.set_yscale("log")
    axes.set_ylim(top=2 * max([row["io_ms"] for row in rows] + [value for _, value in known], default=1))
    axes.set_ylabel("I/O, ms per token")
    axes.legend([ours, papers], ["here", "paper: OPT-6.7B, M1 Max"])


def _draw_time(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """The whole token, in parts where they are known."""
    bottoms = [0.0] * len(rows)
    for name, label, color in PARTS:
        heights = [float(row.get(name) or 0) for row in rows]
        axes.bar(range(len(rows)), heights, 0.6, bottom=bottoms, color=color, label=label)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    whole = [float(row["total_ms"]) for row in rows]
    others = [total - bottom for total, bottom in zip(whole, bottoms, strict=True)]
    bars = axes.bar(range(len(rows)), others, 0.6, bottom=bottoms, color=PAPERS, label="not told apart")
    axes.bar_label(bars, [f"{total:.0f}" for total in whole])
    axes.set_xticks(range(len(rows)), [row["row"] for row in rows], rotation=20)
    axes.set_ylim(0, 1.1 * max(whole, default=1))
    axes.set_ylabel("ms per token")
    axes.legend()


def main() -> int:
    if len(sys.argv) != 3:
        print(f"usage: {Path(sys.argv[0]).name} RESULT.json FOLDER", file=sys.stderr)
        return 2
    result = json.loads(Path(sys.argv[1]).read_text())
    for path in draw(result, result["machine"]["shape"], Path(sys.argv[2]) / f"paper-{result['machine']['shape']}"):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
