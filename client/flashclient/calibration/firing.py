"""Which neurons of a layer fired for which tokens, one bit each, and statistics of these bits."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flashclient.model.predictor_file import UNION_TOKENS_MAX

BLOCK_TOKENS = 512


class PackedBits:
    """Bits of [tokens, neurons], eight in a byte: 100 k tokens of 16384 neurons take 205 MB."""

    def __init__(self, tokens: int, neurons: int) -> None:
        self.neurons = neurons
        self._bytes = np.zeros((tokens, -(-neurons // 8)), np.uint8)

    def __len__(self) -> int:
        return len(self._bytes)

    def put(self, first: int, fired: Tensor) -> None:
        """Sets the bits of tokens `first` and following: [tokens, neurons] bool."""
        self._bytes[first : first + len(fired)] = np.packbits(fired.numpy(), axis=1)

    def of(self, tokens: Tensor | slice) -> Tensor:
        """[tokens, neurons] bool."""
        rows = self._bytes[tokens if isinstance(tokens, slice) else tokens.numpy()]
        return torch.from_numpy(np.unpackbits(rows, axis=1, count=self.neurons)).bool()

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """All tokens, BLOCK_TOKENS at a time."""
        for begin in range(0, len(self), BLOCK_TOKENS):
            tokens = slice(begin, min(begin + BLOCK_TOKENS, len(self)))
            yield tokens, self.of(tokens)

    def select(self, tokens: Tensor) -> PackedBits:
        """The bits of some tokens, copied."""
        selected = PackedBits(0, self.neurons)
        selected._bytes = self._bytes[tokens.numpy()]
        return selected

    def frequency(self) -> NDArray[np.float32]:
        """[neurons]: the share of the tokens at which each neuron's bit is set."""
        count = torch.zeros(self.neurons, dtype=torch.float32)
        for _, fired in self.blocks():
            count += fired.sum(0)
        return (count / max(1, len(self))).numpy()


def unions(predicted: PackedBits, sequence_tokens: int) -> NDArray[np.float32]:
    """[8]: the average share of the neurons in the union of k = 1..8 successive tokens of a sequence."""
    totals, counts = np.zeros(UNION_TOKENS_MAX), np.zeros(UNION_TOKENS_MAX)
    for begin in range(0, len(predicted), sequence_tokens):
        alone = predicted.of(slice(begin, begin + sequence_tokens))
        union = alone
        for more in range(min(UNION_TOKENS_MAX, len(alone))):
            if more:
                union = union[1:] | alone[: len(alone) - more]
            totals[more] += union.float().mean(1).sum().item()
            counts[more] += len(union)
    return (totals / np.maximum(counts, 1)).astype(np.float32)
