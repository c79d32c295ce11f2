"""Calibrates mode "threshold" to a bound on the loss of perplexity: `flashclient calibrate --mode threshold`.

For models whose neurons are never exactly zero. A neuron adds act(gate . x) * (up . x) * down to its layer's output. It
is skipped where |act(gate . x)| * weight is below the threshold of the layer. This is CATS (arXiv 2404.08763) with a
weight: the length of what the neuron adds, over |act(gate . x)| (root mean squares). So neurons that add little are
skipped first. The gate rows are kept in memory, rounded to int8: they tell what to skip before a bundle is read.

The thresholds of all layers follow from one number, the share of a layer's energy (the squared lengths of what neurons
add) that may be skipped. The greatest share is searched whose loss of perplexity is within the bound. Of every four
sequences, two tell the energies, one searches, and one is the test set: the loss that is published is measured on it
alone. If it is above the bound there, smaller shares are taken.
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
from flashclient.calibration.firing import BLOCK_TOKENS, PackedBits, unions
from flashclient.calibration.layer_walk import FeedForward, LayerWalk, LayerWeights, layer_walk
from flashclient.calibration.predictor_training import ReferenceGate
from flashclient.errors import CalibrationError, OptionError
from flashclient.kernels.dtypes import DTYPES
from flashclient.model.loaded import LoadedModel
from flashclient.model.predictor_file import GateRows, arrays_of, in_bytes
from weightd_proto import weightd_pb2
from weightd_proto.encodings import has_experts

TOKENS_DEFAULT = 32768
LOSS_DEFAULT = 0.02
LOSS_AIMED = 0.9  # of the bound, in the search: on other texts the loss is a little larger or smaller
ROLES = 4  # sequences: 0 and 1 tell energies, 2 searches, 3 tests
SHARE_MIN, SHARE_MAX = 1e-5, 0.3  # of the energy
CANDIDATES = 6  # shares that one walk through the layers tries
SMALLER = 1.5  # the factor between shares that are tried on the test set
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
        threshold: of |act(gate . x)| * weight.
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
        energy_share: what may be skipped of each layer's.
    """

    layers: list[ThresholdLayer]
    quality: dict[str, Quality]
    energy_share: float
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
            "energy_share": self.energy_share,
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
    """Raises CalibrationError for mixtures."""
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
        run = _Run(walk, loaded.record, sequences, options, bar)
        share, quality = run.choose()
        layers = run.layers(share)
    settings = {"text_tokens": sequences.numel(), "max_perplexity_loss": options.max_loss}
    return ThresholdResult(layers, quality, share, settings, time.monotonic() - begun_s)


@contextmanager
def _bar(loaded: LoadedModel, shown: bool) -> Iterator[Any]:
    layers = 5 * len(loaded.record.layers)  # energies, two walks that search, the test, and statistics
    with tqdm(total=layers, desc="calibrating", unit="layer", disable=not shown) as bar:
        yield bar


class ScoreHistogram:
    """Energies of the (token, neuron) pairs of a layer, by |act(gate . x)| * weight."""

    def __init__(self) -> None:
        self._energies = torch.zeros(OCTAVES * BINS_PER_OCTAVE, dtype=torch.float64)

    def add(self, scores: Tensor, energies: Tensor) -> None:
        """Both of one shape, fp32."""
        bins = (torch.log2(scores.clamp(min=1e-30)) * BINS_PER_OCTAVE).floor() + len(self._energies) // 2
        bins = bins.clamp(0, len(self._energies) - 1).long().flatten()
        self._energies += torch.bincount(bins, energies.double().flatten(), minlength=len(self._energies))

    def threshold(self, share: float) -> float:
        """The highest score below which at most `share` of the energy lies; 0 for a share of 0."""
        below = int((self._energies.cumsum(0) <= share * self._energies.sum()).sum()) if share > 0 else 0
        return float(2.0 ** ((below - len(self._energies) // 2) / BINS_PER_OCTAVE)) if below else 0.0


@dataclass(frozen=True)
class _Scored:
    """The gates of one layer without thresholds, the weight of each neuron, and the energies by score."""

    gates: GateRows
    weight: NDArray[np.float32]
    histogram: ScoreHistogram

    def with_share(self, share: float) -> GateRows:
        """The gates with the thresholds at which `share` of the energy is skipped."""
        threshold = self.histogram.threshold(share)
        if threshold == 0:
            return self.gates
        by_neuron = np.float32(threshold) / np.maximum(self.weight, np.finfo(np.float32).tiny)
        return replace(self.gates, threshold=by_neuron.astype(np.float32))


class _Run:
    """The layers' scores, measured once, and walks through the model with the thresholds of some shares."""

    def __init__(
        self, walk: LayerWalk, record: weightd_pb2.Model, sequences: Tensor, options: ThresholdOptions, bar: Any
    ) -> None:
        self._walk = walk
        self._record = record
        self._options = options
        self._bar = bar
        roles = torch.arange(len(sequences)) % ROLES
        self._scoring, self._searching, self._testing = (
            sequences[mask] for mask in (roles < ROLES - 2, roles == ROLES - 2, roles == ROLES - 1)
        )
        self._scored = self._score()

    def _score(self) -> list[_Scored]:
        hidden = [self._walk.embed(ids) for ids in self._scoring[:, None]]
        scored = []
        for index in range(len(self._record.layers)):
            weights = self._walk.weights(index)
            inputs: list[Tensor] = []

            def feed_forward(x: Tensor, weights: LayerWeights = weights, inputs: list[Tensor] = inputs) -> Tensor:
                inputs.append(x.to(DTYPES[self._record.compute_dtype]))
                return weights.sum(weights.neurons(x))

            hidden = [self._walk.step(index, one, feed_forward) for one in hidden]
            scored.append(_score_layer(weights, torch.cat(inputs)))
            self._bar.update()
        return scored

    def choose(self) -> tuple[float, dict[str, Quality]]:
        """The share of energy, and the quality on the test set."""
        share = self._search()
        tried = [share / SMALLER**i for i in range(CANDIDATES)]
        dense, *qualities = self._qualities(self._testing, [0.0, *tried])
        for share, quality in zip(tried, qualities, strict=True):
            if quality.perplexity <= (1 + self._options.max_loss) * dense.perplexity:
                return share, {"dense": dense, "threshold": quality}
        raise self._refusal()

    def _search(self) -> float:
        """The greatest share whose loss on the searching sequences is within what is aimed at."""
        shares: list[float] = np.geomspace(SHARE_MIN, SHARE_MAX, CANDIDATES).tolist()
        best = 0.0
        for _ in range(2):
            dense, *qualities = self._qualities(self._searching, [0.0, *shares])
            most = (1 + LOSS_AIMED * self._options.max_loss) * dense.perplexity
            good = next((i for i, one in enumerate(qualities) if one.perplexity > most), len(shares))
            best = shares[good - 1] if good else best
            if best == 0:
                raise self._refusal()
            if good == len(shares):
                break
            shares = np.geomspace(best, shares[good], CANDIDATES + 2)[1:-1].tolist()
        return best

    def _refusal(self) -> CalibrationError:
        return CalibrationError(
            f"model '{self._record.name}' cannot skip any neurons within a loss of {self._options.max_loss:.2%} of "
            "perplexity on this text: allow more loss, or run it in mode 'exact'"
        )

    def _qualities(self, sequences: Tensor, shares: Sequence[float]) -> list[Quality]:
        """The quality with each of `shares`; the first is the reference."""
        hidden = [[self._walk.embed(ids) for ids in sequences[:, None]] for _ in shares]
        for index, scored in enumerate(self._scored):
            weights = self._walk.weights(index)
            for i, share in enumerate(shares):
                feed_forward = _thresholded(weights, scored.with_share(share))
                hidden[i] = [self._walk.step(index, one, feed_forward) for one in hidden[i]]
            self._bar.update()
        qualities = [Quality() for _ in shares]
        for row, ids in enumerate(sequences):
            likeliest = None
            for quality, states in zip(qualities, hidden, strict=True):
                logits = self._walk.logits(ids[None], states[row])
                likeliest = logits.argmax(1) if likeliest is None else likeliest
                quality.add(logits, ids, likeliest)
        return qualities

    def layers(self, share: float) -> list[ThresholdLayer]:
        """The results of each layer, measured on the test set."""
        hidden = [self._walk.embed(ids) for ids in self._testing[:, None]]
        layers = []
        for index, scored in enumerate(self._scored):
            weights, predictor = self._walk.weights(index), scored.with_share(share)
            kept = PackedBits(self._testing.numel(), len(weights.down))
            feed_forward = _thresholded(weights, predictor, kept)
            hidden = [self._walk.step(index, one, feed_forward) for one in hidden]
            predicted = kept.frequency()
            union = unions(kept, self._testing.shape[1])
            threshold = scored.histogram.threshold(share)
            layers.append(ThresholdLayer(predictor, threshold, float(predicted.mean()), predicted, union))
            self._bar.update()
        return layers


def _score_layer(weights: LayerWeights, inputs: Tensor) -> _Scored:
    """
    Args:
        inputs: [tokens, hidden_size].
    """
    rows = weights.rows[0]
    biases = weights.biases
    bias = np.zeros(len(rows), np.float32) if biases is None else biases[0].numpy().astype(np.float32)
    rounded, scale = in_bytes(rows.numpy())
    gates = GateRows(rounded, scale, bias, np.zeros(len(rows), np.float32))
    gate, lengths = ReferenceGate(gates, weights.activation), weights.down.norm(dim=1)
    opened, added = torch.zeros(2, len(rows), dtype=torch.float64)  # sums of squares
    blocks = torch.split(inputs, BLOCK_TOKENS)
    for x in blocks:
        opened += gate.opened(x.float()).square().sum(0)
        added += (weights.neurons(x.float()) * lengths).square().sum(0)
    weight = (added / opened.clamp(min=1e-30)).sqrt().float()
    histogram = ScoreHistogram()
    for x in blocks:
        energies = (weights.neurons(x.float()) * lengths).square()
        histogram.add(gate.opened(x.float()).abs() * weight, energies)
    return _Scored(gates, weight.numpy(), histogram)


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
