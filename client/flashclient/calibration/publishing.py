"""A finished calibration's files, and their way to the daemon."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np

from flashclient import _native
from flashclient.daemon.channel import OPEN_TIMEOUT_S, Connection, rpc_errors
from weightd_proto import weightd_pb2

PIECE_BYTES = 2**20  # of one message


def publish(
    connection: Connection, model: weightd_pb2.Model, mode: str, folder: Path, names: tuple[str, ...]
) -> weightd_pb2.Calibration:
    """Makes the files `names` in `folder` the model's newest calibration.

    Args:
        mode: what mode "auto" is to take for the model: "exact" or "predict".

    Raises:
        RefusedError: the daemon does not allow it, or the model was imported again meanwhile.
        CorruptionError: what came there was not what was sent.
        DaemonLostError.
    """
    calibration = weightd_pb2.Calibration(import_id=model.import_id, mode=mode)
    calibration.files.extend(_described(folder / name) for name in names)
    header = weightd_pb2.PublishCalibrationHeader(model=model.name, calibration=calibration)
    with rpc_errors(connection.address):
        published: weightd_pb2.Calibration = connection.stub.PublishCalibration(
            _messages(header, [folder / name for name in names]), timeout=OPEN_TIMEOUT_S
        )
    return published


def check_may_publish(connection: Connection, model: weightd_pb2.Model) -> None:
    """Raises RefusedError now where `publish` would after hours: offers a calibration of no files.

    A daemon that would take one from here finds fault with the files only.
    """
    offered = weightd_pb2.Calibration(import_id=model.import_id, mode="exact")
    header = weightd_pb2.PublishCalibrationHeader(model=model.name, calibration=offered)
    with rpc_errors(connection.address):
        try:
            connection.stub.PublishCalibration(_messages(header, []), timeout=connection.timeout_s)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.INVALID_ARGUMENT:
                raise


def _described(path: Path) -> weightd_pb2.File:
    data = np.memmap(path, np.uint8, "r")
    return weightd_pb2.File(name=path.name, size_bytes=len(data), checksum=_native.checksum(data))


def _messages(
    header: weightd_pb2.PublishCalibrationHeader, paths: list[Path]
) -> Iterator[weightd_pb2.PublishCalibrationRequest]:
    yield weightd_pb2.PublishCalibrationRequest(header=header)
    for path in paths:
        with path.open("rb") as file:
            while data := file.read(PIECE_BYTES):
                yield weightd_pb2.PublishCalibrationRequest(data=data)
