"""The inference library: predictor, window and forward pass on the pool of a weightd. See ARCHITECTURE.md."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashclient.client import FlashClient

__all__ = ["FlashClient"]


def __getattr__(name: str) -> Any:
    """FlashClient, imported when it is first named: torch and transformers take seconds."""
    if name == "FlashClient":
        from flashclient.client import FlashClient

        return FlashClient
    raise AttributeError(f"module 'flashclient' has no attribute '{name}'")
