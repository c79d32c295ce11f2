"""Flags that say how tokens are chosen become arguments of generate()."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from flashclient.commands.sampling import add_sampling_flags, sampling_arguments
from flashclient.errors import OptionError


def parsed(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_sampling_flags(parser)
    return parser.parse_args(list(flags))


@pytest.mark.parametrize(
    ("flags", "arguments"),
    [
        ((), {}),
        (("--max-new-tokens", "7"), {"max_new_tokens": 7}),
        (("--temperature", "0"), {"do_sample": False}),
        (("--temperature", "0.7"), {"temperature": 0.7, "do_sample": True}),
        (("--top-k", "40", "--top-p", "0.9"), {"top_k": 40, "top_p": 0.9, "do_sample": True}),
        (("--min-p", "0.1"), {"min_p": 0.1, "do_sample": True}),
        (("--repetition-penalty", "1.1"), {"repetition_penalty": 1.1}),
    ],
)
def test_arguments(flags: tuple[str, ...], arguments: dict[str, Any]) -> None:
    assert sampling_arguments(parsed(*flags)) == arguments


def test_stop_texts_add_up() -> None:
    assert parsed().stop == []
    assert parsed("--stop", "a", "--stop", "b").stop == ["a", "b"]


def test_flags_that_exclude_each_other() -> None:
    with pytest.raises(OptionError, match="--top-p has no effect with --temperature 0"):
        sampling_arguments(parsed("--temperature", "0", "--top-p", "0.5"))


@pytest.mark.parametrize(
    "flags",
    [
        ("--temperature", "hot"),
        ("--temperature", "-1"),
        ("--top-p", "nan"),
        ("--top-p", "2"),
        ("--min-p", "1.1"),
        ("--top-k", "0"),
        ("--stop", ""),
    ],
)
def test_bad_values(flags: tuple[str, ...]) -> None:
    with pytest.raises(argparse.ArgumentError):
        parsed(*flags)
