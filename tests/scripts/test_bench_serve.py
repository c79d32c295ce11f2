"""bench_serve.py on a small model."""

from __future__ import annotations

import json
from pathlib import Path

import bench_serve
import pytest
from bench_serve import Turn, row_of, targets_of
from run_here import run_here


def test_rows_of_a_small_model(tmp_path: Path) -> None:
    command = ["bench_serve", "--json", "--layers", "1", "--folder", str(tmp_path), "--conversation", "64"]
    command += ["--memory", "1.5", "--at-once", "1", "3", "--tokens", "5", "--rounds", "1", "--prompt-tokens", "3"]
    done = run_here(bench_serve.main, *command)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    *rows, turn = told["rows"]
    assert [row["at_once"] for row in rows] == [1, 3]
    assert turn["second_turn_first_token_s"] > 0
    assert turn["from_flash_first_token_s"] > 0
    assert told["targets"][0]["name"] == "second_turn_sooner"
    assert {row["kind"] for row in rows} == {"exact"}
    for row in rows:
        assert row["tokens_per_s"] > 0
        assert 0 < row["between_tokens_ms_p50"] <= row["between_tokens_ms_p99"]


def test_speed_counts_only_what_all_streams_have_in_common() -> None:
    turn = Turn(0.0, [[1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 4.0, 5.0]])
    assert turn.tokens_per_s == pytest.approx(4 / 2)
    assert turn.first_s == [1.0, 2.0]
    rows = [row_of(count, [turn]) | {"tokens_per_s": speed, "kind": "exact"} for count, speed in ((1, 2.0), (8, 9.0))]
    (target,) = targets_of(rows)
    assert (target.value, target.met) == (4.5, True)
