"""Publishes the calibration of a planted model. It is known by construction, so nothing is trained.

Training predictors for a model of 6.7 billion parameters takes hours on two cores. A planted model's predictors are the
planted factors, with the thresholds that were set when the model was made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from make_planted_model import PLAN_FILE, PLANTED_FOLDER
from numpy.typing import NDArray
from safetensors.torch import load_file

from flashclient.calibration.publishing import publish
from flashclient.daemon.channel import Connection
from flashclient.model.predictor_file import LowRank, arrays_of, quantized, write_predictors, write_tensors
from weightd_proto import weightd_pb2
from weightd_proto.files import PREDICTORS_FILE, REPORT_FILE, STATISTICS_FILE

FILES = (PREDICTORS_FILE, STATISTICS_FILE, REPORT_FILE)
TIMEOUT_S = 60.0


def read_plan(checkpoint: Path) -> dict[str, Any]:
    """The plan that make_planted_model wrote. Raises OSError if the checkpoint is not a planted model."""
    plan: dict[str, Any] = json.loads((checkpoint / PLANTED_FOLDER / PLAN_FILE).read_text())
    return plan


def publish_planted(checkpoint: Path, name: str, address: str) -> weightd_pb2.Calibration:
    """Publishes the calibration of model `name`, which was imported from `checkpoint`, to the weightd at `address`."""
    connection = Connection(address, TIMEOUT_S)
    try:
        model = connection.describe(name)
        placements = [connection.placement(model, layer) for layer in range(len(model.layers))]
        with TemporaryDirectory(prefix="planted-") as folder:
            write_calibration(checkpoint, model, placements, Path(folder))
            return publish(connection, model, "predict", Path(folder), FILES)
    finally:
        connection.close()


def write_calibration(
    checkpoint: Path, model: weightd_pb2.Model, placements: Sequence[NDArray[np.uint32]], folder: Path
) -> None:
    """Writes the three files of a calibration (flashclient.model.predictor_file) into `folder`.

    Args:
        placements: for each layer its neurons, by position.
    """
    plan = read_plan(checkpoint)
    predictors: list[LowRank] = []
    statistics: dict[str, NDArray[Any]] = {}
    for index, (placement, told) in enumerate(zip(placements, plan["layers"], strict=True)):
        tensors = load_file(checkpoint / PLANTED_FOLDER / f"layer-{index:03}.safetensors")
        by_position = torch.from_numpy(placement.astype(np.int64))
        predictors.append(
            planted_predictor(tensors | {name: tensors[name][by_position] for name in ("output", "bias")})
        )
        statistics[f"layers.{index}.frequency"] = tensors["frequency"][by_position].numpy()
        statistics[f"layers.{index}.predicted"] = tensors["predicted"][by_position].numpy()
        statistics[f"layers.{index}.union"] = np.array(told["union"], np.float32)
    write_predictors(folder / PREDICTORS_FILE, predictors, model)
    write_tensors(folder / STATISTICS_FILE, statistics, model, {})
    (folder / REPORT_FILE).write_text(json.dumps(_report(plan, predictors)))


def planted_predictor(tensors: Mapping[str, torch.Tensor]) -> LowRank:
    """The predictor of one layer from its tensors `input`, `output` and `bias`; the order of their rows is kept."""
    return quantized(_bits(tensors["input"]), tensors["output"].float().numpy(), tensors["bias"].numpy())


def _bits(matrix: torch.Tensor) -> NDArray[np.uint16]:
    """The bits of a matrix of 16-bit floats."""
    bits: NDArray[np.uint16] = matrix.contiguous().view(torch.uint16).numpy()
    return bits


def _report(plan: Mapping[str, Any], predictors: Sequence[LowRank]) -> dict[str, Any]:
    layers = []
    for told, predictor in zip(plan["layers"], predictors, strict=True):
        shares = {name: told[name] for name in ("firing", "predicted", "false_negatives", "false_positives")}
        size_bytes = sum(array.nbytes for array in arrays_of(predictor).values())
        layers.append(shares | {"rank": len(predictor.input), "bytes": size_bytes, "time_share": None})
    return {"layers": layers, "quality": {}, "text_tokens": 0, "planted": True}
