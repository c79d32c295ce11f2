"""A cache of keys and values that appends in place.

transformers' DynamicCache copies all keys and values for every token, which for a long context costs more than
attention itself. Here each tensor is allocated with spare room. A new token is written behind the others, and the
tensor is copied only when the room is used up, once in many tokens.

With kv_dtype "int8" the tensors hold bytes: a row is the blocks of Q8_0 of a token's keys or values in a head, so each
32 values have a scale. Native attention computes on them as they lie. What takes, moves or drops whole rows needs not
know that. Others get the values of update(), decoded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from flashclient._native import decode_rows, encode_rows
from flashclient.kernels.arrays import array_of
from weightd_proto.encodings import in_blocks
from weightd_proto.modes import KV_INT8, KV_PLAIN

SPARE_TOKENS_MIN = 64
SPARE_SHARE = 8  # spare room is an eighth of what is held
BLOCKS = in_blocks("Q8_0")  # of int8: Attention::BLOCKS


class _Growing(DynamicLayer):  # type: ignore[no-untyped-call]
    """A layer whose keys and values lie in larger tensors, the rooms.

    Views of them keep their values until crop() removes tokens and others are written in their place.
    """

    _rooms: tuple[Tensor, Tensor] | None = None  # [sequences, heads, capacity, elements], of keys and of values
    _begin = 0  # where the held tokens begin in the rooms
    _length = 0  # tokens held
    _shown: tuple[Tensor | None, Tensor | None] | None = (None, None)  # what was asked for, or set by somebody

    @property
    def keys(self) -> Tensor:
        """[sequences, heads, tokens, elements]; None before the first update."""
        return self._views()[0]  # type: ignore[return-value]

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        values = self._views()[1]  # of the length before
        self._length = 0 if keys is None or keys.numel() == 0 else keys.shape[-2]
        self._shown = (keys, values)

    @property
    def values(self) -> Tensor:
        """Like keys."""
        return self._views()[1]  # type: ignore[return-value]

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self._shown = (self._views()[0], values)

    def none_of(self, x: Tensor, heads: int, elements: int) -> Tensor:
        """Keys or values of no tokens in the form that is held, for the sequences and of the dtype of x."""
        return x.new_empty(x.shape[0], heads, 0, elements)

    @property
    def held_at(self) -> tuple[int, int]:
        """Where the held tokens begin in the rooms, and their number."""
        return self._begin, self._length

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends [sequences, heads, tokens, elements] each; returns all keys and values, as views.

        Raises:
            ValueError: there are not as many sequences or heads as before.
        """
        tokens = key_states.shape[-2]
        rooms = self.room_for(tokens, key_states, value_states)
        begin = self._begin
        end = begin + self._length + tokens
        for room, states in zip(rooms, (key_states, value_states), strict=True):
            room[..., end - tokens : end, :] = states
        self.add_written(tokens)
        key_room, value_room = rooms
        return key_room[..., begin:end, :], value_room[..., begin:end, :]

    def room_for(self, tokens: int, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Tensors [sequences, heads, capacity, elements] with what is held, and room for `tokens` behind it.

        Args:
            key_states, value_states: of the shape, but for the tokens, and the dtype of those to be written.

        Raises:
            ValueError: there are not as many sequences or heads as before.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rooms = self._rooms
        held = rooms[0] if rooms is not None and self._shown is None else self.keys
        if self._length and key_states.shape[:2] != held.shape[:2]:
            raise ValueError(
                f"keys of [sequences, heads] {list(key_states.shape[:2])} do not continue {list(held.shape[:2])}"
            )
        end = self._length + tokens
        if rooms is None or self._begin + end > rooms[0].shape[-2] or not self._hold(rooms):
            keys, values = (self.keys, self.values) if self._length else (key_states, value_states)
            self._rooms = rooms = (
                _with_room(keys, key_states, self._length, end),
                _with_room(values, value_states, self._length, end),
            )
            self._begin = 0
            self._shown = None
        return rooms

    def room_now(self, sequences: int, tokens: int) -> tuple[Tensor, Tensor] | None:
        """What room_for() returns, where nothing need be allocated or looked at; else None."""
        rooms = self._rooms
        if rooms is None or self._shown is not None or rooms[0].shape[0] != sequences:
            return None
        writable = torch.is_inference_mode_enabled() or not rooms[0].is_inference()
        return rooms if writable and self._begin + self._length + tokens <= rooms[0].shape[-2] else None

    def add_written(self, tokens: int) -> None:
        """Says that so many tokens were written behind those held."""
        self._length += tokens
        self._shown = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i becomes sequence beam_idx[i], with its spare room."""
        if self._rooms is None or not self._hold(self._rooms):
            super().reorder_cache(beam_idx)  # type: ignore[arg-type]  # any tensor of integers
        elif self._length > 0:
            key_room, value_room = (room.index_select(0, beam_idx.to(room.device)) for room in self._rooms)
            self._rooms = key_room, value_room
            self._shown = None

    def reset(self) -> None:
        """Removes all tokens and frees the memory."""
        self._rooms, self._shown, self._begin, self._length = None, (None, None), 0, 0
        self.is_initialized = False  # older transformers set all keys to 0 otherwise
        super().reset()

    def _views(self) -> tuple[Tensor | None, Tensor | None]:
        if self._shown is None:
            assert self._rooms is not None
            held = slice(self._begin, self._begin + self._length)
            key_room, value_room = self._rooms
            self._shown = (key_room[..., held, :], value_room[..., held, :])
        return self._shown

    def _hold(self, rooms: tuple[Tensor, Tensor]) -> bool:
        """Whether what is held lies in `rooms`, and may be written there.

        If somebody has replaced the layer's tensors, it does not. A tensor made in inference mode cannot be written
        outside of it.
        """
        writable = torch.is_inference_mode_enabled() or not rooms[0].is_inference()
        if self._shown is None:
            return writable
        return writable and all(
            held is not None and _lies_at(held, room[..., self._begin :, :])
            for held, room in zip(self._shown, rooms, strict=True)
        )


class GrowingLayer(_Growing):  # type: ignore[no-untyped-call]
    """transformers' DynamicLayer, which appends in place."""

    def get_seq_length(self) -> int:
        """The tokens held."""
        return self._length


class GrowingWindowLayer(_Growing, DynamicSlidingWindowLayer):  # type: ignore[no-untyped-call]
    """transformers' DynamicSlidingWindowLayer, which appends in place. The held tokens move through the rooms."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """See GrowingLayer. Returns the window of the first new token, and the tokens after it."""
        keys, values = super().update(key_states, value_states)
        visible = self.sliding_window - 1 + key_states.shape[-2]
        return keys[..., -visible:, :], values[..., -visible:, :]

    def add_written(self, tokens: int) -> None:
        """Says that so many tokens were written behind those held. Those that left the window are held no more."""
        super().add_written(tokens)
        self.cumulative_length += tokens
        if not getattr(self, "record_past", False):  # older transformers have no record
            left = max(0, self._length - (self.sliding_window - 1))
            self._begin += left
            self._length -= left


class _Encoded(_Growing):  # type: ignore[no-untyped-call]
    """Keys and values in int8: [sequences, heads, tokens, bytes of a row]."""

    def append(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """update() without decoding."""
        return super().update(encoded(key_states), encoded(value_states))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """See _Growing. Returns copies, rounded to the dtype of the states."""
        keys, values = self.append(key_states, value_states)
        return decoded(keys, key_states), decoded(values, value_states)

    def none_of(self, x: Tensor, heads: int, elements: int) -> Tensor:
        """See _Growing."""
        return x.new_empty(x.shape[0], heads, 0, row_bytes(elements), dtype=torch.uint8)


class Int8Layer(_Encoded, GrowingLayer):  # type: ignore[no-untyped-call]
    """GrowingLayer in int8."""


class Int8WindowLayer(_Encoded, GrowingWindowLayer):  # type: ignore[no-untyped-call]
    """GrowingWindowLayer in int8."""


class GrowingCache(DynamicCache):
    """DynamicCache(config=config) whose layers append in place.

    Args:
        kv_dtype: of the keys and values, one of KV_DTYPES.
    """

    def __init__(self, config: PreTrainedConfig, kv_dtype: str = KV_PLAIN) -> None:
        super().__init__(config=config)
        self.kv_dtype = kv_dtype
        self.layers = [_growing(layer, kv_dtype == KV_INT8) for layer in self.layers]

    @property
    def held_bytes(self) -> int:
        """Of the keys and values that are held, without the spare room."""
        layers = [one for one in self.layers if isinstance(one, _Growing) and one.is_initialized]
        return sum(one.keys.nbytes + one.values.nbytes for one in layers)

    @property
    def holds_tokens(self) -> bool:
        """Whether each layer holds keys and values by token, and no state of another kind."""
        return all(isinstance(layer, _Growing) for layer in self.layers)


def _growing(layer: Any, int8: bool) -> Any:
    if type(layer) is DynamicLayer:
        return Int8Layer() if int8 else GrowingLayer()  # type: ignore[no-untyped-call]
    if type(layer) is DynamicSlidingWindowLayer:
        return (Int8WindowLayer if int8 else GrowingWindowLayer)(layer.sliding_window)
    return layer


def int8_layer(cache: Any, index: int) -> Int8Layer | Int8WindowLayer | None:
    """A layer of a cache, if it holds keys and values in int8."""
    layers = cache.layers if isinstance(cache, GrowingCache) and cache.kv_dtype == KV_INT8 else ()
    layer = layers[index] if index < len(layers) else None
    return layer if isinstance(layer, Int8Layer | Int8WindowLayer) else None


def row_bytes(elements: int) -> int:
    """Of the keys or values of a token in a head, in int8."""
    return -(-elements // BLOCKS.block_values) * BLOCKS.block_bytes


def encoded(states: Tensor) -> Tensor:
    """Keys or values [sequences, heads, tokens, elements] in int8, [..., bytes of a row]."""
    elements = states.shape[-1]
    rows = states.detach().to(torch.float32).reshape(-1, elements).contiguous()
    out = torch.empty(len(rows), row_bytes(elements), dtype=torch.uint8, device="cpu")
    encode_rows(array_of(rows), array_of(out))
    return out.view(*states.shape[:-1], -1)


def decoded(rows: Tensor, like: Tensor) -> Tensor:
    """Keys or values in int8 with the elements and the dtype of `like`."""
    flat = rows.reshape(-1, rows.shape[-1])
    values = rows.shape[-1] // BLOCKS.block_bytes * BLOCKS.block_values
    out = torch.empty(len(flat), values, dtype=torch.float32, device="cpu")
    decode_rows(BLOCKS, array_of(flat), array_of(out))
    return out[:, : like.shape[-1]].to(like.dtype).reshape(*rows.shape[:-1], -1)


def capacity_for(tokens: int) -> int:
    """The capacity of a tensor that is allocated for `tokens` tokens."""
    return tokens + max(SPARE_TOKENS_MIN, tokens // SPARE_SHARE)


def _with_room(held: Tensor, new: Tensor, length: int, end: int) -> Tensor:
    """A tensor with capacity for `end` tokens and more, which begins with the `length` tokens of `held`."""
    sequences, heads, _, elements = new.shape
    room = new.new_empty(sequences, heads, capacity_for(end), elements)
    if length:
        room[..., :length, :] = held
    return room


def _lies_at(held: Tensor, room: Tensor) -> bool:
    """Whether `held` is the beginning of `room`."""
    return held.data_ptr() == room.data_ptr() and held.stride() == room.stride() and held.shape[:2] == room.shape[:2]
