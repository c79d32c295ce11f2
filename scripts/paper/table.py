"""Our tables beside the paper's (arXiv 2312.11514 v3, Tables 2 and 3: OPT-6.7B on an M1 Max), as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.report import Row

# DRAM GB, GB read per token, GB/s, I/O ms per token. The paper's last row is bundling: our "all" has more.
PAPER_TABLE_2: Mapping[str, tuple[float, float, float, float]] = {
    "naive": (0, 13.4, 6.10, 2196),
    "hybrid": (6.7, 6.7, 6.10, 1090),
    "+predictor": (4.8, 0.9, 1.25, 738),
    "+windowing": (6.5, 0.2, 1.25, 164),
    "+bundling": (6.5, 0.2, 2.25, 87),
}
# ms per token: I/O, memory management, compute, total; OPT-6.7B on the CPU.
PAPER_TABLE_3: Mapping[str, tuple[float, float, float, float]] = {
    "naive": (2196, 0, 986, 3182),
    "+bundling": (105, 58, 506, 669),
}
NOTHING = "-"
COLUMNS_2 = ("dram_gb", "read_gb_per_token", "gb_per_s", "io_ms")
COLUMNS_3 = ("wait_ms", "management_ms", "compute_ms", "total_ms")
TIMES = ("total_ms_p50", "total_ms_p90", "total_ms_p99", "io_ms_p50", "io_ms_p90", "io_ms_p99")


def tables(rows: Sequence[Row]) -> str:
    """Table 2, Table 3, the spread, and the first tokens."""
    ours = [row for row in rows if "row" in row]
    parts = [
        _table("reading, per token: ours | paper", ("DRAM GB", "GB", "GB/s", "I/O ms"), COLUMNS_2, ours, PAPER_TABLE_2),
        _table(
            "time, ms per token: ours | paper",
            ("I/O", "management", "compute", "total"),
            COLUMNS_3,
            ours,
            PAPER_TABLE_3,
        ),
        _table("spread, ms per token", ("p50", "p90", "p99", "I/O p50", "I/O p90", "I/O p99"), TIMES, ours, {}),
        _table("the first tokens, ms", ("total", "I/O"), ("total_ms", "io_ms"), _first(ours), {}),
    ]
    return "\n\n".join(parts)


def _first(rows: Sequence[Row]) -> list[Row]:
    return [row["first_tokens"] | {"row": row["row"]} for row in rows if row.get("first_tokens")]


def _table(
    title: str,
    heads: Sequence[str],
    columns: Sequence[str],
    rows: Sequence[Row],
    paper: Mapping[str, tuple[float, ...]],
) -> str:
    width = 20 if paper else 11
    lines = [title, f"{'':<24}" + "".join(f"{head:>{width}}" for head in heads)]
    for row in rows:
        theirs = paper.get(row["row"], (None,) * len(columns))
        cells = [_short(row.get(name)) for name in columns]
        if paper:
            cells = [f"{cell} | {_short(their)}" for cell, their in zip(cells, theirs, strict=True)]
        lines.append(f"{row['row']:<24}" + "".join(f"{cell:>{width}}" for cell in cells))
    return "\n".join(lines)


def _short(value: float | None) -> str:
    if value is None:
        return NOTHING
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
