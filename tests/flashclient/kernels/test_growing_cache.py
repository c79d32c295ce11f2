"""The growing cache holds the same keys and values as transformers' after the same calls, in bounded memory."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from checkpoints import make_config, make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from flashclient.kernels.growing_cache import (
    SPARE_SHARE,
    SPARE_TOKENS_MIN,
    GrowingCache,
    GrowingLayer,
    GrowingWindowLayer,
)
from flashclient.torch_state import one_thread

HEADS, ELEMENTS = 2, 8
GREEDY: dict[str, Any] = {"max_new_tokens": 70, "do_sample": False, "eos_token_id": None}

calls = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.integers(1, 90)),
        st.tuples(st.just("crop"), st.integers(0, 8)),
        st.tuples(st.just("reorder"), st.integers(0, 100)),
        st.tuples(st.just("repeat"), st.integers(1, 2)),
        st.tuples(st.just("select"), st.integers(0, 100)),
        st.tuples(st.just("copy"), st.just(0)),
        st.tuples(st.just("reset"), st.just(0)),
    ),
    max_size=25,
)


def states(sequences: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Keys or values as a projection makes them: not contiguous."""
    made = torch.randn(2, sequences, tokens, HEADS, ELEMENTS).transpose(2, 3)
    return made[0], made[1]


def room_tokens(layer: GrowingLayer) -> int:
    """The number of tokens that fit into the memory behind a layer's keys."""
    return layer.keys.untyped_storage().nbytes() // (layer.keys.shape[0] * HEADS * ELEMENTS * 4)


def within_bound(layer: GrowingLayer, longest: int) -> bool:
    return room_tokens(layer) <= longest + max(SPARE_TOKENS_MIN, longest // SPARE_SHARE)


def apply(layer: Any, call: str, argument: int, sequences: int) -> None:
    if call == "crop" and layer.get_seq_length():
        layer.crop(-min(argument, layer.get_seq_length()))
    elif call == "reorder":
        order = torch.Generator().manual_seed(argument)
        layer.reorder_cache(torch.randint(0, sequences, (sequences,), generator=order))
    elif call == "repeat":
        layer.batch_repeat_interleave(argument)
    elif call == "select":
        layer.batch_select_indices(torch.tensor([argument % sequences]))
    elif call == "reset":
        layer.reset()


@settings(max_examples=400, deadline=None)
@given(calls, st.integers(1, 3), st.sampled_from([None, 2, 5, 40]), st.booleans())
def test_calls_in_any_order_are_those_of_transformers_layer(
    steps: list[tuple[str, int]], sequences: int, window: int | None, record: bool
) -> None:
    ours: Any = GrowingLayer() if window is None else GrowingWindowLayer(window)  # type: ignore[no-untyped-call]
    theirs: Any = DynamicLayer() if window is None else DynamicSlidingWindowLayer(window)  # type: ignore[no-untyped-call]
    if window is not None and record:
        for layer in (ours, theirs):
            layer.activate_past_recording()
    longest, torch_sequences = 0, sequences
    for call, argument in [("update", 3), *steps]:
        if call == "update":
            added = states(torch_sequences, argument)
            got, expected = ours.update(*added), theirs.update(*added)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
            longest = max(longest, ours.get_seq_length())
            assert window is not None or within_bound(ours, longest)
        elif call == "copy":
            ours = copy.deepcopy(ours)
        else:
            refused = []
            for layer in (ours, theirs):
                try:
                    apply(layer, call, argument, torch_sequences)
                except RuntimeError as error:  # of crop() beyond the window
                    refused.append(str(error))
            assert len(refused) in (0, 2)
            if theirs.get_seq_length():
                torch_sequences = theirs.keys.shape[0]
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(3) == theirs.get_mask_sizes(3)
        if theirs.get_seq_length():
            assert torch.equal(ours.keys, theirs.keys)
            assert torch.equal(ours.values, theirs.values)


def test_tokens_are_written_in_place() -> None:
    """A thousand tokens, added one by one, copy the held ones about a dozen times."""
    layer: Any = GrowingLayer()  # type: ignore[no-untyped-call]
    addresses = []
    for _ in range(1000):
        keys, values = layer.update(*states(2, 1))
        assert keys.data_ptr() != values.data_ptr()
        addresses.append(keys.data_ptr())
    moves = sum(before != after for before, after in itertools.pairwise(addresses))
    assert 0 < moves <= 14


def test_a_reordered_room_is_not_copied_again() -> None:
    layer: Any = GrowingLayer()  # type: ignore[no-untyped-call]
    layer.update(*states(3, 10))
    layer.reorder_cache(torch.tensor([2, 2, 0]))
    before = layer.keys.data_ptr()
    assert layer.update(*states(3, 1))[0].data_ptr() == before


def test_a_copy_and_its_original_go_separate_ways() -> None:
    first: Any = GrowingLayer()  # type: ignore[no-untyped-call]
    first.update(*states(1, 5))
    second = copy.deepcopy(first)
    begun = first.keys.clone()
    one, other = states(1, 2), states(1, 2)
    first.update(*one)
    second.update(*other)
    assert torch.equal(first.keys, torch.cat([begun, one[0]], 2))
    assert torch.equal(second.keys, torch.cat([begun, other[0]], 2))


def test_what_somebody_else_put_there_is_not_overwritten() -> None:
    """A layer whose keys were replaced by the beginning of another tensor."""
    layer: Any = GrowingLayer()  # type: ignore[no-untyped-call]
    layer.update(*states(1, 5))
    theirs, values = states(1, 9)
    kept = theirs.clone()
    layer.keys, layer.values = theirs[:, :, :4], values[:, :, :4]
    new = states(1, 1)
    assert torch.equal(layer.update(*new)[0], torch.cat([theirs[:, :, :4], new[0]], 2))
    assert torch.equal(theirs, kept)


def test_a_cache_of_inference_mode_goes_on_outside() -> None:
    layer: Any = GrowingLayer()  # type: ignore[no-untyped-call]
    with torch.inference_mode():
        layer.update(*states(1, 5))
        layer.update(*states(1, 1))
    assert layer.update(*states(1, 1))[0].shape == (1, HEADS, 7, ELEMENTS)


def test_another_number_of_sequences_is_refused() -> None:
    layer: Any = GrowingLayer()  # type: ignore[no-untyped-call]
    layer.update(*states(2, 5))
    for sequences in (1, 3):
        with pytest.raises(ValueError, match="do not continue"):
            layer.update(*states(sequences, 1))


def test_each_layer_grows_as_its_kind_does() -> None:
    config = make_config("gemma3", layers=6)
    kinds = [type(layer) for layer in GrowingCache(config).layers]
    growing: dict[Any, Any] = {DynamicLayer: GrowingLayer, DynamicSlidingWindowLayer: GrowingWindowLayer}
    assert kinds == [growing[type(layer)] for layer in DynamicCache(config=config).layers]
    assert set(kinds) == {GrowingLayer, GrowingWindowLayer}


def test_a_window_moves_through_bounded_memory() -> None:
    layer: Any = GrowingWindowLayer(100)
    moves, before = 0, 0
    for _ in range(1000):
        keys, _ = layer.update(*states(1, 1))
        address = keys.untyped_storage().data_ptr()
        moves, before = moves + (address != before), address
        assert room_tokens(layer) <= 100 + SPARE_TOKENS_MIN
    assert moves <= 20


@one_thread()
@pytest.mark.parametrize("family", ["opt", "llama", "gemma3"])
def test_generation_has_the_same_bits(family: str) -> None:
    """transformers' own attention reads views as it reads whole tensors."""
    model: Any = make_model(make_config(family, layers=6 if family == "gemma3" else 2)).requires_grad_(False)
    mask = torch.tensor([[0] * 8 + [1] * 3, [1] * 11])
    ids = torch.randint(3, 300, (2, 11), generator=torch.Generator().manual_seed(0)) * mask
    batch = {"input_ids": ids, "attention_mask": mask}
    one = {"input_ids": ids[1:]}
    draft = make_model(make_config(family), seed=1)
    for case in (batch, batch | {"num_beams": 3}, one, one | {"assistant_model": draft}):
        arguments: dict[str, Any] = {**GREEDY, **case, "return_dict_in_generate": True, "output_scores": True}
        ours = model.generate(**arguments, past_key_values=GrowingCache(model.config))
        theirs = model.generate(**arguments)
        assert torch.equal(ours.sequences, theirs.sequences)
        assert all(torch.equal(a, b) for a, b in zip(ours.scores, theirs.scores, strict=True))
        assert ours.past_key_values.get_seq_length() == theirs.past_key_values.get_seq_length()


@one_thread()
def test_a_conversation_continues_with_a_returned_cache() -> None:
    model: Any = make_model(make_config("llama")).requires_grad_(False)
    ids = torch.tensor([[5, 17, 200, 31, 8]])
    answers = []
    for cache in (GrowingCache(model.config), DynamicCache(config=model.config)):
        first = model.generate(ids, past_key_values=cache, return_dict_in_generate=True, **GREEDY)
        longer = torch.cat([first.sequences, torch.tensor([[9, 44, 45]])], 1)
        branch = copy.deepcopy(first.past_key_values)
        answers.append([model.generate(longer, past_key_values=each, **GREEDY) for each in (cache, branch)])
    for ours, theirs in zip(*answers, strict=True):
        assert torch.equal(ours, theirs)
