"""A cache of keys and values that appends in place.

transformers' DynamicCache copies all keys and values for every token, which for a long context costs more than
attention itself. Here each tensor is allocated with spare room. A new token is written behind the others, and the
tensor is copied only when the room is used up, once in many tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

SPARE_TOKENS_MIN = 64
SPARE_SHARE = 8  # spare room is an eighth of what is held


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """transformers' DynamicLayer, with keys and values that are the beginnings of larger tensors.

    Views of them keep their values until crop() removes tokens and others are written in their place.
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
        """Sequence i becomes sequence beam_idx[i], with its spare room."""
        length = self.get_seq_length()
        if self._rooms is None or not _is_beginning(self.keys, self._rooms[0]):
            super().reorder_cache(beam_idx)  # type: ignore[arg-type]  # any tensor of integers
        elif length > 0:
            key_room, value_room = (room.index_select(0, beam_idx.to(room.device)) for room in self._rooms)
            self._rooms = key_room, value_room
            self._show(length)

    def reset(self) -> None:
        """Removes all tokens and frees the memory."""
        self._rooms = None
        super().reset()

    def _show(self, length: int) -> None:
        assert self._rooms is not None
        self.keys, self.values = (room[..., :length, :] for room in self._rooms)


class GrowingCache(DynamicCache):
    """DynamicCache(config=config) with a GrowingLayer for each layer that holds the whole context.

    Layers with a sliding window are transformers' own.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        self.layers = [_growing(layer) for layer in self.layers]


def _growing(layer: Any) -> Any:
    return GrowingLayer() if type(layer) is DynamicLayer else layer  # type: ignore[no-untyped-call]


def capacity_for(tokens: int) -> int:
    """The capacity of a tensor that is allocated for `tokens` tokens."""
    return tokens + max(SPARE_TOKENS_MIN, tokens // SPARE_SHARE)


def _appended(room: Tensor | None, held: Tensor, new: Tensor, length: int) -> Tensor:
    """`room`, or a larger copy, with `new` written behind the `length` tokens of `held`."""
    end = length + new.shape[-2]
    if room is None or end > room.shape[-2] or not _is_beginning(held, room):
        sequences, heads, _, elements = new.shape
        room = new.new_empty(sequences, heads, capacity_for(end), elements)
        if length:
            room[..., :length, :] = held
    room[..., length:end, :] = new
    return room


def _is_beginning(held: Tensor, room: Tensor) -> bool:
    """Whether `held` is the beginning of `room`, and `room` may be written.

    If somebody has replaced the layer's tensors, the room is not theirs. A tensor made in inference mode cannot be
    written outside of it.
    """
    return (
        held.data_ptr() == room.data_ptr()
        and held.stride() == room.stride()
        and held.shape[:2] == room.shape[:2]
        and (torch.is_inference_mode_enabled() or not room.is_inference())
    )
