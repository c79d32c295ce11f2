"""transformers' generate() on a streamed model, with checked arguments, measurement and output in the caller's kind.

A model has one Generator, which replaces the model's generate(). So other callers, such as a pipeline of transformers,
get the same checks and the same tokens as FlashClient.generate().
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import EosTokenCriteria, GenerationConfig

from flashclient.errors import FlashClientError, OptionError
from flashclient.generation.arguments import check_arguments, known_arguments, merged_config
from flashclient.generation.draft_watch import DraftWatch, watched
from flashclient.generation.drafts import Drafts, drafting
from flashclient.generation.kept_cache import KeptCache
from flashclient.generation.prompts import Prompt, as_mask, as_tensors
from flashclient.generation.stats import Meter, Stats
from flashclient.kernels.growing_cache import GrowingCache
from flashclient.model.loaded import LoadedModel
from flashclient.torch_state import on_cpu
from weightd_proto.modes import EXACT, KV_PLAIN

NEW_TOKENS_DEFAULT = 256  # if neither the caller nor the model's generation_config sets a length


@dataclass
class _Call:
    """A prepared call of transformers' generate().

    Attributes:
        arguments: of the call.
        config: the configuration that results from them, for reading.
        ids_tokens: columns of input_ids, with which the returned sequences begin.
        prompt_tokens: tokens of one row, padding included.
        past_tokens: tokens in the cache that was passed.
        whole: whether the prompt repeats the tokens of that cache.
        continues: whether the cache is that of a conversation, which its next turn may use.
    """

    arguments: dict[str, Any]
    config: GenerationConfig
    ids_tokens: int = 0
    prompt_tokens: int = 1
    past_tokens: int = 0
    whole: bool = True
    continues: bool = False

    @property
    def cached_tokens(self) -> int:
        """Tokens in the cache after the prompt."""
        return self.prompt_tokens if self.whole else self.past_tokens + self.prompt_tokens

    @property
    def fed_tokens(self) -> int:
        return self.cached_tokens - self.past_tokens

    @property
    def drafted(self) -> bool:
        config = self.config
        proposes = (config.prompt_lookup_num_tokens, config.assistant_early_exit, self.arguments.get("assistant_model"))
        return (config.num_beams or 1) == 1 and any(one is not None for one in proposes)

    def set(self, name: str, value: Any) -> None:
        """Sets a parameter: in the generation_config if one was passed, because transformers refuses a mixture."""
        setattr(self.config, name, value)
        given = self.arguments.get("generation_config")
        if given is None or name in self.arguments:
            self.arguments[name] = value
        else:
            self.arguments["generation_config"] = given = copy.deepcopy(given)
            setattr(given, name, value)


class Generator:
    """Replaces the model's generate()."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._model = cast(Any, loaded.model)  # mypy takes attributes of a module for tensors
        self._ffn = loaded.built.ffn
        self._steps = loaded.built.steps
        self._native_layers_share = loaded.built.native_layers_share
        self._source = loaded.source
        self._new_cache = loaded.new_cache
        self._is_long = loaded.is_long
        self._mode, self._perplexity_loss = loaded.mode, loaded.perplexity_loss
        self._drafts = Drafts(loaded.model, loaded.tokenizer)
        self._tokenizer = loaded.tokenizer
        self._turns = loaded.turns
        self.known = known_arguments(self._model)
        self._generate = self._model.generate  # transformers' own
        self._signature = inspect.signature(self._generate)
        self._context_tokens = loaded.context_tokens
        self._context_is_fixed = loaded.context_is_fixed
        self._meters: list[Meter] = []  # of the generations under way, each inside the one before it
        self.stats = Stats()
        self._take_place()

    def _take_place(self) -> None:
        @functools.wraps(self._generate)
        def generate(*positional: Any, **arguments: Any) -> Any:
            bound = self._signature.bind(*positional, **arguments).arguments
            rest = bound.pop("kwargs", {})
            return self.run(bound | rest)[0]

        self._model.generate = generate
        for name in ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager"):
            if hasattr(self._model, name):
                setattr(self._model, name, functools.partial(_refuse_batching, name))

    def answer(self, prompt: Prompt, arguments: dict[str, Any], kept: KeptCache | None = None) -> Any:
        """The output of transformers, in the prompt's kind unless a dict was requested.

        Args:
            kept: of a conversation that the prompt may continue; keeps it for the next turn.
        """
        output, call = self.run(arguments | prompt.inputs, kept)
        return prompt.answer(output, _fill(call.config)) if isinstance(output, Tensor) else output

    def run(self, arguments: dict[str, Any], kept: KeptCache | None = None) -> tuple[Any, _Call]:
        """The output of transformers' generate(), and the call that was made."""
        with self._turns.taken(), on_cpu(), ExitStack() as ending:
            call = self._prepared(arguments, kept)
            assistant = call.arguments.get("assistant_model")
            if assistant is not None:
                given = arguments.get("generation_config")
                ending.enter_context(drafting(assistant, arguments, given))
            meter = Meter(self._source, self._ffn.clock)
            ending.enter_context(self._under_way(meter, call))
            ending.enter_context(meter.watching(self._model, assistant))
            watch = DraftWatch(timed=not call.config.do_sample)
            if call.drafted:
                ending.enter_context(watched(self._model, watch, self._is_long))
            try:
                output = self._generate(**call.arguments)
            except IndexError as error:  # of models like OPT, which run all layers whatever their config says
                if call.config.assistant_early_exit is None or meter.checks > 0:
                    raise
                raise OptionError("assistant_early_exit= is refused: this model cannot stop at a layer") from error
            except (TypeError, ValueError, ImportError) as error:
                if meter.steps > 0 or isinstance(error, FlashClientError):
                    raise
                raise OptionError(str(error).strip()) from error  # before any pass, so the arguments are the cause
            self.stats = replace(self._measured(meter, call, output), passes_without_draft=watch.passes_without)
            if call.continues and kept is not None:
                self._keep(kept, call, output)
        return output, call

    def _keep(self, kept: KeptCache, call: _Call, output: Any) -> None:
        """Keeps what a new prompt would compute alike: in a lossy mode, the tokens of the prompt alone."""
        sequences = output if isinstance(output, Tensor) else output.sequences
        cache = call.arguments["past_key_values"]
        computed = cache.get_seq_length() if self._mode == EXACT else call.prompt_tokens
        if self._is_long(computed) != self._is_long(call.prompt_tokens):
            computed = 0  # its tokens rotate by factors of both kinds
        kept.keep(sequences[0, :computed].tolist(), cache)

    @contextmanager
    def _under_way(self, meter: Meter, call: _Call) -> Iterator[None]:
        for outer in self._meters:
            outer.inner += 1
        self._meters.append(meter)
        if self._steps is not None:
            self._steps.begin(call.cached_tokens, self._end_tokens(call))
        config = self._model.config
        layers = getattr(config, "num_hidden_layers", None)  # a config of parts has none
        try:
            yield
        finally:
            if layers != getattr(config, "num_hidden_layers", None):
                config.num_hidden_layers = layers  # assistant_early_exit lowers it, also when it fails
            self._meters.pop()
            for outer in self._meters:
                outer.inner -= 1
            if self._steps is not None:
                self._steps.end()
            if not self._meters:
                self._ffn.idle()

    def _measured(self, meter: Meter, call: _Call, output: Any) -> Stats:
        sequences = output if isinstance(output, Tensor) else getattr(output, "sequences", None)
        made = torch.empty(0, 0) if sequences is None else sequences[:, call.ids_tokens :]
        cache = call.arguments.get("past_key_values")
        return meter.finish(
            mode=self._mode,
            perplexity_loss=self._perplexity_loss,
            native_layers_share=self._native_layers_share,
            kv_bytes=cache.held_bytes if isinstance(cache, GrowingCache) else 0,
            kv_dtype=cache.kv_dtype if isinstance(cache, GrowingCache) else KV_PLAIN,
            rows=len(made),
            prompt_tokens=call.prompt_tokens,
            kept_tokens=call.past_tokens if call.continues else 0,
            fed_tokens=call.fed_tokens,
            new_tokens=_made_tokens(made, call.config),
            drafted=call.drafted,
        )

    def _end_tokens(self, call: _Call) -> list[int] | None:
        """The tokens after which transformers feeds a row only padding; None for beams, whose rows it reorders."""
        config, arguments = call.config, call.arguments
        own = any(isinstance(one, EosTokenCriteria) for one in arguments.get("stopping_criteria") or [])
        if (config.num_beams or 1) > 1 or call.drafted or own or arguments.get("custom_generate") is not None:
            return None
        return _ids(config.eos_token_id)

    def _prepared(self, arguments: dict[str, Any], kept: KeptCache | None) -> _Call:
        """The call with length, tensors, cache, draft and tokenizer. Refuses what cannot work before any work.

        Raises:
            OptionError: see arguments.py; or the prompt does not fit the model.
        """
        arguments = {name: value for name, value in arguments.items() if not _is_unset(name, value)}
        check_arguments(arguments, self.known)
        call = _Call(arguments, merged_config(self._model, arguments))
        if self._steps is not None and (call.config.guidance_scale or 1) != 1 and call.config.use_cache is False:
            raise OptionError(
                f"guidance_scale= with use_cache=False is refused in mode '{self._mode}': without caches the steps of "
                "the two prompts cannot be distinguished; leave use_cache out"
            )
        if kept is not None:
            self._prepare_conversation(call, kept)
        self._prepare_prompt(call)
        self._prepare_padding(call)
        self._prepare_length(call)
        self._prepare_tokenizer(call)
        if self._uses_default_cache(call):
            arguments["past_key_values"] = self._new_cache()
        return call

    def _prepare_conversation(self, call: _Call, kept: KeptCache) -> None:
        """Sets the cache of the turn before, or an empty one, where one sequence is made, token by token."""
        config, arguments = call.config, call.arguments
        one = (config.num_beams or 1) == 1 and (config.num_return_sequences or 1) == 1 and not call.drafted
        plain = one and (config.guidance_scale or 1) == 1 and len(arguments["input_ids"]) == 1
        if plain and self._uses_default_cache(call):
            cache = kept.take(arguments["input_ids"][0].tolist(), self._is_long)
            arguments["past_key_values"] = self._new_cache() if cache is None else cache
            call.continues = True

    def _prepare_prompt(self, call: _Call) -> None:
        """Turns the prompt and its mask into tensors, and checks them."""
        arguments, cache = call.arguments, call.arguments.get("past_key_values")
        mask, embeds = arguments.get("attention_mask"), arguments.get("inputs_embeds")
        name = "inputs" if "inputs" in arguments else "input_ids"
        if name in arguments:
            fill = self._padding_token(call.config)
            arguments[name], mask = as_tensors(arguments[name], mask, fill)
            call.ids_tokens = call.prompt_tokens = arguments[name].shape[1]
            self._check_vocabulary(arguments[name] if embeds is None else None)
        if embeds is not None:
            if arguments.get("assistant_model") is not None and name not in arguments:
                raise OptionError(
                    "assistant_model= needs input_ids= beside inputs_embeds=, as a draft reads tokens: pass both"
                )
            arguments["inputs_embeds"] = embeds = self._embeds(embeds)
            call.prompt_tokens = embeds.shape[1]
        elif name not in arguments and call.config.bos_token_id is None:
            raise OptionError("there is no prompt, and the model has no first token of its own: pass input_ids")
        call.past_tokens = 0 if cache is None else int(cache.get_seq_length())
        rows = embeds if embeds is not None else arguments.get(name, torch.empty(1, 1))
        if mask is not None:
            arguments["attention_mask"] = mask = as_mask(mask)
            call.whole = embeds is not None or mask.shape[-1] == call.prompt_tokens or call.past_tokens == 0
            if mask.dim() != 2 or mask.shape[0] != rows.shape[0] or mask.shape[1] < rows.shape[1]:
                shapes = f"{list(mask.shape)} does not fit a prompt of {list(rows.shape[:2])}"
                raise OptionError(f"attention_mask of {shapes}: pass one number for each token")

    def _embeds(self, given: Any) -> Tensor:
        hidden = self._model.get_input_embeddings().weight.shape[1]
        embeds = torch.as_tensor(given)
        if embeds.dim() != 3 or embeds.shape[2] != hidden or not embeds.is_floating_point() or embeds.numel() == 0:
            raise OptionError(
                f"inputs_embeds have shape {tuple(embeds.shape)} and dtype {embeds.dtype}: pass floats"
                f" [rows, tokens, {hidden}]"
            )
        return embeds.to(self._model.dtype)

    def _check_vocabulary(self, ids: Tensor | None) -> None:
        size = self._model.get_input_embeddings().weight.shape[0]
        if ids is None:
            return
        strange = ids[(ids < 0) | (ids >= size)]
        if len(strange):
            raise OptionError(f"input_ids contain {int(strange[0])}, and the model's tokens are 0 to {size - 1}")

    def _padding_token(self, config: GenerationConfig) -> int:
        """The padding token for ids of different lengths: the same as for texts, so that both give the same prompt."""
        if self._tokenizer is not None:
            return int(self._tokenizer.pad_token_id)
        found = _ids(config.pad_token_id)
        return found[0] if found and found[0] >= 0 else 0

    def _prepare_padding(self, call: _Call) -> None:
        """Replaces or refuses a pad_token_id that is not a token: it would fail when the first of several rows ends."""
        config = call.config
        pad, ends = _ids(config.pad_token_id), _ids(config.eos_token_id)
        size = self._model.get_input_embeddings().weight.shape[0]
        if not pad or not ends or 0 <= pad[0] < size:
            return
        given = call.arguments.get("generation_config")
        if "pad_token_id" in call.arguments or getattr(given, "pad_token_id", None) is not None:
            rows = next(
                (len(call.arguments[n]) for n in ("inputs", "input_ids", "inputs_embeds") if n in call.arguments), 1
            )
            if rows * max(config.num_beams or 1, config.num_return_sequences or 1) == 1:
                return  # a single row is never padded
            raise OptionError(
                f"pad_token_id={pad[0]} is not a token of the model, whose tokens are 0 to {size - 1}: pass one of"
                " them, or None for eos_token_id"
            )
        call.set("pad_token_id", ends[0])

    def _prepare_length(self, call: _Call) -> None:
        """Sets the default length. Refuses more tokens than the model's context has, if its length is fixed."""
        config, longest = call.config, self._longest_prompt(call)
        new_tokens = config.max_new_tokens
        by = "max_length" if new_tokens is None and config.max_length is not None else "max_new_tokens"
        for name in ("max_new_tokens", "max_length"):
            value = getattr(config, name)
            if value is not None and (not isinstance(value, Integral) or isinstance(value, bool)):
                raise OptionError(f"{name}={value!r} must be a whole number of tokens")
        if new_tokens is None and config.max_length is not None:
            both = call.ids_tokens not in (0, call.prompt_tokens)  # then transformers counts ids and embeddings
            new_tokens = config.max_length - call.prompt_tokens - (call.ids_tokens if both else 0)
        if new_tokens is None:
            room = 0 if self._context_tokens is None else self._context_tokens - call.prompt_tokens
            new_tokens = min(NEW_TOKENS_DEFAULT, room if room > 0 else NEW_TOKENS_DEFAULT)
            call.set("max_new_tokens", new_tokens)
        limit = self._context_tokens if self._context_is_fixed else None
        if limit is not None and longest + max(1, new_tokens) - 1 > limit:  # the last new token is not fed to the model
            raise OptionError(
                f"a prompt of {longest} tokens and {new_tokens} new ones do not fit the model's context of "
                f"{limit} tokens: shorten the prompt or lower {by}="
            )

    def _longest_prompt(self, call: _Call) -> int:
        """The number of tokens in the longest prompt, without padding."""
        if (position_ids := call.arguments.get("position_ids")) is not None:
            return int(torch.as_tensor(position_ids).max()) + 1
        if (mask := call.arguments.get("attention_mask")) is not None:
            return int(mask.long().sum(1).max())
        return call.cached_tokens

    def _prepare_tokenizer(self, call: _Call) -> None:
        """Adds the tokenizer if transformers needs it, and loads the draft model."""
        arguments, config = call.arguments, call.config
        if arguments.get("assistant_model") is not None:
            for name, value in self._drafts.arguments(arguments["assistant_model"]).items():
                if name == "assistant_model" or arguments.get(name) is None:
                    arguments[name] = value
        wanted = [name for name in ("stop_strings", "token_healing") if getattr(config, name)]
        wanted += [name for name in ("assistant_tokenizer",) if arguments.get(name) is not None]
        if not wanted:
            arguments.pop("tokenizer", None)
        elif arguments.get("tokenizer") is None:
            if self._tokenizer is None:
                raise OptionError(
                    f"{wanted[0]} needs a tokenizer, and this model was stored without one: pass tokenizer="
                )
            arguments["tokenizer"] = self._tokenizer

    def _uses_default_cache(self, call: _Call) -> bool:
        """Whether transformers would make a DynamicCache: no cache was passed, chosen by name, or disabled."""
        config = call.config
        embeds = call.arguments.get("inputs_embeds") is not None  # then transformers always uses a cache
        unasked = call.arguments.get("past_key_values") is None and config.cache_implementation in (None, "hybrid")
        wanted = unasked and (embeds or config.use_cache is not False) and not config.is_assistant
        takes = "past_key_values" in inspect.signature(type(self._model).forward).parameters
        return wanted and takes and bool(self._model._supports_default_dynamic_cache())  # others make one of their own


def _refuse_batching(name: str, *_: Any, **__: Any) -> None:
    raise OptionError(f"{name}() is refused: it is for many requests at once, and a client serves one")


def _is_unset(name: str, value: Any) -> bool:
    """Whether an argument requests nothing. Some tokenizers give token_type_ids of zeros for any model."""
    if name == "token_type_ids" and value is not None:
        return not bool(torch.as_tensor(value).any())
    return value is None and name in ("inputs", "input_ids", "inputs_embeds", "attention_mask", "generation_config")


def _ids(tokens: Any) -> list[int] | None:
    return None if tokens is None else [int(token) for token in np.asarray(tokens).ravel()]


def _fill(config: GenerationConfig) -> int | None:
    """The token that transformers pads finished rows with; None if rows have no end token."""
    ends = _ids(config.eos_token_id)
    return None if ends is None else (_ids(config.pad_token_id) or ends)[0]


def _made_tokens(made: Tensor, config: GenerationConfig) -> int:
    """The number of new tokens in [rows, tokens], without the padding behind the last token of each row."""
    fill, ends = _fill(config), _ids(config.eos_token_id)
    if fill is None or ends is None or made.numel() == 0:
        return made.numel()
    filled = (made == fill).flip(1).cumprod(1).sum(1)  # padding at the end of each row
    one_is_its_end = (filled > 0) & torch.tensor(fill in ends)
    return int(made.numel() - filled.sum() + one_is_its_end.sum())
