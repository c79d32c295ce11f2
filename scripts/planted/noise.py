"""A checkpoint of random bf16 numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from planted.shapes import checkpoint_shapes
from weightd_proto.safetensors_header import header_of

RANDOM_BYTES = 64 << 20  # these are repeated
NO_LARGE_EXPONENT = 0xBCFF  # a mask for the bits of a bf16: what is left is neither NaN nor far from 0


def write_noise(config: Mapping[str, Any], folder: Path) -> int:
    """Writes config.json and model.safetensors; returns the bytes of the latter."""
    (folder / "config.json").write_text(json.dumps(config))
    shapes = sorted(checkpoint_shapes(config).items())
    header = header_of({name: ("BF16", shape) for name, shape in shapes}, alignment_bytes=8)
    data_bytes = sum(2 * prod(shape) for _, shape in shapes)
    numbers = np.random.default_rng(0).integers(0, 1 << 16, RANDOM_BYTES // 2, np.uint16) & NO_LARGE_EXPONENT
    noise = memoryview(numbers.tobytes())
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        for begin in range(0, data_bytes, RANDOM_BYTES):
            file.write(noise[: min(RANDOM_BYTES, data_bytes - begin)])
    return len(header) + data_bytes
