"""Counting fields before a message is parsed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightd.gateway.wire import count_fields
from weightd_proto import weightd_pb2 as pb


@pytest.mark.parametrize(
    ("message", "count"),
    [
        (pb.FetchRequest(), 0),
        (pb.FetchRequest(model="m", import_id=b"x" * 300), 2),
        (pb.FetchRequest(bundles=pb.NeuronSet(layer=1 << 31, neurons=range(1000))), 3),
        (pb.FetchRequest(bundles=pb.NeuronSet(positions=[pb.Range(begin=1, end=9)] * 50)), 51),
        (pb.FetchRequest(calibration=pb.CalibrationFile(name="n", range=pb.ByteRange(offset=1, size=2))), 5),
    ],
)
def test_what_is_repeated_counts_once_each(message: pb.FetchRequest, count: int) -> None:
    assert count_fields(message.SerializeToString(), pb.FetchRequest, 1000) == count


def test_counting_stops_beyond_the_bound() -> None:
    header = pb.PublishCalibrationHeader(calibration=pb.Calibration(files=[pb.File()] * 100_000))
    message = pb.PublishCalibrationRequest(header=header).SerializeToString()
    assert 100 < count_fields(message, pb.PublishCalibrationRequest, 100) < 110
    fixed = pb.File(checksum=7).SerializeToString()
    assert count_fields(fixed * 5, pb.File, 100) == 5


@pytest.mark.parametrize(
    "message", [b"\x80", b"\x08", b"\x0a\x05ab", b"\x0b", b"\x19\0\0", b"\x80" * 11, b"\x12\x02\x08"]
)
def test_what_is_no_message(message: bytes) -> None:
    with pytest.raises(ValueError, match=r"number|field"):
        count_fields(message, pb.FetchRequest, 100)


@given(st.binary(max_size=64))
def test_whatever_can_be_parsed_can_be_counted(message: bytes) -> None:
    try:
        count = count_fields(message, pb.FetchRequest, 1000)
    except ValueError:
        return  # some of which are messages with groups, which nothing here writes
    assert 0 <= count <= len(message)
