"""Calibrations of made-up bytes, and how they come into a store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from weightd import _native
from weightd.calibration import CalibrationStaging
from weightd.store import Store
from weightd_proto import weightd_pb2 as pb


def contents(seed: int) -> dict[str, bytes]:
    random = np.random.default_rng(seed)
    return {
        "predictors.safetensors": random.bytes(250_001),
        "statistics.safetensors": random.bytes(4096),
        "report.json": json.dumps({"seed": seed}).encode(),
    }


def checksum(data: bytes) -> int:
    return int(_native.checksum(np.frombuffer(data, np.uint8)))


def record_of(model: pb.Model, contents: dict[str, bytes], **changes: Any) -> pb.Calibration:
    records = [pb.File(name=name, size_bytes=len(data), checksum=checksum(data)) for name, data in contents.items()]
    return pb.Calibration(**({"import_id": model.import_id, "mode": "predict", "files": records} | changes))


def offline(store: Path, model: pb.Model, seed: int = 1) -> pb.Calibration:
    """Publishes it without a daemon."""
    files = contents(seed)
    with Store.open(store) as opened, CalibrationStaging(opened, model, record_of(model, files)) as staging:
        staging.write(b"".join(files.values()))
        return staging.publish()
