#!/usr/bin/env -S bash -c 'PATH="$(realpath "${0%/*}/..")/.venv/bin:$PATH" exec python3 "$0" "$@"'
"""Writes a model of a published shape, with random weights, whose neurons fire as published.

The model is for measuring speed, not quality: its text is noise. But in each layer as many neurons fire, are predicted
and are new per token as in the models of "LLM in a flash" (arXiv 2312.11514). So a system reads and computes as much
for this model as for those. transformers and `weightd import` can read the checkpoint. Its folder planted/ holds the
predictors, which are known by construction, and the plan. Layers are made, tested and written one by one, so the memory
needed is that of a few layers (OPT-6.7B: 1.6 GB).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from flags import FlagParser
from planted.layers import Measured, PlantedLayer, PlantedModel
from planted.plan import PUBLISHED, SHAPES, Shape, new_share, skew_share, union_share
from planted.shapes import checkpoint_shapes
from planted.shards import Shards, new_folder, write_json
from planted.shares import WINDOW
from safetensors.torch import save_file
from tqdm import tqdm

PLANTED_FOLDER = "planted"
PLAN_FILE = "plan.json"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
LAYER_NAME = {"opt": "model.decoder.layers", "llama": "model.layers"}


def main() -> int:
    options = _options()
    shape = SHAPES[options.shape]
    try:
        plan = make_planted_model(shape, options.out, options.dtype, options.seed)
    except OSError as error:
        print(f"make_planted_model: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(plan))
    else:
        print_table(plan)
    return 0


def make_planted_model(shape: Shape, target: Path, dtype: str = "bf16", seed: int = 0) -> dict[str, Any]:
    """Writes the checkpoint to `target`, which appears when it is complete. Returns the contents of plan.json.

    Raises:
        OSError: `target` exists, or the disk is too small.
    """
    tensors = checkpoint_shapes(shape.config("bfloat16")).values()
    with new_folder(target, 2 * sum(torch.Size(one).numel() for one in tensors)) as folder:
        (folder / PLANTED_FOLDER).mkdir()
        return _write(shape, folder, DTYPES[dtype], seed)


def _write(shape: Shape, folder: Path, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    model = PlantedModel(shape, dtype, seed)
    shards = Shards(folder, 1 + shape.layers)
    shards.write(model.outside())
    layers = []
    progress = tqdm(model.layers(), total=shape.layers, unit="layer", disable=None)
    for index, layer in enumerate(progress):
        prefix = f"{LAYER_NAME[shape.family]}.{index}"
        shards.write({f"{prefix}.{name}": tensor for name, tensor in layer.tensors.items()})
        _write_predictor(folder / PLANTED_FOLDER / f"layer-{index:03}.safetensors", layer)
        layers.append(_told(layer.measured))
    shards.write_index()
    write_json(folder / "config.json", shape.config(str(dtype).removeprefix("torch.")))
    write_json(folder / "generation_config.json", {"do_sample": False, "pad_token_id": 1})
    plan = {"shape": asdict(shape), "rank": shape.rank, "published": PUBLISHED, "layers": layers}
    write_json(folder / PLANTED_FOLDER / PLAN_FILE, plan)
    return plan


def _write_predictor(path: Path, layer: PlantedLayer) -> None:
    """The planted factors, and the shares that were seen; rows by neuron."""
    shares = {
        "frequency": torch.from_numpy(layer.measured.neuron_firing),
        "predicted": torch.from_numpy(layer.measured.neuron_predicted),
    }
    save_file(vars(layer.predictor) | shares, path)


def _told(measured: Measured) -> dict[str, Any]:
    """One layer's planned and measured shares."""
    plan = measured.plan
    return asdict(measured.shares) | {
        "correlation": plan.correlation,
        "planned": {
            "firing": float(plan.firing.mean()),
            "predicted": float(plan.predicted.mean()),
            "union_4": union_share(plan.predicted, WINDOW),
            "new_per_token": new_share(plan.predicted, WINDOW),
            "skew": skew_share(plan.predicted),
        },
    }


def print_table(plan: Mapping[str, Any]) -> None:
    """A table of planted and published shares."""
    layers: Sequence[Mapping[str, Any]] = plan["layers"]
    print("random weights with planted firing: for measuring speed, not quality\n")
    print(f"{'share of the neurons':<34}{'published':>10}{'planted':>10}")
    for name, published in PUBLISHED.items():
        value = sum(_value(layer, name) for layer in layers) / len(layers)
        print(f"{_SPELLED[name]:<34}{100 * published:>8.1f} %{100 * value:>8.2f} %")
    print("\nunion of k tokens      " + "".join(f"{k:>8}" for k in range(1, 6)))
    means = [sum(layer["union"][k] for layer in layers) / len(layers) for k in range(5)]
    print("share of the neurons   " + "".join(f"{100 * mean:>6.1f} %" for mean in means))
    print(f"\n{'layer':>5}{'firing':>10}{'planned':>10}{'predicted':>11}{'missed':>9}{'needless':>10}")
    for index, layer in enumerate(layers):
        shares = (layer["firing"], layer["planned"]["firing"], layer["predicted"])
        errors = (layer["false_negatives"], layer["false_positives"])
        firing, planned, predicted, missed, needless = (f"{100 * share:.2f} %" for share in (*shares, *errors))
        print(f"{index:>5}{firing:>10}{planned:>10}{predicted:>11}{missed:>9}{needless:>10}")


_SPELLED = {
    "predicted": "predicted per token",
    "firing": "firing per token",
    "false_negatives": "firing, not predicted (FN)",
    "false_positives": "predicted, of those not firing (FP)",
    "union_4": "union of 4 tokens",
    "new_per_token": "new per token after 4",
    "skew": "that make 80 % of activations",
}


def _value(layer: Mapping[str, Any], name: str) -> float:
    if name == "union_4":
        return float(layer["union"][WINDOW - 1])
    return float(layer["planned"]["skew"] if name == "skew" else layer[name])


def _options() -> argparse.Namespace:
    parser = FlagParser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of the checkpoint; must not exist"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same model")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
