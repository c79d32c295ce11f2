"""Structure-aware mutation: changes fields of a JSON text, a protobuf message, or a GGUF or safetensors header.

Inputs whose bytes were changed at random seldom pass the first check of a reader. Inputs that cannot be parsed, and one
in RAW_SHARE of the others, are mutated by libFuzzer as plain bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

NUMBERS = [0, 1, 2, 3, 7, 8, 31, 64, 255, 4096, 1 << 16, 1 << 31, 1 << 32, 1 << 53, 1 << 63, 1 << 64, 10**30]
TEXTS = ["", "x", "0", "1", "../x", "/etc/passwd", "a/b", "\0", "\ud800", "\u00e9", "x" * 300, "{{ x }}", "null"]
VALUES: list[Any] = [
    None, True, False, *NUMBERS, *(-number for number in NUMBERS), 0.5, 1e308, float("nan"), float("inf"), *TEXTS,
    [], {}, [[]], [1, 2], ["x"], {"": None}, {"a": 1},
]  # fmt: skip
RAW_SHARE = 8  # one in so many is mutated as bytes


@dataclass(frozen=True)
class Mutator:
    """`parse` raises ValueError or DecodeError for other inputs. `change` makes new bytes from its result."""

    parse: Callable[[bytes], Any]
    change: Callable[[Any, Random], bytes]

    def by_field(self, data: bytes, seed: int) -> bytes | None:
        """`data` with some fields changed; None if it has no fields."""
        try:
            return self.change(self.parse(data), Random(seed))
        except (ValueError, DecodeError, RecursionError):
            return None

    def __call__(self, data: bytes, max_size: int, seed: int) -> bytes:
        """The custom mutator, with the arguments that atheris passes."""
        import atheris  # only there while fuzzing

        changed = self.by_field(data, seed) if seed % RAW_SHARE else None
        return bytes(atheris.Mutate(data, max_size)) if changed is None or len(changed) > max_size else changed


# JSON


def json_text(value: Any) -> bytes:
    return json.dumps(value).encode()


def change_json(value: Any, random: Random, keys: Sequence[str] = ()) -> Any:
    """`value` with one to four of its parts changed. `keys`: names that a reader may look for."""
    for _ in range(random.choice((1, 1, 2, 4))):
        value = _change_one(value, random, keys)
    return value


def _change_one(value: Any, random: Random, keys: Sequence[str]) -> Any:
    places = list(_places(value))
    if not places or random.randrange(16) == 0:
        return random.choice(VALUES)
    holder, key = random.choice(places)
    _change_part(holder, key, random.choice(places), random, keys)
    return value


def _change_part(holder: Any, key: Any, other: tuple[Any, Any], random: Random, keys: Sequence[str]) -> None:
    match random.randrange(8):
        case 0:
            del holder[key]
        case 1 | 2:
            holder[key] = random.choice(VALUES)
        case 3:
            holder[key] = _nudged(holder[key], random)
        case 4:
            holder[key] = json.loads(json.dumps(other[0][other[1]]))
        case 5:
            holder[key] = random.choice(([holder[key]], {"x": holder[key]}, [holder[key]] * 3))
        case _:
            if isinstance(holder, dict):
                name = random.choice(keys) if keys else random.choice(TEXTS)
                holder[name] = random.choice((random.choice(VALUES), holder[key]))
            else:
                holder.insert(key, random.choice(VALUES))


def _places(value: Any) -> Any:
    """Every part of the value: the object that contains it, and its key there."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in list(parts):
        yield value, key
        yield from _places(part)


def _nudged(value: Any, random: Random) -> Any:
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return random.choice((value + 1, value - 1, value * 2, -value, value + 0.5, str(value)))
    if isinstance(value, str):
        at = random.randrange(len(value) + 1)
        return random.choice((value[:at], value + random.choice(TEXTS), value[:at] + "\0" + value[at:], value.upper()))
    return value


# safetensors


def safetensors(keys: Sequence[str]) -> Mutator:
    """Mutates a file: the length of its header, the header, or the data. `keys`: names that a reader may look for."""
    known = [*keys, "dtype", "shape", "data_offsets"]

    def mutate(parsed: tuple[Any, bytes], random: Random) -> bytes:
        text = json_text(change_json(parsed[0], random, known))
        size_bytes = len(text) + random.choice((0, 0, 0, 1, -1, 1 << 62))
        return size_bytes.to_bytes(8, "little", signed=True) + text + parsed[1]

    return Mutator(_parse_safetensors, mutate)


def _parse_safetensors(data: bytes) -> tuple[Any, bytes]:
    size_bytes = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size_bytes]), data[8 + size_bytes :]


# Protobuf


def change_message(message: Message, random: Random) -> None:
    """Changes one to four fields of the message or of those inside it."""
    for _ in range(random.choice((1, 1, 2, 4))):
        inside = list(_messages(message))
        chosen = random.choice(inside)
        fields = list(chosen.DESCRIPTOR.fields)
        if fields:
            _change_field(chosen, random.choice(fields), random)


def _messages(message: Message) -> Any:
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in value if field.is_repeated else [value]:
                yield from _messages(part)


def _change_field(message: Message, field: FieldDescriptor, random: Random) -> None:
    if random.randrange(6) == 0:
        message.ClearField(field.name)
    elif field.message_type is not None:
        _change_part_message(message, field, random)
    elif field.is_repeated:
        values = getattr(message, field.name)
        if len(values) and random.randrange(2):
            values[random.randrange(len(values))] = _scalar(field, random, values[0])
        else:
            values.extend([_scalar(field, random, 0)] * random.choice((1, 1, 3, 100)))
    else:
        setattr(message, field.name, _scalar(field, random, getattr(message, field.name)))


def _change_part_message(message: Message, field: FieldDescriptor, random: Random) -> None:
    if not field.is_repeated:
        getattr(message, field.name).SetInParent()
        return
    parts = getattr(message, field.name)
    match random.randrange(3):
        case 0 if len(parts):
            del parts[random.randrange(len(parts))]
        case 1 if len(parts):
            parts.add().CopyFrom(random.choice(list(parts)))
        case _:
            parts.add()


def _scalar(field: FieldDescriptor, random: Random, now: Any) -> Any:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING if field.type == FieldDescriptor.TYPE_BYTES:
            return random.choice((b"", b"x", b"\0" * 16, b"\xff" * 17, b"y" * 300))
        case FieldDescriptor.CPPTYPE_STRING:
            text = random.choice(TEXTS)
            return text if text.isprintable() or text == "\0" else "\u00e9"
        case FieldDescriptor.CPPTYPE_DOUBLE | FieldDescriptor.CPPTYPE_FLOAT:
            return random.choice((0.0, -1.0, float("nan"), float("inf")))
        case FieldDescriptor.CPPTYPE_BOOL:
            return random.randrange(2) == 1
    bits = 32 if field.cpp_type in (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_UINT32) else 64
    signed = field.cpp_type in (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64)
    value = random.choice((now + 1, now - 1, now * 2, random.choice(NUMBERS), (1 << bits) - 1)) % (1 << bits)
    return value - (1 << bits) if signed and value >> (bits - 1) else value
