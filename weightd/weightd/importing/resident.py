"""resident.safetensors: its header, and where each tensor lies."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod

from weightd.sizes import round_up
from weightd_proto import weightd_pb2
from weightd_proto.encodings import DTYPES

TENSOR_ALIGNMENT_BYTES = 64


def lay_out_resident(
    shapes: Mapping[str, tuple[int, ...]], dtype: str, block_bytes: int
) -> tuple[bytes, list[weightd_pb2.Tensor]]:
    """The header, padded so that the data begin on a block boundary, and the tensors in order, without checksums.

    safetensors allows no holes, so tensors whose size is a multiple of 64 come first: all of those are aligned.
    """
    sizes = {name: prod(shape) * DTYPES[dtype].bytes for name, shape in shapes.items()}
    order = sorted(sizes, key=lambda name: (sizes[name] % TENSOR_ALIGNMENT_BYTES != 0, -sizes[name], name))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset_bytes = 0
    for name in order:
        offsets = [offset_bytes, offset_bytes + sizes[name]]
        entries[name] = {"dtype": dtype, "shape": list(shapes[name]), "data_offsets": offsets}
        offset_bytes += sizes[name]
    text = json.dumps(entries, separators=(",", ":")).encode()
    data_offset_bytes = round_up(8 + len(text), block_bytes)
    header = (data_offset_bytes - 8).to_bytes(8, "little") + text.ljust(data_offset_bytes - 8)
    tensors = []
    for name in order:
        tensors.append(
            weightd_pb2.Tensor(
                name=name, dtype=dtype, shape=shapes[name], offset_bytes=data_offset_bytes, size_bytes=sizes[name]
            )
        )
        data_offset_bytes += sizes[name]
    return header, tensors
