"""Native linear layers against torch's, in float64 and inside a model."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from blocks import as_multiplied, decoded, in_integers, random_rows
from checkpoints import make_config, make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import AVAILABLE
from torch import Tensor, nn

from flashclient._native import EncodedMatrix, Linear, Workers
from flashclient.kernels.arrays import array_of
from flashclient.kernels.dtypes import KERNEL_DTYPES
from flashclient.kernels.encoded_matrix import BlockRows
from flashclient.kernels.resident_linear import ResidentLinear, use_fast_linears
from flashclient.model.tables.encoded_weights import EncodedWeight, settle_encoded_weights
from weightd_proto.encodings import BLOCK_FORMATS, in_blocks, plain

WORKERS = Workers(2)
dtypes = st.sampled_from(sorted(KERNEL_DTYPES, key=str))


def fast(linear: nn.Linear, instruction_set: str = "portable") -> nn.Linear:
    assert use_fast_linears(linear, WORKERS, instruction_set) == 1
    return linear.requires_grad_(False)


def make(
    inputs: int, outputs: int, dtype: torch.dtype, bias: bool = True, instruction_set: str = "portable"
) -> nn.Linear:
    return fast(nn.Linear(inputs, outputs, bias=bias, dtype=dtype), instruction_set)


def near(actual: Tensor, expected: Tensor) -> bool:
    """Compares results that were rounded once to the dtype of `actual`. The sums are of order 1."""
    unit = torch.finfo(actual.dtype).eps
    return torch.allclose(actual.double(), expected, rtol=unit, atol=max(unit / 4, 1e-5))


@settings(max_examples=150, deadline=None)
@given(
    dtypes,
    st.integers(1, 1200),
    st.integers(1, 200),
    st.integers(1, 50),
    st.booleans(),
    st.sampled_from(AVAILABLE),
    st.integers(0, 1000),
)
def test_product_is_the_formula(
    dtype: torch.dtype, inputs: int, outputs: int, rows: int, bias: bool, instruction_set: str, seed: int
) -> None:
    torch.manual_seed(seed)
    linear = make(inputs, outputs, dtype, bias, instruction_set)
    x = torch.randn(rows, inputs).to(dtype)
    y = linear(x)
    assert y.dtype == dtype
    expected = x.double() @ linear.weight.double().T + (linear.bias.double() if bias else 0)
    assert near(y, expected)
    for row in {0, rows // 2, rows - 1}:
        assert torch.equal(linear(x[row : row + 1])[0], y[row]), "a row depends on its batch-mates"


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_several_blocks_of_rows(dtype: torch.dtype) -> None:
    linear = make(640, 3001, dtype)
    x = torch.randn(2, 3, 640).to(dtype)
    assert near(linear(x), x.double() @ linear.weight.double().T + linear.bias.double())


@pytest.mark.parametrize("instruction_set", AVAILABLE)
def test_bits_do_not_depend_on_threads(instruction_set: str) -> None:
    weight = torch.randn(1000, 333).bfloat16()
    x, results = np.random.default_rng(0).standard_normal((7, 333)).astype(np.float32), []
    for threads in (1, 2, 5):
        y = np.full((7, 1000), np.nan, np.float32)
        Linear(Workers(threads), "BF16", instruction_set).multiply(array_of(weight), x, y)
        results.append(y)
    assert all(np.array_equal(y, results[0]) for y in results)


def test_torch_takes_what_the_kernel_does_not() -> None:
    plain = nn.Linear(64, 32)
    linear = fast(copy.deepcopy(plain))
    assert linear(torch.randn(0, 64)).shape == (0, 32)
    with pytest.raises(RuntimeError):
        linear(torch.randn(1, 64).bfloat16())
    with pytest.raises(RuntimeError):
        linear(torch.randn(2, 32))
    doubled = linear.double()
    assert torch.equal(doubled(torch.ones(1, 64).double()), plain.double()(torch.ones(1, 64).double()))


def test_gradients_flow() -> None:
    linear = make(16, 8, torch.float32).requires_grad_(True)
    x = torch.randn(2, 16, requires_grad=True)
    linear(x).sum().backward()
    assert linear.weight.grad is not None
    assert x.grad is not None


def test_strides_and_shapes() -> None:
    linear = make(48, 20, torch.bfloat16)
    x = torch.randn(4, 6, 48).bfloat16()
    last = x[:, -1:, :]  # as transformers passes it to the head
    assert linear(last).shape == (4, 1, 20)
    assert torch.equal(linear(last), linear(last.contiguous()))
    assert linear(torch.randn(48).bfloat16()).shape == (20,)
    assert linear(x[:, 0].T.contiguous().T).shape == (4, 20)


def test_weight_stays_in_place_and_may_change() -> None:
    linear = nn.Linear(32, 16, dtype=torch.bfloat16)
    before = linear.weight.data_ptr()
    fast(linear)
    assert linear.weight.data_ptr() == before
    assert list(linear.state_dict()) == ["weight", "bias"]
    x = torch.ones(1, 32).bfloat16()
    linear.load_state_dict({"weight": torch.ones(16, 32).bfloat16(), "bias": torch.zeros(16)}, assign=True)
    assert linear(x).tolist() == [[32.0] * 16]
    linear.float()
    assert linear(x.float()).tolist() == [[32.0] * 16]


def test_what_a_model_holds() -> None:
    """Every projection and a tied head use the kernel, and nothing else does."""
    config = make_config("gemma3")
    model = make_model(config).requires_grad_(False)
    plain = copy.deepcopy(model)
    linears = sum(type(module) is nn.Linear for module in model.modules())
    assert use_fast_linears(model, WORKERS, "portable") == linears > 0
    assert isinstance(model.lm_head, ResidentLinear)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert use_fast_linears(model, WORKERS, "portable") == 0
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-4)


def test_default_is_the_best_instruction_set() -> None:
    """The choice never depends on a measurement."""
    linear: Any = nn.Linear(4, 4)
    assert use_fast_linears(linear, WORKERS) == 1
    best = next(name for name in AVAILABLE if name != "avx512_vnni")  # which is for blocks
    assert linear.kernels[torch.bfloat16].instruction_set == best
    with pytest.raises(ValueError, match="instruction set 'mmx' is unknown"):
        use_fast_linears(nn.Linear(4, 4), WORKERS, "mmx")


def test_shapes_that_do_not_fit_are_refused() -> None:
    kernel, square = Linear(WORKERS, "F32"), np.zeros((4, 4), np.float32)
    with pytest.raises(ValueError, match="same tokens"):
        kernel.multiply(square, np.zeros((1, 4), np.float32), np.zeros((2, 4), np.float32))


@pytest.mark.parametrize("instruction_set", AVAILABLE)
@pytest.mark.parametrize("format", BLOCK_FORMATS)
def test_a_matrix_in_blocks_is_computed_on_as_it_lies(format: str, instruction_set: str) -> None:
    """For one row and for many, which have the same bits."""
    outputs, columns = 333, 512
    stored = random_rows(format, outputs, columns, 0.1, 0)
    values = torch.from_numpy(decoded(format, stored)).double()
    encoded = EncodedMatrix(in_blocks(format), stored, columns)
    x = torch.randn(35, columns).bfloat16()
    bias = torch.randn(outputs)
    for name, dtype in (("F32", torch.float32), ("BF16", torch.bfloat16)):
        kernel, given = Linear(WORKERS, name, instruction_set), x.to(dtype)
        y, alone = torch.empty(35, outputs, dtype=dtype), torch.empty(1, outputs, dtype=dtype)
        kernel.project(encoded, array_of(bias), array_of(given), array_of(y))
        assert near(
            y, torch.from_numpy(as_multiplied(x.float().numpy(), format, instruction_set)).double() @ values.T + bias
        )
        for row in (0, 17, 34):
            kernel.project(encoded, array_of(bias), array_of(given[row : row + 1]), array_of(alone))
            assert torch.equal(alone[0], y[row]), "a row depends on its batch-mates"


@pytest.mark.parametrize("instruction_set", AVAILABLE)
@pytest.mark.parametrize("format", BLOCK_FORMATS)
def test_bits_of_blocks_depend_on_the_row_alone(format: str, instruction_set: str) -> None:
    """Not on the number of rows or threads. Rows may end within the largest vectors."""
    block = BLOCK_FORMATS[format]
    for columns in {256, -(-96 // block.values) * block.values, -(-576 // block.values) * block.values}:
        encoded = EncodedMatrix(in_blocks(format), random_rows(format, 83, columns, 0.1, 0), columns)
        x = np.random.default_rng(0).standard_normal((40, columns)).astype(np.float32)
        whole = np.empty((40, 83), np.float32)
        Linear(WORKERS, "F32", instruction_set).multiply(encoded, x, whole)
        for rows, threads in ((1, 1), (2, 2), (7, 3), (16, 1), (40, 5)):
            y = np.empty((rows, 83), np.float32)
            Linear(Workers(threads), "F32", instruction_set).multiply(encoded, x[:rows], y)
            assert np.array_equal(y, whole[:rows])


@pytest.mark.parametrize("instruction_set", AVAILABLE)
@pytest.mark.parametrize("format", BLOCK_FORMATS)
@pytest.mark.parametrize("rows", [1, 3])
def test_blocks_times_special_numbers(format: str, instruction_set: str, rows: int) -> None:
    """NaN and infinity spoil their own row. Numbers of any size and zeros are computed as any others."""
    stored = random_rows(format, 20, 512, 0.1, 0)
    values, encoded = decoded(format, stored).astype(np.float64), EncodedMatrix(in_blocks(format), stored, 512)
    x = np.random.default_rng(0).standard_normal((rows, 512)).astype(np.float32)
    kernel, y = Linear(WORKERS, "F32", instruction_set), np.empty((rows, 20), np.float32)
    for size in (1e-30, 1e-8, 0, 1e20, 1e34):
        scaled = x * np.float32(size)
        kernel.multiply(encoded, scaled, y)
        expected = as_multiplied(scaled, format, instruction_set).astype(np.float64) @ values.T
        assert np.allclose(y, expected, rtol=1e-5, atol=1e-5 * size)
    for special in (np.nan, np.inf, -np.inf):
        spoilt = x.copy()
        spoilt[-1, 77] = special
        kernel.multiply(encoded, spoilt, y)
        assert np.isnan(y[-1]).all() if in_integers(format, instruction_set) else not np.isfinite(y[-1]).any()
        assert np.isfinite(y[:-1]).all()


def test_matrices_in_blocks_that_are_none_are_refused() -> None:
    rows = random_rows("Q8_0", 4, 64, 1.0, 0)
    for encoding, columns in ((in_blocks("Q8_0"), 96), (in_blocks("Q8_0"), 63), (in_blocks("Q4_0"), 64)):
        with pytest.raises(ValueError, match=r"the rows of a matrix must be whole blocks of Q[48]_0"):
            EncodedMatrix(encoding, rows, columns)
    with pytest.raises(ValueError, match="no kernel for a matrix of encoding 'F32'"):
        EncodedMatrix(plain("F32"), rows, 17)
    matrix = EncodedMatrix(in_blocks("Q8_0"), rows, 64)
    with pytest.raises(ValueError, match="weight must be"):
        Linear(WORKERS, "F32").multiply(matrix, np.zeros((1, 32), np.float32), np.zeros((1, 4), np.float32))


def test_weights_in_blocks_of_other_modules_are_decoded() -> None:
    """A linear layer of a class of its own, and a parameter of another module, compute with the values."""

    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    model: Any = nn.ModuleDict({"head": nn.Linear(64, 8), "scaled": Scaled(64, 8), "looked_up": nn.Embedding(8, 64)})
    rows = BlockRows(torch.from_numpy(random_rows("Q4_0", 8, 64, 0.1, 0)), "Q4_0", 64, torch.float32)
    for module in model.values():
        module._parameters["weight"] = EncodedWeight.of_blocks(rows, "w", torch.float32)
    use_fast_linears(model, WORKERS)
    assert settle_encoded_weights(model) == ["scaled"]
    x = torch.from_numpy(as_multiplied(torch.randn(2, 64).numpy(), "Q4_0", AVAILABLE[0]))
    with torch.no_grad():
        for module in (model["head"], model["scaled"]):
            expected = nn.functional.linear(x, rows.values(), module.bias)
            assert near(module(x), expected.double() * (2 if module is model["scaled"] else 1))
    assert torch.equal(model["looked_up"](torch.tensor([[3, 0]])), rows.values()[[3, 0]][None])


def test_a_gate_of_a_row_depends_on_that_row_alone() -> None:
    """torch's sigmoid of neighbours differs from that of one, so those of a gate with one output are no neighbours."""
    gate = nn.Sequential(nn.Linear(16, 1)).requires_grad_(False)
    use_fast_linears(gate, WORKERS)
    x = torch.randn(3, 331, 16, generator=torch.Generator().manual_seed(0))
    whole = torch.sigmoid(gate(x))
    assert whole.shape == (3, 331, 1)
    alone = [torch.sigmoid(gate(row.view(1, 1, -1))).view(1) for row in x.view(-1, 16)]
    assert torch.equal(whole.view(-1), torch.cat(alone))
