"""bench_serve.py on a small model."""

from __future__ import annotations

import json
from pathlib import Path

import bench_serve
import pytest
from bench_serve import Turn, row_of, targets_of
from run_here import run_here


def test_rows_of_a_small_model(tmp_path: Path) -> None:
    command = [
        "bench_serve",
        "--json",
        "--layers",
        "1",
        "--folder",
        str(tmp_path),
        "--conversation",
        "64",
        "--no-peers",
    ]
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
    assert turn.answered_tokens_per_s == pytest.approx(8 / 5)
    row = row_of(1, [turn]) | {"row": "weightd", "kind": "exact"}
    eight = row | {"at_once": 8, "tokens_per_s": 9.0, "answered_tokens_per_s": 8.0}
    (target,) = targets_of([row | {"tokens_per_s": 2.0}, eight])
    assert (target.value, target.met) == (4.5, True)
    peer = eight | {"row": "llama.cpp", "tokens_per_s": 0.0, "answered_tokens_per_s": 2.0}
    assert [one.value for one in targets_of([eight, peer])] == [4.0]


def test_speed_of_streams_that_never_run_at_once_is_none() -> None:
    assert Turn(0.0, [[1.0, 2.0], [3.0, 4.0]]).tokens_per_s == 0
