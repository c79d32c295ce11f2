"""The window against a reading of its rules with sets, and what it may hold where the limit is less than that."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashclient._native import Window, locate

CELLS, LAYERS = 12, 3
NO_LIMIT = 10_000
Columns = list[list[set[int]]]  # [columns][rows] -> positions


@dataclass
class Reference:
    """What each layer holds, token by token."""

    tokens: int
    bundles_per_cell: int
    layers: list[dict[int, set[int]]] = field(default_factory=lambda: [{} for _ in range(LAYERS)])

    def held(self, layer: int) -> set[int]:
        return set().union(*self.layers[layer].values())

    def slide(self, layer: int, past_tokens: int, columns: Columns) -> tuple[set[int], set[int]]:
        before = self.held(layer)
        last = range(past_tokens - self.tokens + 1, past_tokens)
        kept = {token: cells for token, cells in self.layers[layer].items() if token in last}
        for column, rows in enumerate(columns):
            kept[past_tokens + column] = {position // self.bundles_per_cell for row in rows for position in row}
        self.layers[layer] = kept
        return self.held(layer) - before, before - self.held(layer)


def lists(columns: Columns) -> tuple[np.ndarray, np.ndarray]:
    """Positions and row masks as a predictor gives them."""
    rows = [(row * len(columns) + column, cells) for column, of in enumerate(columns) for row, cells in enumerate(of)]
    positions = sorted(set().union(*(wanted for _, wanted in rows)))
    masks = [sum(1 << bit for bit, wanted in rows if position in wanted) for position in positions]
    return np.array(positions, np.uint32), np.array(masks, np.uint16)


@st.composite
def walks(draw: st.DrawFn) -> tuple[int, int, list[tuple[int, int, Columns]]]:
    """k, bundles per cell, and steps (layer, past tokens, columns). Tokens are rejected, generations begin anew."""
    k, per_cell, rows = draw(st.integers(0, 8)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    wanted = st.sets(st.integers(0, CELLS * per_cell - 1), max_size=8)
    ends = [0] * LAYERS
    steps = []
    for _ in range(draw(st.integers(1, 12))):
        layer = draw(st.integers(0, LAYERS - 1))
        past_tokens = max(0, ends[layer] - draw(st.sampled_from([0, 0, 0, 1, 3, 100])))
        columns = [[draw(wanted) for _ in range(rows)] for _ in range(draw(st.integers(1, 4)))]
        ends[layer] = past_tokens + len(columns)
        steps.append((layer, past_tokens, columns))
    return k, per_cell, steps


@given(walks())
def test_it_holds_what_the_last_tokens_wanted(walk: tuple[int, int, list[tuple[int, int, Columns]]]) -> None:
    k, per_cell, steps = walk
    window, reference = Window(k, per_cell, [CELLS] * LAYERS), Reference(k, per_cell)
    for layer, past_tokens, columns in steps:
        slid = window.slide(layer, past_tokens, len(columns), *lists(columns), NO_LIMIT)
        assert slid is not None
        acquire, release, elsewhere = slid
        expected = reference.slide(layer, past_tokens, columns)
        assert (set(acquire.tolist()), set(release.tolist())) == expected
        assert (len(acquire), len(release)) == (len(expected[0]), len(expected[1])), "a cell is named twice"
        assert not elsewhere
        assert window.cells_held == sum(len(reference.held(layer)) for layer in range(LAYERS))


@settings(deadline=None)
@given(walks(), st.integers(1, 20))
def test_a_limit_shrinks_it_from_its_oldest_token(
    walk: tuple[int, int, list[tuple[int, int, Columns]]], limit: int
) -> None:
    """Whatever it says to acquire and release: what is held is never more than the limit, and covers the step."""
    k, per_cell, steps = walk
    window = Window(k, per_cell, [CELLS] * LAYERS)
    held: list[set[int]] = [set() for _ in range(LAYERS)]
    for layer, past_tokens, columns in steps:
        need = {int(position) // per_cell for position in lists(columns)[0]}
        slid = window.slide(layer, past_tokens, len(columns), *lists(columns), limit)
        assert (slid is None) == (len(need) > limit)
        if slid is None:
            held = [set() for _ in range(LAYERS)]
        else:
            acquire, release, elsewhere = (slid[0].tolist(), slid[1].tolist(), slid[2])
            for other, cells in [*elsewhere, (layer, slid[1])]:
                assert set(cells.tolist()) <= held[other], "what is not held cannot be given back"
                held[other] -= set(cells.tolist())
            assert not held[layer] & set(acquire)
            assert not set(acquire) & set(release)
            held[layer] |= set(acquire)
            assert need <= held[layer]
        assert window.cells_held == sum(map(len, held)) <= limit


def one(*positions: int) -> tuple[np.ndarray, np.ndarray]:
    return np.array(positions, np.uint32), np.ones(len(positions), np.uint16)


def test_the_oldest_token_of_all_layers_gives_way() -> None:
    window = Window(4, 1, [CELLS] * LAYERS)
    window.slide(1, 0, 1, *one(1, 2), 6)
    window.slide(0, 0, 1, *one(3, 4), 6)
    window.slide(0, 1, 1, *one(5, 6), 6)
    slid = window.slide(0, 2, 1, *one(7), 6)
    assert slid is not None
    acquire, release, [(other, cells)] = slid
    assert (acquire.tolist(), release.tolist(), other, cells.tolist()) == ([7], [], 1, [1, 2])
    slid = window.slide(2, 0, 1, *one(8, 9), 6)
    assert slid is not None
    assert [(other, cells.tolist()) for other, cells in slid[2]] == [(0, [3, 4])]


def test_rejected_tokens_leave_and_accepted_ones_stay() -> None:
    window = Window(2, 1, [CELLS])
    masks = np.array([0b001, 0b010, 0b100], np.uint16)
    window.slide(0, 0, 3, np.array([1, 2, 3], np.uint32), masks, NO_LIMIT)
    slid = window.slide(0, 2, 1, *one(9), NO_LIMIT)  # the third was rejected, the second is the last accepted
    assert slid is not None
    assert (slid[0].tolist(), sorted(slid[1].tolist())) == ([9], [1, 3])


def test_nothing_is_held_after_a_step_that_does_not_fit() -> None:
    window = Window(4, 1, [CELLS])
    assert window.slide(0, 0, 1, *one(1, 2), 2) is not None
    assert window.slide(0, 1, 1, *one(3, 4, 5), 2) is None
    assert window.cells_held == 0
    slid = window.slide(0, 2, 1, *one(1), 2)
    assert slid is not None
    assert slid[0].tolist() == [1]


def test_positions_beyond_the_layer_are_refused() -> None:
    with pytest.raises(IndexError):
        Window(1, 2, [CELLS]).slide(0, 0, 1, *one(2 * CELLS), NO_LIMIT)


def test_bundles_are_located_as_their_cells_arrive() -> None:
    table = np.array([0, 1000, 0], np.uint64)
    positions = np.array([1, 2, 3, 4], np.uint32)
    addresses, found = np.zeros(4, np.uint64), np.zeros(4, np.uint32)
    assert locate(table, positions, 2, 64, addresses, found) == 2
    assert (found[:2].tolist(), addresses.tolist()) == ([1, 2], [0, 1000, 1064, 0])
    table[2] = 5000
    assert locate(table, positions, 2, 64, addresses, found) == 1
    assert (found[0], addresses.tolist()) == (3, [0, 1000, 1064, 5000])
    assert locate(table, positions, 2, 64, addresses, found) == 0
    with pytest.raises(ValueError, match="a place for each position"):
        locate(table, positions, 2, 64, addresses[:1], found)
