"""A cache of keys and values that appends in place.

transformers' DynamicCache makes new tensors of all keys and values for every token, which for a long context costs more
than attention itself. Here each tensor has room to spare: a token is written behind the others, and a context that
outgrows its room is copied once in many tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

SPARE_TOKENS_MIN = 64
SPARE_SHARE = 8  # an eighth of what is held


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """transformers' DynamicLayer whose keys and values are the beginnings of larger tensors.

    Views that it gave out keep their values until crop() takes tokens back and others are written in their place.
    """

    keys: Tensor  # None before the first update
    values: Tensor
    _rooms: tuple[Tensor, Tensor] | None = None  # [sequences, heads, capacity, elements], of keys and of values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends [sequences, heads, tokens, elements] each; returns all keys and values, as views.

        Raises:
            ValueError: there are not as many sequences or heads as before.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        if length and key_states.shape[:2] != self.keys.shape[:2]:
            raise ValueError(
                f"keys of [sequences, heads] {list(key_states.shape[:2])} do not continue {list(self.keys.shape[:2])}"
            )
        key_room, value_room = self._rooms or (None, None)
        self._rooms = (
            _appended(key_room, self.keys, key_states, length),
            _appended(value_room, self.values, value_states, length),
        )
        self._show(length + key_states.shape[-2])
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i becomes that of beam_idx[i]; the room moves with it, so that the next token finds it."""
        length = self.get_seq_length()
        if self._rooms is None or not _is_beginning(self.keys, self._rooms[0]):
            super().reorder_cache(beam_idx)  # type: ignore[arg-type]  # any tensor of integers
        elif length > 0:
            key_room, value_room = (room.index_select(0, beam_idx.to(room.device)) for room in self._rooms)
            self._rooms = key_room, value_room
            self._show(length)

    def reset(self) -> None:
        """Forgets everything, and gives its memory back."""
        self._rooms = None
        super().reset()

    def _show(self, length: int) -> None:
        assert self._rooms is not None
        self.keys, self.values = (room[..., :length, :] for room in self._rooms)


class GrowingCache(DynamicCache):
    """DynamicCache(config=config) with growing layers in the place of those that hold the whole context.

    Layers with a sliding window stay transformers' own.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        self.layers = [_growing(layer) for layer in self.layers]


def _growing(layer: Any) -> Any:
    return GrowingLayer() if type(layer) is DynamicLayer else layer  # type: ignore[no-untyped-call]


def capacity_for(tokens: int) -> int:
    """Of a room that is made for `tokens` tokens."""
    return tokens + max(SPARE_TOKENS_MIN, tokens // SPARE_SHARE)


def _appended(room: Tensor | None, held: Tensor, new: Tensor, length: int) -> Tensor:
    """The room of the `length` tokens in `held` with `new` written behind them, or a larger one."""
    end = length + new.shape[-2]
    if room is None or end > room.shape[-2] or not _is_beginning(held, room):
        sequences, heads, _, elements = new.shape
        room = new.new_empty(sequences, heads, capacity_for(end), elements)
        if length:
            room[..., :length, :] = held
    room[..., length:end, :] = new
    return room


def _is_beginning(held: Tensor, room: Tensor) -> bool:
    """Not so where somebody has replaced what the layer holds: then the room has nothing to do with it. A tensor that
    was made in inference mode cannot be written outside of it."""
    return (
        held.data_ptr() == room.data_ptr()
        and held.stride() == room.stride()
        and held.shape[:2] == room.shape[:2]
        and (torch.is_inference_mode_enabled() or not room.is_inference())
    )
