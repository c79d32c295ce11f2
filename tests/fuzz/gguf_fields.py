"""A GGUF header as fields that can be changed. Its code is separate from the reader that is fuzzed.

    b"GGUF", version, tensors, entries; each entry key, type, value; each tensor name, dimensions, type, offset

(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) The caller adds the magic.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from random import Random

from mutators import NUMBERS

STRING, ARRAY = 8, 9
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of the scalar types
KEYS = [
    b"general.architecture", b"general.alignment", b"split.count", b"llama.block_count", b"llama.embedding_length",
    b"llama.attention.head_count", b"llama.rope.scaling.type", b"llama.rope.scaling.factor", b"llama.vocab_size",
    b"tokenizer.ggml.tokens", b"tokenizer.ggml.eos_token_id", b"tokenizer.ggml.eot_token_id",
    b"tokenizer.chat_template", b"general.file_type",
]  # fmt: skip
TEXTS = [b"", b"llama", b"gemma3", b"qwen2", b"x", b"\xff", b"yarn", b"\0", b"y" * 200]


@dataclass(frozen=True)
class Entry:
    key: bytes
    kind: int
    value: bytes  # as it is stored, without the type of its items
    item_kind: int = 0  # of an array, whose value begins with the count


@dataclass(frozen=True)
class TensorInfo:
    name: bytes
    dimensions: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class Header:
    version: int
    entries: tuple[Entry, ...]
    tensors: tuple[TensorInfo, ...]
    rest: bytes  # padding and data
    lies: tuple[int, int] = (0, 0)  # added to the counts of tensors and entries


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise ValueError("it ends early")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def string(self) -> bytes:
        return self.take(self.number(8))

    def value(self, kind: int) -> bytes:
        if kind == STRING:
            return _string(self.string())
        if kind not in SIZES:
            raise ValueError("an unknown type")
        return self.take(SIZES[kind])

    def entry(self) -> Entry:
        key, kind = self.string(), self.number(4)
        if kind != ARRAY:
            return Entry(key, kind, self.value(kind))
        item_kind, count = self.number(4), self.number(8)
        if count > len(self.data):
            raise ValueError("more items than bytes")
        items = b"".join(self.value(item_kind) for _ in range(count))
        return Entry(key, kind, struct.pack("<Q", count) + items, item_kind)

    def tensor(self) -> TensorInfo:
        name, count = self.string(), self.number(4)
        dimensions = tuple(self.number(8) for _ in range(min(count, len(self.data))))
        return TensorInfo(name, dimensions, self.number(4), self.number(8))


def parse(data: bytes) -> Header:
    """ValueError if the bytes are not a whole header (without its magic)."""
    reader = _Reader(data)
    version, tensors, entries = reader.number(4), reader.number(8), reader.number(8)
    made = tuple(reader.entry() for _ in range(entries))
    return Header(version, made, tuple(reader.tensor() for _ in range(tensors)), data[reader.at :])


def pack(header: Header) -> bytes:
    counts = [len(header.tensors) + header.lies[0], len(header.entries) + header.lies[1]]
    parts = [struct.pack("<I", header.version), *(_number(count, 8) for count in counts)]
    for entry in header.entries:
        parts += [_string(entry.key), _number(entry.kind, 4)]
        parts += [_number(entry.item_kind, 4)] if entry.kind == ARRAY else []
        parts += [entry.value]
    for tensor in header.tensors:
        parts += [_string(tensor.name), _number(len(tensor.dimensions), 4)]
        parts += [_number(size, 8) for size in tensor.dimensions]
        parts += [_number(tensor.kind, 4), _number(tensor.offset, 8)]
    return b"".join(parts) + header.rest


def _number(value: int, size: int) -> bytes:
    return (value % (1 << 8 * size)).to_bytes(size, "little")


def _string(text: bytes) -> bytes:
    return _number(len(text), 8) + text


def change(header: Header, random: Random) -> bytes:
    """The header with one to four of its fields changed."""
    for _ in range(random.choice((1, 1, 2, 4))):
        header = _change_one(header, random)
    return pack(header)


def _change_one(header: Header, random: Random) -> Header:
    entries, tensors = list(header.entries), list(header.tensors)
    match random.randrange(8):
        case 0 if entries:
            entries.pop(random.randrange(len(entries)))
        case 1 if tensors:
            tensors.pop(random.randrange(len(tensors)))
        case 2 if tensors:
            tensors.append(random.choice(tensors))
        case 3:
            entries.append(_new_entry(random))
        case 4 | 5 if tensors:
            at = random.randrange(len(tensors))
            tensors[at] = _changed_tensor(tensors[at], random)
        case 6 if entries:
            at = random.randrange(len(entries))
            entries[at] = _changed_entry(entries[at], random)
        case _:
            lies = random.choice(((0, 1), (1, 0), (0, 1 << 40), (1 << 63, 0), (-1, -1)))
            return replace(header, lies=lies, version=random.choice((header.version, 2, 3, 1, 4)))
    return replace(header, entries=tuple(entries), tensors=tuple(tensors))


def _new_entry(random: Random) -> Entry:
    kind = random.choice([*SIZES, STRING, ARRAY, 13])
    if kind == STRING:
        return Entry(random.choice(KEYS), kind, _string(random.choice(TEXTS)))
    if kind == ARRAY:
        item_kind = random.choice([*SIZES, STRING, ARRAY])
        return Entry(random.choice(KEYS), kind, _number(random.choice(NUMBERS), 8) + b"\0" * 64, item_kind)
    return Entry(random.choice(KEYS), kind, _number(random.choice(NUMBERS), SIZES.get(kind, 4)))


def _changed_entry(entry: Entry, random: Random) -> Entry:
    new = _new_entry(random)
    return random.choice((replace(new, key=entry.key), replace(entry, key=new.key), replace(entry, kind=new.kind)))


def _changed_tensor(tensor: TensorInfo, random: Random) -> TensorInfo:
    sizes = list(tensor.dimensions)
    match random.randrange(5):
        case 0:
            return replace(tensor, kind=random.choice((0, 1, 2, 8, 12, 16, 24, 30, 39, 1 << 31)))
        case 1:
            return replace(tensor, offset=random.choice(NUMBERS))
        case 2:
            return replace(tensor, name=random.choice((b"", b"\xff", tensor.name + b"x", b"output.weight")))
        case 3 if sizes:
            sizes[random.randrange(len(sizes))] = random.choice(NUMBERS)
        case _:
            sizes = random.choice((sizes[:-1], [*sizes, 1], [*sizes, 0], [1] * 300))
    return replace(tensor, dimensions=tuple(sizes))
