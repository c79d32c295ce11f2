"""Flags that say how tokens are chosen, and where a text ends."""

from __future__ import annotations

import argparse
import math
from typing import Any

from flashclient.commands.arguments import not_negative, positive, utf8
from flashclient.errors import OptionError

CHOICES = ("top_p", "top_k", "min_p")  # from which tokens is sampled


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"'{text}' must be a number of at least 0")
    return value


def _probability(text: str) -> float:
    value = _number(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"'{text}' must be a number from 0 to 1")
    return value


def _seed(text: str) -> int:
    value = not_negative(text)
    if value >= 2**63:
        raise argparse.ArgumentTypeError(f"'{text}' must be below 2^63")
    return value


def _stop_text(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("an empty text would end every answer at once")
    return utf8(text)


def add_sampling_flags(command: Any) -> None:
    """The usual names of sampling options. Without them the model's own generation config decides."""
    command.add_argument(
        "--max-new-tokens",
        "--max-tokens",
        "-n",
        type=positive,
        metavar="N",
        help="number of new tokens (default: the model's own, or 256)",
    )
    command.add_argument("--temperature", type=_number, metavar="T", help="of sampling; 0 takes the likeliest token")
    command.add_argument(
        "--top-p", type=_probability, metavar="P", help="sample from the likeliest tokens that sum up to P"
    )
    command.add_argument("--top-k", type=positive, metavar="K", help="sample from the K likeliest tokens")
    command.add_argument(
        "--min-p", type=_probability, metavar="P", help="sample from tokens at least P times as likely as the likeliest"
    )
    command.add_argument(
        "--repetition-penalty", type=_number, metavar="R", help="above 1 makes tokens of the text so far less likely"
    )
    command.add_argument("--seed", type=_seed, metavar="N", help="the same seed gives the same text")
    command.add_argument(
        "--stop",
        action="append",
        default=[],
        type=_stop_text,
        metavar="TEXT",
        help="end before this text; may be given several times",
    )


def sampling_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of generate().

    Raises:
        OptionError: two flags exclude each other.
    """
    names = ("max_new_tokens", "temperature", *CHOICES, "repetition_penalty")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    chosen = [name for name in CHOICES if name in given]
    if given.get("temperature") == 0:
        if chosen:
            flag = f"--{chosen[0].replace('_', '-')}"
            raise OptionError(f"{flag} has no effect with --temperature 0, which takes the likeliest token: drop one")
        given = {name: value for name, value in given.items() if name != "temperature"} | {"do_sample": False}
    elif chosen or "temperature" in given:
        given["do_sample"] = True
    return given


def seed_sampling(options: argparse.Namespace) -> None:
    """Starts torch's random numbers at --seed."""
    if options.seed is not None:
        import torch

        torch.manual_seed(options.seed)
