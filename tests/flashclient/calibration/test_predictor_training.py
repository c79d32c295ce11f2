"""Predictors, thresholds and statistics against plain definitions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from flashclient.calibration.firing import PackedBits, unions
from flashclient.calibration.predictor_training import (
    Examples,
    ReferencePredictor,
    measure,
    sign_predictor,
    train_low_rank,
    with_thresholds,
)
from flashclient.model.predictor_file import LowRank, Signs


def examples(tokens: int, hidden: int, neurons: int, seed: int = 0, share: float = 0.2) -> Examples:
    """Random inputs, and random firing that is independent of them."""
    random = torch.Generator().manual_seed(seed)
    bits = PackedBits(tokens, neurons)
    bits.put(0, torch.rand(tokens, neurons, generator=random) < share)
    return Examples(torch.randn(tokens, hidden, generator=random), bits)


def stored(matrix: Tensor) -> NDArray[Any]:
    return matrix.numpy() if matrix.dtype == torch.float32 else matrix.view(torch.int16).numpy().view(np.uint16)


@settings(max_examples=25, deadline=None)
@given(hidden=st.integers(1, 70), neurons=st.integers(1, 20), seed=st.integers(0, 1000))
def test_sign_scores_are_counted_coordinates(hidden: int, neurons: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    rows = torch.from_numpy(random.normal(size=(neurons, hidden)).astype(np.float32))
    x = torch.from_numpy(random.normal(size=(3, hidden)).astype(np.float32))
    x[0, 0] = -0.0
    signs = np.packbits(np.signbit(rows.numpy()), axis=1, bitorder="little")
    margin = random.integers(-5, 5, neurons, dtype=np.int32)
    wanted = ReferencePredictor(Signs(signs, margin), torch.float32).wanted(x)
    for token in range(3):
        for neuron in range(neurons):
            equal = int((np.signbit(rows[neuron].numpy()) == np.signbit(x[token].numpy())).sum())
            assert wanted[token, neuron].item() == (equal - (hidden - equal) > margin[neuron])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_rank_scores(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    first, second = torch.randn(3, 10, generator=random).to(dtype), torch.randn(7, 3, generator=random).to(dtype)
    bits = [
        m.numpy() if dtype == torch.float32 else m.view(torch.int16).numpy().view(np.uint16) for m in (first, second)
    ]
    bias = np.arange(-3, 4, dtype=np.float32)
    x = torch.randn(5, 10, generator=random)
    expected = (x.double() @ first.double().T @ second.double().T + torch.from_numpy(bias)) > 0
    assert torch.equal(ReferencePredictor(LowRank(bits[0], bits[1], bias), dtype).wanted(x), expected)


@settings(max_examples=25, deadline=None)
@given(recall=st.floats(0.5, 0.99), seed=st.integers(0, 1000), share=st.floats(0.02, 0.9))
def test_thresholds_find_the_target_share(recall: float, seed: int, share: float) -> None:
    held_out = examples(200, 16, 12, seed, share)
    rows = torch.randn(12, 16, generator=torch.Generator().manual_seed(seed))
    low_rank = LowRank(np.eye(16, dtype=np.float32), rows.numpy(), np.zeros(12, np.float32))
    shifted = with_thresholds(low_rank, torch.float32, held_out, recall)
    for predictor in (shifted, sign_predictor(rows, held_out, recall)):
        rates = measure(predictor, torch.float32, held_out)
        assert rates.false_negatives <= 1 - recall + 1e-6
        assert rates.firing == pytest.approx(held_out.fired.frequency().mean(), rel=1e-5)


def test_rates_are_shares_of_pairs() -> None:
    held_out = examples(300, 8, 30)
    fired = held_out.fired.of(slice(0, 300))
    predictor = LowRank(np.zeros((1, 8), np.float32), np.zeros((30, 1), np.float32), np.ones(30, np.float32))
    predictor.bias[10:] = -1
    rates = measure(predictor, torch.float32, held_out)
    assert rates.predicted == pytest.approx(1 / 3)
    assert rates.false_negatives == pytest.approx(fired[:, 10:].sum().item() / fired.sum().item())
    assert rates.false_positives == pytest.approx((~fired[:, :10]).sum().item() / (~fired).sum().item())


def test_the_smallest_rank_that_serves_is_taken() -> None:
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(96, 6, generator=random) @ torch.randn(6, 48, generator=random)
    x = torch.randn(3000, 48, generator=random)
    bits = PackedBits(3000, 96)
    bits.put(0, x @ rows.T - 30 > 0)
    whole = Examples(x, bits)
    training, held_out = whole.select(torch.arange(2000)), whole.select(torch.arange(2000, 3000))
    predictor = train_low_rank(
        rows,
        torch.full((96,), -30.0),
        training,
        held_out,
        ranks=(2, 6, 12, 500),
        recall=0.95,
        dtype=torch.float32,
        seed=0,
    )
    assert isinstance(predictor, LowRank)
    assert predictor.input.shape == (6, 48)
    assert measure(predictor, torch.float32, held_out).false_positives < 0.005


@settings(max_examples=20, deadline=None)
@given(tokens=st.integers(1, 40), length=st.integers(1, 20), neurons=st.integers(1, 20), seed=st.integers(0, 100))
def test_unions_are_those_of_sets(tokens: int, length: int, neurons: int, seed: int) -> None:
    bits = PackedBits(tokens, neurons)
    fired = np.random.default_rng(seed).random((tokens, neurons)) < 0.2
    bits.put(0, torch.from_numpy(fired))
    sequences = [fired[begin : begin + length] for begin in range(0, tokens, length)]
    found = unions(bits, length)
    for k in range(1, 9):
        sizes = [
            len(set().union(*(np.flatnonzero(row) for row in one[end - k : end])))
            for one in sequences
            for end in range(k, len(one) + 1)
        ]
        assert found[k - 1] == pytest.approx(np.mean(sizes) / neurons if sizes else 0.0, rel=1e-5)


def test_packed_bits_are_the_bits() -> None:
    fired = torch.rand(700, 13, generator=torch.Generator().manual_seed(0)) < 0.5
    bits = PackedBits(700, 13)
    for begin in range(0, 700, 100):
        bits.put(begin, fired[begin : begin + 100])
    assert torch.equal(bits.of(slice(0, 700)), fired)
    chosen = torch.tensor([3, 699, 4])
    assert torch.equal(bits.select(chosen).of(slice(0, 3)), fired[chosen])
    assert torch.equal(torch.cat([block for _, block in bits.blocks()]), fired)
    np.testing.assert_allclose(bits.frequency(), fired.float().mean(0).numpy(), rtol=1e-6)
