"""The keyword arguments of a FlashClient, checked once."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flashclient._native import WINDOW_TOKENS_MAX
from flashclient.daemon.address import TlsOptions, parse_address
from flashclient.errors import CalibrationError, OptionError
from weightd_proto import weightd_pb2
from weightd_proto.dram import DRAM_BYTES_MIN
from weightd_proto.encodings import DTYPES, bundle_neurons, has_experts
from weightd_proto.modes import EXACT, KV_DTYPES, KV_PLAIN, PREDICT, THRESHOLD, WINDOW_TOKENS, lossy_mode

if TYPE_CHECKING:
    import torch

MODES = ("auto", EXACT, PREDICT, THRESHOLD)
NEEDS = {PREDICT: "predictors", THRESHOLD: "thresholds"}
TRANSPORTS = ("auto", "shm", "grpc")
TIMEOUT_S_MAX = 86400.0  # a day
_DRAM = re.compile(r"\d+(\.\d+)?\s*([kmgt]?b|[kmgt]ib|%)?", re.IGNORECASE)


@dataclass(frozen=True)
class Options:
    """See FlashClient."""

    address: str | None = None
    store: str | os.PathLike[str] | None = None
    dram: str | int | None = None
    mode: str = "auto"
    window: int | None = None
    device: str = "cpu"
    dtype: str | torch.dtype | None = None
    transport: str = "auto"
    timeout_s: float = 30.0
    pool_bytes: int | None = None
    tls_ca: str | os.PathLike[str] | None = None
    tls_cert: str | os.PathLike[str] | None = None
    tls_key: str | os.PathLike[str] | None = None
    kv_dtype: str = KV_PLAIN

    def __post_init__(self) -> None:
        """Raises OptionError for a value that is not allowed."""
        if self.address is not None and self.store is not None:
            raise OptionError("address= and store= each name a weightd: pass one of them")
        if self.dram is not None and self.store is None:
            raise OptionError(f"dram={self.dram} is for a private weightd: pass store= too, or leave it out")
        if self.store is not None and "\0" in os.fspath(self.store):
            raise OptionError(f"store={os.fspath(self.store)!r} is not the path of a folder: it has a zero byte")
        if self.dram is not None:
            _check_dram(self.dram)
        if self.tls.given and self.address is None:
            raise OptionError("tls_ca= is for a weightd at an address: pass address= too")
        if self.address is not None:
            parse_address(self.address, self.tls)
        _one_of("mode", self.mode, MODES)
        _one_of("transport", self.transport, TRANSPORTS)
        _one_of("kv_dtype", self.kv_dtype, KV_DTYPES)
        _one_of("device", str(self.device), ("cpu",))
        if self.window is not None and (
            isinstance(self.window, bool)
            or not isinstance(self.window, int)
            or not 0 <= self.window <= WINDOW_TOKENS_MAX
        ):
            raise OptionError(f"window={self.window} must be a whole number of tokens from 0 to {WINDOW_TOKENS_MAX}")
        if not (math.isfinite(self.timeout_s) and 0 < self.timeout_s <= TIMEOUT_S_MAX):
            raise OptionError(f"timeout_s={self.timeout_s:g} must be above 0 and at most {TIMEOUT_S_MAX:g}")
        if self.pool_bytes is not None and self.pool_bytes < 1:
            raise OptionError(f"pool_bytes={self.pool_bytes} must be above 0")

    @property
    def tls(self) -> TlsOptions:
        """Raises OptionError for an incomplete set."""
        return TlsOptions(self.tls_ca, self.tls_cert, self.tls_key)

    def mode_of(self, model: weightd_pb2.Model) -> str:
        """The mode in which this model runs: exact, predict or threshold.

        Raises:
            CalibrationError: a lossy mode is asked for, and the model has no calibration for it.
        """
        calibration = model.calibration
        if self.mode == "exact" or (self.mode == "auto" and calibration.mode != "predict"):
            return "exact"
        mode = "predict" if self.mode == "auto" else self.mode
        if has_experts(model):
            raise CalibrationError(
                f"mode='{mode}' is not for models with experts, such as '{model.name}', whose router picks what is "
                "read: use mode='exact'"
            )
        if bundle_neurons(model.bundle) > 1:
            raise CalibrationError(
                f"mode='{mode}' reads neurons one by one, and model '{model.name}' is stored as published, in slabs: "
                "use mode='exact', or import it with --dtype bf16, int8 or int4"
            )
        command = f"run `flashclient calibrate {model.name} --text FILE{' --mode threshold' * (mode == 'threshold')}`"
        if calibration.version == 0:
            raise CalibrationError(
                f"mode='{mode}' needs {NEEDS[mode]}, and model '{model.name}' was never calibrated: {command}, or use "
                "mode='exact'"
            )
        if calibration.import_id != model.import_id:
            raise CalibrationError(
                f"model '{model.name}' was calibrated for another import of it: {command} again, or use mode='exact'"
            )
        if lossy_mode(calibration) != mode:
            raise CalibrationError(
                f"mode='{mode}' needs {NEEDS[mode]}, and model '{model.name}' was calibrated for mode "
                f"'{lossy_mode(calibration)}': use that mode, or {command}, which replaces that calibration"
            )
        return mode

    def window_of(self, mode: str) -> int | None:
        """The tokens whose neurons stay leased; None in mode exact."""
        return None if mode == "exact" else WINDOW_TOKENS[mode] if self.window is None else self.window

    def check_dtype(self, stored: str) -> None:
        """Refuses a dtype other than the stored one: it would make a private copy of every shared weight."""
        if self.dtype is None:
            return
        import torch  # it takes seconds, and a model is there by now

        name = DTYPES[stored].torch
        wanted = getattr(torch, self.dtype, None) if isinstance(self.dtype, str) else self.dtype
        if wanted != getattr(torch, name):
            raise OptionError(
                f"dtype={self.dtype} is not the stored dtype, {name}: leave dtype= out, or import the model again"
                " with `weightd import --dtype`"
            )

    def uses_shared_memory(self, address: str) -> bool:
        """Whether bundles come through the daemon's own pool. Raises OptionError where they cannot."""
        local = parse_address(address, self.tls).socket_path is not None
        if self.transport == "shm" and not local:
            raise OptionError(f"transport='shm' needs a weightd on this machine, not {address}: use transport='grpc'")
        return local and self.transport != "grpc"


def _check_dram(dram: object) -> None:
    """Checks the grammar of weightd's --dram. The OptionError suggests what may have been meant."""
    text = str(dram).strip()
    if isinstance(dram, bool) or not isinstance(dram, int | str) or not _DRAM.fullmatch(text):
        short = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt])", text, re.IGNORECASE)
        meant = f"did you mean '{short[1]}{short[2].upper()}iB'?" if short else "use a size like '512MiB' or '50%'"
        raise OptionError(f"dram={dram!r} is not a size: {meant}")
    if text.isdecimal() and int(text) < DRAM_BYTES_MIN:
        meant = (
            f"did you mean '{int(text)}GiB' or '{int(text)}%'?" if 0 < int(text) <= 100 else "use a size like '512MiB'"
        )
        raise OptionError(f"dram={dram!r} is {int(text)} bytes, because it has no unit: {meant}")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise OptionError(f"{name}='{value}' is not known: use {' or '.join(repr(one) for one in allowed)}")
