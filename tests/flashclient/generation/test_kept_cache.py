"""The next turn of a conversation computes only what is new, and gives the text that it gives alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_config, make_model, make_tokenizer
from cut_model import clients_of, cut
from transformers import DynamicCache, PreTrainedModel

from flashclient import FlashClient
from flashclient.generation.kept_cache import KeptCache
from flashclient.kernels.growing_cache import GrowingCache

TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}a:"
FAMILIES = ("llama", "gemma3")  # with windows of 16 tokens
NEW: dict[str, Any] = {"max_new_tokens": 6}


def never_long(tokens: int) -> bool:
    return False


def model_of(family: str) -> PreTrainedModel:
    model = make_model(make_config(family), seed=3)
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, FlashClient]]:
    cuts = [cut(model_of(family), make_tokenizer(), family) for family in FAMILIES]
    with clients_of(cuts, tmp_path_factory.mktemp("kept")) as made:
        for client in made.values():
            client.tokenizer.chat_template = TEMPLATE
        yield made


def chat(client: FlashClient, messages: Any) -> tuple[str, list[int]]:
    """The answer, and the tokens of each forward pass."""
    fed: list[int] = []
    hook = client.model.register_forward_pre_hook(
        lambda _, args, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        return client.chat(messages, **NEW), fed
    finally:
        hook.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_turn_feeds_only_what_is_new(clients: dict[str, FlashClient], family: str) -> None:
    client = clients[family]
    messages = [{"role": "user", "content": "Hi"}]
    client.chat(messages, **NEW)
    for _ in range(3):
        messages += [{"role": "assistant", "content": "Yo"}, {"role": "user", "content": "Go on"}]
        text, fed = chat(client, messages)
        prompt = "".join(f"{one['role'][0]}:{one['content']};" for one in messages) + "a:"
        alone = client.generate(prompt, **NEW)
        assert text == alone
        if family == "llama":
            assert fed[0] < 16, "the prompt of the turn before is kept"
            assert fed[1:] == [1] * 5


def test_stats_say_how_many_tokens_were_kept(clients: dict[str, FlashClient]) -> None:
    client = clients["llama"]
    client.chat("Once", **NEW)
    assert client.stats().kept_tokens == 0 or client.stats().kept_tokens < client.stats().prompt_tokens
    client.chat("Once", **NEW)
    assert client.stats().kept_tokens == client.stats().prompt_tokens - 1
    assert "kept from the last turn" in client.stats().table()


def test_other_ways_to_generate_neither_use_nor_change_it(clients: dict[str, FlashClient]) -> None:
    client = clients["llama"]
    expected = client.chat("Hello", **NEW)
    client.generate("x", **NEW)
    client.chat("Hello", **NEW, num_beams=2)
    client.chat(["Hello", "Bye"], **NEW)
    client.chat("Hello", **NEW, past_key_values=DynamicCache(config=client.model.config))
    client.chat("Hello", **NEW, use_cache=False)
    assert client.stats().kept_tokens == 0
    assert client.chat("Hello", **NEW) == expected
    assert client.stats().kept_tokens == client.stats().prompt_tokens - 1


def test_an_interrupted_answer_keeps_the_conversation_right(clients: dict[str, FlashClient]) -> None:
    client = clients["llama"]
    pieces = client.chat("Tell me", stream=True, max_new_tokens=40)
    next(pieces)
    pieces.close()
    alone = client.generate("u:Tell me;a:", **NEW)
    assert client.chat("Tell me", **NEW) == alone
    assert "".join(client.chat("Tell me", stream=True, **NEW)) == alone


def filled(family: str, tokens: list[int]) -> tuple[PreTrainedModel, GrowingCache]:
    model: Any = model_of(family)
    cache = GrowingCache(model.config)
    with torch.no_grad():
        model(torch.tensor([tokens]), past_key_values=cache, use_cache=True)
    return model, cache


@pytest.mark.parametrize(
    ("kept", "prompt", "length"),
    [
        ([5, 6, 7, 8], [5, 6, 7, 8, 9], 4),
        ([5, 6, 7, 8], [5, 6, 7, 8], 3),  # the last token is computed, for its logits
        ([5, 6, 7, 8], [5, 6, 9, 8, 3], 2),
        ([5, 6, 7, 8], [5, 6], 1),
        ([5, 6, 7, 8], [9, 6, 7, 8], None),
        ([5, 6, 7, 8], [5], None),
    ],
)
def test_what_two_prompts_have_in_common(kept: list[int], prompt: list[int], length: int | None) -> None:
    _, cache = filled("llama", kept)
    conversation = KeptCache()
    conversation.keep(kept, cache)
    taken = conversation.take(prompt, never_long)
    assert (None if taken is None else taken.get_seq_length()) == length
    assert conversation.take(prompt, never_long) is None, "it was given away"


def test_a_window_that_has_lost_tokens_is_only_continued(tmp_path: Path) -> None:
    tokens = list(range(3, 33))  # longer than the window of 16
    _, cache = filled("gemma3", tokens)
    conversation = KeptCache()
    conversation.keep(tokens, cache)
    taken = conversation.take([*tokens, 40], never_long)
    assert taken is not None
    conversation.keep(tokens, taken)
    assert conversation.take([*tokens[:20], 40], never_long) is None


def test_fewer_tokens_than_the_cache_has_are_kept() -> None:
    _, cache = filled("llama", [5, 6, 7, 8])
    conversation = KeptCache()
    conversation.keep([5, 6], cache)
    taken = conversation.take([5, 6, 7, 8], never_long)
    assert taken is not None
    assert taken.get_seq_length() == 2


def test_tokens_that_other_factors_rotate_are_computed_again() -> None:
    def is_long(tokens: int) -> bool:
        return tokens > 6

    for kept, prompt, usable in ((6, 7, False), (7, 6, False), (5, 6, True), (7, 9, True)):
        _, cache = filled("llama", list(range(3, 3 + kept)))
        conversation = KeptCache()
        conversation.keep(list(range(3, 3 + kept)), cache)
        assert (conversation.take(list(range(3, 3 + prompt)), is_long) is not None) == usable


def test_other_caches_are_not_kept() -> None:
    model = model_of("llama")
    conversation = KeptCache()
    conversation.keep([5, 6], DynamicCache(config=model.config))
    assert conversation.take([5, 6, 7], never_long) is None
