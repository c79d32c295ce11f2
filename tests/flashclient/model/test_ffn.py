"""The FFN kernels and modules against a plain reading of the formula in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from activations import ACTIVATIONS, XIELU
from checkpoints import make_config, make_model
from cut_model import ArraySource, CutModel, cut
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import AVAILABLE, INSTRUCTION_SETS
from torch import Tensor

from flashclient._native import Ffn, LentMemory, Linear, Workers
from flashclient.kernels.arrays import array_of
from flashclient.model.activations import FUNCTIONS, neurons_of
from flashclient.model.ffn import Clock, ExactFFN, LayerFFN
from weightd_proto import weightd_pb2
from weightd_proto.encodings import parts_of, plain
from weightd_proto.weightd_pb2 import Activation

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Every function with a gate; gated_relu has none without.
UNGATED = sorted(set(FUNCTIONS) - {"gated_relu"})


class Layer:
    """Random bundles of one FFN, and the expected output for x."""

    def __init__(
        self,
        dtype: str,
        hidden: int,
        neurons: int,
        gated: bool,
        activation: str | Activation,
        seed: int = 0,
        biased: bool = False,
    ) -> None:
        torch.manual_seed(seed)
        self.parts = ["gate", "up", "down"] if gated else ["up", "down"]
        self.weights = (torch.randn(neurons, len(self.parts), hidden) / hidden**0.5).to(DTYPES[dtype])
        self.biases = torch.randn(len(self.parts) - 1, neurons) if biased or not gated else None
        self.activation = ACTIVATIONS[activation] if isinstance(activation, str) else activation
        self.layout = weightd_pb2.BundleLayout(
            parts=parts_of(self.parts, plain(dtype)), hidden_size=hidden, bundle_bytes=self.weights[0].nbytes
        )

    def reference(self, x: Tensor) -> Tensor:
        weights, x = self.weights.double(), x.double()
        products = [x @ weights[:, part].T for part in range(len(self.parts) - 1)]
        if self.biases is not None:
            products = [rows + bias.double() for rows, bias in zip(products, self.biases, strict=True)]
        total: Tensor = neurons_of(self.activation, *products) @ weights[:, -1]
        return total

    def source(self, chunk_sizes: Sequence[int]) -> ArraySource:
        data = self.weights.view(len(self.weights), -1).view(torch.uint8).numpy()
        return ArraySource(CutModel(weightd_pb2.Model(), [data], [], b"", {}), chunk_sizes)

    def run(self, x: Tensor, chunk_sizes: Sequence[int] = (37, 1, 64), threads: int = 2) -> Tensor:
        source = self.source(chunk_sizes)
        ffn = exact_ffn(source, self.layout, self.activation, threads)
        y = LayerFFN(ffn, 0, None if self.biases is None else self.biases.numpy())(x)
        assert source.opened == 0, "an iterator was left open"
        return y


def exact_ffn(source: ArraySource, layout: weightd_pb2.BundleLayout, activation: Any, threads: int) -> ExactFFN:
    kernels = Ffn(Workers(threads), [part.encoding for part in layout.parts], layout.hidden_size, activation)
    return ExactFFN(source, [kernels] * 2, layout.hidden_size, Clock())  # no test has more layers


def close(actual: Tensor, expected: Tensor) -> bool:
    """Compares with the tolerance that fp32 sums of a few hundred terms of this size need."""
    largest = max(1.0, expected.abs().max().item() / 16)  # terms cancel: a small sum may have large terms
    return torch.allclose(actual.double(), expected, rtol=1e-5, atol=2e-5 * largest)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7, 16, 17, 40])
@pytest.mark.parametrize("hidden", [1, 63, 64, 77, 640])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_is_the_formula(dtype: str, hidden: int, tokens: int) -> None:
    for gated in (True, False):
        layer = Layer(dtype, hidden, 150, gated, "silu" if gated else "relu")
        x = torch.randn(tokens, hidden)
        assert close(layer.run(x), layer.reference(x))


@pytest.mark.parametrize("tokens", [3, 20])
@pytest.mark.parametrize("activation", FUNCTIONS)
def test_activations(activation: str, tokens: int) -> None:
    for gated in (True, False) if activation in UNGATED else (True,):
        layer = Layer("F32", 96, 200, gated, activation)
        x = torch.randn(tokens, 96) * 3
        assert close(layer.run(x), layer.reference(x))


@pytest.mark.parametrize("activation", UNGATED)
def test_kernel_activations_are_those_of_torch(activation: str) -> None:
    values = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, -0.0, -100.0, 100.0])])
    weights = torch.stack([values, torch.ones_like(values)], dim=1).contiguous()  # up, down: hidden_size 1
    kernels, lent = Ffn(Workers(1), [plain("F32")] * 2, 1, ACTIVATIONS[activation]), LentMemory(array_of(weights))
    one = np.ones((1, 1), np.float32)
    for value, address in zip(values, weights.data_ptr() + np.arange(len(values), dtype=np.uint64) * 8, strict=True):
        y = np.zeros((1, 1), np.float32)
        kernels.add_rows(np.array([address], np.uint64), None, None, one, y)
        expected = neurons_of(ACTIVATIONS[activation], value.double()).item()
        assert abs(y[0, 0] - expected) <= 1e-6 * max(1.0, abs(expected))
    del lent


def limits() -> st.SearchStrategy[float | None]:
    return st.one_of(st.none(), st.floats(0.25, 2, width=32))


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(sorted(DTYPES)),
    st.sampled_from(AVAILABLE),
    st.booleans(),
    st.builds(
        Activation,
        function=st.sampled_from(UNGATED),
        parameter=st.floats(0.25, 2, width=32),
        gate_factor=limits(),
        gate_max=limits(),
        activation_max=limits(),
        up_limit=limits(),
        up_offset=st.sampled_from([0.0, 1.0, -0.5]),
        further=st.just(XIELU),
    ),
    st.integers(1, 20),
    st.integers(0, 1000),
)
def test_limits_offsets_and_biases(
    dtype: str, instruction_set: str, gated: bool, activation: Activation, tokens: int, seed: int
) -> None:
    layer = Layer(dtype, 48, 90, gated, activation, seed, biased=True)
    assert layer.biases is not None
    kernels = Ffn(Workers(2), [plain(dtype)] * len(layer.parts), 48, activation, instruction_set)
    x = torch.randn(tokens, 48)
    addresses = layer.weights.data_ptr() + np.arange(90, dtype=np.uint64) * layer.weights[0].nbytes
    lent = LentMemory(array_of(layer.weights))
    y = torch.zeros_like(x)
    for part in (slice(0, 40), slice(40, 90)):
        kernels.add_rows(addresses[part], layer.biases.numpy()[:, part], None, x.numpy(), y.numpy())
    if activation.function == "fatrelu" and beside_threshold(layer, x):
        return
    assert close(y, layer.reference(x))
    del lent


def beside_threshold(layer: Layer, x: Tensor) -> bool:
    """Whether rounding decides for some neuron whether it fires."""
    assert layer.biases is not None
    gate = x.double() @ layer.weights[:, 0].double().T + layer.biases[0].double()
    factor = layer.activation.gate_factor if layer.activation.HasField("gate_factor") else 1.0
    return bool(((gate * factor - layer.activation.parameter).abs() < 1e-5).any())


def test_what_is_zero_is_not_read_whatever_is_added_to_up() -> None:
    """NaN stands in the up rows and down columns of neurons whose gate is closed."""
    activation = Activation(function="relu", up_limit=7.0, up_offset=1.0)
    layer = Layer("F32", 40, 60, True, activation, biased=True)
    assert layer.biases is not None
    x = torch.randn(3, 40)
    closed = ~(x @ layer.weights[:, 0].T + layer.biases[0] > 0).any(dim=0)
    assert closed.any()
    expected = layer.reference(x)
    layer.weights[closed, 1:] = torch.nan
    assert close(layer.run(x), expected)


@pytest.mark.parametrize("tokens", [1, 5, 16, 17, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_chunks_or_threads(dtype: str, tokens: int) -> None:
    for gated in (True, False):
        layer = Layer(dtype, 77, 331, gated, "relu")
        x = torch.randn(tokens, 77)
        whole = layer.run(x, [331], threads=1)
        for sizes, threads in (([1], 1), ([2, 3, 50], 2), ([128, 7], 3), ([331], 4)):
            assert torch.equal(layer.run(x, sizes, threads), whole)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(DTYPES)),
    st.integers(1, 1200),
    st.integers(1, 300),
    st.integers(2, 70),
    st.sampled_from(["relu", "silu", "gelu_tanh"]),
    st.lists(st.integers(1, 200), min_size=1, max_size=3),
    st.sampled_from([1, 2, 3]),
    st.integers(0, 1000),
)
def test_a_row_depends_on_itself_alone(
    dtype: str, hidden: int, neurons: int, tokens: int, activation: str, chunks: list[int], threads: int, seed: int
) -> None:
    layer = Layer(dtype, hidden, neurons, gated=activation != "relu", activation=activation, seed=seed)
    x = torch.randn(tokens, hidden)
    together = layer.run(x, chunks, threads)
    for token in {0, tokens // 2, tokens - 1}:
        assert torch.equal(layer.run(x[token : token + 1]), together[token : token + 1])
    first = seed % tokens
    assert torch.equal(layer.run(x[first:]), together[first:])


def test_a_sum_in_several_blocks_of_neurons_and_slices_of_outputs() -> None:
    layer, x = Layer("BF16", 600, 1200, gated=True, activation="silu"), torch.randn(400, 600)
    whole = layer.run(x, [1200], 1)
    assert close(whole, layer.reference(x))
    for chunks, threads in (([37, 1, 64], 2), ([701, 499], 3)):
        assert torch.equal(layer.run(x, chunks, threads), whole)
    assert torch.equal(layer.run(x[130:131]), whole[130:131])


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_instruction_sets(dtype: str, instruction_set: str) -> None:
    layer = Layer(dtype, 77, 90, True, "gelu_tanh")
    try:
        kernels = Ffn(Workers(2), [plain(dtype)] * 3, 77, "gelu_tanh", instruction_set=instruction_set)
    except ValueError as error:
        pytest.skip(str(error))
    of_bf16 = instruction_set in ("amx", "avx512_bf16")
    for_others = instruction_set == "avx512_vnni" or (of_bf16 and dtype != "BF16")
    assert kernels.instruction_set == ("avx512" if for_others else instruction_set)
    x = torch.randn(16, 77)
    (chunk,) = layer.source([90]).chunks(0)
    addresses = layer.weights.data_ptr() + np.arange(90, dtype=np.uint64) * layer.weights[0].nbytes
    lent = LentMemory(array_of(layer.weights))
    assert len(chunk.addresses) == len(addresses)
    together, alone = torch.zeros(16, 77), torch.zeros(16, 77)
    kernels.add_rows(addresses, None, None, x.numpy(), together.numpy())
    assert close(together, layer.reference(x))
    for token in range(16):
        kernels.add_rows(addresses, None, None, x[token : token + 1].numpy(), alone[token : token + 1].numpy())
    assert torch.equal(together, alone), "a row depends on its batch-mates"
    del lent


def test_half_precision_is_widened_exactly() -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
    for dtype in ("F16", "BF16"):
        values = every.view(DTYPES[dtype])
        weight = torch.where(values.isfinite(), values, 0).view(-1, 64).contiguous()
        for instruction_set in AVAILABLE:
            kernels = Linear(Workers(1), dtype, instruction_set)
            for columns in (64, 1):  # whole vectors, and the ends of rows
                rows = weight.view(-1, columns)
                out = np.empty((columns, len(rows)), np.float32)
                kernels.multiply(array_of(rows), np.eye(columns, dtype=np.float32), out)
                expected = rows.float()
                if instruction_set in ("amx", "avx512_bf16") and dtype == "BF16":  # take subnormals for 0
                    expected = torch.where(expected.abs() < 2.0**-126, 0.0, expected)
                assert np.array_equal(out.T, expected.numpy())


def test_output_is_fresh_and_of_the_dtype_of_x() -> None:
    layer = Layer("BF16", 64, 50, True, "silu")
    for tokens in (2, 30):
        x = torch.randn(2, tokens, 64).bfloat16()
        before = x.clone()
        y = layer.run(x)
        assert y.dtype == torch.bfloat16
        assert y.shape == x.shape
        assert torch.equal(x, before)
        assert torch.equal(y, layer.run(x.float()).bfloat16()), "rounded more than once"


def test_no_tokens() -> None:
    assert Layer("F32", 64, 50, True, "silu").run(torch.zeros(0, 64)).shape == (0, 64)


def test_iterator_is_closed_when_a_chunk_fails() -> None:
    layer = Layer("F32", 64, 50, True, "silu")
    source = layer.source([10])
    ffn = exact_ffn(source, layer.layout, "silu", 1)
    with pytest.raises(ValueError, match="hidden_size"):
        ffn(0, torch.zeros(1, 63), None)
    assert source.opened == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": [plain("F32"), plain("I8")]}, "no kernel for weights of encoding 'I8'"),
        ({"activation": "sine"}, "no kernel for activation 'sine'"),
        ({"hidden_size": 0}, "hidden_size must be positive"),
        ({"activation": "gated_relu", "parts": [plain("F32")] * 2}, "needs bundles with a gate row"),
        ({"instruction_set": "mmx"}, "instruction set 'mmx' is unknown"),
    ],
)
def test_kernels_refuse(change: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"parts": [plain("F32")] * 3, "hidden_size": 8, "activation": "silu"} | change
    with pytest.raises(ValueError, match=message):
        Ffn(Workers(1), **options)


def test_kernels_refuse_shapes_that_do_not_fit() -> None:
    kernels = Ffn(Workers(1), [plain("F32")] * 3, 8, "silu")
    rows, none = np.zeros((1, 8), np.float32), np.zeros(0, np.uint64)
    with pytest.raises(ValueError, match="too many tokens"):
        kernels.accumulate(none, np.zeros((0, 17), np.float32), np.zeros((17, 8), np.float32))
    for biases in (np.zeros((2, 1), np.float32), np.zeros((1, 0), np.float32)):
        with pytest.raises(ValueError, match=r"biases must be \[parts of a bundle but down, neurons\]"):
            kernels.add_rows(none, biases, None, rows, rows.copy())
    for masks in (np.zeros((2, 0), np.uint16), np.zeros((1, 1), np.uint16)):
        with pytest.raises(ValueError, match=r"row_masks must be \[groups of 16 tokens, bundles\]"):
            kernels.add_rows(none, None, masks, rows, rows.copy())
    with pytest.raises(ValueError, match="must be contiguous"):
        kernels.add_rows(np.zeros(2, np.uint64), None, np.zeros((1, 4), np.uint16)[:, ::2], rows, rows.copy())


def test_ffn_of_a_model_is_transformers_own() -> None:
    """The layer as cut from a model, against the module that transformers runs."""
    model = make_model(make_config("llama"))
    parts = cut(model)
    ffn = exact_ffn(ArraySource(parts, [50]), parts.record.bundle, "silu", 2)
    for tokens in (4, 40):
        x = torch.randn(1, tokens, 64)
        with torch.no_grad():
            expected = model.get_submodule("model.layers.1.mlp")(x)
        assert torch.allclose(LayerFFN(ffn, 1)(x), expected, atol=1e-5)
