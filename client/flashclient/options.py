"""What a FlashClient is asked for, checked once."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from flashclient.errors import OptionError
from flashclient.model import DTYPES

DEFAULT_ADDRESS = "unix:/run/weightd/weightd.sock"  # where the system service listens
MODES = ("auto", "exact")
MODES_NOT_AVAILABLE = ("predict", "threshold")  # they need calibration, which no model in a store has
TRANSPORTS = ("auto", "shm", "grpc")


@dataclass(frozen=True)
class Options:
    """The keyword arguments of FlashClient; see there."""

    address: str | None = None
    store: str | Path | None = None
    dram: str | int | None = None
    mode: str = "auto"
    window: int = 4
    device: str = "cpu"
    dtype: str | torch.dtype | None = None
    transport: str = "auto"
    timeout_s: float = 30.0
    pool_bytes: int | None = None

    @classmethod
    def of(cls, given: dict[str, Any]) -> Options:
        """Raises OptionError for an unknown name or a value that is not allowed."""
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise OptionError(f"unknown option '{name}'{_meant(name, known)}: FlashClient knows {', '.join(known)}")
        options = cls(**given)
        options._check()
        return options

    def _check(self) -> None:
        if self.address is not None and self.store is not None:
            raise OptionError("address= and store= name two ways to a weightd: pass one of them")
        if self.dram is not None and self.store is None:
            raise OptionError(f"dram={self.dram} is for a weightd of one's own: pass store= too, or leave it out")
        if self.mode in MODES_NOT_AVAILABLE:
            raise OptionError(f"mode='{self.mode}' is not available for this model: 'auto' and 'exact' are")
        _one_of("mode", self.mode, MODES)
        _one_of("transport", self.transport, TRANSPORTS)
        _one_of("device", str(self.device), ("cpu",))
        if self.window < 1:
            raise OptionError(f"window={self.window} must be at least 1 token")
        if not self.timeout_s > 0:
            raise OptionError(f"timeout_s={self.timeout_s} must be above 0")
        if self.pool_bytes is not None and self.pool_bytes < 1:
            raise OptionError(f"pool_bytes={self.pool_bytes} must be above 0")

    def check_dtype(self, stored: str) -> None:
        """Refuses a dtype other than the stored one: it would make a private copy of every shared weight."""
        if self.dtype is None:
            return
        wanted = getattr(torch, self.dtype, None) if isinstance(self.dtype, str) else self.dtype
        if wanted != DTYPES[stored]:
            name = str(DTYPES[stored]).removeprefix("torch.")
            raise OptionError(
                f"dtype={self.dtype} is not the stored one, {name}: leave dtype= out, or import the model again"
                " with `weightd import --dtype`"
            )

    def uses_shared_memory(self, address: str) -> bool:
        """Whether bundles come through the daemon's own pool. Raises OptionError where they cannot."""
        local = address.startswith("unix:")
        if self.transport == "shm" and not local:
            raise OptionError(f"transport='shm' needs a weightd on this machine, not {address}: use transport='grpc'")
        return local and self.transport != "grpc"


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise OptionError(f"{name}='{value}' is not known: use {' or '.join(repr(one) for one in allowed)}")


def _meant(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""
