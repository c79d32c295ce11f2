"""The inference library: predictor, window and forward pass on the pool of a weightd. See ARCHITECTURE.md."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from flashclient.garbage import garbage_kept

# By default, torch's idle OpenMP threads spin and take processor time from the kernels, the daemon and other processes.
# On two busy cores decoding is 4 to 8 times as fast without that. libgomp reads the variable once, when torch is
# imported. A user's own setting stands.
if "OMP_WAIT_POLICY" not in os.environ and "GOMP_SPINCOUNT" not in os.environ:
    if "torch" in sys.modules:
        import logging  # not otherwise: a command's first lines should run soon

        logging.getLogger(__name__).warning(
            "torch was imported before flashclient, so its idle threads spin and slow down decoding several times: "
            "import flashclient first, or set GOMP_SPINCOUNT=0"
        )
    os.environ["GOMP_SPINCOUNT"] = "0"  # for this process and those that it starts

if TYPE_CHECKING:
    from flashclient.client import FlashClient

__all__ = ["FlashClient"]


def __getattr__(name: str) -> Any:
    """Imports FlashClient when it is first named: torch and transformers take seconds."""
    if name == "FlashClient":
        with garbage_kept():
            from flashclient.client import FlashClient

        return FlashClient
    raise AttributeError(f"module 'flashclient' has no attribute '{name}'")
