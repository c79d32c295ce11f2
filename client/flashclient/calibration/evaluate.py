"""Perplexity and agreement of a model's modes on a text: `flashclient eval`.

The same sequences run in three ways: through transformers' dense model, rebuilt in memory from the bundles if it fits;
through the client in mode "exact"; and in mode "predict" if the model was calibrated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from flashclient.calibration.layer_walk import LayerWeights, layer_walk, read_parts
from flashclient.calibration.predictor_training import PairCounts, Rates, Reference, reference_of
from flashclient.kernels.dtypes import DTYPES
from flashclient.memory_limits import free_bytes, memory_limits
from flashclient.model.build import resident_tensors
from flashclient.model.loaded import LoadedModel
from flashclient.model.predictor_file import Predictor, read_predictors
from weightd_proto import weightd_pb2
from weightd_proto.files import PREDICTORS_FILE
from weightd_proto.modes import lossy_mode
from weightd_proto.tables import WEIGHT, with_tables

TOKENS_DEFAULT = 16384
DENSE_HEADROOM = 1.2  # memory of a dense model and its forward pass, as a multiple of the size of its weights


@dataclass
class Quality:
    """How well logits predict a text. Sums over all tokens but the first of each sequence, which nothing predicts."""

    tokens: int = 0
    agreed: int = 0
    nats: float = 0.0

    def add(self, logits: Tensor, ids: Tensor, reference: Tensor) -> None:
        """Adds one sequence.

        Args:
            logits: [length, vocabulary] fp32.
            ids: [length].
            reference: [length], the most likely next tokens according to the reference model.
        """
        self.nats += functional.cross_entropy(logits[:-1], ids[1:], reduction="sum").item()
        self.agreed += int((logits.argmax(1) == reference)[:-1].sum())
        self.tokens += len(ids) - 1

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nats / max(1, self.tokens), 700.0))

    @property
    def top1_agreement(self) -> float:
        return self.agreed / max(1, self.tokens)

    def as_dict(self) -> dict[str, float]:
        return {"perplexity": self.perplexity, "top1_agreement": self.top1_agreement}


@dataclass
class Evaluation:
    """What was measured. A part that could not be is None or empty, and `notes` says why.

    Attributes:
        sequences: [sequences, length] ids.
        likeliest: of the same shape, the most likely next tokens according to the reference model: the dense one, or
            exact mode where that does not fit.
    """

    sequences: Tensor
    likeliest: Tensor | None = None
    dense: Quality | None = None
    exact: Quality = field(default_factory=Quality)
    predict: Quality | None = None
    threshold: Quality | None = None
    calibrated_loss: float | None = None
    layers: list[Rates] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """What --json prints. `top1_agreement` is with the reference model."""
        dense = None if self.dense is None else {"perplexity": self.dense.perplexity}
        return {
            "dense": dense,
            "exact": self.exact.as_dict(),
            "predict": None if self.predict is None else self.predict.as_dict(),
            "threshold": None if self.threshold is None else self.threshold.as_dict(),
            "calibrated_loss": self.calibrated_loss,
            "layers": [asdict(rates) for rates in self.layers],
            "text_tokens": self.sequences.numel(),
            "agreement_with": "exact" if self.dense is None else "dense",
            "notes": self.notes,
        }

    def table(self) -> str:
        """A row per mode, a row per layer, and the notes."""
        lines = [f"{'':<8}{'perplexity':>12} {'same first token':>18}"]
        for name in ("dense", "exact", "predict", "threshold"):
            quality: Quality | None = getattr(self, name)
            if quality is not None:
                lines.append(f"{name:<10}{quality.perplexity:>10.3f} {quality.top1_agreement:>18.2%}")
        if self.calibrated_loss is not None:
            lines.append(f"calibration measured a loss of perplexity of {self.calibrated_loss:+.2%}")
        if self.layers:
            lines.append(f"{'layer':<8}{'firing':>12} {'predicted':>12} {'missed':>12} {'false':>12}")
        for index, rates in enumerate(self.layers):
            lines.append(f"{index:<8}" + " ".join(f"{share:>12.2%}" for share in astuple(rates)))
        return "\n".join([*lines, *self.notes])


def evaluate_exact(loaded: LoadedModel, sequences: Tensor, progress: bool = False) -> Evaluation:
    """Evaluates the dense model, exact mode and, if the model was calibrated, the predictors of each layer.

    Args:
        loaded: a model in exact mode.
        sequences: [sequences, length] ids.

    Raises:
        DaemonLostError, CorruptionError: while the weights were read.
        CalibrationError: the calibration does not fit the model.
    """
    result = Evaluation(sequences)
    with torch.no_grad(), loaded.taken():
        result.likeliest = _evaluate_dense(loaded, result, progress)
        result.likeliest = _run(loaded.model, result, result.exact, _bar("exact", sequences, progress))
        if calibrated_mode(loaded) is not None:
            result.layers = layer_rates(loaded, fetch_predictors(loaded), sequences)
        else:
            result.notes.append(
                f"predict: not run, as '{loaded.record.name}' was never calibrated: run `flashclient calibrate`"
            )
    return result


def calibrated_mode(loaded: LoadedModel) -> str | None:
    """The mode that the model was calibrated for; None if it never was."""
    calibration = loaded.record.calibration
    return lossy_mode(calibration) if calibration.version > 0 else None


def evaluate_lossy(loaded: LoadedModel, result: Evaluation, progress: bool = False) -> None:
    """Adds the mode that the model was calibrated for to `result`.

    Args:
        loaded: the same model in that mode. It is loaded after the one in exact mode, so that one session is enough.
    """
    quality = Quality()
    with torch.no_grad(), loaded.taken():
        _run(loaded.model, result, quality, _bar(loaded.mode, result.sequences, progress))
    if loaded.mode == "threshold":
        result.threshold = quality
    else:
        result.predict = quality
    result.calibrated_loss = loaded.perplexity_loss or None


def _bar(mode: str, sequences: Tensor, shown: bool) -> Iterator[Tensor]:
    yield from tqdm(sequences, desc=mode, unit="sequence", disable=not shown)


def _evaluate_dense(loaded: LoadedModel, result: Evaluation, progress: bool) -> Tensor | None:
    """Returns the most likely next tokens, as _run() does; None if the model does not fit into memory."""
    record = loaded.record
    weights_bytes = sum(one.bundles_file_bytes + one.resident_file_bytes for one in with_tables(record))
    needed_bytes = int(weights_bytes * DENSE_HEADROOM)
    free = free_bytes(memory_limits())
    if needed_bytes > free:
        result.notes.append(
            f"dense: not run, as it needs {needed_bytes / 1e9:.1f} GB of memory and {free / 1e9:.1f} are free"
        )
        return None
    if not _is_in_matrices(record):
        result.notes.append("dense: not run, as its FFNs are mixtures or have fused matrices")
        return None
    result.dense = Quality()
    return _run(dense_model(loaded), result, result.dense, _bar("dense", result.sequences, progress))


def _run(model: Any, result: Evaluation, quality: Quality, rows: Iterator[Tensor]) -> Tensor:
    """Adds to `quality` how well `model` predicts.

    Returns the most likely next tokens [sequences, length] of the reference model, which is this one if there is none.
    """
    likeliest = torch.empty_like(result.sequences) if result.likeliest is None else result.likeliest
    for row, ids in enumerate(rows):
        logits = model(input_ids=ids[None], use_cache=False).logits[0].float()
        if result.likeliest is None:
            likeliest[row] = logits.argmax(1)
        quality.add(logits, ids, likeliest[row])
    return likeliest


def _is_in_matrices(record: weightd_pb2.Model) -> bool:
    """Whether each part of the bundles is a matrix of the model."""
    return all(layer.experts == 0 and len(set(layer.weights)) == len(layer.weights) for layer in record.layers)


def dense_model(loaded: LoadedModel) -> Any:
    """transformers' own model with all its weights in memory, from the resident tensors, tables and bundles.

    Args:
        loaded: a model whose FFNs are no mixtures and have no fused matrices.
    """
    record, config = loaded.record, loaded.model.config
    dtype = DTYPES[record.compute_dtype]
    state = resident_tensors(record, loaded.source.resident, dtype)
    for (layer,) in (table.layers for table in record.tables):
        path = f"{layer.module}.{WEIGHT}"
        state[path] = functional.embedding(torch.arange(layer.neurons), loaded.model.get_parameter(path))
    for index, layer in enumerate(record.layers):
        order = torch.from_numpy(np.argsort(loaded.placement(index)))
        *rows, down = (part[order] for part in read_parts(loaded, index))
        for name, part in zip(layer.weights, [*rows, down.T], strict=True):
            path = f"{layer.module}.{name}"
            transposed = isinstance(loaded.model.get_submodule(path.rpartition(".")[0]), Conv1D)
            state[path] = (part.T if transposed else part).contiguous()
    model = type(loaded.model).from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    model.train(False)
    return model


def fetch_predictors(loaded: LoadedModel) -> list[Predictor]:
    """The predictors of the model's newest calibration, fetched over gRPC. Raises CalibrationError, RefusedError."""
    what = weightd_pb2.CalibrationFile(version=loaded.record.calibration.version, name=PREDICTORS_FILE)
    request = weightd_pb2.FetchRequest(model=loaded.record.name, calibration=what)
    data: NDArray[np.uint8] = np.frombuffer(b"".join(loaded.connection.fetch(request)), np.uint8)
    return read_predictors(data, loaded.record)


def layer_rates(loaded: LoadedModel, predictors: list[Predictor], sequences: Tensor) -> list[Rates]:
    """How well `predictors` do, layer by layer, on the inputs that the dense model's FFNs get."""
    dtype, rates = DTYPES[loaded.record.compute_dtype], []
    with layer_walk(loaded, sequences[:1]) as walk:
        hidden = [walk.embed(ids) for ids in sequences[:, None]]
        for index, predictor in enumerate(predictors):
            weights = walk.weights(index)
            counted = _Counted(weights, reference_of(predictor, weights.activation, dtype), PairCounts())
            hidden = [walk.step(index, one, counted) for one in hidden]
            rates.append(counted.counts.rates())
    return rates


@dataclass(frozen=True)
class _Counted:
    """A dense FFN that compares the neurons that fire with those predicted."""

    weights: LayerWeights
    prediction: Reference
    counts: PairCounts

    def __call__(self, rows: Tensor) -> Tensor:
        fired = self.weights.neurons(rows)
        self.counts.add(fired != 0, self.prediction.wanted(rows))
        return self.weights.sum(fired)
