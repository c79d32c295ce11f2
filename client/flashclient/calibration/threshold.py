"""Calibrates mode "threshold" to a bound on the loss of perplexity: `flashclient calibrate --mode threshold`.

For models whose neurons are never exactly zero. A neuron adds act(gate . x) * (up . x) * down to its layer's output. It
is skipped where |act(gate . x)| is below the threshold of the layer (CATS, arXiv 2404.08763). The gate rows are kept in
memory, rounded to int8: they tell what to skip before a bundle is read.

The thresholds of all layers follow from one number, the sparsity: the share of (token, neuron) pairs of each layer that
is skipped. The greatest sparsity is searched whose loss of perplexity is within the bound. Of every four sequences, two
tell how |act(gate . x)| is distributed, one searches, and one is the test set, on which alone the published loss is
measured. If it is above the bound there, smaller sparsities are taken.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from flashclient.calibration.evaluate import Quality
from flashclient.calibration.firing import PackedBits, unions
from flashclient.calibration.layer_walk import FeedForward, LayerWalk, LayerWeights, check_by_neuron, layer_walk
from flashclient.calibration.predictor_training import ReferenceGate
from flashclient.errors import CalibrationError, OptionError
from flashclient.model.loaded import LoadedModel
from flashclient.model.predictor_file import GateRows, arrays_of, in_bytes
from weightd_proto import weightd_pb2
from weightd_proto.encodings import has_experts

TOKENS_DEFAULT = 32768
LOSS_DEFAULT = 0.02
LOSS_AIMED = 0.9  # of the bound, in the search: on other texts the loss is a little larger or smaller
ROLES = 4  # sequences: 0 and 1 tell distributions, 2 searches, 3 tests
SPARSITY_MIN, SPARSITY_MAX = 0.02, 0.9
CANDIDATES = 6  # sparsities that one walk through the layers tries
SMALLER = 0.9  # the ratio of sparsities that are tried on the test set
BINS_PER_OCTAVE = 16
OCTAVES = 64


@dataclass(frozen=True)
class ThresholdOptions:
    """Options of `flashclient calibrate --mode threshold`. Raises OptionError for values that are not allowed.

    Attributes:
        max_loss: of perplexity, relative.
        progress: a bar on standard error.
    """

    max_loss: float = LOSS_DEFAULT
    progress: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.max_loss < 1:
            raise OptionError(f"a loss of perplexity of {self.max_loss:g} must be above 0 and below 1, such as 2%")


@dataclass(frozen=True)
class ThresholdLayer:
    """Results for one layer; arrays are by position.

    Attributes:
        threshold: of |act(gate . x)|.
        kept: share of (token, neuron) pairs that are computed.
        predicted: [neurons], by neuron; frequency: the same, for tools that expect it.
        union: see predictor_file.py.
    """

    predictor: GateRows
    threshold: float
    kept: float
    predicted: NDArray[np.float32]
    union: NDArray[np.float32]

    @property
    def frequency(self) -> NDArray[np.float32]:
        return self.predicted

    def report(self) -> dict[str, Any]:
        size_bytes = sum(array.nbytes for array in arrays_of(self.predictor).values())
        return {"kept": self.kept, "threshold": self.threshold, "bytes": size_bytes}


@dataclass
class ThresholdResult:
    """A finished calibration.

    Attributes:
        quality: of "dense", the whole model, and of "threshold", on the test set.
        sparsity: what was chosen; `skipped` is what it skips of the test set.
    """

    layers: list[ThresholdLayer]
    quality: dict[str, Quality]
    sparsity: float
    settings: dict[str, Any]
    seconds: float

    lossy_mode: ClassVar[str] = "threshold"

    @property
    def loss(self) -> float:
        """The relative loss of perplexity; negative for a gain."""
        return self.quality["threshold"].perplexity / self.quality["dense"].perplexity - 1

    @property
    def skipped(self) -> float:
        """The share of neurons that a token skips."""
        return 1 - float(np.mean([layer.kept for layer in self.layers]))

    def mode(self) -> tuple[str, str]:
        """The mode for "auto", and the reason."""
        return "exact", "mode 'threshold' loses quality, so it is never chosen by itself"

    def report(self) -> dict[str, Any]:
        """report.json."""
        mode, reason = self.mode()
        return {
            "layers": [layer.report() for layer in self.layers],
            "quality": {name: quality.as_dict() for name, quality in self.quality.items()} | {"loss": self.loss},
            "lossy_mode": self.lossy_mode,
            "skipped": self.skipped,
            "sparsity": self.sparsity,
            "mode": mode,
            "mode_reason": reason,
            **self.settings,
        }

    def table(self) -> str:
        """A row per layer, and the loss."""
        lines = [f"{'layer':>5} {'computed':>9} {'threshold':>10}"]
        lines += [f"{i:>5} {layer.kept:>9.1%} {layer.threshold:>10.3g}" for i, layer in enumerate(self.layers)]
        dense, lossy = self.quality["dense"].perplexity, self.quality["threshold"].perplexity
        return "\n".join([
            *lines,
            f"mode 'threshold' skips {self.skipped:.1%} of the neurons; perplexity {dense:.3f} -> {lossy:.3f} "
            f"({self.loss:+.2%}, at most {self.settings['max_perplexity_loss']:.2%})",
        ])  # fmt: skip


def check_no_experts(loaded: LoadedModel) -> None:
    """Raises CalibrationError for mixtures and slabs."""
    check_by_neuron(loaded.record)
    if has_experts(loaded.record):
        raise CalibrationError(
            f"model '{loaded.record.name}' cannot be calibrated: its router picks experts, and there are no thresholds "
            "within experts; run it in mode 'exact'"
        )


def calibrate_thresholds(loaded: LoadedModel, sequences: Tensor, options: ThresholdOptions) -> ThresholdResult:
    """Runs the whole calibration. Raises what calibrate() does.

    Args:
        loaded: a model in exact mode.
        sequences: [sequences, length] ids, at least 4 sequences.
    """
    check_no_experts(loaded)
    begun_s = time.monotonic()
    with torch.no_grad(), layer_walk(loaded, sequences[:1]) as walk, _bar(loaded, options.progress) as bar:
        run = _Search(walk, loaded.record, sequences, options, bar)
        sparsity, quality = run.choose()
        layers = run.layers(sparsity)
    settings = {"text_tokens": sequences.numel(), "max_perplexity_loss": options.max_loss}
    return ThresholdResult(layers, quality, sparsity, settings, time.monotonic() - begun_s)


@contextmanager
def _bar(loaded: LoadedModel, shown: bool) -> Iterator[Any]:
    layers = 5 * len(loaded.record.layers)  # distributions, two walks that search, the test, and statistics
    with tqdm(total=layers, desc="calibrating", unit="layer", disable=not shown) as bar:
        yield bar


class GateHistogram:
    """How many (token, neuron) pairs of a layer have which |act(gate . x)|."""

    def __init__(self) -> None:
        self._counts = torch.zeros(OCTAVES * BINS_PER_OCTAVE, dtype=torch.float64)

    def add(self, opened: Tensor) -> None:
        """Values of act(gate . x), fp32."""
        bins = (torch.log2(opened.abs().clamp(min=1e-30)) * BINS_PER_OCTAVE).floor() + len(self._counts) // 2
        bins = bins.clamp(0, len(self._counts) - 1).long().flatten()
        self._counts += torch.bincount(bins, minlength=len(self._counts))

    def threshold(self, sparsity: float) -> float:
        """The highest value below which at most `sparsity` of the pairs lie; 0 for a sparsity of 0."""
        below = int((self._counts.cumsum(0) <= sparsity * self._counts.sum()).sum()) if sparsity > 0 else 0
        return float(2.0 ** ((below - len(self._counts) // 2) / BINS_PER_OCTAVE)) if below else 0.0


@dataclass(frozen=True)
class _Gates:
    """The gates of one layer without thresholds, and the distribution of what they give."""

    rows: GateRows
    histogram: GateHistogram

    def with_sparsity(self, sparsity: float) -> GateRows:
        """The gates with the layer's threshold."""
        threshold = self.histogram.threshold(sparsity)
        return replace(self.rows, threshold=np.full_like(self.rows.threshold, threshold))


class _Search:
    """The layers' gates, measured once, and walks through the model with the thresholds of some sparsities."""

    def __init__(
        self, walk: LayerWalk, record: weightd_pb2.Model, sequences: Tensor, options: ThresholdOptions, bar: Any
    ) -> None:
        self._walk = walk
        self._record = record
        self._options = options
        self._bar = bar
        roles = torch.arange(len(sequences)) % ROLES
        self._measuring, self._searching, self._testing = (
            sequences[mask] for mask in (roles < ROLES - 2, roles == ROLES - 2, roles == ROLES - 1)
        )
        self._gates = self._measure()

    def _measure(self) -> list[_Gates]:
        hidden = [self._walk.embed(ids) for ids in self._measuring[:, None]]
        measured = []
        for index in range(len(self._record.layers)):
            weights, histogram = self._walk.weights(index), GateHistogram()
            rows = _gates_of(weights)
            feed_forward = _measured(weights, ReferenceGate(rows, weights.activation), histogram)
            hidden = [self._walk.step(index, one, feed_forward) for one in hidden]
            measured.append(_Gates(rows, histogram))
            self._bar.update()
        return measured

    def choose(self) -> tuple[float, dict[str, Quality]]:
        """The sparsity, and the quality on the test set."""
        best = self._search()
        tried = [best * SMALLER**i for i in range(CANDIDATES)]
        dense, *qualities = self._qualities(self._testing, [0.0, *tried])
        for sparsity, quality in zip(tried, qualities, strict=True):
            if quality.perplexity <= (1 + self._options.max_loss) * dense.perplexity:
                return sparsity, {"dense": dense, "threshold": quality}
        raise self._refusal()

    def _search(self) -> float:
        """The greatest sparsity whose loss on the searching sequences is within what is aimed at."""
        tried: list[float] = np.linspace(SPARSITY_MIN, SPARSITY_MAX, CANDIDATES).tolist()
        best = 0.0
        for _ in range(2):
            dense, *qualities = self._qualities(self._searching, [0.0, *tried])
            most = (1 + LOSS_AIMED * self._options.max_loss) * dense.perplexity
            good = next((i for i, one in enumerate(qualities) if one.perplexity > most), len(tried))
            best = tried[good - 1] if good else best
            if best == 0:
                raise self._refusal()
            if good == len(tried):
                break
            tried = np.linspace(best, tried[good], CANDIDATES + 2)[1:-1].tolist()
        return best

    def _refusal(self) -> CalibrationError:
        return CalibrationError(
            f"model '{self._record.name}' cannot skip any neurons within a loss of {self._options.max_loss:.2%} of "
            "perplexity on this text: allow more loss, or run it in mode 'exact'"
        )

    def _qualities(self, sequences: Tensor, sparsities: Sequence[float]) -> list[Quality]:
        """The quality with each of `sparsities`; the first is the reference."""
        hidden = [[self._walk.embed(ids) for ids in sequences[:, None]] for _ in sparsities]
        for index, gates in enumerate(self._gates):
            weights = self._walk.weights(index)
            for i, sparsity in enumerate(sparsities):
                feed_forward = _thresholded(weights, gates.with_sparsity(sparsity))
                hidden[i] = [self._walk.step(index, one, feed_forward) for one in hidden[i]]
            self._bar.update()
        qualities = [Quality() for _ in sparsities]
        for row, ids in enumerate(sequences):
            likeliest = None
            for quality, states in zip(qualities, hidden, strict=True):
                logits = self._walk.logits(ids[None], states[row])
                likeliest = logits.argmax(1) if likeliest is None else likeliest
                quality.add(logits, ids, likeliest)
        return qualities

    def layers(self, sparsity: float) -> list[ThresholdLayer]:
        """The results of each layer, measured on the test set."""
        hidden = [self._walk.embed(ids) for ids in self._testing[:, None]]
        layers = []
        for index, gates in enumerate(self._gates):
            weights, predictor = self._walk.weights(index), gates.with_sparsity(sparsity)
            kept = PackedBits(self._testing.numel(), len(weights.down))
            feed_forward = _thresholded(weights, predictor, kept)
            hidden = [self._walk.step(index, one, feed_forward) for one in hidden]
            predicted = kept.frequency()
            union = unions(kept, self._testing.shape[1])
            threshold = gates.histogram.threshold(sparsity)
            layers.append(ThresholdLayer(predictor, threshold, float(predicted.mean()), predicted, union))
            self._bar.update()
        return layers


def _gates_of(weights: LayerWeights) -> GateRows:
    rows, biases = weights.rows[0], weights.biases
    zeros = np.zeros(len(rows), np.float32)
    rounded, scale = in_bytes(rows.numpy())
    return GateRows(rounded, scale, zeros if biases is None else biases[0].numpy().astype(np.float32), zeros)


def _measured(weights: LayerWeights, gate: ReferenceGate, histogram: GateHistogram) -> FeedForward:
    """The dense FFN, whose gates are counted."""

    def feed_forward(x: Tensor) -> Tensor:
        histogram.add(gate.opened(x))
        return weights.sum(weights.neurons(x))

    return feed_forward


def _thresholded(weights: LayerWeights, predictor: GateRows, kept: PackedBits | None = None) -> FeedForward:
    """The FFN that skips the neurons below their thresholds; `kept` gets the others, of one call after the other."""
    gate = ReferenceGate(predictor, weights.activation)
    first = 0

    def feed_forward(x: Tensor) -> Tensor:
        nonlocal first
        wanted = gate.wanted(x)
        if kept is not None:
            kept.put(first, wanted)
            first += len(x)
        return weights.sum(weights.neurons(x) * wanted)

    return feed_forward
