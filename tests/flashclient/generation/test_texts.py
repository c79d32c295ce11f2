"""New text continues the prompt, character for character: as a whole, in pieces and in batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from checkpoints import make_config, make_model, make_tokenizer
from cut_model import clients_of, cut
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerFast

from flashclient import FlashClient
from flashclient.errors import OptionError

BYTES = [f"<0x{value:02X}>" for value in range(256)]
WORDS = ["▁", "h", "e", "l", "o", "w", "▁h", "▁w"]
TOKENS = ["<unk>", "<s>", "</s>", *BYTES, *WORDS, "<tool>"]


def sentencepiece() -> PreTrainedTokenizerFast:
    """A tokenizer like Llama's: tokens of words begin with a space, which is dropped at the beginning of a text.

    All other tokens are bytes.
    """
    merges = [("▁", "h"), ("▁", "w")]
    vocabulary = {token: index for index, token in enumerate(TOKENS)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<tool>"],
    )


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, FlashClient]]:
    model = make_model(make_config("llama", 1, max_position_embeddings=1024), seed=5)
    model.generation_config.eos_token_id = None
    cuts = [cut(model, sentencepiece(), "words"), cut(model, make_tokenizer(), "bytes")]
    with clients_of(cuts, tmp_path_factory.mktemp("texts")) as made:
        yield made


class Say(LogitsProcessor):
    """Makes a model generate certain tokens."""

    def __init__(self, tokens: list[int]) -> None:
        self._coming = iter(tokens)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Any:
        return torch.full_like(scores, -1e4).index_fill(1, torch.tensor([next(self._coming)]), 0.0)


def saying(client: FlashClient, tokens: list[str]) -> dict[str, Any]:
    ids: list[int] = [client.tokenizer.convert_tokens_to_ids(token) for token in tokens]
    return {"max_new_tokens": len(ids), "logits_processor": [Say(ids)]}


EURO, HALF = ["<0xE2>", "<0x82>", "<0xAC>"], ["<0xE2>", "<0x82>"]


@pytest.mark.parametrize("prompt", ["hello", " hello", "hello ", "<s>hello", "hello<tool>", "hé€", "he wo"])
@pytest.mark.parametrize(
    "tokens",
    [
        ["▁w", "▁w", "▁w"],
        ["w", "▁", "▁", "▁w"],
        ["<tool>", "▁w", "<tool>", "</s>", "▁w"],
        [*EURO, "▁w"],
        [*EURO, *EURO],
        [*EURO, *HALF],  # ends inside a character: the decoder gives nothing for all five
        [*EURO, "<tool>", *HALF, "w"],
        [*HALF, "▁w", *EURO],
        ["<0x80>", "w", "<0x80>"],
    ],
    ids="".join,
)
def test_prompt_and_answer_are_what_all_tokens_decode_to(
    clients: dict[str, FlashClient], prompt: str, tokens: list[str]
) -> None:
    client = clients["words"]
    row = client.tokenizer(prompt)["input_ids"]
    row = row[1:] if row[:2] == [1, 1] else row  # a text that begins so does not begin twice
    whole = client.tokenizer.decode(client.generate(row, **saying(client, tokens)), skip_special_tokens=True)
    begun = client.tokenizer.decode(row, skip_special_tokens=True)
    assert begun == prompt.replace("<tool>", "").replace("<s>", "")
    if not whole.startswith(begun):  # invalid bytes break characters of the prompt, which an answer cannot change
        whole = begun + client.generate("h", **saying(client, tokens))
    assert begun + client.generate(prompt, **saying(client, tokens)) == whole
    assert begun + client.generate(["w", prompt], **saying(client, tokens))[1] == whole
    assert begun + "".join(client.stream(prompt, **saying(client, tokens))) == whole
    assert client.stats().new_tokens == len(tokens)


@pytest.mark.parametrize("name", ["words", "bytes"])
def test_a_long_stream_is_the_text(clients: dict[str, FlashClient], name: str) -> None:
    """A text longer than a stream decodes at once, of random bytes; many of them are parts of characters."""
    client = clients[name]
    call: dict[str, Any] = {"max_new_tokens": 400, "do_sample": True, "temperature": 5.0}
    torch.manual_seed(1)
    whole = client.generate("hello hello", **call)
    torch.manual_seed(1)
    pieces = list(client.stream("hello hello", **call))
    assert "".join(pieces) == whole
    assert len(pieces) > 5


def test_no_piece_has_half_a_character(clients: dict[str, FlashClient]) -> None:
    client = clients["words"]
    pieces = list(client.stream("hello", **saying(client, ["▁w", *EURO, "w", *EURO, "▁w"])))
    assert "".join(pieces) == " w€w€ w"
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_text_that_begins_as_texts_do_begins_once(clients: dict[str, FlashClient]) -> None:
    client = clients["words"]
    assert client.generate("<s>hello", max_new_tokens=6) == client.generate("hello", max_new_tokens=6)
    client.generate("<s>", max_new_tokens=1)
    assert client.stats().prompt_tokens == 1
    assert client.generate("", max_new_tokens=3) == client.generate("<s>", max_new_tokens=3)


def test_an_ended_row_says_no_more_than_it_did_alone(clients: dict[str, FlashClient]) -> None:
    """The end token is not a special token here, and it pads the row that it ended."""
    client = clients["bytes"]
    prompts = ["hello", "a longer prompt than that"]
    free = [client.tokenizer.encode(client.generate(prompt, max_new_tokens=12)) for prompt in prompts]
    end = free[0][4]
    together = client.generate(prompts, max_new_tokens=12, eos_token_id=end, pad_token_id=end)
    alone = [client.generate(prompt, max_new_tokens=12, eos_token_id=end, pad_token_id=end) for prompt in prompts]
    assert together == alone


def test_healed_tokens(clients: dict[str, FlashClient]) -> None:
    """The prompt's last token may become a longer one; the text still continues the prompt."""
    client = clients["bytes"]
    free = client.generate("oh", max_new_tokens=6)
    healed = client.generate("oh", max_new_tokens=6, token_healing=True)
    assert isinstance(healed, str)
    assert len(free) > 0
    assert client.stats().steps >= 6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"prompt": ["a", "b"]}, "stream\\(\\) gives the text of one sequence, not of 2"),
        ({"prompt": "a", "do_sample": True, "num_return_sequences": 2}, "of one sequence, not of 2"),
        ({"prompt": "a", "num_beams": 2}, "`streamer` cannot be used with beam search"),
        ({"prompt": "a", "streamer": 3}, "streamer= is for generate"),
        ({"prompt": "a", "return_dict_in_generate": True}, "return_dict_in_generate= is for generate"),
    ],
)
def test_what_no_stream_can_give(clients: dict[str, FlashClient], call: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        list(clients["bytes"].stream(**call, max_new_tokens=2))


def test_a_stream_of_ids(clients: dict[str, FlashClient]) -> None:
    client = clients["bytes"]
    ids = client.tokenizer("hello")["input_ids"]
    assert "".join(client.stream(ids, max_new_tokens=9)) == client.generate("hello", max_new_tokens=9)
    assert "".join(client.stream(input_ids=ids, max_new_tokens=9)) == client.generate("hello", max_new_tokens=9)
