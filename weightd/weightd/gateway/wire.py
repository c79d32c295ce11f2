"""Counts the fields of a protobuf message before it is parsed.

A parsed field can take twenty times its bytes: a mebibyte of empty submessages becomes half a million objects. Counting
the fields first makes no objects.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from google.protobuf.message import Message

Descriptor = Any  # protobuf has one class for type checkers and another at run time
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types; proto3 has no groups (3, 4)
FIXED_BYTES = {FIXED64: 8, FIXED32: 4}
VARINT_BYTES_MAX = 10


def count_fields(message: bytes, of: type[Message], most: int) -> int:
    """Counts the fields of `message`, whose type is `of`, and of its submessages that are not repeated.

    A repeated submessage counts as one field, whatever it contains: numbers and strings make no objects. Counting stops
    above `most`. Raises ValueError if the bytes are not a message.
    """
    return _count(message, 0, len(message), of.DESCRIPTOR, most)


def _count(message: bytes, at: int, end: int, of: Descriptor, most: int) -> int:
    once = _contained_once(of)
    count = 0
    while at < end and count <= most:
        tag, at = _varint(message, at, end)
        count += 1
        kind = tag & 7
        if kind == BYTES:
            size, at = _varint(message, at, end)
            inside = once.get(tag >> 3)
            if inside is not None and at + size <= end:
                count += _count(message, at, at + size, inside, most - count)
            at += size
        elif kind == VARINT:
            _, at = _varint(message, at, end)
        elif kind in FIXED_BYTES:
            at += FIXED_BYTES[kind]
        else:
            raise ValueError(f"a field of wire type {kind}")
    if at > end:
        raise ValueError("a field that ends behind its message")
    return count


@cache
def _contained_once(of: Descriptor) -> dict[int, Descriptor]:
    """The types of the submessages that are not repeated, by field number."""
    fields = of.fields_by_number.items()
    return {n: field.message_type for n, field in fields if field.message_type is not None and not field.is_repeated}


def _varint(message: bytes, at: int, end: int) -> tuple[int, int]:
    """The number at `at`, and the offset behind it."""
    if at < end and message[at] < 0x80:  # the usual case
        return message[at], at + 1
    value = 0
    for place, byte in enumerate(message[at : min(end, at + VARINT_BYTES_MAX)]):
        value |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return value, at + place + 1
    raise ValueError("a number without an end")
