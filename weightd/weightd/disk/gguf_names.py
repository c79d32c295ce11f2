"""Names of GGUF files: models that are split into parts, and files that lie beside models.

llama.cpp's llama-gguf-split writes large models as NAME-00001-of-00003.gguf and so on. The first part has all metadata.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

SUFFIX = ".gguf"
PROJECTOR = "mmproj"  # of images, for the model beside it
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


def part_names(name: str, parts: int) -> list[str]:
    """The names of all parts of the model one of whose `parts` has this name, which may have folders; empty: it is not
    named as a part of so many."""
    found = _PART.fullmatch(name)
    if found is None or int(found[3]) != parts:
        return []
    return [f"{found[1]}-{part:05d}-of-{parts:05d}{SUFFIX}" for part in range(1, parts + 1)]


def parts_of(name: str) -> list[str]:
    """The names of the files of the model whose first, or only, file has this name."""
    found = _PART.fullmatch(name)
    return (part_names(name, int(found[3])) if found is not None else []) or [name]


def without_suffix(name: str) -> str:
    """What a file's name says of the model."""
    found = _PART.fullmatch(name)
    return name.removesuffix(SUFFIX) if found is None else found[1]


def models_among(names: Iterable[str]) -> list[str]:
    """The GGUF files with a model among files with these names, sorted; of a split model its first part."""
    files = sorted(
        name for name in names if name.endswith(SUFFIX) and not name.rpartition("/")[2].startswith(PROJECTOR)
    )
    return [name for name in files if (found := _PART.fullmatch(name)) is None or int(found[2]) == 1]
