"""Measures a model's sparsity on a text, trains its predictors and publishes both: `flashclient calibrate`.

The model runs one decoder layer at a time over all sequences, so each layer is read from flash once. In memory are: the
hidden states and one layer's FFN inputs (each tokens x hidden_size in the model's dtype), its firing bits (tokens x
neurons / 8 bytes), its weights in fp32 (neurons x hidden_size x 12 bytes with a gate), and the finished predictors.
For 65536 tokens of OPT-6.7B that is 0.5 + 0.5 + 0.1 + 0.5 + 0.2 GB. The inputs of all layers would take 17 GB.

Of every eight sequences, six train the predictors, one chooses thresholds and ranks, and one is the test set: rates,
unions and the loss of quality are measured on it alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from tqdm import tqdm

from flashclient.calibration.evaluate import Quality
from flashclient.calibration.firing import PackedBits, unions
from flashclient.calibration.layer_walk import LayerWalk, LayerWeights, check_by_neuron, layer_walk
from flashclient.calibration.predictor_training import (
    Examples,
    ReferencePredictor,
    Trained,
    constant_predictor,
    measure,
    sign_predictor,
    train_low_rank,
)
from flashclient.calibration.publishing import publish
from flashclient.calibration.result import CalibratedLayer, CalibrationResult, Publishable, write_files
from flashclient.errors import CalibrationError, OptionError
from flashclient.kernels.dtypes import DTYPES
from flashclient.model.activations import activation_of, has_exact_zeros
from flashclient.model.loaded import LoadedModel
from weightd_proto import weightd_pb2
from weightd_proto.encodings import has_experts

TOKENS_DEFAULT = 65536
RANKS_DEFAULT = (16, 32, 64, 128)
RECALL_DEFAULT = 0.95
KINDS = ("low_rank", "sign")
FIRING_DENSE = 0.95  # where more neurons fire there is nothing to predict; a model of such layers is refused
MISSES_AIMED = 0.9  # of the misses that the target recall allows: on other texts predictors miss a little more
ROLES = 8  # sequences: 0 to 5 train, 6 chooses, 7 tests


def check_sparse(loaded: LoadedModel) -> None:
    """Raises CalibrationError for mixtures, for slabs, and where no neuron of the activation is ever exactly zero."""
    if has_experts(loaded.record):
        raise CalibrationError(
            f"model '{loaded.record.name}' cannot be calibrated: its router picks experts, so nothing is predicted"
        )
    check_by_neuron(loaded.record)
    activation = activation_of(loaded.record, loaded.record.layers[0])
    if not has_exact_zeros(activation):
        raise CalibrationError(
            f"model '{loaded.record.name}' cannot be calibrated for mode 'predict': its activation, "
            f"{activation.function}, is never exactly zero, so predict mode would lose quality or read everything; run "
            "it in mode 'exact', or calibrate with --mode threshold"
        )


@dataclass(frozen=True)
class CalibrationOptions:
    """Options of `flashclient calibrate`. Raises OptionError for values that are not allowed."""

    target_recall: float = RECALL_DEFAULT
    ranks: tuple[int, ...] = RANKS_DEFAULT
    kind: str = "low_rank"
    seed: int = 0
    progress: bool = False  # a bar on standard error

    def __post_init__(self) -> None:
        if not 0 < self.target_recall < 1:
            raise OptionError(f"target recall {self.target_recall:g} must be between 0 and 1, such as 0.95")
        if not self.ranks or min(self.ranks) < 1:
            raise OptionError(f"ranks {', '.join(map(str, self.ranks)) or '()'} must be whole numbers of at least 1")
        if self.kind not in KINDS:
            raise OptionError(f"kind '{self.kind}' is not known: use {' or '.join(KINDS)}")


def calibrate(loaded: LoadedModel, sequences: Tensor, options: CalibrationOptions) -> CalibrationResult:
    """Runs the whole calibration.

    Args:
        loaded: a model in exact mode.
        sequences: [sequences, length] ids, at least 8 sequences.

    Raises:
        CalibrationError: the model has no exact zeros to predict.
        DaemonLostError, CorruptionError: while its weights were read.
    """
    check_sparse(loaded)
    begun_s = time.monotonic()
    with torch.no_grad(), layer_walk(loaded, sequences[:1]) as walk:
        run = _Run(walk, loaded.record, sequences, options)
        layers = [run.layer(index) for index in _progress(len(loaded.record.layers), options.progress)]
        quality = run.quality()
    settings = {"kind": options.kind, "target_recall": options.target_recall, "seed": options.seed}
    return CalibrationResult(layers, quality, sequences.numel(), settings, time.monotonic() - begun_s)


def _progress(layers: int, shown: bool) -> Iterator[int]:
    yield from tqdm(range(layers), desc="calibrating", unit="layer", disable=not shown)


class _Run:
    """The hidden states of all sequences, layer by layer; those of the test set also with predicted FFNs."""

    def __init__(
        self, walk: LayerWalk, record: weightd_pb2.Model, sequences: Tensor, options: CalibrationOptions
    ) -> None:
        self._walk = walk
        self._record = record
        self._options = options
        self._sequences = sequences
        self._recall = 1 - MISSES_AIMED * (1 - options.target_recall)
        self._dtype = DTYPES[record.compute_dtype]
        self._hidden = [self._walk.embed(ids) for ids in sequences[:, None]]
        roles = torch.arange(len(sequences)) % ROLES
        self._tested = (roles == ROLES - 1).nonzero()[:, 0].tolist()
        self._predicted = [self._hidden[index] for index in self._tested]
        token_roles = roles.repeat_interleave(sequences.shape[1])
        self._training = (token_roles < ROLES - 2).nonzero()[:, 0]
        self._choosing = (token_roles == ROLES - 2).nonzero()[:, 0]
        self._testing = (token_roles == ROLES - 1).nonzero()[:, 0]
        self._firing: list[float] = []

    def layer(self, index: int) -> CalibratedLayer:
        weights = self._walk.weights(index)
        examples = self._advance(index, weights)
        frequency = examples.fired.frequency()
        self._refuse_dense(float(frequency.mean()))
        choosing, testing = examples.select(self._choosing), examples.select(self._testing)
        signs = sign_predictor(weights.rows[0], choosing, self._recall)
        predictor = signs if self._options.kind == "sign" else self._train(weights, examples, choosing)
        prediction = ReferencePredictor(predictor, self._dtype)
        self._advance_predicted(index, weights, prediction)
        wanted = _wanted(prediction, examples)
        return CalibratedLayer(
            predictor,
            measure(predictor, self._dtype, testing),
            measure(signs, self._dtype, testing),
            frequency,
            wanted.frequency(),
            unions(wanted.select(self._testing), self._sequences.shape[1]),
            self._record.layers[index].neurons * self._record.bundle.bundle_bytes,
        )

    def _advance(self, index: int, weights: LayerWeights) -> Examples:
        """Takes all hidden states through the layer; returns its FFN's inputs and the neurons that fired."""
        length = self._sequences.shape[1]
        hidden_size, neurons = self._record.bundle.hidden_size, len(weights.down)
        x = torch.empty(self._sequences.numel(), hidden_size, dtype=self._dtype)
        bits = PackedBits(len(x), neurons)
        for row, hidden in enumerate(self._hidden):
            self._hidden[row] = self._walk.step(index, hidden, _Recorded(weights, x, bits, row * length))
        return Examples(x, bits)

    def _advance_predicted(self, index: int, weights: LayerWeights, prediction: ReferencePredictor) -> None:
        def feed_forward(rows: Tensor) -> Tensor:
            return weights.sum(weights.neurons(rows) * prediction.wanted(rows))

        self._predicted = [self._walk.step(index, hidden, feed_forward) for hidden in self._predicted]

    def _train(self, weights: LayerWeights, examples: Examples, choosing: Examples) -> Trained:
        training = examples.select(self._training)
        share = float(training.fired.frequency().mean())
        if share > FIRING_DENSE or not share or not choosing.fired.frequency().any():
            neurons, hidden_size = weights.rows[0].shape
            return constant_predictor(neurons, hidden_size, share > FIRING_DENSE, self._dtype)
        return train_low_rank(
            weights.rows[0],
            None if weights.biases is None else weights.biases[0],
            training,
            choosing,
            ranks=self._options.ranks,
            recall=self._recall,
            dtype=self._dtype,
            seed=self._options.seed,
        )

    def _refuse_dense(self, firing: float) -> None:
        """Refuses a model whose first two layers are dense; the first layer of a sparse model may be."""
        self._firing.append(firing)
        if len(self._firing) == min(2, len(self._record.layers)) and min(self._firing) > FIRING_DENSE:
            raise CalibrationError(
                f"{min(self._firing):.1%} of the neurons of model '{self._record.name}' are not zero for an"
                " average token: predict mode would lose quality or read everything; run it in mode 'exact'"
            )

    def quality(self) -> dict[str, Quality]:
        """Quality of the dense and of the predicted model on the test set."""
        dense, predict = Quality(), Quality()
        for row, predicted in zip(self._tested, self._predicted, strict=True):
            ids = self._sequences[row : row + 1]
            logits = self._walk.logits(ids, self._hidden[row])
            likeliest = logits.argmax(1)
            dense.add(logits, ids[0], likeliest)
            predict.add(self._walk.logits(ids, predicted), ids[0], likeliest)
        return {"dense": dense, "predict": predict}


@dataclass(frozen=True)
class _Recorded:
    """An FFN that records its inputs and the neurons that fired, from token `first` on."""

    weights: LayerWeights
    x: Tensor
    bits: PackedBits
    first: int

    def __call__(self, rows: Tensor) -> Tensor:
        fired = self.weights.neurons(rows)
        self.x[self.first : self.first + len(rows)] = rows.to(self.x.dtype)
        self.bits.put(self.first, fired != 0)
        return self.weights.sum(fired)


def _wanted(prediction: ReferencePredictor, examples: Examples) -> PackedBits:
    bits = PackedBits(len(examples.x), examples.fired.neurons)
    first = 0
    for x, _ in examples.blocks():
        bits.put(first, prediction.wanted(x))
        first += len(x)
    return bits


def publish_result(result: Publishable, loaded: LoadedModel) -> weightd_pb2.Calibration:
    """Publishes `result` as the model's newest calibration. Raises what publish() does."""
    with TemporaryDirectory(prefix="flashclient-") as name:
        names = write_files(result, loaded.record, Path(name))
        return publish(
            loaded.connection,
            loaded.record,
            result.mode()[0],
            Path(name),
            names,
            lossy_mode=result.lossy_mode,
            perplexity_loss=result.loss,
        )
