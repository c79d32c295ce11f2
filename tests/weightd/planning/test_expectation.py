"""The arithmetic of a plan: what is read, and that more memory never reads more."""

from __future__ import annotations

import numpy as np
import pytest

from weightd.importing.client_process import TokenCost
from weightd.planning.expectation import (
    EXPERT_HITS,
    NOT_AT_ONCE,
    PoolSize,
    Reads,
    expect,
    expert_hits,
    gb_per_s,
    missed_cells,
    pool_of,
)
from weightd.planning.firing import assumed_firing
from weightd.serving.served_models import demand_of
from weightd.store.device_profile import DEPTHS, DeviceProfile, ReadSpeed, assumed_profile
from weightd.store.layout import lay_out_layers, model_layout
from weightd_proto.encodings import parts_of, plain
from weightd_proto.weightd_pb2 import Layer, Model

GB = 10**9
DEVICE = assumed_profile(2.0)
COST = TokenCost(ffn_s=0.02, besides_s=0.01, picks=2)


def record(experts: int = 0, layers: int = 4, neurons: int = 4096, hidden: int = 2048) -> Model:
    place = Layer.EXPERTS if experts else Layer.MODULE
    made = Model(name="m", compute_dtype="BF16", resident_file_bytes=8 << 20)
    made.layers.extend(Layer(neurons=neurons * max(1, experts), experts=experts, place=place) for _ in range(layers))
    parts = parts_of(["gate", "up", "down"], plain("BF16"))
    made.bundle.CopyFrom(model_layout(parts, hidden, made.layers, 4096, 256 << 10))
    made.bundles_file_bytes = lay_out_layers(made.bundle, made.layers)
    return made


def dram_bytes(model: Model, pool_share: float) -> int:
    return demand_of(model).minimum_bytes + int(pool_share * model.bundles_file_bytes)


@pytest.mark.parametrize(("experts", "predict"), [(0, False), (0, True), (8, False)])
def test_more_memory_never_reads_more(experts: int, predict: bool) -> None:
    model = record(experts)
    firing, model = assumed_firing(model, 0.1, window=4) if predict else (None, model)
    reads = [
        expect(model, COST, DEVICE, dram_bytes(model, share), firing).reads.read_bytes
        for share in (0, 0.1, 0.25, 0.5, 0.75, 1)
    ]
    assert reads == sorted(reads, reverse=True)
    assert reads[-1] == 0
    assert reads[0] > 0


def test_dense_model_reads_what_the_pool_lacks() -> None:
    model = record()
    expected = expect(model, COST, DEVICE, dram_bytes(model, 0.5))
    half = model.bundles_file_bytes / 2
    assert half <= expected.reads.read_bytes <= half + expected.pool.share_slots * expected.pool.cell_bytes
    assert expected.read_s == pytest.approx(expected.reads.read_bytes / GB / gb_per_s(DEVICE, expected.reads))
    assert expected.compute_s == pytest.approx(0.03)


def test_exact_mode_reads_while_it_computes_but_for_a_part() -> None:
    model = record()
    half, whole = (expect(model, COST, DEVICE, dram_bytes(model, share)) for share in (0.5, 1))
    longer_s, shorter_s = max(half.read_s, 0.03), min(half.read_s, 0.03)
    assert half.token_s == pytest.approx(longer_s + NOT_AT_ONCE * shorter_s)
    assert whole.token_s == pytest.approx(0.03)


def test_predict_mode_computes_what_is_predicted_and_the_predictors() -> None:
    firing, model = assumed_firing(record(), 0.1, window=4)
    whole = model.bundle.bundle_bytes * len(firing.predicted)
    neurons = firing.predicted.sum() * 2 / 3 + firing.fires.sum() / 3  # gate and up, and down
    share = (neurons * model.bundle.bundle_bytes + model.calibration.files[0].size_bytes) / whole
    expected = expect(model, COST, DEVICE, dram_bytes(model, 0.5), firing)
    assert expected.compute_s == pytest.approx(0.01 + 0.02 * share)
    slow, fast = (expect(model, COST, assumed_profile(gbps), dram_bytes(model, 0.5), firing) for gbps in (0.1, 100.0))
    assert slow.token_s == pytest.approx(0.01 + slow.read_s)
    assert fast.token_s == pytest.approx(fast.compute_s)


def test_mixture_reads_the_picks_that_miss() -> None:
    model = record(experts=8)
    expected = expect(model, COST, DEVICE, dram_bytes(model, 0.5))
    picked = model.bundles_file_bytes * COST.picks / 8
    held = expected.pool.slots / expected.pool.cells
    assert expected.reads.read_bytes == pytest.approx(picked * (1 - expert_hits(held)))
    assert expected.token_s == pytest.approx(0.01 + max(expected.read_s, 0.02))
    assert [expert_hits(share) for share, _ in EXPERT_HITS] == [hits for _, hits in EXPERT_HITS]


def test_ffns_beside_mixtures_are_kept_first() -> None:
    model = record(experts=8)
    model.layers[0].experts, model.layers[0].place = 0, Layer.MODULE
    always = model.layers[0].cells * model.bundle.cell_bytes
    least = expect(model, COST, DEVICE, demand_of(model).minimum_bytes)
    assert least.reads.read_bytes >= always
    enough = expect(model, COST, DEVICE, demand_of(model).minimum_bytes + always)
    assert enough.reads.read_bytes <= (model.bundles_file_bytes - always) * COST.picks / 8


def test_the_hottest_cells_are_held_beside_the_window() -> None:
    used = np.array([1.0] * 10 + [0.1] * 90)
    assert missed_cells(used, 100, 0) == 0
    assert missed_cells(used, 10, 0) == pytest.approx(9, rel=0.02)
    assert missed_cells(used, 10, 4) <= missed_cells(used, 10, 0) + 0.1  # a window that does not fit is shorter
    with_window = missed_cells(used, 60, 4)
    assert missed_cells(used, 60, 0) <= with_window <= 9 * 0.9**4


def test_the_pool_is_what_the_engine_gives() -> None:
    model = record()
    least = pool_of(model, demand_of(model).minimum_bytes)
    assert least == PoolSize(6, 3, 16384, 12288)
    assert pool_of(model, demand_of(model).minimum_bytes + (64 << 20)).share_slots == (8 << 20) // 12288


def test_room_for_segments_that_a_table_does_not_fill_is_the_pools() -> None:
    model = record()
    without = pool_of(model, demand_of(model).minimum_bytes).slots
    model.tables.add().CopyFrom(record(layers=1, neurons=16384))
    model.tables[0].name = "m/embed"
    assert pool_of(model, demand_of(model).minimum_bytes).slots == without + (62 << 20) // 12288


def test_speed_lies_between_the_sizes_and_depths_that_were_measured() -> None:
    rows = [
        ReadSpeed(size, depth, 0.0, speed)
        for depth, size, speed in ((1, 4096, 0.1), (1, 1 << 20, 1.0), (32, 4096, 0.4), (32, 1 << 20, 2.0))
    ]
    device = DeviceProfile(0, 2.0, tuple(rows))
    assert gb_per_s(device, Reads(0, 4096, 1)) == pytest.approx(0.1)
    assert gb_per_s(device, Reads(0, 1 << 20, 1000)) == pytest.approx(2.0)
    assert 0.1 < gb_per_s(device, Reads(0, 4096, 6)) < 0.4
    assert 0.4 < gb_per_s(device, Reads(0, 65536, 32)) < 2.0


def test_assumed_device_is_slower_at_small_reads_and_reaches_its_speed() -> None:
    device = assumed_profile(3.0)
    assert {row.depth for row in device.random} == set(DEPTHS)
    speeds = [row.gb_per_s for row in device.random if row.depth == 1]
    assert speeds == sorted(speeds)
    assert max(row.gb_per_s for row in device.random) == 3.0


def test_assumed_firing_has_the_mean_that_was_asked_for() -> None:
    firing, with_predictors = assumed_firing(record(), 0.1, window=4)
    assert firing.predicted.mean() == pytest.approx(0.1, rel=0.05)
    assert demand_of(with_predictors).minimum_bytes > demand_of(record()).minimum_bytes
