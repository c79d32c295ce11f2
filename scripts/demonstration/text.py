"""The text that the demo's models learn: documentation of installed Debian packages, as plain paragraphs.

Sources are the HTML pages and POD files under the given roots (`/usr/share`, or a folder that packages were unpacked
to), in the order of their paths. Each English paragraph is kept once. The hash of a page's path below `share/` decides
whether it is held out of training, so every machine holds out the same pages.
"""

from __future__ import annotations

import gc
import hashlib
import html
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

HELD_OUT_PERCENT = 2
PAGE_BYTES_MIN = 400
READERS = 2
# A shorter paragraph is a heading or a table's cell. Those repeat, and mean nothing outside their page.
REPEATS_BELOW_CHARACTERS = 60
FOREIGN_LETTERS_SHARE_MAX = 0.02
# Lists of symbols and texts in other languages are not worth learning.
SKIPPED = re.compile(
    r"/(_sources|_static|_modules|translations|devhelp)/|genindex|py-modindex|search\.html|contents\.html"
)
OTHER_LANGUAGE = re.compile(r"/debian-handbook/html/(?!en-US)[^/]+/")

_BODY = re.compile(
    r'<(?:div|section|main)[^>]*role="main"[^>]*>(.*?)'
    r'(?:<div class="(?:sphinxsidebar|clearer|footer)|</main>|<footer|\Z)',
    re.S,
)
_DROPPED = re.compile(r"<(script|style|head|nav|title)\b.*?</\1>|<!--.*?-->|<a class=\"headerlink\".*?</a>", re.S)
_BLOCK = re.compile(r"</?(?:p|div|li|ul|ol|dl|dt|dd|h[1-6]|table|tr|section|br|blockquote|hr|body)\b[^>]*>")
_TAG = re.compile(r"<[^>]*>")
_PREFORMATTED = re.compile(r"<pre\b[^>]*>(.*?)</pre>", re.S)
_POD_MARK = re.compile(r"[A-Z](?:<<+ (.*?) >>+|<([^<>]*)>)")


@dataclass(frozen=True)
class Page:
    """One document: its path below `share/`, its paragraphs, parted by empty lines, and the root it came from."""

    name: str
    text: str
    root: Path

    @property
    def held_out(self) -> bool:
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8]) % 100 < HELD_OUT_PERCENT


def read_pages(roots: list[Path]) -> list[Page]:
    """Every page under `roots`, each paragraph only where it comes first. The order depends on names alone."""
    found = {_name(path): (path, root) for root in roots for path in _documents(root)}
    names = sorted(found)
    with ProcessPoolExecutor(READERS, initializer=gc.freeze) as pool:  # what this process left is not theirs to collect
        texts = pool.map(_read, [found[name][0] for name in names], chunksize=64)
        pages = [Page(name, text, found[name][1]) for name, text in zip(names, texts, strict=True)]
    return list(_without_repeats(pages))


def _documents(root: Path) -> Iterator[Path]:
    for path in root.rglob("*"):
        skipped = SKIPPED.search(str(path)) or OTHER_LANGUAGE.search(str(path))
        if path.suffix in (".html", ".pod") and not skipped and path.is_file() and not path.is_symlink():
            yield path


def _name(path: Path) -> str:
    return str(path).rpartition("/share/")[2]


def _read(path: Path) -> str:
    raw = path.read_text(errors="replace")
    return plain_pod(raw) if path.suffix == ".pod" else plain_html(raw)


def plain_html(raw: str) -> str:
    """The page's main part: blocks become paragraphs, preformatted text keeps its lines."""
    found = _BODY.search(raw)
    body = _DROPPED.sub("", found.group(1) if found else raw)
    pieces = _PREFORMATTED.split(body)
    for index, piece in enumerate(pieces):
        preformatted = index % 2 == 1
        spaced = piece if preformatted else _BLOCK.sub("\0", re.sub(r"\s+", " ", piece))
        plain = html.unescape(_TAG.sub("", spaced))
        pieces[index] = f"\n\n{plain.rstrip()}\n\n" if preformatted else re.sub(r" *\0[ \0]*", "\n\n", plain)
    return _tidy("".join(pieces))


def plain_pod(raw: str) -> str:
    """Perl's documentation format without its commands and marks."""
    lines = [line for line in raw.splitlines() if not re.match(r"=(encoding|begin|end|for|cut|pod|over|back)", line)]
    text = re.sub(r"^=\w+ *", "", "\n".join(lines), flags=re.M)
    while (shorter := _POD_MARK.sub(lambda mark: mark.group(1) or mark.group(2) or "", text)) != text:
        text = shorter
    return _tidy(text)


def _tidy(text: str) -> str:
    return re.sub(r"\n\s*\n+", "\n\n", text.replace("¶", "").replace("\xa0", " ")).strip()


def _without_repeats(pages: list[Page]) -> Iterator[Page]:
    seen: set[bytes] = set()
    for page in pages:
        if _foreign(page.text):
            continue
        kept = []
        for paragraph in page.text.split("\n\n"):
            mark = hashlib.blake2b(paragraph.encode(errors="replace"), digest_size=12).digest()
            if len(paragraph) < REPEATS_BELOW_CHARACTERS or mark not in seen:
                kept.append(paragraph)
            seen.add(mark)
        text = "\n\n".join(kept)
        if len(text) >= PAGE_BYTES_MIN:
            yield replace(page, text=text)


def _foreign(text: str) -> bool:
    return sum(character > "\x7f" for character in text) > FOREIGN_LETTERS_SHARE_MAX * len(text)
