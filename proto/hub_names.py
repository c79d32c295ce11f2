"""Names of models on the Hugging Face hub, ORGANISATION/NAME, and what tells them from paths."""

from __future__ import annotations

import re

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*")
NAME_CHARACTERS_MAX = 96  # the hub's own


def is_hub_name(text: str) -> bool:
    """Whether `text` may name a model on the hub. It may still be a relative path: a path that exists comes first."""
    allowed = len(text) <= NAME_CHARACTERS_MAX and "--" not in text and ".." not in text
    return allowed and _NAME.fullmatch(text) is not None and not text.endswith((".git", ".gguf", "-", "."))
