"""What flashclient raises for bad input and for faults of the daemon. Programming errors are assertions instead.

FlashClientError              one line for the user: lower case, the value, what to try
├── OptionError               an unknown option, or a value that is not allowed (exit status 2); also a TypeError and
│                             a ValueError, the classes that transformers raises
├── NoDaemonError             no weightd answers at the address; also a ConnectionError
│   └── DaemonLostError       the daemon answered before and has not come back within timeout_s
├── StartError                the private weightd or its import failed; repeats its message
├── ModelNotFoundError        the store has no such model; names the models that it has
├── ModelError                the client cannot run a model of this kind, or the model lacks a tensor
│   └── AbsentWeightError     the request needs FFN weights in this process; names an alternative
├── CalibrationError          the model has no calibration that fits it, or cannot be calibrated; says why
├── ShareError                the daemon's memory has no room for another session; gives the numbers
├── BusyError                 the daemon has too many calls at once; try again
├── CorruptionError           flash returns wrong bytes or an error; names model, layer and neuron
├── RefusedError              the daemon refused a request for another reason; says which
└── ForkedError               a client made before fork() was used in the child
"""

from __future__ import annotations

from collections.abc import Sequence


class FlashClientError(Exception):
    """The root of the tree above. A command prints its `str()`.

    Attributes:
        status: the name of gRPC's status that the error stands for; empty for others.
    """

    exit_status = 1
    status = ""


class OptionError(FlashClientError, TypeError, ValueError):
    """An unknown option or a value that is not allowed."""

    exit_status = 2


class NoDaemonError(FlashClientError, ConnectionError):
    """No weightd answers at the address."""


class DaemonLostError(NoDaemonError):
    """The daemon was lost and has not come back in time."""


class StartError(FlashClientError):
    """The private weightd, or the import before it, failed."""


class ModelNotFoundError(FlashClientError):
    """The store has no such model."""


class ModelError(FlashClientError):
    """The client cannot run a model of this kind, or the model lacks a tensor."""


class AbsentWeightError(ModelError):
    """The request needs FFN weights in this process; they stay with weightd."""


class CalibrationError(FlashClientError):
    """The model has no calibration that fits it, or cannot be calibrated."""


class ShareError(FlashClientError):
    """The daemon's memory has no room for another session."""


class BusyError(FlashClientError):
    """The daemon has too many calls at once."""


class CorruptionError(FlashClientError):
    """Bytes on flash differ from their checksum, or cannot be read."""


class RefusedError(FlashClientError):
    """The daemon refused a request."""


class ForkedError(FlashClientError):
    """A client made before fork() was used in the child."""


def some(names: Sequence[str], most: int = 5) -> str:
    """The first of `names`, and how many more there are: for a text."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
