"""Ffn.add_rows over slabs, against the formula in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from activations import ACTIVATIONS
from blocks import as_multiplied, decoded, random_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import AVAILABLE, INSTRUCTION_SETS
from numpy.typing import NDArray
from torch import Tensor

from flashclient._native import Ffn, LentMemory, Workers
from flashclient.kernels.arrays import array_of
from flashclient.model.activations import FUNCTIONS, neurons_of
from weightd_proto.encodings import BLOCK_FORMATS, SLAB_NEURONS_MIN, in_blocks, plain
from weightd_proto.weightd_pb2 import Encoding

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
STORED = (*DTYPES, *BLOCK_FORMATS)
WORKERS = Workers(2)


def numbers(format: str, rows: int, values: int, seed: int) -> tuple[NDArray[np.uint8], Tensor]:
    """Random rows as they are stored [rows, bytes], and their numbers [rows, values]."""
    if format in DTYPES:
        generator = torch.Generator().manual_seed(seed)
        weights = (torch.randn(rows, values, generator=generator) / 16).to(DTYPES[format])
        return weights.view(torch.uint8).numpy().reshape(rows, -1), weights
    stored = random_rows(format, rows, values, 1 / 8, seed)
    return stored, torch.from_numpy(decoded(format, stored))


def encoding_of(format: str) -> Encoding:
    return plain(format) if format in DTYPES else in_blocks(format)


@dataclass
class Slabs:
    """Random slabs; the formats of [gate,] up and down."""

    formats: Sequence[str]
    hidden: int
    neurons: int  # of a slab
    slabs: int
    activation: str = "silu"
    seed: int = 0

    def __post_init__(self) -> None:
        total = self.neurons * self.slabs
        *rows, down = self.formats
        parts = [numbers(format, total, self.hidden, self.seed + i) for i, format in enumerate(rows)]
        self.matrices = [weights.double() for _, weights in parts]
        stored = [data.reshape(self.slabs, -1) for data, _ in parts]
        data, weights = numbers(down, self.slabs * self.hidden, self.neurons, self.seed + 7)
        self.down = weights.double().view(self.slabs, self.hidden, -1).transpose(0, 1).reshape(self.hidden, -1)
        together = np.concatenate([*stored, data.reshape(self.slabs, -1)], axis=1)
        self.memory = np.pad(together, ((0, 0), (0, -together.shape[1] % 64)))
        self.lent = LentMemory(self.memory)
        step = np.uint64(self.memory.shape[1])
        self.addresses = np.uint64(self.memory.ctypes.data) + np.arange(self.slabs, dtype=np.uint64) * step
        self.biases = torch.randn(len(rows), total, generator=torch.Generator().manual_seed(self.seed))

    def kernels(self, instruction_set: str | None = None, workers: Workers = WORKERS) -> Ffn:
        encodings = [encoding_of(format) for format in self.formats]
        activation = ACTIVATIONS[self.activation]
        return Ffn(workers, encodings, self.hidden, activation, instruction_set, self.neurons)

    def run(self, kernels: Ffn, x: Tensor, cuts: Sequence[int] = ()) -> Tensor:
        """The sum for x [tokens, hidden], of the slabs cut before these numbers."""
        y = torch.zeros_like(x)
        ends = [*cuts, self.slabs]
        for begin, end in zip([0, *cuts], ends, strict=True):
            biases = self.biases[:, begin * self.neurons : end * self.neurons]
            kernels.add_rows(self.addresses[begin:end], array_of(biases), None, array_of(x), array_of(y))
        return y

    def reference(self, x: Tensor, instruction_set: str) -> Tensor:
        inputs = [multiplied(x, format, instruction_set) for format in self.formats[:-1]]
        parts = zip(inputs, self.matrices, self.biases.double(), strict=True)
        products = [x @ rows.T + bias for x, rows, bias in parts]
        h = neurons_of(ACTIVATIONS[self.activation], *products)
        return multiplied(h, self.formats[-1], instruction_set) @ self.down.T


def multiplied(x: Tensor, format: str, instruction_set: str) -> Tensor:
    """What rows of a format are multiplied by, in float64."""
    if format in DTYPES:
        return x.double()
    return torch.from_numpy(as_multiplied(x.float().numpy(), format, instruction_set)).double()


def slab_neurons(formats: Sequence[str]) -> int:
    return max(SLAB_NEURONS_MIN, encoding_of(formats[-1]).block_values)


def hidden_of(formats: Sequence[str], least: int) -> int:
    """At least `least`, in whole blocks of all rows."""
    values = max(encoding_of(format).block_values for format in formats[:-1])
    return -(-least // values) * values


def rows_of(tokens: int, hidden: int) -> Tensor:
    return torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("down", STORED)
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_sum_is_the_formula(instruction_set: str, down: str) -> None:
    if instruction_set not in AVAILABLE:
        pytest.skip(f"no {instruction_set} in this processor")
    for formats in ((down, "Q4_1", down), ("Q8_0", down)):
        case = Slabs(formats, hidden_of(formats, 96), slab_neurons(formats), 3, "silu" if len(formats) == 3 else "relu")
        kernels = case.kernels(instruction_set)
        for tokens in (1, 2, 5, 16, 40):
            x = rows_of(tokens, case.hidden)
            torch.testing.assert_close(
                case.run(kernels, x).double(), case.reference(x, instruction_set), rtol=1e-4, atol=2e-4
            )


@pytest.mark.parametrize("activation", FUNCTIONS)
def test_activations(activation: str) -> None:
    case = Slabs(("Q4_0", "Q8_0", "Q4_1"), 64, 32, 2, activation)
    x = rows_of(3, 64)
    torch.testing.assert_close(
        case.run(case.kernels(), x).double(), case.reference(x, AVAILABLE[0]), rtol=1e-4, atol=2e-4
    )


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(STORED),
    st.sampled_from(STORED),
    st.sampled_from(AVAILABLE),
    st.integers(1, 300),
    st.integers(1, 40),
    st.data(),
)
def test_bits_depend_on_the_row_alone(
    rows: str, down: str, instruction_set: str, least: int, tokens: int, data: st.DataObject
) -> None:
    """Not on the other rows, on chunks or on threads. Plain rows may have any length."""
    formats = (rows, rows, down)
    case = Slabs(formats, hidden_of(formats, least), slab_neurons(formats), 5)
    x = rows_of(tokens, case.hidden)
    whole = case.run(case.kernels(instruction_set), x)
    token = data.draw(st.integers(0, tokens - 1))
    cuts = sorted(data.draw(st.sets(st.integers(1, 4))))
    alone = case.run(case.kernels(instruction_set, Workers(1)), x[token : token + 1], cuts)
    assert torch.equal(alone[0], whole[token])


def test_what_does_not_fit_is_refused() -> None:
    workers = Workers(1)
    for neurons, hidden in ((33, 64), (16, 64), (512, 64)):
        with pytest.raises(ValueError, match="a slab has 32 to 256 neurons"):
            Ffn(workers, [plain("F32")] * 2, hidden, "relu", neurons=neurons)
    with pytest.raises(ValueError, match="hidden_size 48 is not whole blocks of Q4_0"):
        Ffn(workers, [in_blocks("Q4_0")] * 2, 48, "relu", neurons=32)


def test_only_whole_sums() -> None:
    """No neurons alone: predict mode has bundles of one neuron."""
    case = Slabs(("Q4_0", "Q4_0"), 32, 32, 1, "relu")
    kernels, one = case.kernels(), np.ones((1, 32), np.float32)
    index, masks = np.zeros(1, np.uint32), np.ones(1, np.uint16)
    with pytest.raises(ValueError, match="slabs are summed as a whole"):
        kernels.fire(case.addresses, index, masks, None, one, np.zeros((1, 1), np.float32))
    with pytest.raises(ValueError, match="slabs are summed as a whole"):
        kernels.accumulate(case.addresses, np.ones((1, 1), np.float32), one)
    with pytest.raises(ValueError, match="slabs are summed as a whole"):
        kernels.add_rows(case.addresses, None, np.ones((1, 1), np.uint16), one, one.copy())


def test_slabs_beyond_their_memory_are_refused() -> None:
    case = Slabs(("Q4_0", "Q4_0"), 32, 32, 2, "relu")
    x = rows_of(1, 32)
    with pytest.raises(ValueError, match="no bundle lies at"):
        case.kernels().add_rows(case.addresses + np.uint64(64), None, None, array_of(x), array_of(x.clone()))
