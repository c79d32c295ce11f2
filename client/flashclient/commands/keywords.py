"""The library's keyword arguments in errors, as the command's flags."""

from __future__ import annotations

import re

_KEYWORDS = (
    *("address", "store", "dram", "mode", "window", "transport", "timeout_s", "tls_ca", "tls_cert", "tls_key"),
    *("kv_dtype", "max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
)
_KEYWORD = re.compile(rf"\b({'|'.join(_KEYWORDS)})=(?=(\S?))")


def in_flags(text: str) -> str:
    """An error's text in one line, with the command's flags in place of the library's keyword arguments."""

    def flag(found: re.Match[str]) -> str:
        gap = " " if found[2].isalnum() or found[2] in tuple("'\"/.-") else ""
        return f"--{found[1].replace('_', '-')}{gap}"

    line = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
    return _KEYWORD.sub(flag, line)
