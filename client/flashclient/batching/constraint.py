"""What a text may be: a grammar, which says after each token which ones may follow. llguidance does the work."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.hf import from_tokenizer
from torch import Tensor

from flashclient.errors import OptionError

GRAMMAR_BYTES_MAX = 1 << 16
SYMBOLS_MAX = 20_000  # of a grammar: llguidance's time grows with their square, to half a second here
LEXER_STATES_MAX = 20_000  # of one sequence, about 2 kB each
ERROR_CHARACTERS_MAX = 300
# Between the parts of a JSON text. A model that may add any space sometimes adds nothing else.
JSON_SPACE: Any = {"whitespace_pattern": r"\n?[ \t]{0,32}"}


class Grammars:
    """Makes constraints for the tokens of one model.

    Args:
        vocabulary: the number of logits.
        ends: tokens that end a text.

    Raises:
        OptionError: llguidance cannot read the tokenizer.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, ends: Sequence[int]) -> None:
        try:
            self._tokens: LLTokenizer = from_tokenizer(tokenizer, vocabulary, list(ends) or None)
        except Exception as error:  # of any kind: it tries to read a file of the tokenizer
            raise OptionError(
                f"the answer cannot be given a form, because of the model's tokenizer: {error}"
            ) from error
        self._limits = LLParserLimits(
            max_grammar_size=SYMBOLS_MAX, max_lexer_states=LEXER_STATES_MAX, verbose_errors=False
        )
        self._vocabulary = vocabulary

    def json(self, schema: Any) -> Constraint:
        """Text that is JSON of a schema. Raises OptionError for a schema that is refused."""
        text = _bounded(json.dumps(schema))
        try:
            grammar = LLMatcher.grammar_from_json_schema(text, None, JSON_SPACE)
        except ValueError as error:
            raise OptionError(f"the schema is refused: {_short(str(error))}") from error
        return self._made("the schema", grammar)

    def lark(self, grammar: str) -> Constraint:
        """Text of a grammar in llguidance's variant of Lark. Raises OptionError for one that is refused."""
        return self._made("the grammar", LLMatcher.grammar_from_lark(_bounded(grammar)))

    def _made(self, what: str, grammar: str) -> Constraint:
        matcher = LLMatcher(self._tokens, grammar, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise OptionError(f"{what} is refused: {_short(matcher.get_error())}")
        constraint = Constraint(matcher, self._vocabulary)
        constraint.allowed()  # some are too complex for their first token
        return constraint


class Constraint:
    """The grammar of one text, and how far it is. The text's tokens are taken one by one."""

    def __init__(self, matcher: LLMatcher, vocabulary: int) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary

    def copy(self) -> Constraint:
        """For another text that begins like this one."""
        return Constraint(self._matcher.deep_copy(), self._vocabulary)

    def allowed(self) -> Tensor:
        """Which tokens may follow: [vocabulary] bool. Raises OptionError where the grammar becomes too complex."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise OptionError(f"the form of the answer is too complex to go on: {_short(self._matcher.get_error())}")
        return torch.from_numpy(np.unpackbits(bits, bitorder="little", count=self._vocabulary)).bool()

    def take(self, token: int) -> None:
        """The text goes on with a token that is allowed."""
        if not self._matcher.consume_token(token):
            raise OptionError(f"the form of the answer is too complex to go on: {_short(self._matcher.get_error())}")

    @property
    def complete(self) -> bool:
        """Whether nothing may follow."""
        return bool(self._matcher.is_stopped())


def _bounded(text: str) -> str:
    if len(text) > GRAMMAR_BYTES_MAX:
        raise OptionError(f"the schema has {len(text)} characters: at most {GRAMMAR_BYTES_MAX} are read")
    return text


def _short(error: str) -> str:
    return " ".join(error.split())[:ERROR_CHARACTERS_MAX]
