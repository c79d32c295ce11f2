"""Ffn.fire and Ffn.accumulate against the formula in float64, and against add_rows bit for bit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from activations import ACTIVATIONS, PARAMETER
from blocks import as_multiplied, decoded, random_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import AVAILABLE, INSTRUCTION_SETS
from numpy.typing import NDArray
from torch import Tensor

from flashclient._native import Ffn, LentMemory, Workers
from flashclient.kernels.arrays import array_of
from flashclient.model.activations import neurons_of
from weightd_proto.encodings import BLOCK_FORMATS, in_blocks, plain

WORKERS = Workers(2)
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
STORED = (*DTYPES, *BLOCK_FORMATS)


@dataclass
class Case:
    """A random layer, tokens, and which of them want which neuron."""

    dtype: str
    hidden: int
    neurons: int
    tokens: int
    gated: bool
    activation: str
    seed: int

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self.gated = self.gated or self.activation == "gated_relu"
        self.parts = 3 if self.gated else 2
        if self.dtype in BLOCK_FORMATS:
            values = BLOCK_FORMATS[self.dtype].values
            self.hidden = -(-self.hidden // values) * values
            rows = random_rows(self.dtype, self.neurons * self.parts, self.hidden, 2 / self.hidden**0.5, self.seed)
            self.weights = torch.from_numpy(decoded(self.dtype, rows)).view(self.neurons, self.parts, -1)
            self.stored = torch.from_numpy(rows).view(self.neurons, -1)
            self.encoding = in_blocks(self.dtype)
        else:
            weights = torch.randn(self.neurons, self.parts, self.hidden) / self.hidden**0.5
            self.weights = self.stored = weights.to(DTYPES[self.dtype])
            self.encoding = plain(self.dtype)
        self.x = torch.randn(self.tokens, self.hidden)
        self.biases = torch.randn(self.parts - 1, self.neurons)
        self.masks = torch.randint(0, 2**self.tokens, (self.neurons,)).numpy().astype(np.uint16)
        self.masks[torch.rand(self.neurons).numpy() < 0.3] = 0
        self.lent = LentMemory(array_of(self.stored))
        step = self.stored[0].nbytes
        self.addresses = self.stored.data_ptr() + np.arange(self.neurons, dtype=np.uint64) * np.uint64(step)

    def kernels(self, instruction_set: str | None = None, workers: Workers = WORKERS) -> Ffn:
        return Ffn(workers, [self.encoding] * self.parts, self.hidden, ACTIVATIONS[self.activation], instruction_set)

    def wanted(self) -> Tensor:
        bits = self.masks[:, None] >> np.arange(self.tokens, dtype=np.uint16) & 1
        return torch.from_numpy(bits.astype(bool))  # [neurons, tokens]

    def multiplied(self, instruction_set: str = AVAILABLE[0]) -> Tensor:
        """x as the kernels multiply it, in float64."""
        in_integers = self.dtype in BLOCK_FORMATS
        x = torch.from_numpy(as_multiplied(self.x.numpy(), self.dtype, instruction_set)) if in_integers else self.x
        return x.double()

    def reference(self, instruction_set: str = AVAILABLE[0]) -> tuple[Tensor, Tensor]:
        """h [neurons, tokens] and y [tokens, hidden] in float64."""
        weights, x = self.weights.double(), self.multiplied(instruction_set)
        products = [weights[:, part] @ x.T + bias[:, None] for part, bias in enumerate(self.biases.double())]
        h = torch.where(self.wanted(), neurons_of(ACTIVATIONS[self.activation], *products), 0.0)
        return h, h.T @ weights[:, -1]

    def fire(self, kernels: Ffn, masks: NDArray[np.uint16], pieces: int = 3) -> Tensor:
        """h, computed in a few pieces of random order."""
        h = torch.full((self.neurons, self.tokens), torch.nan)
        order = np.random.default_rng(self.seed).permutation(self.neurons).astype(np.uint32)
        for index in np.array_split(order, pieces):
            kernels.fire(self.addresses, index, masks, self.biases.numpy(), self.x.numpy(), h.numpy())
        return h

    def accumulate(self, kernels: Ffn, h: Tensor) -> Tensor:
        y = torch.zeros(self.tokens, self.hidden)
        kernels.accumulate(self.addresses, h.numpy(), y.numpy())
        return y


cases = st.builds(
    Case,
    dtype=st.sampled_from(sorted(STORED)),
    hidden=st.one_of(st.integers(1, 100), st.sampled_from([128, 640, 1000])),
    neurons=st.integers(1, 120),
    tokens=st.integers(1, 16),
    gated=st.booleans(),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    seed=st.integers(0, 1000),
)


def near(actual: Tensor, expected: Tensor) -> bool:
    return torch.allclose(actual.double(), expected, rtol=2e-5, atol=4e-5)


def by_row(case: Case, h: Tensor, row: int) -> Tensor:
    """The result of `row` computed alone, with a list of only its own neurons."""
    own = np.flatnonzero(case.masks >> row & 1)
    y = torch.zeros(1, case.hidden)
    alone = torch.zeros(len(own), 1)
    x, masks = case.x[row : row + 1].contiguous().numpy(), np.ones(len(own), np.uint16)
    addresses, biases = case.addresses[own], np.ascontiguousarray(case.biases.numpy()[:, own])
    kernels = case.kernels()
    kernels.fire(addresses, np.arange(len(own), dtype=np.uint32), masks, biases, x, alone.numpy())
    assert torch.equal(alone[:, 0], h[own, row])
    kernels.accumulate(addresses, alone.numpy(), y.numpy())
    return y[0]


@settings(max_examples=150, deadline=None)
@given(cases)
def test_masked_sum_is_the_formula(case: Case) -> None:
    h = case.fire(case.kernels(), case.masks)
    expected_h, expected_y = case.reference()
    # Close to a threshold rounding decides whether a neuron fires. Only there h may differ.
    argument = case.weights[:, 0].double() @ case.multiplied().T + case.biases[0].double()[:, None]
    beside = (argument - PARAMETER).abs() < 1e-5 if case.activation == "fatrelu" else torch.zeros_like(argument) > 0
    assert near(h[~beside], expected_h[~beside])
    assert not h[~case.wanted()].any(), "a neuron counts for a row that did not want it"
    if not beside.any():
        assert near(case.accumulate(case.kernels(), h), expected_y)


@settings(max_examples=60, deadline=None)
@given(cases)
def test_all_masks_set_is_add_rows_bit_for_bit(case: Case) -> None:
    kernels, y = case.kernels(), torch.zeros(case.tokens, case.hidden)
    kernels.add_rows(case.addresses, case.biases.numpy(), None, case.x.numpy(), y.numpy())
    h = case.fire(kernels, np.full(case.neurons, 0xFFFF, np.uint16))
    assert torch.equal(case.accumulate(kernels, h), y)


@settings(max_examples=40, deadline=None)
@given(cases, st.integers(1, 60), st.integers(1, 4))
def test_masks_of_several_groups_are_those_of_fire(case: Case, tokens: int, threads: int) -> None:
    """Each row of add_rows() has the bits that fire() and accumulate() give for this row alone."""
    random = np.random.default_rng(case.seed)
    x = random.standard_normal((tokens, case.hidden)).astype(np.float32)
    masks = random.integers(0, 2**16, (-(-tokens // 16), case.neurons + 3)).astype(np.uint16)[:, 2:-1]
    y = np.zeros((tokens, case.hidden), np.float32)
    case.kernels(workers=Workers(threads)).add_rows(case.addresses, case.biases.numpy(), masks, x, y)
    index, kernels = np.arange(case.neurons, dtype=np.uint32), case.kernels()
    for row in range(tokens):
        one, own = x[row : row + 1], masks[row // 16] >> np.uint16(row % 16) & np.uint16(1)
        h, alone = np.empty((case.neurons, 1), np.float32), np.zeros((1, case.hidden), np.float32)
        kernels.fire(case.addresses, index, own, case.biases.numpy(), one, h)
        kernels.accumulate(case.addresses, h, alone)
        assert np.array_equal(alone[0], y[row])


@settings(max_examples=60, deadline=None)
@given(cases)
def test_row_depends_on_its_own_neurons_only(case: Case) -> None:
    kernels = case.kernels()
    h = case.fire(kernels, case.masks)
    y = case.accumulate(kernels, h)
    for row in range(case.tokens):
        assert torch.equal(y[row], by_row(case, h, row)), "batch-mates or the list changed a row"


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("tokens", [1, 5, 16])
def test_instruction_sets(instruction_set: str, dtype: str, tokens: int) -> None:
    case = Case(dtype, 131, 70, tokens, True, "relu_squared", 3)
    try:
        kernels = case.kernels(instruction_set)
    except ValueError as error:
        pytest.skip(str(error))
    h = case.fire(kernels, case.masks)
    expected_h, expected_y = case.reference(instruction_set)
    assert near(h, expected_h)
    assert near(case.accumulate(kernels, h), expected_y)


def test_a_neuron_that_nobody_wants_is_not_read() -> None:
    """The address of an unwanted neuron is not valid."""
    case = Case("BF16", 64, 20, 3, True, "relu", 0)
    case.masks[:] = 7
    case.masks[5] = 0
    case.addresses[5] = 0
    h = case.fire(case.kernels(), case.masks)
    assert not h[5].any()
    assert case.accumulate(case.kernels(), h).isfinite().all()


def test_up_row_and_down_column_of_what_did_not_fire_are_not_counted() -> None:
    """NaN is where nothing may be read."""
    case = Case("F32", 40, 30, 4, True, "relu", 1)
    closed = ~(case.weights[:, 0] @ case.x.T + case.biases[0][:, None] > 0).any(dim=1)
    assert closed.any()
    case.weights[closed, 1:] = torch.nan
    h = case.fire(case.kernels(), np.full(30, 0xF, np.uint16))
    assert case.accumulate(case.kernels(), h).isfinite().all()


def test_shapes_that_do_not_fit_are_refused() -> None:
    case = Case("F32", 8, 4, 2, False, "relu", 0)
    kernels, x, h = case.kernels(), case.x.numpy(), np.zeros((4, 2), np.float32)
    index = np.arange(4, dtype=np.uint32)
    with pytest.raises(ValueError, match="beyond the list"):
        kernels.fire(case.addresses, index + np.uint32(1), case.masks, None, x, h)
    with pytest.raises(ValueError, match="a row mask per address"):
        kernels.fire(case.addresses, index, case.masks[:3], None, x, h)
    with pytest.raises(ValueError, match="biases must be"):
        kernels.fire(case.addresses, index, case.masks, case.biases.numpy()[:, :3], x, h)
    with pytest.raises(ValueError, match=r"h must be \[addresses, tokens\]"):
        kernels.fire(case.addresses, index, case.masks, None, x, h[:, :1].copy())
    with pytest.raises(ValueError, match="too many tokens: 17"):
        kernels.accumulate(case.addresses, np.zeros((4, 17), np.float32), np.zeros((17, 8), np.float32))
    with pytest.raises(ValueError, match="threads must be positive"):
        Workers(0)
