"""Which neurons of a layer fired for which tokens, one bit each, and what follows from it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flashclient.model.predictor_file import COMPANIONS, UNION_TOKENS_MAX

COACTIVATION_TOKENS = 4096  # its cost is tokens * neurons^2: seconds for a layer of 16384 neurons
COACTIVATION_BLOCK = 1024  # neurons at a time
BLOCK_TOKENS = 512


class PackedBits:
    """Bits of [tokens, neurons], eight to a byte: 100 k tokens of 16384 neurons take 205 MB."""

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
    """[8]: the share of the neurons in the union of k = 1..8 successive tokens of a sequence, on average."""
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


def coactivation(fired: PackedBits) -> NDArray[np.int32]:
    """[neurons, 8]: which others fire with each neuron most often beyond chance, best first; -1 where there are fewer.

    Beyond chance, as otherwise the few neurons that nearly always fire would be everybody's companions.
    """
    tokens = torch.linspace(0, len(fired) - 1, min(len(fired), COACTIVATION_TOKENS), dtype=torch.float32).long()
    bits = fired.of(tokens).float()
    share = bits.mean(0)
    companions = np.full((fired.neurons, COMPANIONS), -1, np.int32)
    kept = min(COMPANIONS, fired.neurons)
    for begin in range(0, fired.neurons, COACTIVATION_BLOCK):
        end = min(begin + COACTIVATION_BLOCK, fired.neurons)
        excess = bits[:, begin:end].T @ bits / len(bits) - share[begin:end, None] * share
        excess[torch.arange(end - begin), torch.arange(begin, end)] = 0
        best = excess.topk(kept, dim=1)
        companions[begin:end, :kept] = torch.where(best.values > 0, best.indices, -1).numpy()
    return companions
