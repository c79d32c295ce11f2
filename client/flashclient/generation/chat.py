"""Conversations as prompts, formatted by a tokenizer's chat template."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from flashclient.errors import OptionError
from flashclient.generation.prompts import Prompt, of_rows, single

# Arguments of apply_chat_template() that shape the text. Its others are about tokenizing, which happens here.
LAYOUT = ("tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message")


def conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: Any,
    arguments: Mapping[str, Any],
    known: set[str],
    check: Callable[[str], None] | None = None,
) -> tuple[Prompt, dict[str, Any]]:
    """The prompt of one conversation or of several, and the arguments that belong to generate().

    Args:
        known: names of generate()'s arguments. Another name belongs to the template if the template uses it.
        check: of the text of each conversation, before it is encoded.

    Raises:
        OptionError: there is no template, it refuses the messages, or they have another form.
    """
    several, conversations = _conversations(messages)
    template = _template(tokenizer, arguments)
    for one in conversations:
        _require_content(one, template)
    layout = {name: arguments[name] for name in LAYOUT if name in arguments}
    layout.setdefault("add_generation_prompt", not arguments.get("continue_final_message"))
    rest = {name: value for name, value in arguments.items() if name not in layout}
    for name in [name for name in rest if name not in known and re.search(rf"\b{re.escape(name)}\b", template)]:
        layout[name] = rest.pop(name)
    rows = [_laid_out(tokenizer, one, layout, check) for one in conversations]
    prompt = of_rows(rows, tokenizer)
    if several:
        return prompt, rest
    return Prompt(prompt.inputs, lambda sequences, fill: single(prompt.answer(sequences, fill))), rest


def _conversations(messages: Any) -> tuple[bool, list[list[dict[str, Any]]]]:
    """Whether `messages` are several conversations, and each as a list of messages."""
    if isinstance(messages, str):
        return False, [[{"role": "user", "content": messages}]]
    if isinstance(messages, Mapping):
        return False, [_checked([messages])]
    if not isinstance(messages, Sequence) or len(messages) == 0:
        kind = "an empty list" if isinstance(messages, Sequence) else f"a {type(messages).__name__}"
        raise OptionError(
            f"cannot chat about {kind}: pass text, or messages such as {{'role': 'user', 'content': 'Hi'}}"
        )
    if all(isinstance(one, Mapping) for one in messages):
        return False, [_checked(messages)]
    if any(isinstance(one, Mapping) for one in messages):
        raise OptionError("cannot mix messages and whole conversations in one list: pass several lists of messages")
    return True, [_conversations(one)[1][0] for one in messages]


def _checked(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    for index, message in enumerate(messages):
        if not isinstance(message.get("role"), str):
            raise OptionError(f"message {index} has no role: pass messages such as {{'role': 'user', 'content': 'Hi'}}")
    return [dict(message) for message in messages]


def _require_content(messages: Sequence[Mapping[str, Any]], template: str) -> None:
    """Refuses a message of which the template uses no key: it would format it as empty."""
    for index, message in enumerate(messages):
        keys = [key for key in message if key != "role"]
        if not any(key == "content" or re.search(rf"\b{re.escape(str(key))}\b", template) for key in keys):
            has = f"only {', '.join(map(repr, keys))}, which the template does not use" if keys else "nothing else"
            raise OptionError(f"message {index} has a role and {has}: pass its text as 'content'")


def _template(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]) -> str:
    """The text of the template that applies."""
    if tokenizer.chat_template is None and arguments.get("chat_template") is None:
        raise OptionError("this model has no chat template: use generate() with a prompt, or pass chat_template=")
    try:
        return tokenizer.get_chat_template(arguments.get("chat_template"), arguments.get("tools"))
    except ValueError as error:
        names = ", ".join(sorted(tokenizer.chat_template)) if isinstance(tokenizer.chat_template, dict) else "none"
        raise OptionError(f"this model has several chat templates: pass one of {names} as chat_template=") from error


def _laid_out(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    layout: Mapping[str, Any],
    check: Callable[[str], None] | None,
) -> list[int]:
    try:
        if check is not None:
            check(str(tokenizer.apply_chat_template(messages, tokenize=False, **layout)))
        encoded: Any = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **layout)
    except OptionError:
        raise
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise OptionError(f"the model's chat template refuses the messages: {error}") from error
    row = [int(token) for token in encoded["input_ids"]]
    if not row:
        raise OptionError("the model's chat template gives no tokens for these messages: use generate() with a prompt")
    return row
