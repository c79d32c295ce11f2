"""Checks the structure of an LMDB file before LMDB reads it.

LMDB trusts its file. A wrong page number, from a flipped bit or a truncated file, ends in SIGSEGV or SIGBUS, or in live
pages that are overwritten. This module visits every page of both trees once and reads nothing outside the file. (The
layout is that of lmdb's mdb.c, data version 1: "Page header", "Header for a node", "Meta page content".) The values of
the records have checksums of their own (catalog.py).
"""

from __future__ import annotations

import os
import struct
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from weightd.errors import CorruptionError

MAGIC, DATA_VERSION = 0xBEEFC0DE, 1
BRANCH, LEAF, OVERFLOW, META = 0x01, 0x02, 0x04, 0x08
BIG_DATA = 0x01  # the value of the node lies in overflow pages
NO_PAGE = (1 << 64) - 1
FIRST_PAGE = 2  # pages 0 and 1 are meta pages
PAGE = struct.Struct("<QHHHH")  # number, padding, flags, lower, upper; in overflow pages a u32 count for the last two
NODE = struct.Struct("<HHHH")  # two halves of the size, flags, key bytes; a branch's page number in the first three
META_HEAD = struct.Struct("<IIQQ")  # magic, version, address, map size
DATABASE = struct.Struct("<IHHQQQQQ")  # page bytes (in the first), flags, depth, branch, leaf, overflow, entries, root
META_TAIL = struct.Struct("<QQ")  # last page, transaction
ORDER_FLAGS, INTEGER_KEYS = 0x7F, 0x08  # flags of a database: the order of its keys and values
DEPTH_MAX = 32


class Tree(NamedTuple):
    """One of the two databases of the file: the free pages, and the main database."""

    depth: int
    root: int


class Meta(NamedTuple):
    """A meta page: the state after one transaction."""

    page_bytes: int
    free: Tree
    main: Tree
    last_page: int
    transaction: int


class Node(NamedTuple):
    """An entry of a leaf."""

    key: bytes
    value: bytes


def check_pages(path: Path) -> None:
    """CorruptionError unless the file is whole and the pages of its newest transaction are sound.

    The caller makes sure that no transaction is written meanwhile.
    """
    with path.open("rb") as file:
        _Pages(path, file.fileno()).check()


class _Pages:
    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor
        self._size_bytes = os.fstat(descriptor).st_size
        self._used: set[int] = set()
        self._of_free_pages = False  # whether the free pages' tree is being checked, or the main one

    def check(self) -> None:
        self._meta = max((self._read_meta(number) for number in (0, 1)), key=lambda meta: meta.transaction)
        file_bytes = (self._meta.last_page + 1) * self._meta.page_bytes
        self._require(self._size_bytes >= file_bytes, f"{self._size_bytes} bytes, and its pages take {file_bytes}")
        self._leaves(self._meta.main)
        self._of_free_pages = True
        for node in self._leaves(self._meta.free):
            count = len(node.value) // 8 - 1
            self._require(count >= 0 and len(node.value) % 8 == 0, "a malformed list of free pages")
            pages = struct.unpack(f"<{count + 1}Q", node.value)
            self._require(pages[0] == count, "a list of free pages of another length")
            for page in pages[1:]:
                self._use(page, 1)

    def _read_meta(self, number: int) -> Meta:
        # LMDB's pages have the size of the system's pages, at least 4096 bytes.
        data = os.pread(self._descriptor, 4096, number * (self._page_bytes if number else 0))
        self._require(len(data) == 4096, f"{self._size_bytes} bytes")
        _, _, flags, _, _ = PAGE.unpack_from(data)
        magic, version, _, _ = META_HEAD.unpack_from(data, PAGE.size)
        place = PAGE.size + META_HEAD.size
        free = DATABASE.unpack_from(data, place)
        main = DATABASE.unpack_from(data, place + DATABASE.size)
        last_page, transaction = META_TAIL.unpack_from(data, place + 2 * DATABASE.size)
        self._require(flags == META and (magic, version & 0xFFFF) == (MAGIC, DATA_VERSION), "an unknown meta page")
        self._require(free[0] in (4096, 8192, 16384, 32768, 65536), f"pages of {free[0]} bytes")
        self._require((free[1] & ORDER_FLAGS, main[1] & ORDER_FLAGS) == (INTEGER_KEYS, 0), "trees of another order")
        # LMDB writes transaction n to meta page n % 2. (In a new file both have number 0.)
        self._require(transaction % 2 == number or transaction == 0, f"transaction {transaction} on page {number}")
        self._page_bytes: int = free[0]
        return Meta(free[0], Tree(free[2], free[7]), Tree(main[2], main[7]), last_page, transaction)

    def _leaves(self, tree: Tree) -> list[Node]:
        """All entries in order of their keys. (A catalog has some hundred. Values in overflow pages are not read.)"""
        if tree.root == NO_PAGE:
            return []
        self._require(1 <= tree.depth <= DEPTH_MAX, f"a tree of depth {tree.depth}")
        nodes = self._below(tree.root, tree.depth)
        keys = [self._order(node.key) for node in nodes]
        self._require(all(before < after for before, after in pairwise(keys)), "keys out of order")
        return nodes

    def _order(self, key: bytes) -> bytes:
        """The bytes by which keys are compared. Keys of the free pages are little-endian numbers."""
        return key[::-1] if self._of_free_pages else key

    def _below(self, number: int, depth: int) -> list[Node]:
        self._use(number, 1)
        page = self._page(number, LEAF if depth == 1 else BRANCH)
        _, _, _, lower, upper = PAGE.unpack_from(page)
        self._require(PAGE.size < lower <= upper <= len(page) and lower % 2 == 0, f"page {number} without an order")
        nodes: list[Node] = []
        for (offset,) in struct.iter_unpack("<H", page[PAGE.size : lower]):
            self._require(upper <= offset <= len(page) - NODE.size, f"page {number} with a node outside it")
            low, high, flags, key_bytes = NODE.unpack_from(page, offset)
            begin = offset + NODE.size + key_bytes
            self._require(begin <= len(page), f"page {number} with a key outside it")
            key = page[offset + NODE.size : begin]
            if depth == 1:
                nodes.append(Node(key, self._value(page, number, begin, flags, low | high << 16)))
                continue
            below = self._below(low | high << 16 | flags << 32, depth - 1)
            if nodes:
                before, first = self._order(nodes[-1].key), self._order(below[0].key)
                self._require(before < self._order(key) <= first, f"page {number} with a key that leads astray")
            nodes += below
        return nodes

    def _value(self, page: bytes, number: int, begin: int, flags: int, size_bytes: int) -> bytes:
        """The value of a node; empty for a large value of the main tree, which is not read."""
        self._require(flags in (0, BIG_DATA), f"page {number} with a value of kind {flags}")
        end = begin + (8 if flags else size_bytes)
        self._require(end <= len(page), f"page {number} with a value outside it")
        if not flags:
            return page[begin:end]
        first = int.from_bytes(page[begin:end], "little")
        head = self._page(first, OVERFLOW)
        count = int.from_bytes(head[12:16], "little")
        self._require(PAGE.size + size_bytes <= count * len(page), f"page {first} that is shorter than its value")
        self._use(first, count)
        return os.pread(self._descriptor, size_bytes, first * len(page) + PAGE.size) if self._of_free_pages else b""

    def _page(self, number: int, kind: int) -> bytes:
        page_bytes = self._meta.page_bytes
        self._require(FIRST_PAGE <= number <= self._meta.last_page, f"a page {number}, which does not exist")
        page = os.pread(self._descriptor, page_bytes, number * page_bytes)
        self._require(len(page) == page_bytes, f"page {number} cut off")
        found, _, flags, _, _ = PAGE.unpack_from(page)
        self._require(found == number and flags == kind, f"another page than {number} in its place")
        return page

    def _use(self, first: int, count: int) -> None:
        """Marks pages as used. A page can be used only once."""
        inside = first >= FIRST_PAGE and first + count - 1 <= self._meta.last_page
        self._require(inside, f"pages {first} to {first + count - 1}, which do not exist")
        pages = range(first, first + count)
        self._require(self._used.isdisjoint(pages), f"page {first} in two places")
        self._used.update(pages)

    def _require(self, sound: bool, what: str) -> None:
        if not sound:
            raise CorruptionError(
                f"the catalog {self._path} is damaged: it has {what}; restore a copy of it, or import into a new store"
            )
