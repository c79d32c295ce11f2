"""Writes config.json, generation_config.json and the tokenizer of a GGUF file.

A child process makes the tokenizer. transformers and a converted vocabulary take hundreds of megabytes, and this memory
is free again before the first weight is read.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from weightd.checkpoint.gguf_config import token_id
from weightd.checkpoint.gguf_file import ARRAY_TYPE, GgufFile
from weightd.checkpoint.gguf_keys import SHORT
from weightd.errors import CheckpointError

PACKAGES = ("gguf", "torch", "transformers")
# Tokens that end a generation, as in llama.cpp: those of these keys, and control tokens with these texts.
END_KEYS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
END_TEXTS = {
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>",
    "<EOT>", "_<EOT>", "<end_of_utterance>", "<\uff5cend\u2581of\u2581sentence\uff5c>",
}  # fmt: skip
CONTROL = 3  # of tokenizer.ggml.token_type
SAMPLING = {
    "temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "penalty_repeat": "repetition_penalty",
}  # fmt: skip
# Keys of the tokenizer. Some of them follow from others, and some are used only for infilling and classification.
TOKENIZER_KEYS = {
    "ggml.model", "ggml.pre", "ggml.tokens", "ggml.scores", "ggml.token_type", "ggml.merges", "ggml.add_bos_token",
    "ggml.add_eos_token", "ggml.add_space_prefix", "ggml.remove_extra_whitespaces", "ggml.precompiled_charsmap",
    "ggml.token_type_count", "ggml.seperator_token_id", "ggml.unknown_token_id", "ggml.mask_token_id",
    "ggml.cls_token_id", "ggml.bos_token_id", "ggml.padding_token_id", "ggml.prefix_token_id", "ggml.suffix_token_id",
    "ggml.middle_token_id", "ggml.fim_pre_token_id", "ggml.fim_suf_token_id", "ggml.fim_mid_token_id",
    "chat_template", "chat_templates", "huggingface.json", *(f"ggml.{key}_token_id" for key in END_KEYS),
}  # fmt: skip


def check_packages(path: Path) -> None:
    """CheckpointError names packages that are not installed."""
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if missing:
        raise CheckpointError(f"{path} needs {' and '.join(missing)} to be read: pip install 'weightd[import]'")


def check_keys(file: GgufFile) -> None:
    """CheckpointError names a key that cannot be honoured. (gguf_config.py checks the keys of the architecture.)"""
    kind = file.metadata.get("general.type")
    if kind is not None and kind.content != "model":
        raise CheckpointError(f"{file.path} has general.type = {kind.content!r}: give the file of the model itself")
    for key, value in file.metadata.items():
        name = key.removeprefix("tokenizer.")
        if name != key and name not in TOKENIZER_KEYS and not name.startswith("chat_template."):
            neutral = name == "ggml.add_sep_token" and value.content is False
            if not neutral:
                raise CheckpointError(f"{file.path} has {key}, which weightd does not know")


def write_files(file: GgufFile, config: Mapping[str, Any], folder: Path) -> None:
    """Writes config.json, generation_config.json and, if the file has a vocabulary, the tokenizer's files."""
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = _generation_config(file, config)
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    if "tokenizer.ggml.tokens" in file.metadata:
        _write_tokenizer(file.path, folder)


def _generation_config(file: GgufFile, config: Mapping[str, Any]) -> dict[str, Any]:
    ends = _ends(file, config["vocab_size"])
    ids = {name: config[name] for name in ("bos_token_id", "pad_token_id") if config[name] is not None}
    if ends:
        ids["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    keys = {ours: f"general.sampling.{theirs}" for theirs, ours in SAMPLING.items()}
    sampling = {ours: _number(file, key) for ours, key in keys.items() if key in file.metadata}
    if "temperature" in sampling and sampling["temperature"] <= 0:  # greedy, to llama.cpp
        sampling = {name: value for name, value in sampling.items() if name == "repetition_penalty"}
    elif sampling:
        sampling["do_sample"] = True
    return ids | sampling


def _number(file: GgufFile, key: str) -> int | float:
    value = file.metadata[key].content
    if type(value) not in (int, float):
        raise CheckpointError(f"{file.path} has {key} = {SHORT.repr(value)}, which is not a number")
    return value  # type: ignore[no-any-return]


def _ends(file: GgufFile, vocabulary: int) -> list[int]:
    """The ids of the tokens that end a generation. The end-of-sequence token is first."""
    ends = [token_id(file, key, vocabulary) for key in END_KEYS]
    tokens, kinds = (file.metadata.get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
    if tokens is not None and kinds is not None and tokens.kind == kinds.kind == ARRAY_TYPE:
        pairs = zip(tokens.content, kinds.content, strict=False)
        ends += [index for index, (text, kind) in enumerate(pairs) if kind == CONTROL and text in END_TEXTS]
    return list(dict.fromkeys(end for end in ends if end is not None))


def _write_tokenizer(path: Path, folder: Path) -> None:
    command = [sys.executable, "-P", "-m", "weightd.checkpoint.gguf_tokenizer", str(path), str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if result.returncode != 0:
        refused = result.stdout.strip().splitlines()
        lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
        raise CheckpointError(refused[-1] if refused else f"transformers cannot convert {path}: {lines[-1]}")
