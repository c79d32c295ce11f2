"""A call of generate() for every parameter of transformers' that works, by the parameter's name.

tests/test_calls.py makes each of them with the streamed and with the dense model; scripts/call_table.py names them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    MaxLengthCriteria,
    WatermarkingConfig,
)
from transformers.generation.streamers import BaseStreamer

PROMPT = torch.tensor([[5, 17, 200, 31, 8, 31, 8]])
BATCH = torch.tensor([[0, 0, 17, 200, 31, 8], [9, 21, 60, 7, 118, 4]])  # the first one padded with token 0
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
NEW = {"max_new_tokens": 6}
BEAMS = NEW | {"num_beams": 3}
SAMPLED = NEW | {"do_sample": True}
DICT = NEW | {"return_dict_in_generate": True}


@dataclass
class World:
    """What calls are made of, besides numbers.

    Attributes:
        embed: ids -> embeddings.
        end: a token that the plain call makes early, and the text it stands for.
    """

    config: Any
    tokenizer: Any
    embed: Callable[[Tensor], Tensor]
    draft: Any
    other_draft: Any  # with more tokens in its vocabulary
    end: int


@dataclass(frozen=True)
class Case:
    """Arguments of a call, made anew for each model; `same` where the tokens are those of the call without it."""

    arguments: Callable[[World], dict[str, Any]]
    same: bool = False


def _fixed(same: bool = False, **arguments: Any) -> Case:
    return Case(lambda _: {"inputs": PROMPT, **NEW, **arguments}, same)


def _beams(**arguments: Any) -> Case:
    return Case(lambda _: {"inputs": PROMPT, **BEAMS, **arguments})


def _sampled(**arguments: Any) -> Case:
    return Case(lambda _: {"inputs": PROMPT, **SAMPLED, **arguments})


def _dict(**arguments: Any) -> Case:
    return Case(lambda _: {"inputs": PROMPT, **DICT, **arguments}, same=True)


def _made(arguments: Callable[[World], dict[str, Any]], same: bool = False) -> Case:
    return Case(lambda world: {"inputs": PROMPT, **NEW, **arguments(world)}, same)


def _drafted(**arguments: Any) -> Case:
    return _made(lambda world: {"assistant_model": world.draft, **arguments}, same=True)


def _translated(**arguments: Any) -> Case:
    def made(world: World) -> dict[str, Any]:
        tokenizers = {"tokenizer": world.tokenizer, "assistant_tokenizer": world.tokenizer}
        return {"assistant_model": world.other_draft, **tokenizers, **arguments}

    return _made(made, same=True)


class Recorder(BaseStreamer):
    """A streamer of one's own."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.seen.append(value.tolist())

    def end(self) -> None:
        self.seen.append("end")


class OnlyEven(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Any:
        return scores.masked_fill(torch.arange(scores.shape[1]) % 2 == 1, -torch.inf)


def take_worst(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    **arguments: Any,
) -> Tensor:
    """A decoding loop of one's own."""
    while not stopping_criteria(input_ids, None).all():
        logits = model(input_ids=input_ids, use_cache=False).logits[:, -1]
        input_ids = torch.cat([input_ids, logits.argmin(1, keepdim=True)], dim=1)
    return input_ids


def _continued(world: World) -> dict[str, Any]:
    """The prompt after another one, whose keys and values are in a cache."""
    return {"past_key_values": DynamicCache(config=world.config)}


CASES: dict[str, Case] = {
    # the prompt
    "inputs": _fixed(same=True),
    "input_ids": Case(lambda _: {"input_ids": PROMPT, **NEW}, same=True),
    "attention_mask": Case(lambda _: {"inputs": BATCH, "attention_mask": MASK, **NEW}),
    "position_ids": _fixed(position_ids=torch.tensor([[0, 2, 4, 6, 8, 10, 11]])),
    "inputs_embeds": Case(lambda world: {"inputs_embeds": world.embed(PROMPT), **NEW}),
    "past_key_values": _made(_continued, same=True),
    "negative_prompt_ids": _fixed(negative_prompt_ids=PROMPT[:, :3], guidance_scale=1.7),
    "negative_prompt_attention_mask": _fixed(
        negative_prompt_ids=BATCH[:1], negative_prompt_attention_mask=MASK[:1], guidance_scale=1.7
    ),
    "tokenizer": _made(lambda world: {"tokenizer": world.tokenizer, "stop_strings": ["zz"]}, same=True),
    # its length
    "max_length": Case(lambda _: {"inputs": PROMPT, "max_length": 10}),
    "max_new_tokens": _fixed(max_new_tokens=4),
    "min_length": _made(lambda world: {"eos_token_id": world.end, "min_length": 12}),
    "min_new_tokens": _made(lambda world: {"eos_token_id": world.end, "min_new_tokens": 5}),
    "max_time": _fixed(max_time=1e-9),
    "stop_strings": _made(
        lambda world: {"stop_strings": [world.tokenizer.decode([world.end])], "tokenizer": world.tokenizer}
    ),
    "stopping_criteria": _made(lambda _: {"stopping_criteria": [MaxLengthCriteria(9)]}),
    "early_stopping": _beams(early_stopping=True),
    "eos_token_id": _made(lambda world: {"eos_token_id": [world.end, 3]}),
    "pad_token_id": Case(lambda world: {"inputs": BATCH, **NEW, "eos_token_id": world.end, "pad_token_id": 0}),
    "bos_token_id": Case(lambda _: {**NEW, "bos_token_id": 9}),
    "forced_bos_token_id": Case(lambda _: {"inputs": PROMPT[:, :1], **NEW, "forced_bos_token_id": 11}),
    "forced_eos_token_id": _fixed(forced_eos_token_id=7),
    # how it is decoded
    "generation_config": Case(
        lambda _: {"inputs": PROMPT, "generation_config": GenerationConfig(max_new_tokens=5, num_beams=2)}  # type: ignore[no-untyped-call]
    ),
    "do_sample": _sampled(),
    "temperature": _sampled(temperature=1.9),
    "top_k": _sampled(top_k=3),
    "top_p": _sampled(top_p=0.2),
    "min_p": _sampled(min_p=0.3),
    "top_h": _sampled(top_h=0.3),
    "typical_p": _sampled(typical_p=0.2),
    "epsilon_cutoff": _sampled(epsilon_cutoff=0.02),
    "eta_cutoff": _sampled(eta_cutoff=0.02),
    "num_beams": _beams(),
    "length_penalty": _beams(length_penalty=-3.0),
    "num_return_sequences": _beams(num_return_sequences=2),
    "repetition_penalty": _fixed(repetition_penalty=3.0),
    "encoder_repetition_penalty": _fixed(encoder_repetition_penalty=9.0),
    "no_repeat_ngram_size": _fixed(no_repeat_ngram_size=1),
    "encoder_no_repeat_ngram_size": _fixed(encoder_no_repeat_ngram_size=1),
    "bad_words_ids": _made(lambda world: {"bad_words_ids": [[world.end]]}),
    "suppress_tokens": _made(lambda world: {"suppress_tokens": [world.end]}),
    "begin_suppress_tokens": _fixed(begin_suppress_tokens=list(range(2, 300))),
    "sequence_bias": _fixed(sequence_bias={(33,): 50.0}),
    "exponential_decay_length_penalty": _made(
        lambda _: {"exponential_decay_length_penalty": (1, 9.0), "eos_token_id": 7}
    ),
    "renormalize_logits": _dict(renormalize_logits=True, output_scores=True),
    "remove_invalid_values": _fixed(same=True, remove_invalid_values=True),
    "guidance_scale": _fixed(guidance_scale=2.5),
    "logits_processor": _made(lambda _: {"logits_processor": [OnlyEven()]}),
    "prefix_allowed_tokens_fn": _fixed(prefix_allowed_tokens_fn=lambda row, ids: [4, 5, 6 + int(ids[-1]) % 7]),
    "watermarking_config": _fixed(watermarking_config=WatermarkingConfig(bias=20.0)),
    "token_healing": _made(lambda world: {"token_healing": True, "tokenizer": world.tokenizer}, same=True),
    "custom_generate": _fixed(custom_generate=take_worst),
    # its cache
    "use_cache": _fixed(same=True, use_cache=False),
    "cache_implementation": _fixed(same=True, cache_implementation="static"),
    "max_cache_len": _fixed(same=True, cache_implementation="static", max_cache_len=64),
    "prefill_chunk_size": _fixed(same=True, prefill_chunk_size=3),
    "disable_compile": _fixed(same=True, disable_compile=True, cache_implementation="static"),
    "compile_config": _fixed(same=True, compile_config=CompileConfig()),
    # drafts
    "assistant_model": _drafted(),
    "assistant_tokenizer": _translated(),
    "num_assistant_tokens": _drafted(num_assistant_tokens=2),
    "num_assistant_tokens_schedule": _drafted(num_assistant_tokens_schedule="heuristic"),
    "assistant_confidence_threshold": _drafted(assistant_confidence_threshold=0.9),
    "assistant_ensemble_weight": _drafted(assistant_ensemble_weight=0.9),
    "assistant_lookbehind": _translated(assistant_lookbehind=4),
    "target_lookbehind": _translated(target_lookbehind=4),
    "assistant_early_exit": _fixed(same=True, assistant_early_exit=1),
    "prompt_lookup_num_tokens": _fixed(same=True, prompt_lookup_num_tokens=3),
    "max_matching_ngram_size": _fixed(same=True, prompt_lookup_num_tokens=3, max_matching_ngram_size=1),
    # what comes out
    "streamer": _made(lambda _: {"streamer": Recorder()}, same=True),
    "return_dict_in_generate": _dict(),
    "output_scores": _dict(output_scores=True),
    "output_logits": _dict(output_logits=True),
    "output_attentions": _dict(output_attentions=True),
    "output_hidden_states": _dict(output_hidden_states=True),
    "logits_to_keep": _fixed(same=True, logits_to_keep=0),
    "is_causal": _fixed(is_causal=False),
}

# Values that ask for something, of parameters that are refused although None would do nothing.
REFUSED_VALUES: dict[str, Any] = {
    "cache_config": {"backend": "quanto"},
    "compile_config": None,
    "constraints": [object()],
    "diversity_penalty": 0.5,
    "num_beam_groups": 2,
    "penalty_alpha": 0.6,
    "speculation_type": "dflash",
}
