"""Configurations that are shipped, under short names: the models of the slides "Dynamic data loading from Flash to DRAM
for LLM inference" (2024), whose figures stand beside those of `weightd plan`.

Each file of configs/ has the values of config.json as published, compared with copies in public repositories. That of
ChatGLM is ChatGLM3-6B's, because the first ChatGLM-6B has other mathematics.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class SlideFigures:
    """DRAM at 16 bit, in bytes of 10^9: all weights in memory, and with data loaded from flash."""

    conventional_gb: float
    assisted_gb: float


SLIDES = {
    "llama-3-8b": SlideFigures(16, 5),
    "chatglm3-6b": SlideFigures(12, 3.5),
    "qwen-7b": SlideFigures(14, 4),
    "mixtral-8x7b": SlideFigures(87, 24),
}


def shipped_config(name: str) -> Path | None:
    """The file of the configuration with this name; None if there is none."""
    return FOLDER / f"{name}.json" if name in SLIDES else None
