"""Texts that follow a grammar: which tokens may follow, where a text is complete, grammars that are refused in time."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import torch
from checkpoints import VOCABULARY, make_tokenizer

from flashclient.batching.constraint import GRAMMAR_BYTES_MAX, Constraint, Grammars
from flashclient.batching.sampling import Sampler, Sampling
from flashclient.errors import OptionError

TOKENIZER = make_tokenizer()
END = 2
REFUSED_S = 10.0  # hostile grammars take less than 1 s on a quiet machine


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(TOKENIZER, VOCABULARY, [END])


def made(constraint: Constraint, seed: int) -> str:
    """A random text that the constraint allows."""
    sampler = Sampler(Sampling(seed=seed), [5], constraint)
    generator, tokens = torch.Generator().manual_seed(seed), []
    while not constraint.complete:
        tokens.append(sampler.pick(torch.randn(VOCABULARY, generator=generator)).token)
    return str(TOKENIZER.decode(tokens, skip_special_tokens=True))


def test_random_texts_follow_their_schema(grammars: Grammars) -> None:
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {"n": {"type": "integer"}, "s": {"enum": ["a", "\u00fc\n"]}},
        "required": ["n", "s"],
    }
    schema |= {"additionalProperties": False}
    constraint = grammars.json(schema)
    for seed in range(5):
        said = json.loads(made(constraint.copy(), seed))
        assert isinstance(said["n"], int)
        assert said["s"] in ("a", "\u00fc\n")


def test_a_grammar(grammars: Grammars) -> None:
    assert {made(grammars.lark('start: "yes" | "no"'), seed) for seed in range(8)} == {"yes", "no"}
    with pytest.raises(OptionError, match="the grammar is refused"):
        grammars.lark("start: nowhere")


@pytest.mark.parametrize(
    "schema",
    [
        {"enum": [f"value{index}" for index in range(5000)]},
        {"type": "object", "properties": {f"p{index}": {"type": "string"} for index in range(2500)}},
        {
            "allOf": [
                {"anyOf": [{"type": "string", "pattern": f"^.{{{i}}}a.{{{j}}}"} for j in range(6)]} for i in range(8)
            ]
        },
        {"type": "string", "pattern": "^(.*a.{30}){20}$"},
        {"type": "string", "pattern": "(((a{1000}){1000}){1000})"},
        {"type": "array", "items": {"type": "integer"}, "minItems": 10**9},
        {"type": "integer", "multipleOf": 1_000_003, "minimum": 0, "maximum": 10**15},
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        {"$ref": "http://example.com/schema.json"},
        "x" * (GRAMMAR_BYTES_MAX + 1),
    ],
)
def test_hostile_schemas_are_refused_or_followed_in_bounded_time(grammars: Grammars, schema: Any) -> None:
    refused, begin = "", time.monotonic()
    try:
        constraint = grammars.json(schema)
        for _ in range(4):
            allowed = constraint.allowed()
            if constraint.complete or not allowed.any():
                break
            constraint.take(int(allowed.nonzero()[-1]))
    except OptionError as error:
        refused = str(error)
    assert len(refused) < 500
    assert time.monotonic() - begin < REFUSED_S
