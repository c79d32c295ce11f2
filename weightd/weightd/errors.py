"""What weightd raises on bad input, a bad store or a bad device. Programming errors are assertions instead.

WeightdError                  one line for the user: lower case, the value, what to try
├── UsageError                wrong flags or configuration (exit status 2)
├── CheckpointError           the checkpoint to import is missing, incomplete or of an unknown kind
├── RequestError              a remote call names a layer, neuron or range that is not there, or contradicts itself
│   └── LimitError            it sends, or asks for, more than one call may
├── BusyError                 too many calls run at once; ask again a little later
├── SilenceError              a remote caller sent, or took, nothing for too long
├── ForbiddenError            a remote caller may not do this
├── StoreError                the store is missing, locked, of a newer format or lacks the model
│   ├── UnknownModelError     no model of that name; lists those there are
│   ├── ImportingError        another process imports a model of that name just now
│   └── CorruptionError       flash gives wrong bytes or none; names model, layer and neuron
├── StoppingError             the daemon is stopping; ask again once it is back
├── SpaceError                not enough room on the device or in --dram, with the numbers
├── DaemonError               no daemon answers where one was looked for
└── DeviceError               the device or file system refuses what is needed (O_DIRECT, ...)
"""

from __future__ import annotations


class WeightdError(Exception):
    """The root of the tree above; `str()` of it is what a command prints."""

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
    """Too many calls run at once; ask again a little later."""


class SilenceError(WeightdError):
    """A remote caller sent, or took, nothing for too long."""


class ForbiddenError(WeightdError):
    """A remote caller may not do this."""


class StoreError(WeightdError):
    """The store is missing, locked, of a newer format, or lacks the model."""


class UnknownModelError(StoreError):
    """No model of that name; lists those there are."""


class ImportingError(StoreError):
    """Another process imports a model of that name just now."""


class CorruptionError(StoreError):
    """Bytes on flash differ from their checksum, or cannot be read."""


class StoppingError(WeightdError):
    """The daemon is stopping."""


class SpaceError(WeightdError):
    """Not enough room on the device or in --dram."""


class DaemonError(WeightdError):
    """No daemon answers where one was looked for."""


class DeviceError(WeightdError):
    """The device or file system refuses what is needed."""
