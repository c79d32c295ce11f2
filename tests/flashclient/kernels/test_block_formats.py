"""Kernels on rows in block formats, against gguf-py's numbers and torch's."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from blocks import FP8, NVFP4, as_multiplied, decoded, random_rows, spoil
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays
from instruction_sets import AVAILABLE
from numpy.typing import NDArray

from flashclient._native import Ffn, LentMemory, Workers, decode_rows
from weightd_proto.encodings import BLOCK_FORMATS, in_blocks, plain
from weightd_proto.weightd_pb2 import Encoding

WORKERS = Workers(2)
VALUES = 512  # two of the largest blocks


def decode(format: str, rows: NDArray[np.uint8], instruction_set: str) -> NDArray[np.float32]:
    block_values, block_bytes, *_ = BLOCK_FORMATS[format]
    out = np.empty((len(rows), rows.shape[1] // block_bytes * block_values), np.float32)
    decode_rows(in_blocks(format), rows, out, instruction_set)
    return out


@pytest.mark.parametrize("instruction_set", AVAILABLE)
@pytest.mark.parametrize("format", BLOCK_FORMATS)
def test_numbers_are_those_of_gguf_and_torch(format: str, instruction_set: str) -> None:
    """Of any bytes: scales are NaN, infinite and subnormal, too."""
    block_values, block_bytes, *_ = BLOCK_FORMATS[format]

    @settings(max_examples=60, deadline=None)
    @given(arrays(np.uint8, (3, VALUES // block_values * block_bytes)))
    def check(rows: NDArray[np.uint8]) -> None:
        assert np.array_equal(decode(format, rows, instruction_set), decoded(format, rows), equal_nan=True)

    check()
    rows = random_rows(format, 50, VALUES, 1.0, 0)
    assert np.array_equal(decode(format, rows, instruction_set), decoded(format, rows))


@pytest.mark.parametrize("instruction_set", AVAILABLE)
@pytest.mark.parametrize("format", BLOCK_FORMATS)
@pytest.mark.parametrize("tokens", [1, 2, 7, 16])
def test_damaged_scales_spoil_their_own_neurons_only(format: str, tokens: int, instruction_set: str) -> None:
    """NaN and infinity flow into the sums that have them, as in float64, and nothing else happens."""
    neurons, parts = 61, 3
    stored = random_rows(format, neurons * parts, VALUES, 0.05, 1).reshape(neurons, -1)
    block_bytes = BLOCK_FORMATS[format].bytes
    for neuron, scale in ((7, np.nan), (40, np.inf)):
        spoil(format, stored[neuron, block_bytes : 2 * block_bytes], scale)
    gate, up, down = decoded(format, stored.reshape(neurons * parts, -1)).reshape(neurons, parts, -1).swapaxes(0, 1)
    x = np.random.default_rng(2).standard_normal((tokens, VALUES)).astype(np.float32)
    lent = LentMemory(stored)
    addresses = stored.ctypes.data + np.arange(neurons, dtype=np.uint64) * np.uint64(stored.shape[1])
    kernels = Ffn(WORKERS, [in_blocks(format)] * parts, VALUES, "silu", instruction_set)
    h, masks = np.empty((neurons, tokens), np.float32), np.full(neurons, 2**tokens - 1, np.uint16)
    kernels.fire(addresses, np.arange(neurons, dtype=np.uint32), masks, None, x, h)
    with np.errstate(all="ignore"):
        multiplied = as_multiplied(x, format, instruction_set).T.astype(np.float64)
        products = gate @ multiplied
        expected = products / (1 + np.exp(-products)) * (up @ multiplied)
    spoilt = ~np.isfinite(expected).all(axis=1)
    assert list(np.flatnonzero(~np.isfinite(h).all(axis=1))) == list(np.flatnonzero(spoilt))
    assert spoilt.sum() == 2
    assert np.allclose(h[~spoilt], expected[~spoilt], rtol=2e-5, atol=4e-5)
    h[spoilt] = 0
    y = np.zeros((tokens, VALUES), np.float32)
    kernels.accumulate(addresses, h, y)
    assert np.allclose(y, h[~spoilt].T.astype(np.float64) @ down[~spoilt], rtol=2e-5, atol=4e-5)
    del lent


def test_sizes_are_those_of_gguf() -> None:
    for format, record in BLOCK_FORMATS.items():
        if format in (*FP8, *NVFP4):
            continue
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[format]] == (record.values, record.bytes)


def test_other_encodings_are_refused() -> None:
    for wrong in (
        Encoding(format="Q8_0", block_values=32, block_bytes=36, scales=Encoding.IN_BLOCK),
        Encoding(format="Q8_0", block_values=32, block_bytes=34),
        Encoding(format="Q9_9", block_values=32, block_bytes=34, scales=Encoding.IN_BLOCK),
    ):
        with pytest.raises(ValueError, match="no kernel for weights of encoding 'Q"):
            Ffn(WORKERS, [wrong] * 3, VALUES, "silu")
    with pytest.raises(ValueError, match="hidden_size 48 is not whole blocks of Q8_0"):
        Ffn(WORKERS, [in_blocks("Q8_0")] * 3, 48, "silu")
    with pytest.raises(ValueError, match="rows are not whole blocks"):
        decode_rows(in_blocks("Q8_0"), np.zeros((1, 35), np.uint8), np.zeros((1, 32), np.float32))
    with pytest.raises(ValueError, match=r"out must be \[rows, values\]"):
        decode_rows(in_blocks("Q8_0"), np.zeros((1, 34), np.uint8), np.zeros((1, 31), np.float32))
    with pytest.raises(ValueError, match="only rows in blocks are decoded"):
        decode_rows(plain("F32"), np.zeros((1, 64), np.uint8), np.zeros((1, 16), np.float32))
