"""The native predictors against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from flashclient._native import GatePredictor, LowRankPredictor, SignPredictor, Workers
from flashclient.model.activations import FUNCTIONS
from flashclient.model.predictor_file import quantized

WORKERS = Workers(2)
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
Wanted = NDArray[np.bool_]  # [neurons, tokens]

sizes = st.integers(1, 150)
tokens_of = st.integers(1, 16)
seeds = st.integers(0, 1000)


def stored_bits(weight: Tensor) -> NDArray[np.uint16] | NDArray[np.float32]:
    """Copies of the arrays at addresses as in a mapped file."""
    return weight.numpy() if weight.dtype == torch.float32 else weight.view(torch.uint16).numpy()


def unpack(prediction: tuple[NDArray[np.uint32], NDArray[np.uint16]], neurons: int, tokens: int) -> Wanted:
    positions, row_masks = prediction
    assert positions.dtype == np.uint32
    assert row_masks.dtype == np.uint16
    assert (np.diff(positions.astype(np.int64)) > 0).all(), "positions must rise"
    assert row_masks.all(), "a neuron that nobody wants is listed"
    wanted = np.zeros((neurons, tokens), np.bool_)
    wanted[positions] = (row_masks[:, None] >> np.arange(tokens) & 1).astype(bool)
    return wanted


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(DTYPES)), sizes, sizes, sizes, tokens_of, seeds)
def test_low_rank(dtype: str, hidden: int, rank: int, neurons: int, tokens: int, seed: int) -> None:
    torch.manual_seed(seed)
    into = (torch.randn(rank, hidden) / hidden**0.5).to(DTYPES[dtype])
    out = (torch.randn(neurons, rank) / rank**0.5).to(DTYPES[dtype])
    bias, x = torch.randn(neurons), torch.randn(tokens, hidden)
    predictor = LowRankPredictor(WORKERS, dtype, stored_bits(into), stored_bits(out), bias.numpy())
    check_low_rank(predictor, into, out.double(), bias, x)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(DTYPES)), sizes, sizes, sizes, tokens_of, seeds)
def test_low_rank_in_bytes(dtype: str, hidden: int, rank: int, neurons: int, tokens: int, seed: int) -> None:
    torch.manual_seed(seed)
    into = (torch.randn(rank, hidden) / hidden**0.5).to(DTYPES[dtype])
    bias, x = torch.randn(neurons), torch.randn(tokens, hidden)
    stored = quantized(stored_bits(into), (torch.randn(neurons, rank) / rank**0.5).numpy(), bias.numpy())
    assert stored.scale is not None
    predictor = LowRankPredictor(WORKERS, dtype, stored.input, stored.output, stored.bias, stored.scale)
    out = torch.from_numpy(stored.output).double() * torch.from_numpy(stored.scale).double()[:, None]
    check_low_rank(predictor, into, out, bias, x)


def check_low_rank(predictor: LowRankPredictor, into: Tensor, out: Tensor, bias: Tensor, x: Tensor) -> None:
    neurons, tokens = len(out), len(x)
    wanted = unpack(predictor.predict(x.numpy()), neurons, tokens)
    score = (out @ (into.double() @ x.double().T) + bias.double()[:, None]).numpy()
    clear = np.abs(score) > 1e-4  # closer to 0 rounding decides
    assert np.array_equal(wanted[clear], score[clear] > 0)
    for row in range(tokens):
        alone = unpack(predictor.predict(x[row : row + 1].numpy()), neurons, 1)
        assert np.array_equal(alone[:, 0], wanted[:, row]), "a row depends on its batch-mates"


@settings(max_examples=100, deadline=None)
@given(sizes, sizes, tokens_of, seeds)
def test_sign(hidden: int, neurons: int, tokens: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    weights = random.standard_normal((neurons, hidden)).astype(np.float32)
    x = random.standard_normal((tokens, hidden)).astype(np.float32)
    margin = random.integers(-hidden, hidden, neurons).astype(np.int32)
    signs = np.packbits(np.signbit(weights), axis=1, bitorder="little")
    wanted = unpack(SignPredictor(WORKERS, signs, x.shape[1], margin).predict(x), neurons, tokens)
    agree = np.sign(weights).astype(np.int64) @ np.sign(x).astype(np.int64).T  # same less different
    assert np.array_equal(wanted, agree > margin[:, None])


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["silu", "gelu_tanh", "relu"]), sizes, sizes, tokens_of, seeds)
def test_gate(activation: str, hidden: int, neurons: int, tokens: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    gate = random.integers(-127, 128, (neurons, hidden), dtype=np.int8)
    scale, bias, threshold = (random.random((3, neurons)) * [[0.02], [1], [0.5]]).astype(np.float32)
    x = random.standard_normal((tokens, hidden)).astype(np.float32)
    predictor = GatePredictor(WORKERS, gate, scale, bias, threshold, activation)
    wanted = unpack(predictor.predict(x), neurons, tokens)
    v = torch.from_numpy(gate.astype(np.float64) @ x.T.astype(np.float64) * scale[:, None] + bias[:, None])
    opened = FUNCTIONS[activation](v, 0.0).abs().numpy()
    clear = np.abs(opened - threshold[:, None]) > 1e-4  # closer to the threshold rounding decides
    assert np.array_equal(wanted[clear], (opened >= threshold[:, None])[clear])
    for row in range(tokens):
        alone = unpack(predictor.predict(x[row : row + 1]), neurons, 1)
        assert np.array_equal(alone[:, 0], wanted[:, row]), "a row depends on its batch-mates"


def test_a_threshold_of_zero_wants_everything() -> None:
    gate, ones, zeros = np.zeros((40, 8), np.int8), np.ones(40, np.float32), np.zeros(40, np.float32)
    x = np.array([[0.0] * 8, [np.nan] * 8], np.float32)
    for threshold in (zeros, -ones):
        positions, row_masks = GatePredictor(WORKERS, gate, ones, zeros, threshold, "silu").predict(x)
        assert positions.tolist() == list(range(40))
        assert set(row_masks.tolist()) == {3}
    positions, row_masks = GatePredictor(WORKERS, gate, ones, zeros, ones, "silu").predict(x)
    assert set(row_masks.tolist()) == {2}, "what is not a number is computed"


@pytest.mark.parametrize("instruction_set", ["amx", "avx512", "avx2", "portable"])
def test_instruction_sets(instruction_set: str) -> None:
    signs = np.full((3, 9), 0x00, np.uint8)
    x = -np.ones((1, 71), np.float32)
    margin = np.array([-72, -71, 0], np.int32)
    identity, bias, one = np.eye(71, dtype=np.float32), np.zeros(71, np.float32), np.ones(71, np.float32)
    try:
        sign = SignPredictor(WORKERS, signs, x.shape[1], margin, instruction_set)
    except ValueError as error:
        pytest.skip(str(error))
    assert sign.predict(x)[0].tolist() == [0]
    x[0, 7] = 1
    for output, scale in ((identity, None), (identity.astype(np.int8), one)):
        low_rank = LowRankPredictor(WORKERS, "F32", identity, output, bias, scale, instruction_set)
        assert low_rank.predict(x)[0].tolist() == [7]


def test_arrays_stay_alive_and_may_be_read_only() -> None:
    def make() -> LowRankPredictor:
        identity, bias = np.eye(64, dtype=np.float32), np.zeros(64, np.float32)
        identity.flags.writeable = False
        return LowRankPredictor(WORKERS, "F32", identity, identity, bias)

    predictors = [make() for _ in range(50)]
    x = np.full((2, 64), -1, np.float32)
    x[0, 3] = x[1, 60] = 1
    for predictor in predictors:
        positions, row_masks = predictor.predict(x)
        assert positions.tolist() == [3, 60]
        assert row_masks.tolist() == [1, 2]


def test_nobody_wants_anything() -> None:
    identity, bias = np.eye(4, dtype=np.float32), np.zeros(4, np.float32)
    predictor = LowRankPredictor(WORKERS, "F32", identity, identity, bias)
    positions, row_masks = predictor.predict(np.zeros((1, 4), np.float32))
    assert len(positions) == len(row_masks) == 0


def test_what_does_not_fit_is_refused() -> None:
    floats, bias = np.zeros((4, 4), np.float32), np.zeros(4, np.float32)
    with pytest.raises(ValueError, match="int8 with a scale"):
        GatePredictor(WORKERS, floats, bias, bias, bias, "silu")
    with pytest.raises(ValueError, match="a scale, a bias and a threshold per neuron"):
        GatePredictor(WORKERS, floats.astype(np.int8), bias, bias, bias[:3], "silu")
    with pytest.raises(ValueError, match="uint16, their bits"):
        LowRankPredictor(WORKERS, "BF16", floats, floats, bias)
    with pytest.raises(ValueError, match=r"output \[neurons, rank\]"):
        LowRankPredictor(WORKERS, "F32", floats, np.zeros((4, 3), np.float32), bias)
    with pytest.raises(ValueError, match="a bias per neuron"):
        LowRankPredictor(WORKERS, "F32", floats, floats, bias[:3])
    with pytest.raises(ValueError, match="int8 with a scale"):
        LowRankPredictor(WORKERS, "F32", floats, floats, bias, bias)
    with pytest.raises(ValueError, match="a scale per neuron"):
        LowRankPredictor(WORKERS, "F32", floats, floats.astype(np.int8), bias, bias[:3])
    with pytest.raises(ValueError, match="a margin per neuron"):
        SignPredictor(WORKERS, np.zeros((4, 1), np.uint8), 8, np.zeros(3, np.int32))
    with pytest.raises(TypeError):  # a temporary copy would be gone when it is read
        LowRankPredictor(WORKERS, "F32", floats, floats, np.zeros(4, np.float64))
    predictor = LowRankPredictor(WORKERS, "F32", floats, floats, bias)
    with pytest.raises(ValueError, match="hidden_size"):
        predictor.predict(np.zeros((1, 5), np.float32))
    with pytest.raises(ValueError, match="too many tokens: 17"):
        predictor.predict(np.zeros((17, 4), np.float32))
