#!/usr/bin/env -S bash -c 'PATH="$(realpath "${0%/*}/..")/.venv/bin:$PATH" exec python3 "$0" "$@"'
"""Writes the table of client/README.md: every parameter of transformers' generate(), whether it works, and its test."""

from __future__ import annotations

import sys
from pathlib import Path

import transformers
from flags import FlagParser

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "fixtures"))

from call_cases import CASES  # noqa: E402

from flashclient.generation.arguments import IGNORED, REFUSED, known_arguments  # noqa: E402
from flashclient.model.architectures import ARCHITECTURES  # noqa: E402

BEGIN, END = "<!-- scripts/call_table.py begins -->\n", "<!-- scripts/call_table.py ends -->\n"
TEST = "test_calls.py"
# What a word on the parameter says more than that it works.
NOTES = {
    "assistant_early_exit": "for models that can stop at a layer; OPT is refused, as transformers' runs all of them",
    "cache_config": "needs cache_implementation='quantized' and the packages of its backend",
    "cache_implementation": "but 'offloaded', 'offloaded_static' (no GPU) and 'paged' (many requests) are refused",
    "compile_config": "transformers warns that it compiles nothing on a CPU",
    "custom_generate": "a function; the name of a repository is refused, as its code would run here",
    "guidance_scale": "in mode predict not together with use_cache=False",
    "is_causal": "as transformers has it: for prompts",
    "max_new_tokens": "256 where nothing sets a length",
    "negative_prompt_ids": "with guidance_scale",
    "num_assistant_tokens": "1 to 15; transformers itself reads it in the draft's config only",
    "pad_token_id": "one that is no token is taken for unset in a model's config, and refused where rows need it",
    "tokenizer": "set where stop_strings, token_healing or a draft need it",
}


def parameters() -> set[str]:
    """Of generate(), its config and the forward of every model that can be run."""
    names: set[str] = set()
    for name in ARCHITECTURES:
        names |= known_arguments(getattr(transformers, name))
    return names


def table() -> str:
    """One row for each."""
    lines = ["| parameter | | test |", "|---|---|---|"]
    for name in sorted(parameters() | set(CASES), key=lambda one: one.lstrip("_")):
        if name in REFUSED or name in IGNORED:
            reason = (REFUSED.get(name) or IGNORED[name])[0]
            lines.append(f"| `{name}` | refused: {reason} | `{TEST}::test_refused[{name}]` |")
        else:
            note = f": {NOTES[name]}" if name in NOTES else ""
            test = f"`{TEST}::test_works[{name}]`" if name in CASES else "`test_call_refusals.py`"
            lines.append(f"| `{name}` | works{note} | {test} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    FlagParser(__doc__).parse_args()
    path = ROOT / "client/README.md"
    before, _, rest = path.read_text().partition(BEGIN)
    path.write_text(before + BEGIN + table() + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
