"""Which arguments of transformers' generate() the client refuses, and why.

All others go to transformers unchanged. client/README.md has a table of all arguments, with the test of each.
"""

from __future__ import annotations

import copy
import difflib
import inspect
from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any

from transformers import Cache, GenerationConfig
from transformers.utils.generic import TransformersKwargs

from flashclient.errors import OptionError

_REPOSITORY = "transformers loads this method as code from a repository, and flashclient runs no such code"
_ENCODER = "it is for models with an encoder"
_TRAINING = "it is for training, and generate() ignores it"
_PACKED = "it is for packed sequences of FlashAttention, and generate() ignores it"
_METADATA = "it says which program wrote a generation_config.json and has no effect"

# For each parameter: why it is refused, and the values that request nothing. These parameters would change the result,
# so they are refused wherever they come from: the call, a GenerationConfig or the model's generation_config.json.
REFUSED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "constraints": (_REPOSITORY, (None,)),
    "continuous_batching_config": ("a client generates for one caller at a time", (None,)),
    "diversity_penalty": (_REPOSITORY, (None, 0.0)),
    "dola_layers": (_REPOSITORY, (None,)),
    "force_words_ids": (_REPOSITORY, (None,)),
    "low_memory": (_REPOSITORY, (None, False)),
    "num_beam_groups": (_REPOSITORY, (None, 1)),
    "penalty_alpha": (_REPOSITORY, (None, 0.0)),
    "speculation_type": ("only assistant_model=, prompt lookup and early exit can draft tokens", (None,)),
    "use_mtp": ("an import drops heads that predict several tokens", (None, False)),
}

# The same for parameters that transformers accepts and ignores: refused only if the caller passes them to generate().
IGNORED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "_from_model_config": (_METADATA, (None,)),
    "cu_seq_lens_k": (_PACKED, (None,)),
    "cu_seq_lens_q": (_PACKED, (None,)),
    "decoder_start_token_id": (_ENCODER, (None,)),
    "is_assistant": ("transformers sets it for the draft model", (None, False)),
    "labels": (_TRAINING, (None,)),
    "max_length_k": (_PACKED, (None,)),
    "max_length_q": (_PACKED, (None,)),
    "num_items_in_batch": (_TRAINING, (None,)),
    "output_router_logits": ("it is for mixtures of experts, and this model is not one", (None, False)),
    "seq_idx": ("it is for state-space models", (None,)),
    "synced_gpus": ("there is one process and no GPU to wait for", (None, False)),
    "transformers_version": (_METADATA, (None,)),
    "trust_remote_code": ("flashclient runs no code from a repository", (None, False)),
}

# Arguments that have no effect without another one; transformers does not report it.
NEEDS = {
    "assistant_confidence_threshold": "assistant_model",
    "assistant_ensemble_weight": "assistant_model",
    "assistant_lookbehind": "assistant_model",
    "assistant_tokenizer": "assistant_model",
    "cache_config": "cache_implementation",
    "max_matching_ngram_size": "prompt_lookup_num_tokens",
    "negative_prompt_attention_mask": "negative_prompt_ids",
    "negative_prompt_ids": "guidance_scale",
    "num_assistant_tokens": "assistant_model",
    "num_assistant_tokens_schedule": "assistant_model",
    "target_lookbehind": "assistant_model",
}

_CACHES = {
    "offloaded": "it moves keys and values between a GPU and memory, and there is no GPU",
    "offloaded_static": "it moves keys and values between a GPU and memory, and there is no GPU",
    "paged": "it is for many requests at once, and a client serves one",
}


def known_arguments(model: Any) -> set[str]:
    """The names of all arguments of transformers' generate() for `model`."""
    names = set(vars(GenerationConfig())) | set(TransformersKwargs.__optional_keys__)  # type: ignore[no-untyped-call]
    for function in (model.generate, model.forward):
        names |= set(inspect.signature(function).parameters)
    return names - {"self", "kwargs"} | {"assistant_tokenizer", "tokenizer", "trust_remote_code"}


def check_arguments(arguments: Mapping[str, Any], known: set[str]) -> None:
    """Raises OptionError for a name that is unknown, refused, ignored by transformers, or useless without another."""
    for name, value in arguments.items():
        if name not in known:
            raise OptionError(f"transformers' generate() has no argument '{name}'{_near(name, known)}")
        for refused in (REFUSED, IGNORED):
            _refuse(refused, name, value)
    for name, partner in NEEDS.items():
        if arguments.get(name) is not None and not _asks_for(partner, arguments):
            raise OptionError(f"{name}= has no effect without {partner}=: pass both or neither")
    if isinstance(arguments.get("custom_generate"), str):
        raise OptionError(
            f"custom_generate='{arguments['custom_generate']}' is refused: it runs code from a repository;"
            " pass a function"
        )
    _check_callables(arguments)
    if arguments.get("inputs") is not None and arguments.get("input_ids") is not None:
        raise OptionError("inputs= and input_ids= are two names for the prompt: pass one of them")


def _check_callables(arguments: Mapping[str, Any]) -> None:
    """Checks what transformers would call only after it has computed something."""
    for name in ("logits_processor", "stopping_criteria"):
        given = arguments.get(name) or []
        if not isinstance(given, list | tuple):
            raise OptionError(f"{name}= is a {type(given).__name__}: pass a list of functions")
        for one in given:
            if not callable(one):
                raise OptionError(f"{name}= contains a {type(one).__name__}: pass functions of ids and scores")
    function = arguments.get("prefix_allowed_tokens_fn")
    if function is not None and not callable(function):
        raise OptionError(f"prefix_allowed_tokens_fn= is a {type(function).__name__}: pass a function")
    streamer = arguments.get("streamer")
    if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
        raise OptionError(f"streamer= is a {type(streamer).__name__}: pass an object with put() and end()")
    cache = arguments.get("past_key_values")
    if cache is not None and not isinstance(cache, Cache):
        raise OptionError(f"past_key_values= is a {type(cache).__name__}: pass a Cache of transformers")


def merged_config(model: Any, arguments: Mapping[str, Any]) -> GenerationConfig:
    """The configuration of a generation. Arguments override generation_config=, which overrides the model's own.

    A value that none of them sets is None; transformers puts its default there.

    Raises:
        OptionError: a value is not allowed, or flashclient cannot do it.
    """
    given = arguments.get("generation_config")
    if given is not None and not isinstance(given, GenerationConfig):
        raise OptionError(f"generation_config is a {type(given).__name__}: pass a GenerationConfig of transformers")
    fields = set(vars(GenerationConfig()))  # type: ignore[no-untyped-call]
    for name in sorted(set(vars(given or GenerationConfig())) - fields):  # type: ignore[no-untyped-call]
        if not name.startswith("_") and (near := _near(name, fields)):
            raise OptionError(f"transformers' GenerationConfig has no field '{name}'{near}")
    config: Any = GenerationConfig() if given is None else copy.deepcopy(given)  # type: ignore[no-untyped-call]
    own = model.generation_config.to_dict()
    try:
        config.update(**own, defaults_only=True, allow_custom_entries=True)
        config.update(**{name: value for name, value in arguments.items() if name in fields})
    except (TypeError, ValueError) as error:
        raise OptionError(str(error)) from error
    for name in REFUSED:
        _refuse(REFUSED, name, getattr(config, name, None))
    for name in ("num_beams", "num_return_sequences"):  # of 0 transformers raises a ZeroDivisionError
        value = getattr(config, name)
        if value is not None and (not isinstance(value, Integral) or value < 1):
            raise OptionError(f"{name}={value!r} must be a whole number from 1 on")
    if config.cache_implementation in _CACHES:
        reason = _CACHES[config.cache_implementation]
        raise OptionError(f"cache_implementation='{config.cache_implementation}' is refused: {reason}")
    result: GenerationConfig = config
    return result


def _refuse(refused: Mapping[str, tuple[str, tuple[Any, ...]]], name: str, value: Any) -> None:
    reason, neutral = refused.get(name, ("", (value,)))
    if not any(value is one or (isinstance(value, int | float) and value == one) for one in neutral):
        raise OptionError(f"{name}={_shown(value)} is refused: {reason}; leave it out or pass {name}={neutral[-1]}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 and "\n" not in text else f"({type(value).__name__})"


def _asks_for(name: str, arguments: Mapping[str, Any]) -> bool:
    """Whether the arguments, or the generation_config among them, set `name`."""
    found = arguments.get(name)
    found = getattr(arguments.get("generation_config"), name, None) if found is None else found
    return found is not None and not (name == "guidance_scale" and found == 1)


def _near(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, sorted(known), 1, 0.75)
    return f"; did you mean '{found[0]}'?" if found else ""
