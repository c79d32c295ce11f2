"""Traces of cells: what the forward passes of one process need, step by step.

A trace is an array [steps, cells of a step] of cell numbers. A step is one layer of one token: its cells are needed at
once.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Trace = NDArray[np.uint32]

# The share of choices that an LRU list finds which holds this share of a layer's experts: Gemma 4 26B-A4B, 128 experts,
# 8 of them chosen (oMLX pull request 2595).
LRU_HITS = ((0.125, 0.45), (0.25, 0.67), (0.5, 0.89), (1.0, 1.0))


def expert_choices(experts: int, chosen: int, tokens: int, popularity: float, seed: int) -> NDArray[np.uint32]:
    """The experts that a layer chooses: [tokens, chosen], distinct in a row.

    Choices are drawn by their distance in the LRU stack (Mattson et al., IBM Systems Journal 9(2), 1970), so that an
    LRU list has LRU_HITS. `popularity`: the exponent of Zipf's law that weighs experts of similar distance; with 0 all
    are alike in the long run.
    """
    rng = np.random.default_rng(seed)
    weight = rng.permutation((np.arange(experts) + 1.0) ** -popularity)
    ends = [0, *(round(share * experts) for share, _ in LRU_HITS)]
    shares = np.diff([0.0, *(hits for _, hits in LRU_HITS)])
    stack = rng.permutation(experts)  # the most recent first
    choices = np.empty((tokens, chosen), np.uint32)
    for token in range(tokens):
        wanted = rng.multinomial(chosen, shares)
        picked: list[int] = []
        short = 0
        for begin, end, count in zip(ends, ends[1:], wanted, strict=False):
            members = stack[begin:end]
            taken = min(count + short, len(members))
            short += count - taken
            share = weight[members] / weight[members].sum()
            picked += rng.choice(members, taken, replace=False, p=share).tolist()
        left = stack[~np.isin(stack, picked)]
        # In the order of the stack, so that a list of any length finds all that it held before this token.
        now = np.concatenate([stack[np.isin(stack, picked)], left[:short]])
        choices[token] = now
        stack = np.concatenate([now, stack[~np.isin(stack, now)]])
    return choices


def mixture(layers: int, experts: int, chosen: int, tokens: int, popularity: float = 0.0, seed: int = 7) -> Trace:
    """Decoding with a mixture of experts: a cell is an expert. [tokens * layers, chosen]"""
    by_layer = [
        expert_choices(experts, chosen, tokens, popularity, seed + layer) + np.uint32(layer * experts)
        for layer in range(layers)
    ]
    return np.stack(by_layer, axis=1).reshape(tokens * layers, chosen).astype(np.uint32)


def dense(layers: int, cells: int, tokens: int) -> Trace:
    """Exact mode of a dense model: every token needs all cells of all layers, in order. [steps, 16]"""
    return np.tile(np.arange(layers * cells, dtype=np.uint32), tokens).reshape(-1, 16)


def neurons(layers: int, cells: int, tokens: int, seed: int = 7) -> Trace:
    """Predict mode: neurons fire independently with p ~ Beta(0.153, 1.377), whose mean is a tenth. [steps, most]

    This is how planted models fire (planted/plan.py). A row that has fewer cells than the longest repeats its last.
    """
    rng = np.random.default_rng(seed)
    share = rng.beta(0.153, 1.377, (layers, cells))
    rows = []
    for _ in range(tokens):
        for layer in range(layers):
            fired = np.flatnonzero(rng.random(cells) < share[layer])
            rows.append((fired if len(fired) else np.array([0])) + layer * cells)
    width = max(map(len, rows))
    return np.array([np.pad(row, (0, width - len(row)), "edge") for row in rows], np.uint32)


def recorded(path: Path) -> Trace:
    """The trace in a .npy file of numpy's. Raises ValueError for an array of another kind."""
    trace: Trace = np.load(path, allow_pickle=False)
    if trace.ndim != 2 or trace.dtype != np.uint32:
        raise ValueError(f"{path} holds {trace.dtype} {list(trace.shape)}, not uint32 [steps, cells of a step]")
    return trace
