"""The header of a safetensors file: 8 bytes with the length of a JSON text, then the text. The tensors follow.

    {"__metadata__": {key: text}, name: {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, ...}

Offsets count from the end of the text, which may end in spaces. (https://github.com/huggingface/safetensors)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from weightd_proto.encodings import DTYPES

LENGTH_BYTES = 8
TEXT_BYTES_MAX = 100_000_000  # the safetensors library refuses a longer text
METADATA = "__metadata__"


class HeaderError(ValueError):
    """Says what is wrong with a header. It does not name the file, which the reader knows."""


def text_bytes(begin: bytes) -> int:
    """The length of the text, from the first 8 bytes of the file. HeaderError if this is not a safetensors file."""
    length = int.from_bytes(begin[:LENGTH_BYTES], "little")
    if len(begin) < LENGTH_BYTES or length > TEXT_BYTES_MAX:
        raise HeaderError("it does not begin with the length of a header")
    return length


def parse(text: bytes) -> dict[str, Any]:
    """The entries by name, METADATA among them; they are not checked. HeaderError if the text is not a JSON object."""
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise HeaderError("its header is not JSON") from error
    if not isinstance(entries, dict):
        raise HeaderError("its header is not a JSON object")
    return entries


def header_of(
    tensors: Mapping[str, tuple[str, Sequence[int]]], alignment_bytes: int, metadata: Mapping[str, str] | None = None
) -> bytes:
    """The header for tensors (name -> dtype, shape) back to back in this order, padded with spaces: the tensors begin
    at a multiple of `alignment_bytes`."""
    entries: dict[str, object] = {} if metadata is None else {METADATA: dict(metadata)}
    begin = 0
    for name, (dtype, shape) in tensors.items():
        end = begin + DTYPES[dtype].bytes * prod(shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(LENGTH_BYTES + len(text)) % alignment_bytes)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text
