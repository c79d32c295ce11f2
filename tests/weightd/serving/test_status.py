"""Each error of the tree has its status."""

from __future__ import annotations

import grpc
import pytest

from weightd import errors
from weightd.serving.status import STATUSES, status_of


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.UnknownModelError("x"), grpc.StatusCode.NOT_FOUND),
        (errors.CorruptionError("x"), grpc.StatusCode.DATA_LOSS),
        (errors.StoreError("x"), grpc.StatusCode.FAILED_PRECONDITION),
        (errors.RequestError("x"), grpc.StatusCode.INVALID_ARGUMENT),
        (errors.LimitError("x"), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (errors.BusyError("x"), grpc.StatusCode.ABORTED),
        (errors.SilenceError("x"), grpc.StatusCode.DEADLINE_EXCEEDED),
        (errors.ForbiddenError("x"), grpc.StatusCode.PERMISSION_DENIED),
        (errors.SpaceError("x"), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (MemoryError("x"), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (errors.StoppingError("x"), grpc.StatusCode.UNAVAILABLE),
        (OSError(5, "x"), grpc.StatusCode.INTERNAL),
    ],
)
def test_statuses(error: Exception, status: grpc.StatusCode) -> None:
    assert status_of(error) == (status, str(error))


def test_a_fault_of_ours_says_so() -> None:
    status, details = status_of(ZeroDivisionError("x"))
    assert status is grpc.StatusCode.INTERNAL
    assert "a fault of weightd" in details
    assert "ZeroDivisionError" in details


def test_no_row_hides_a_later_one() -> None:
    for index, (kind, _) in enumerate(STATUSES):
        assert not any(issubclass(kind, earlier) for earlier, _ in STATUSES[:index])
