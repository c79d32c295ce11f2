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

BEGIN, END = "<!-- scripts/call_table.py begins -->\n", "<!-- scripts/call_table.py ends -->\n"
TEST = "test_calls.py"
CLASSES = ("Gemma3ForCausalLM", "LlamaForCausalLM", "MistralForCausalLM", "OPTForCausalLM", "Qwen2ForCausalLM")
# What the table says after "works".
NOTES = {
    "assistant_early_exit": "but not with OPT, which always runs all layers",
    "cache_config": "needs cache_implementation='quantized' and the packages of its backend",
    "cache_implementation": "except 'offloaded' and 'offloaded_static' (no GPU), and 'paged' (many requests)",
    "compile_config": "transformers warns that it does not compile on a CPU",
    "custom_generate": "only a function; the name of a repository is refused, because its code would run here",
    "guidance_scale": "but in predict mode not together with use_cache=False",
    "is_causal": "only for prompts, as in transformers",
    "max_new_tokens": "the default is 256 if no length is set",
    "negative_prompt_ids": "needs guidance_scale",
    "num_assistant_tokens": "1 to 15; transformers itself reads it only from the draft's config",
    "pad_token_id": "an id outside the vocabulary is refused in a call for several rows, ignored in a config",
    "tokenizer": "by default the model's own, if stop_strings, token_healing or a draft needs one",
}


def parameters() -> set[str]:
    """Parameters of generate(), its config and the forward() of CLASSES."""
    names: set[str] = set()
    for name in CLASSES:
        names |= known_arguments(getattr(transformers, name))
    return names


def table() -> str:
    """The table, one row per parameter."""
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
