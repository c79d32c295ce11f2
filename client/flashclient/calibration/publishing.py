"""Sends the files of a finished calibration to the daemon."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np

from flashclient import _native
from flashclient.daemon.channel import OPEN_TIMEOUT_S, Connection
from weightd_proto import weightd_pb2

PIECE_BYTES = 2**20  # file bytes in one message


def publish(
    connection: Connection,
    model: weightd_pb2.Model,
    mode: str,
    folder: Path,
    names: tuple[str, ...],
    *,
    lossy_mode: str = "predict",
    perplexity_loss: float = 0.0,
) -> weightd_pb2.Calibration:
    """Publishes the files `names` in `folder` as the model's newest calibration.

    Args:
        mode: "exact" or "predict", which mode "auto" then takes for the model.
        lossy_mode: "predict" or "threshold", which mode the calibration is for.
        perplexity_loss: of that mode, relative, as measured.

    Raises:
        RefusedError: the daemon does not allow it, or the model has been imported again.
        CorruptionError: the daemon received other bytes than were sent.
        DaemonLostError.
    """
    calibration = weightd_pb2.Calibration(
        import_id=model.import_id, mode=mode, lossy_mode=lossy_mode, perplexity_loss=perplexity_loss
    )
    calibration.files.extend(_described(folder / name) for name in names)
    header = weightd_pb2.PublishCalibrationHeader(model=model.name, calibration=calibration)
    with connection.rpc_errors():
        published: weightd_pb2.Calibration = connection.stub.PublishCalibration(
            _messages(header, [folder / name for name in names]), timeout=OPEN_TIMEOUT_S
        )
    return published


def check_may_publish(connection: Connection, model: weightd_pb2.Model) -> None:
    """Raises RefusedError if publish() would raise it. Call it before a calibration, which takes hours.

    Offers a calibration without files. A daemon that allows publishing refuses it only because files are missing.
    """
    offered = weightd_pb2.Calibration(import_id=model.import_id, mode="exact")
    header = weightd_pb2.PublishCalibrationHeader(model=model.name, calibration=offered)
    with connection.rpc_errors():
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
