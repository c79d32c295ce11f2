"""Headers as the safetensors library reads and writes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from weightd_proto.safetensors_header import (
    LENGTH_BYTES,
    METADATA,
    TEXT_BYTES_MAX,
    HeaderError,
    header_of,
    parse,
    text_bytes,
)


@pytest.mark.parametrize("alignment_bytes", [1, 64, 4096])
def test_the_library_reads_what_is_written(tmp_path: Path, alignment_bytes: int) -> None:
    first, second = np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(5, dtype=np.uint8)
    header = header_of({"first": ("F32", (2, 3)), "second": ("U8", [5])}, alignment_bytes, {"format": "pt"})
    assert len(header) % alignment_bytes == 0
    (tmp_path / "file").write_bytes(header + first.tobytes() + second.tobytes())
    tensors = safetensors.numpy.load_file(tmp_path / "file")
    np.testing.assert_array_equal(tensors["first"], first)
    np.testing.assert_array_equal(tensors["second"], second)


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"x": np.zeros((3, 2), np.int8)}, tmp_path / "file", {"of": "a test"})
    data = (tmp_path / "file").read_bytes()
    end = LENGTH_BYTES + text_bytes(data)
    entries = parse(data[LENGTH_BYTES:end])
    assert entries == {METADATA: {"of": "a test"}, "x": {"dtype": "I8", "shape": [3, 2], "data_offsets": [0, 6]}}
    assert len(data) == end + 6


def test_no_metadata_without_any() -> None:
    assert METADATA not in parse(header_of({"x": ("F16", [1])}, 1)[LENGTH_BYTES:])


@pytest.mark.parametrize("begin", [b"", b"\1" * 7, (TEXT_BYTES_MAX + 1).to_bytes(8, "little")])
def test_a_begin_that_is_no_length_is_refused(begin: bytes) -> None:
    with pytest.raises(HeaderError, match="does not begin with the length"):
        text_bytes(begin)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[" * 200_000])
def test_a_text_that_is_not_json_is_refused(text: bytes) -> None:
    with pytest.raises(HeaderError, match="its header is not JSON"):
        parse(text)


def test_json_that_is_no_object_is_refused() -> None:
    with pytest.raises(HeaderError, match="not a JSON object"):
        parse(b"[]")
