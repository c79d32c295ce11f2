"""Matrices of random Q4_K blocks: cheap to make, and their values are known exactly.

A block has 256 values d * s * q - dmin * m, with a 6-bit scale s and minimum m for each 32 of them and 4-bit codes q.
Here m = s and dmin = 7.5 * d, so values are d * s * (q - 7.5), and their mean is 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGMLQuantizationType, dequantize
from numpy.typing import NDArray
from torch import Tensor

KIND = GGMLQuantizationType.Q4_K
BLOCK_VALUES, BLOCK_BYTES = 256, 144
BANK_BLOCKS = (1 << 16) + 43  # odd, so that rows which reuse the same blocks have them in other columns
SCALES = (4, 8)
MEAN_CODE = 7.5
D, DMIN, PACKED = slice(0, 2), slice(2, 4), slice(4, 16)  # bytes of a block
EXACT_BITS = 7  # of d, so that dmin is a number of 16 bit, too
SMALLEST = 2.0**-23  # of d: half of it is the smallest number of 16 bit


@dataclass(frozen=True)
class Q4KMatrix:
    """A matrix [rows, columns].

    Attributes:
        blocks: [rows, bytes of a row] uint8.
        unscaled: [blocks of the bank, 256] fp32.
        places: of this matrix's blocks in `unscaled`.
        scale: what their values are multiplied by.
    """

    blocks: NDArray[np.uint8]
    unscaled: Tensor
    places: Tensor
    scale: float

    def float(self) -> Tensor:
        """The values of the blocks, [rows, columns] fp32."""
        return (self.unscaled[self.places] * self.scale).view(len(self.blocks), -1)

    def __getitem__(self, rows: list[int]) -> Tensor:
        return self.float()[rows]


Matrix = Tensor | Q4KMatrix


def q4_k_bytes(rows: int, columns: int) -> int:
    """The bytes of a matrix. Columns are a multiple of 256."""
    return rows * columns // BLOCK_VALUES * BLOCK_BYTES


class Q4KNoise:
    """Makes random matrices of consecutive blocks of one bank, from a random place on, with a scale of their own."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        bank = self._random.integers(0, 256, (BANK_BLOCKS, BLOCK_BYTES), np.uint8)
        bank[:, PACKED] = packed_scales(self._random.integers(*SCALES, (BANK_BLOCKS, 8), np.uint8))
        set_scale(bank, 1.0)
        values = dequantize(bank, KIND)
        self._deviation = float(values.std())
        self._bank, self._values = bank, torch.from_numpy(values)

    def matrix(self, rows: int, columns: int, deviation: float) -> Q4KMatrix:
        """A matrix [rows, columns] of about this standard deviation. Columns are a multiple of 256."""
        count = rows * columns // BLOCK_VALUES
        places = (np.arange(count) + self._random.integers(BANK_BLOCKS)) % BANK_BLOCKS
        blocks, scale = self._bank[places], exact_scale(deviation / self._deviation)
        set_scale(blocks, scale)
        return Q4KMatrix(blocks.reshape(rows, -1), self._values, torch.from_numpy(places), scale)


def exact_scale(scale: float) -> float:
    """The nearest number that is exact in 16 bit, and is so if it is multiplied by 7.5."""
    step = max(2.0 ** (np.floor(np.log2(scale)) - EXACT_BITS + 1), SMALLEST)
    return float(round(scale / step) * step)


def set_scale(blocks: NDArray[np.uint8], scale: float) -> None:
    for part, number in ((D, scale), (DMIN, scale * MEAN_CODE)):
        blocks[:, part] = np.frombuffer(np.float16(number).tobytes(), np.uint8)


def packed_scales(scales: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Scales, which are the minimums, too: [blocks, 8], each below 16, as the 12 bytes of a block."""
    low, high = scales[:, :4], scales[:, 4:]
    return np.concatenate([low, low, high | high << 4], axis=1)
