"""Predictors of one layer: a low-rank one, which is trained, and one of sign bits, which needs no training.

Both score every neuron and predict those above a threshold. The threshold is the highest with which the target share
of firings is found on tokens held out from training. The layer has one, or each neuron if that predicts less.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flashclient.calibration.firing import PackedBits
from flashclient.model.activations import neurons_of
from flashclient.model.predictor_file import GateRows, LowRank, Predictor, Signs, quantized
from weightd_proto import weightd_pb2

EPOCHS = 3
BATCH_TOKENS = 256
BLOCK_NEURONS = 4096  # of a batch at a time: bounds the memory of training to a few MB
LEARNING_RATE = 2e-3
LOGIT_PER_DEVIATION = 4.0  # the initial predictor's logit at one standard deviation of a neuron's input
FALSE_POSITIVES_REACH = 0.01  # a smaller rank is chosen if it adds at most this share of false positives
MOMENTS_TOKENS = 4096  # summed in fp32 before they go into sums in fp64
ROUNDING = np.float32(1e-5)  # relative, of a score: adding the threshold to the bias rounds once more
FIRINGS_MIN = 16  # a neuron with fewer gets no threshold of its own


@dataclass(frozen=True)
class Examples:
    """Inputs of one layer's FFN, and the neurons that fired for them.

    Attributes:
        x: [tokens, hidden_size], in the model's dtype.
        fired: bits of [tokens, neurons].
    """

    x: Tensor
    fired: PackedBits

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """x in fp32 and fired in bool, a few hundred tokens at a time."""
        for tokens, fired in self.fired.blocks():
            yield self.x[tokens].float(), fired

    def select(self, tokens: Tensor) -> Examples:
        return Examples(self.x[tokens], self.fired.select(tokens))


@dataclass(frozen=True)
class Rates:
    """How good a predictor is on some tokens.

    Attributes:
        firing, predicted: shares of all (neuron, token) pairs.
        false_negatives: share of the firing pairs that were not predicted.
        false_positives: share of the pairs that did not fire that were predicted.
    """

    firing: float
    predicted: float
    false_negatives: float
    false_positives: float


@dataclass
class PairCounts:
    """Counts of (neuron, token) pairs, from which Rates follow."""

    pairs: int = 0
    firing: int = 0
    predicted: int = 0
    both: int = 0

    def add(self, fired: Tensor, wanted: Tensor) -> None:
        """Both [tokens, neurons] bool."""
        self.pairs += fired.numel()
        self.firing += int(fired.sum())
        self.predicted += int(wanted.sum())
        self.both += int((fired & wanted).sum())

    def rates(self) -> Rates:
        return Rates(
            self.firing / max(1, self.pairs),
            self.predicted / max(1, self.pairs),
            (self.firing - self.both) / max(1, self.firing),
            (self.predicted - self.both) / max(1, self.pairs - self.firing),
        )


Trained = LowRank | Signs


class ReferencePredictor:
    """A predictor computed by torch: the reference for the kernels.

    Args:
        dtype: of the predictor's matrices; numpy has no bfloat16, so they are uint16 there.
    """

    def __init__(self, predictor: Trained, dtype: torch.dtype) -> None:
        if isinstance(predictor, LowRank):
            self._input, self._output = _values(predictor.input, dtype), _output(predictor, dtype)
            self._bias = torch.from_numpy(predictor.bias.copy())
        else:
            self._signs, self._margin = predictor.signs, torch.from_numpy(predictor.margin.astype(np.float32))
        self._is_low_rank = isinstance(predictor, LowRank)

    def scores(self, x: Tensor) -> Tensor:
        """Scores [tokens, neurons] of x [tokens, hidden_size] fp32; a neuron is wanted where its score is above 0."""
        if self._is_low_rank:
            return torch.addmm(self._bias, x @ self._input.T, self._output.T)
        bits = np.unpackbits(self._signs, axis=1, count=x.shape[1], bitorder="little")
        return _signs_of(x) @ (1.0 - 2.0 * torch.from_numpy(bits).float()).T - self._margin

    def wanted(self, x: Tensor) -> Tensor:
        """[tokens, neurons] bool."""
        return self.scores(x) > 0


class ReferenceGate:
    """The same for the gate rows of mode threshold."""

    def __init__(self, predictor: GateRows, activation: weightd_pb2.Activation) -> None:
        self._rows = torch.from_numpy(predictor.gate * predictor.scale[:, None])
        self._bias, self._threshold = (torch.from_numpy(one.copy()) for one in (predictor.bias, predictor.threshold))
        self._activation = activation

    def opened(self, x: Tensor) -> Tensor:
        """act(gate . x) of x [tokens, hidden_size] fp32: [tokens, neurons]."""
        return neurons_of(self._activation, torch.addmm(self._bias, x, self._rows.T))

    def wanted(self, x: Tensor) -> Tensor:
        """[tokens, neurons] bool."""
        return ~(self.opened(x).abs() < self._threshold)


Reference = ReferencePredictor | ReferenceGate


def reference_of(predictor: Predictor, activation: weightd_pb2.Activation, dtype: torch.dtype) -> Reference:
    """The reference for the predictor's kernel."""
    if isinstance(predictor, GateRows):
        return ReferenceGate(predictor, activation)
    return ReferencePredictor(predictor, dtype)


def _signs_of(x: Tensor) -> Tensor:
    """1 or -1 by the stored sign bit: -0.0 is negative."""
    return 1.0 - 2.0 * torch.signbit(x).float()


def _values(matrix: NDArray[Any], dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(matrix.copy()).view(dtype).float()


def _output(predictor: LowRank, dtype: torch.dtype) -> Tensor:
    if predictor.scale is None:
        return _values(predictor.output, dtype)
    return torch.from_numpy(predictor.output * predictor.scale[:, None])


def _stored(matrix: Tensor, dtype: torch.dtype) -> NDArray[Any]:
    """`matrix` rounded to `dtype`; 16-bit floats as uint16."""
    rounded = matrix.to(dtype).contiguous()
    return rounded.numpy() if dtype == torch.float32 else rounded.view(torch.int16).numpy().view(np.uint16)


def measure(predictor: Trained, dtype: torch.dtype, examples: Examples) -> Rates:
    """The rates of `predictor` on `examples`."""
    prediction = ReferencePredictor(predictor, dtype)
    counts = PairCounts()
    for x, fired in examples.blocks():
        counts.add(fired, prediction.wanted(x))
    return counts.rates()


def train_low_rank(
    rows: Tensor,
    bias: Tensor | None,
    training: Examples,
    held_out: Examples,
    *,
    ranks: Sequence[int],
    recall: float,
    dtype: torch.dtype,
    seed: int,
) -> Trained:
    """The low-rank predictor of the smallest rank whose false positives are close to those of the largest rank.

    Starts from the best approximation of `rows` under the covariance of the inputs, then minimises balanced binary
    cross-entropy on the firing bits (LLM in a flash, arXiv 2312.11514, section 3.1).

    Args:
        rows: [neurons, hidden_size] fp32, the gate rows, or the up rows where there is no gate.
        bias: [neurons] fp32 or None.
        held_out: the examples on which thresholds and rank are chosen.
        ranks: candidates; each is capped at hidden_size and neurons.
        recall: the share of firings to predict.
    """
    candidates = sorted({min(rank, *rows.shape) for rank in ranks})
    start = _Start(rows, bias, training.x)

    def train(rank: int) -> tuple[Trained, float]:
        first, second, shift = _descend(*start.of(rank), training, seed)
        unshifted = quantized(_stored(first, dtype), second.numpy(), shift.numpy())
        predictor = with_thresholds(unshifted, dtype, held_out, recall)
        return predictor, measure(predictor, dtype, held_out).false_positives

    best, reach = train(candidates[-1])
    for rank in candidates[:-1]:
        smaller, false_positives = train(rank)
        if false_positives <= reach + FALSE_POSITIVES_REACH:
            return smaller
    return best


class _Start:
    """Low-rank approximations of W x + b with the least mean square error over the inputs.

    The error of each neuron is in units of the standard deviation of its input.

    With C the inputs' covariance, V the leading eigenvectors of C^1/2 W' W C^1/2: W is about (W C^1/2 V) (V' C^-1/2).
    """

    def __init__(self, rows: Tensor, bias: Tensor | None, x: Tensor) -> None:
        self._mean, covariance = _moments(x)
        variances, axes = torch.linalg.eigh(covariance)
        variances = variances.clamp(min=1e-6 * variances.max().item() + 1e-30)
        self._root = (axes * variances.sqrt()) @ axes.T
        self._inverse_root = (axes / variances.sqrt()) @ axes.T
        weights = rows.double()
        spread = (weights @ self._root).norm(dim=1, keepdim=True).clamp(min=1e-30)
        self._weights = weights * (LOGIT_PER_DEVIATION / spread)
        offset = weights @ self._mean + (0.0 if bias is None else bias.double())
        self._offset = offset * (LOGIT_PER_DEVIATION / spread[:, 0])
        whitened = self._weights @ self._root
        self._directions = torch.linalg.eigh(whitened.T @ whitened).eigenvectors.flip(1)

    def of(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """input [rank, hidden_size], output [neurons, rank], bias [neurons], all fp32."""
        leading = self._directions[:, :rank]
        first, second = leading.T @ self._inverse_root, self._weights @ self._root @ leading
        return first.float(), second.float(), (self._offset - second @ (first @ self._mean)).float()


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [hidden_size] and covariance [hidden_size, hidden_size] of the rows of x, fp64."""
    total = torch.zeros(x.shape[1], dtype=torch.float64)
    products = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for begin in range(0, len(x), MOMENTS_TOKENS):
        block = x[begin : begin + MOMENTS_TOKENS].float()
        total += block.double().sum(0)
        products += (block.T @ block).double()
    mean = total / len(x)
    return mean, products / len(x) - torch.outer(mean, mean)


def _descend(
    first: Tensor, second: Tensor, bias: Tensor, training: Examples, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Adam on balanced binary cross-entropy. The gradient is explicit: autograd would keep every block's logits."""
    parameters = [first, second, bias]
    steps = EPOCHS * -(-len(training.x) // BATCH_TOKENS)
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps + 1, pct_start=0.1)
    firing = float(training.fired.frequency().mean())
    weight = (1 - firing) / firing
    random = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        order = torch.randperm(len(training.x), generator=random)
        for begin in range(0, len(order), BATCH_TOKENS):
            tokens = order[begin : begin + BATCH_TOKENS]
            _set_gradients(parameters, training.x[tokens].float(), training.fired.of(tokens), weight)
            optimizer.step()
            schedule.step()
    return first, second, bias


def _set_gradients(parameters: list[Tensor], x: Tensor, fired: Tensor, weight: float) -> None:
    """Gradients of the mean over pairs of -(weight * fired * log p + (1 - fired) * log(1 - p)), p = sigmoid(score)."""
    first, second, bias = parameters
    latent = x @ first.T
    back = torch.zeros_like(latent)
    second.grad, bias.grad = torch.empty_like(second), torch.empty_like(bias)
    for begin in range(0, len(bias), BLOCK_NEURONS):
        block = slice(begin, begin + BLOCK_NEURONS)
        truth = fired[:, block].float()
        slope = torch.addmm(bias[block], latent, second[block].T).sigmoid_()
        slope.mul_(truth * (weight - 1) + 1).sub_(truth, alpha=weight).div_(fired.numel())
        second.grad[block] = slope.T @ latent
        bias.grad[block] = slope.sum(0)
        back += slope @ second[block]
    first.grad = back.T @ x


def sign_predictor(rows: Tensor, held_out: Examples, recall: float) -> Trained:
    """SparseInfer's predictor (arXiv 2411.12692), but with margins chosen by recall instead of one parameter."""
    signs = np.packbits(torch.signbit(rows).numpy(), axis=1, bitorder="little")
    if not held_out.fired.frequency().any():  # no input exceeds this margin
        return Signs(signs, np.full(len(rows), rows.shape[1], np.int32))
    return with_thresholds(Signs(signs, np.zeros(len(rows), np.int32)), torch.float32, held_out, recall)


def constant_predictor(neurons: int, hidden_size: int, wants: bool, dtype: torch.dtype) -> LowRank:
    """A predictor that wants every neuron, or none: for layers where nothing can be learnt."""
    first, second = torch.zeros(1, hidden_size, dtype=torch.float32), torch.zeros(neurons, 1, dtype=torch.float32)
    bias = np.full(neurons, 1.0 if wants else -1.0, np.float32)
    return quantized(_stored(first, dtype), second.numpy(), bias)


def with_thresholds(predictor: Trained, dtype: torch.dtype, held_out: Examples, recall: float) -> Trained:
    """`predictor` with thresholds in its bias or margin. In `held_out`, at least one neuron must have fired."""
    prediction = ReferencePredictor(predictor, dtype)
    neurons, found = [], []
    for x, fired in held_out.blocks():
        places = fired.nonzero(as_tuple=True)
        neurons.append(places[1].numpy())
        found.append(prediction.scores(x)[places].numpy())
    choices = _thresholds(np.concatenate(neurons), np.concatenate(found), held_out.fired.neurons, recall)
    shifted = [_shift(predictor, threshold) for threshold in choices]
    return min(shifted, key=lambda one: measure(one, dtype, held_out).predicted)


def _thresholds(
    neurons: NDArray[np.int64], scores: NDArray[np.float32], count: int, recall: float
) -> list[NDArray[np.float32]]:
    """Two choices of the lowest score [neurons] that is still wanted: one for the layer, and one for each neuron.

    In the second, neurons that seldom fire share a threshold.

    Args:
        neurons, scores: the neuron and the score of each firing.
    """
    firings = np.bincount(neurons, minlength=count)
    order = np.lexsort((scores, neurons))
    ranks = (np.cumsum(firings) - firings + (1 - recall) * firings).astype(np.int64)
    frequent = firings >= FIRINGS_MIN
    single = np.empty(count, np.float32)
    single[frequent] = scores[order][ranks[frequent]]
    single[~frequent] = _lowest(scores[~frequent[neurons]], recall)
    return [np.full(count, _lowest(scores, recall), np.float32), single]


def _lowest(scores: NDArray[np.float32], recall: float) -> float:
    """The highest score at or above which `recall` of all scores lie; 0 if there are no scores."""
    place = int((1 - recall) * len(scores))
    return float(np.partition(scores, place)[place]) if len(scores) else 0.0


def _shift(predictor: Trained, lowest: NDArray[np.float32]) -> Trained:
    """`predictor` changed so that it wants scores of `lowest` and above."""
    if isinstance(predictor, Signs):
        return replace(predictor, margin=predictor.margin + lowest.astype(np.int32) - 1)
    below = lowest - ROUNDING * (1 + np.abs(lowest))
    return replace(predictor, bias=(predictor.bias - below).astype(np.float32))
