"""Results of a calibration: of each layer and of the model, and the mode that they recommend."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from flashclient.calibration.evaluate import Quality
from flashclient.calibration.predictor_training import Rates, Trained
from flashclient.model.predictor_file import LowRank, Predictor, Signs, arrays_of, write_predictors, write_tensors
from weightd_proto import weightd_pb2
from weightd_proto.files import CALIBRATION_FILES, PREDICTORS_FILE, REPORT_FILE, STATISTICS_FILE

LOSS_MAX = 0.005  # of perplexity; mode "auto" does not predict with more
COMPUTED_SHARE_MAX = 0.5  # of the FFNs' bytes that a token needs, predictor included; with more, predicting is slower
# Of neurons that are new with each token. Random reads cost twice as much as sequential ones, and exact mode reads
# about half of the model.
NEW_SHARE_MAX = 0.25
WINDOW_TOKENS = 4


class PublishableLayer(Protocol):
    """What is published of a layer: its predictor, and statistics by position (predictor_file.py)."""

    @property
    def predictor(self) -> Predictor: ...
    @property
    def frequency(self) -> NDArray[np.float32]: ...
    @property
    def predicted(self) -> NDArray[np.float32]: ...
    @property
    def union(self) -> NDArray[np.float32]: ...


class Publishable(Protocol):
    """What is published of a calibration."""

    lossy_mode: ClassVar[str]

    @property
    def layers(self) -> Sequence[PublishableLayer]: ...
    @property
    def loss(self) -> float: ...
    def mode(self) -> tuple[str, str]: ...
    def report(self) -> dict[str, Any]: ...


@dataclass
class CalibratedLayer:
    """Results for one layer; arrays are by position."""

    predictor: Trained
    rates: Rates
    sign_rates: Rates
    frequency: NDArray[np.float32]
    predicted: NDArray[np.float32]
    union: NDArray[np.float32]
    ffn_bytes: int

    @property
    def predictor_bytes(self) -> int:
        return int(sum(array.nbytes for array in arrays_of(self.predictor).values()))

    @property
    def time_share(self) -> float:
        """The predictor's share of the bytes that a token's FFN reads; at decode both run at memory bandwidth."""
        return self.predictor_bytes / (self.predictor_bytes + self.rates.predicted * self.ffn_bytes)

    @property
    def computed_share(self) -> float:
        return self.predictor_bytes / self.ffn_bytes + self.rates.predicted

    @property
    def new_share(self) -> float:
        """The share of neurons that are predicted for a token and not in the window of the tokens before it."""
        return float(self.union[WINDOW_TOKENS] - self.union[WINDOW_TOKENS - 1])

    @property
    def rank(self) -> int:
        """The predictor's rank; 0 for one of sign bits."""
        return len(self.predictor.input) if isinstance(self.predictor, LowRank) else 0

    def row(self) -> str:
        """The layer's columns in the table: of its predictor and, for comparison, of one of sign bits."""
        size = f"{self.rank:>9} {self.predictor_bytes / 1024:>9.1f} {self.time_share:>9.1%}"
        others = [] if isinstance(self.predictor, Signs) else _columns(self.sign_rates)
        return " ".join([*_columns(self.rates), size, *others])

    def report(self) -> dict[str, Any]:
        row = {**asdict(self.rates), "rank": self.rank, "bytes": self.predictor_bytes, "time_share": self.time_share}
        return {**row, "union": [float(share) for share in self.union], "sign": asdict(self.sign_rates)}


def _columns(rates: Rates) -> list[str]:
    return [f"{share:>9.1%}" for share in (rates.predicted, rates.false_negatives, rates.false_positives)]


@dataclass
class CalibrationResult:
    """A finished calibration.

    Attributes:
        quality: of "dense", the whole model, and of "predict", the model masked by the predictors.
    """

    layers: list[CalibratedLayer]
    quality: dict[str, Quality]
    text_tokens: int
    settings: dict[str, Any]
    seconds: float

    lossy_mode: ClassVar[str] = "predict"

    @property
    def loss(self) -> float:
        """The relative loss of perplexity by prediction; negative for a gain."""
        return self.quality["predict"].perplexity / self.quality["dense"].perplexity - 1

    def mode(self) -> tuple[str, str]:
        """The mode for "auto", and the reason."""
        computed = float(np.mean([layer.computed_share for layer in self.layers]))
        new = float(np.mean([layer.new_share for layer in self.layers]))
        if self.loss > LOSS_MAX:
            return "exact", f"prediction costs {self.loss:.2%} of perplexity, more than {LOSS_MAX:.1%}"
        if computed > COMPUTED_SHARE_MAX:
            return "exact", f"a token needs {computed:.0%} of the FFNs, predictors included: prediction pays below 50%"
        if new > NEW_SHARE_MAX:
            return "exact", f"{new:.0%} of the neurons are new with each token: prediction pays below 25%"
        return "predict", (
            f"prediction costs {self.loss:.2%} of perplexity (at most {LOSS_MAX:.1%}); a token needs {computed:.0%} of "
            f"the FFNs (below 50%); {new:.1%} of the neurons are new with each token (below 25%)"
        )

    def report(self) -> dict[str, Any]:
        """report.json."""
        mode, reason = self.mode()
        return {
            "layers": [layer.report() for layer in self.layers],
            "quality": {name: quality.as_dict() for name, quality in self.quality.items()} | {"loss": self.loss},
            "mode": mode,
            "mode_reason": reason,
            "text_tokens": self.text_tokens,
            **self.settings,
        }

    def table(self) -> str:
        """A row per layer with the predictors side by side, and the recommended mode."""
        rates, size = ("predicted", "missed", "false"), ("rank", "KiB", "time")
        is_sign = self.settings["kind"] == "sign"
        head = f"{'':>14} {'sign bits' if is_sign else 'low rank':^59}" + ("" if is_sign else f" {'sign bits':^29}")
        names = (*rates, *size, *(() if is_sign else rates))
        lines = [head, f"{'layer':>5} {'firing':>8} " + " ".join(f"{name:>9}" for name in names)]
        for index, layer in enumerate(self.layers):
            lines.append(f"{index:>5} {layer.rates.firing:>8.1%} {layer.row()}")
        mode, reason = self.mode()
        return "\n".join([*lines, f"mode '{mode}': {reason}"])


def write_files(result: Publishable, model: weightd_pb2.Model, folder: Path) -> tuple[str, ...]:
    """Writes the three files of the format (flashclient.model.predictor_file); returns their names."""
    write_predictors(folder / PREDICTORS_FILE, [layer.predictor for layer in result.layers], model)
    statistics = {
        f"layers.{index}.{name}": getattr(layer, name)
        for index, layer in enumerate(result.layers)
        for name in ("frequency", "predicted", "union")
    }
    write_tensors(folder / STATISTICS_FILE, statistics, model, {})
    (folder / REPORT_FILE).write_text(json.dumps(result.report(), indent=1))
    return CALIBRATION_FILES
