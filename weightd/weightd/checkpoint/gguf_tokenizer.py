"""Makes the tokenizer of a GGUF file with transformers' conversion, and adds what that drops.

    python -m weightd.checkpoint.gguf_tokenizer GGUF FOLDER             the child process of gguf_files.py

It adds the tokens at the beginning and end of a text, as the file and llama.cpp define them, every chat template, and
the splitting of digits. A key that cannot be honoured is refused by name.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from weightd.checkpoint.gguf_file import ARRAY_TYPE, STRING_TYPE, GgufFile, Value, read_header
from weightd.errors import CheckpointError

# Values of tokenizer.ggml.pre, which says how text is split before merging: as by GPT-2, or the same after every digit
# was split off. transformers itself knows others (GGUF_PRE_TOKENIZER_SPLITS).
SPLIT_AS_GPT2 = {
    "default", "gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jina-v1-en", "jina-v2-es", "jina-v2-de", "mellum", "gigachat",
    "trillion", "granite-docling",
}  # fmt: skip
SPLIT_WITH_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"}
# Others of llama.cpp (llama-vocab.cpp): expressions, each of which splits what those before it have left whole.
_CONTRACTIONS = r"'s|'t|'re|'ve|'m|'ll|'d"
_BLOOM = r" ?[^(\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
SPLITS = {
    "bloom": [_BLOOM],
    "poro-chat": [_BLOOM],
    "viking": [_BLOOM, r"\p{N}"],
    "deepseek-coder": [
        r"[\r\n]",
        r"\s?\p{L}+",
        r"\s?\p{P}+",
        r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
        r"\p{N}",
    ],
    "falcon": [
        r"[\p{P}\$\+<=>\^~\|`]+",
        _CONTRACTIONS + r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
        r"[0-9][0-9][0-9]",
    ],
    "stablelm2": [
        f"(?i:{_CONTRACTIONS})" + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
}
# For these, llama.cpp begins every text with the BOS token unless the file says otherwise.
PRE_WITH_BOS = {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken"}
PREFIX_SPACE = "\u2581"
# Architectures whose header transformers does not read. Its conversion of the vocabulary is that of others.
WITHOUT_CLASS = {"arcee", "ernie4_5", "gemma", "granite", "olmo2", "olmoe", "seed_oss", "smollm3"}


class _Parts(Sequence[Any]):
    """The elements of a metadata value as numpy arrays, as in the gguf package, but made only when they are read."""

    def __init__(self, value: Value) -> None:
        self._items = value.content if value.kind == ARRAY_TYPE else [value.content]
        self._strings = value.item_kind == STRING_TYPE

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        item = self._items[index]
        return np.frombuffer(item.encode(), np.uint8) if self._strings else np.array([item])


class LeanReader:
    """The part of gguf.GGUFReader that transformers uses. It neither maps the file nor makes an object per element.

    Keys of the rotary embedding are left out. A tokenizer needs none of them, and transformers fails on gpt-oss's.
    """

    def __init__(self, path: str) -> None:
        file = read_header(Path(path))
        self.fields = {name: _field(value) for name, value in file.metadata.items() if ".rope.scaling." not in name}
        self.tensors = [SimpleNamespace(name=name) for name in file.tensors]


def _field(value: Value) -> SimpleNamespace:
    from gguf import GGUFValueType

    kinds = [value.kind] if value.kind != ARRAY_TYPE else [ARRAY_TYPE, value.item_kind]
    parts = _Parts(value)
    return SimpleNamespace(parts=parts, data=range(len(parts)), types=[GGUFValueType(kind) for kind in kinds])


def write_tokenizer(path: Path, folder: Path) -> None:
    """Writes the tokenizer of the file at `path` into `folder`. CheckpointError if it cannot be honoured."""
    file = read_header(path)
    pre = _string(file, "ggml.pre") or "default"
    kind = _string(file, "ggml.model")
    _check_split(file, kind, pre)
    with _alone(path) as where:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        reads: Any = PreTrainedTokenizerFast if file.architecture in WITHOUT_CLASS else AutoTokenizer
        # transformers imports GGUFReader when it reads. If it stops doing so, the result is the same, only slower.
        with mock.patch("gguf.GGUFReader", LeanReader):
            try:
                tokenizer = reads.from_pretrained(where, gguf_file=path.name, trust_remote_code=False)
            except Exception as error:  # the library may raise anything for a malformed file
                reason = " ".join(str(error).split()) or type(error).__name__  # it may have several lines
                raise CheckpointError(f"transformers cannot convert the tokenizer of {path}: {reason}") from error
    if kind == "gpt2" and pre in SPLIT_WITH_DIGITS:
        _split_digits(tokenizer)
    elif kind == "gpt2" and pre in SPLITS:
        _split_by(tokenizer, SPLITS[pre])
    _check_prefix_space(file, kind, tokenizer)
    _add_ends(file, tokenizer, first=_flag(file, "ggml.add_bos_token", kind == "llama" or pre in PRE_WITH_BOS))
    templates = _templates(file)
    if templates:
        tokenizer.chat_template = templates["default"] if list(templates) == ["default"] else templates
    tokenizer.save_pretrained(folder)
    # Without the spaces between: Gemma's 33 MB become 14, which each client fetches and parses.
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    _list_added_tokens(tokenizer, folder / "tokenizer_config.json")


@contextmanager
def _alone(path: Path) -> Iterator[str]:
    """A folder with only a link to the file: transformers would also read templates that lie beside the file."""
    with tempfile.TemporaryDirectory(prefix="weightd-") as folder:
        (Path(folder) / path.name).symlink_to(path.absolute())
        yield folder


def _string(file: GgufFile, name: str) -> str | None:
    value = file.metadata.get(f"tokenizer.{name}")
    return value.content if value is not None and isinstance(value.content, str) else None


def _flag(file: GgufFile, name: str, default: bool) -> bool:
    value = file.metadata.get(f"tokenizer.{name}")
    return default if value is None else bool(value.content)


def _check_split(file: GgufFile, kind: str | None, pre: str) -> None:
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:  # older transformers knows none
        GGUF_PRE_TOKENIZER_SPLITS = {}
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(f"{file.path} has tokenizer.ggml.model = {kind!r}: known are gpt2 and llama")
    if (
        kind == "gpt2"
        and pre not in SPLIT_AS_GPT2 | SPLIT_WITH_DIGITS | SPLITS.keys() | GGUF_PRE_TOKENIZER_SPLITS.keys()
    ):
        raise CheckpointError(f"{file.path} has tokenizer.ggml.pre = {pre!r}: weightd does not know how it splits text")


def _split_digits(tokenizer: Any) -> None:
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def _split_by(tokenizer: Any, expressions: Sequence[str]) -> None:
    from tokenizers import Regex, pre_tokenizers

    splits = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in expressions]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])


def _check_prefix_space(file: GgufFile, kind: str | None, tokenizer: Any) -> None:
    """CheckpointError if the file and transformers' tokenizer class differ about a space before every text."""
    if kind != "llama":
        return
    backend = tokenizer.backend_tokenizer
    text = "a" if backend.normalizer is None else backend.normalizer.normalize_str("a")
    pieces = [(text, None)] if backend.pre_tokenizer is None else backend.pre_tokenizer.pre_tokenize_str(text)
    wanted = _flag(file, "ggml.add_space_prefix", True)
    if pieces[0][0].startswith(PREFIX_SPACE) != wanted:
        raise CheckpointError(
            f"{file.path} has tokenizer.ggml.add_space_prefix = {wanted}, which transformers' tokenizer of its kind "
            "does not follow"
        )


def _add_ends(file: GgufFile, tokenizer: Any, first: bool) -> None:
    """Adds the tokens before and after a text, for every tokenizer class."""
    from tokenizers import processors

    last = _flag(file, "ggml.add_eos_token", False)
    ends = {name: getattr(tokenizer, f"{name}_token") for name in ("bos", "eos")}
    begin = [ends["bos"]] if first and ends["bos"] is not None else []
    end = [ends["eos"]] if last and ends["eos"] is not None else []
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in {*begin, *end}]
    second = [f"{piece}:1" for piece in (*begin, "$B", *end)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=[*begin, "$A", *end], pair=[*begin, "$A", *end, *second], special_tokens=ids
    )
    tokenizer.init_kwargs.update(add_bos_token=bool(begin), add_eos_token=bool(end))
    for name, token in (("_add_bos_token", begin), ("_add_eos_token", end)):
        if hasattr(tokenizer, name):
            setattr(tokenizer, name, bool(token))


def _list_added_tokens(tokenizer: Any, path: Path) -> None:
    """Lists them in the tokenizer's configuration. Otherwise transformers parses all of tokenizer.json to find them."""
    config = json.loads(path.read_bytes())
    tokens = tokenizer.added_tokens_decoder.items()
    config["added_tokens_decoder"] = {str(number): token.__getstate__() for number, token in tokens}
    path.write_text(json.dumps(config, ensure_ascii=False, indent=2, sort_keys=True), "utf-8")


def _templates(file: GgufFile) -> dict[str, str]:
    """tokenizer.chat_template and tokenizer.chat_template.NAME, by name."""
    found = {}
    for key, value in file.metadata.items():
        if key == "tokenizer.chat_template" or key.startswith("tokenizer.chat_template."):
            if not isinstance(value.content, str):
                raise CheckpointError(f"{file.path} has {key} = {value.content!r}, which is not a template")
            found[key.removeprefix("tokenizer.chat_template").removeprefix(".") or "default"] = value.content
    return found


def main() -> None:
    try:
        write_tokenizer(Path(sys.argv[1]).absolute(), Path(sys.argv[2]))
    except CheckpointError as error:
        print(error)
        sys.exit(1)


if __name__ == "__main__":
    main()
