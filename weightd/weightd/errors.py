"""What weightd raises on bad input, a bad store or a bad device. Programming errors are assertions instead.

WeightdError                  one line for the user: lower case, the value, what to try
├── UsageError                wrong flags or configuration (exit status 2)
├── CheckpointError           the checkpoint to import is missing, incomplete or of an unknown kind
├── RequestError              a remote call names a layer, neuron or range that is not there, or contradicts itself
│   └── LimitError            a remote call sends, or asks for, more than is allowed
├── BusyError                 too many calls run at once; try again later
├── SilenceError              a remote caller sent nothing, or read nothing, for too long
├── ForbiddenError            a remote caller may not do this
├── StoreError                the store is missing, locked, of a newer format or lacks the model
│   ├── UnknownModelError     no model has that name; lists the names that exist
│   ├── InUseError            a model cannot be removed, because clients use it
│   ├── ImportingError        another process is importing a model of that name
│   └── CorruptionError       bytes on flash are wrong or cannot be read; names model, layer and neuron
├── ServiceError              `weightd install-service` cannot do a step; names it
├── CertificateError          a certificate or key of `weightd cert` cannot be made or read
├── StoppingError             the daemon is stopping; try again when it runs again
├── SpaceError                not enough room on the device or in --dram; gives the numbers
├── DaemonError               no daemon answers at the address
└── DeviceError               the device or file system refuses what is needed (O_DIRECT, ...)
"""

from __future__ import annotations

import errno

_NOT_YOURS = "run it as the owner, change the mode (`ls -ld` shows both), or name another folder"
_REMEDIES = {
    errno.EACCES: _NOT_YOURS,
    errno.EPERM: _NOT_YOURS,
    errno.EROFS: "mount it writable, or name a folder elsewhere",
}


class WeightdError(Exception):
    """The root of the tree above. Commands print its `str()`."""

    exit_status = 1


class UsageError(WeightdError):
    """Wrong flags or configuration."""

    exit_status = 2


class CheckpointError(WeightdError):
    """The checkpoint to import is missing, incomplete or of an unknown kind."""


class RequestError(WeightdError):
    """A remote call names a layer, neuron or range that is not there, or contradicts itself."""


class LimitError(RequestError):
    """A remote call sends, or asks for, more than one call may."""


class BusyError(WeightdError):
    """Too many calls run at once; try again later."""


class SilenceError(WeightdError):
    """A remote caller sent nothing, or read nothing, for too long."""


class ForbiddenError(WeightdError):
    """A remote caller may not do this."""


class StoreError(WeightdError):
    """The store is missing, locked, of a newer format, or lacks the model."""


class UnknownModelError(StoreError):
    """No model has that name; lists the names that exist."""


class InUseError(StoreError):
    """A model cannot be removed, because clients use it."""


class ImportingError(StoreError):
    """Another process is importing a model of that name."""


class CorruptionError(StoreError):
    """Bytes on flash differ from their checksum, or cannot be read."""


class ServiceError(WeightdError):
    """`weightd install-service` cannot do a step."""


class CertificateError(WeightdError):
    """A certificate or key of `weightd cert` cannot be made or read."""


class StoppingError(WeightdError):
    """The daemon is stopping."""


class SpaceError(WeightdError):
    """Not enough room on the device or in --dram."""


class DaemonError(WeightdError):
    """No daemon answers at the address."""


class DeviceError(WeightdError):
    """The device or file system refuses what is needed."""


def described(error: OSError) -> str:
    """A refusal of the system in one line: the path, the reason, and the remedy where it is known."""
    reason = (error.strerror or str(error)).lower()
    if not error.filename:
        return reason
    remedy = _REMEDIES.get(error.errno or 0)
    return f"{error.filename}: {reason}" + (f": {remedy}" if remedy else "")
