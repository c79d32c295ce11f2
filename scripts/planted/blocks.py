"""Matrices of random quantised blocks: cheap to make, and their values are known exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
from numpy.typing import NDArray
from torch import Tensor

BANK_BLOCKS = (1 << 16) + 43  # odd, so that rows which reuse the same blocks have them in other columns
# Of Q4_K: 256 values d * s * q - dmin * m, with a 6-bit scale s and minimum m for each 32 of them and 4-bit codes q.
# Here m = s and dmin = 7.5 * d, so values are d * s * (q - 7.5), and their mean is 0.
SCALES = (4, 8)
MEAN_CODE = 7.5
D, DMIN, PACKED = slice(0, 2), slice(2, 4), slice(4, 16)  # bytes of a block
EXACT_BITS = 7  # of d, so that dmin is a number of 16 bit, too
SMALLEST = 2.0**-23  # of d: half of it is the smallest number of 16 bit
# Of Q4_0: a scale d, then 32 values d * (q - 8) with 4-bit codes q. Of Q8_0: a scale, then 32 values of 8 bits. Neither
# has the lowest code here, so that the mean is 0.
# Of MXFP4: 32 numbers of 4 bits, which are symmetric, after the exponent of the power of two that scales them.
EXPONENT, BIAS = 0, 127


@dataclass(frozen=True)
class BlockKind:
    """How random blocks of an encoding are made.

    Attributes:
        prepare: sets what is not random in random blocks [blocks, bytes] uint8, but the scale.
        exact_scale: the nearest scale that a block can have.
        set_scale: gives the blocks such a scale.
    """

    encoding: GGMLQuantizationType
    prepare: Callable[[NDArray[np.uint8], np.random.Generator], None]
    exact_scale: Callable[[float], float]
    set_scale: Callable[[NDArray[np.uint8], float], None]

    @property
    def block_values(self) -> int:
        return GGML_QUANT_SIZES[self.encoding][0]

    @property
    def block_bytes(self) -> int:
        return GGML_QUANT_SIZES[self.encoding][1]

    def matrix_bytes(self, rows: int, columns: int) -> int:
        """The bytes of a matrix. Columns are a multiple of block_values."""
        return rows * columns // self.block_values * self.block_bytes


@dataclass(frozen=True)
class BlockMatrix:
    """A matrix [rows, columns].

    Attributes:
        blocks: [rows, bytes of a row] uint8.
        unscaled: [blocks of the bank, values of a block] fp32.
        places: of this matrix's blocks in `unscaled`.
        scale: what their values are multiplied by.
    """

    kind: BlockKind
    blocks: NDArray[np.uint8]
    unscaled: Tensor
    places: Tensor
    scale: float

    def float(self) -> Tensor:
        """The values of the blocks, [rows, columns] fp32."""
        return (self.unscaled[self.places] * self.scale).view(len(self.blocks), -1)

    def __getitem__(self, rows: list[int]) -> Tensor:
        return self.float()[rows]


Matrix = Tensor | BlockMatrix


class BlockNoise:
    """Makes random matrices of consecutive blocks of one bank, from a random place on, with a scale of their own."""

    def __init__(self, kind: BlockKind, seed: int) -> None:
        self._kind = kind
        self._random = np.random.default_rng(seed)
        bank = self._random.integers(0, 256, (BANK_BLOCKS, kind.block_bytes), np.uint8)
        kind.prepare(bank, self._random)
        kind.set_scale(bank, 1.0)
        values = dequantize(bank, kind.encoding)
        self._deviation = float(values.std())
        self._bank, self._values = bank, torch.from_numpy(values)

    def matrix(self, rows: int, columns: int, deviation: float) -> BlockMatrix:
        """A matrix [rows, columns] of the standard deviation that is nearest to this one.

        Columns are a multiple of the values of a block.
        """
        count = rows * columns // self._kind.block_values
        places = (np.arange(count) + self._random.integers(BANK_BLOCKS)) % BANK_BLOCKS
        blocks, scale = self._bank[places], self._kind.exact_scale(deviation / self._deviation)
        self._kind.set_scale(blocks, scale)
        return BlockMatrix(self._kind, blocks.reshape(rows, -1), self._values, torch.from_numpy(places), scale)


def _prepare_q4_k(blocks: NDArray[np.uint8], random: np.random.Generator) -> None:
    """Sets the scales, which are the minimums, too: each below 16, so that 8 of them are packed like this."""
    scales = random.integers(*SCALES, (len(blocks), 8), np.uint8)
    low, high = scales[:, :4], scales[:, 4:]
    blocks[:, PACKED] = np.concatenate([low, low, high | high << 4], axis=1)


def _prepare_q4_0(blocks: NDArray[np.uint8], random: np.random.Generator) -> None:
    low, high = (random.integers(1, 16, (len(blocks), 16), np.uint8) for _ in range(2))
    blocks[:, 2:] = low | high << 4


def _prepare_q8_0(blocks: NDArray[np.uint8], random: np.random.Generator) -> None:
    blocks[:, 2:] = random.integers(-127, 128, (len(blocks), 32), np.int8).view(np.uint8)


def _exact_scale(scale: float) -> float:
    """The nearest number that is exact in 16 bit, and is so if it is multiplied by 7.5."""
    step = max(2.0 ** (np.floor(np.log2(scale)) - EXACT_BITS + 1), SMALLEST)
    return float(round(scale / step) * step)


def _set_scale_q4_k(blocks: NDArray[np.uint8], scale: float) -> None:
    for part, number in ((D, scale), (DMIN, scale * MEAN_CODE)):
        blocks[:, part] = np.frombuffer(np.float16(number).tobytes(), np.uint8)


def _set_scale(blocks: NDArray[np.uint8], scale: float) -> None:
    blocks[:, D] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)


def _set_scale_mxfp4(blocks: NDArray[np.uint8], scale: float) -> None:
    blocks[:, EXPONENT] = BIAS + round(np.log2(scale))


Q4_K = BlockKind(GGMLQuantizationType.Q4_K, _prepare_q4_k, _exact_scale, _set_scale_q4_k)
Q4_0 = BlockKind(GGMLQuantizationType.Q4_0, _prepare_q4_0, _exact_scale, _set_scale)
Q8_0 = BlockKind(GGMLQuantizationType.Q8_0, _prepare_q8_0, _exact_scale, _set_scale)
MXFP4 = BlockKind(
    GGMLQuantizationType.MXFP4, lambda *_: None, lambda scale: 2.0 ** round(np.log2(scale)), _set_scale_mxfp4
)
KINDS = {kind.encoding.name: kind for kind in (Q4_K, Q4_0, Q8_0, MXFP4)}
