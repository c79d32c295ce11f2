"""The child process of gguf_files.py: `python -m weightd.gguf_conversion config|files GGUF [FOLDER]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from weightd.gguf_checkpoint import ARRAY_TYPE, STRING_TYPE, GgufFile, Value, read_gguf

# transformers' configurations carry no class name when they come from a GGUF file.
CLASSES = {
    "gemma3_text": "Gemma3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}

GEMMA3_27B_LAYERS = 62


class _Parts(Sequence[Any]):
    """Elements of a metadata value as the gguf package gives them: numpy arrays, here made when asked for."""

    def __init__(self, value: Value) -> None:
        self._items = value.content if value.kind == ARRAY_TYPE else [value.content]
        self._strings = value.item_kind == STRING_TYPE

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        item = self._items[index]
        return np.frombuffer(item.encode(), np.uint8) if self._strings else np.array([item])


class LeanReader:
    """What transformers uses of gguf.GGUFReader, without mapping the file or an object per metadata element."""

    def __init__(self, path: str) -> None:
        file = read_gguf(Path(path))
        self.fields = {name: _field(value) for name, value in file.metadata.items()}
        self.tensors = [SimpleNamespace(name=name) for name in file.tensors]


def _field(value: Value) -> SimpleNamespace:
    from gguf import GGUFValueType

    kinds = [value.kind] if value.kind != ARRAY_TYPE else [ARRAY_TYPE, value.item_kind]
    parts = _Parts(value)
    return SimpleNamespace(parts=parts, data=range(len(parts)), types=[GGUFValueType(kind) for kind in kinds])


def gemma3_attention_scale(config: Any) -> int:
    """query_pre_attn_scalar, which GGUF does not carry: transformers takes 256 then, wrong for many sizes.

    As in llama.cpp (f_attention_scale of LLM_ARCH_GEMMA3), 27B is told by its layers; else it is the head's width.
    """
    is_27b = config.num_hidden_layers == GEMMA3_27B_LAYERS
    return int(config.hidden_size // config.num_attention_heads if is_27b else config.head_dim)


def _convert(file: GgufFile, folder: Path | None) -> str:
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    where = {"pretrained_model_name_or_path": str(file.path.parent), "gguf_file": file.path.name}
    config = AutoConfig.from_pretrained(**where)
    config.architectures = [CLASSES[config.model_type]]
    if config.model_type == "gemma3_text":
        config.query_pre_attn_scalar = gemma3_attention_scale(config)
    if folder is not None:
        config.save_pretrained(folder)
        GenerationConfig.from_model_config(config).save_pretrained(folder)
        if "tokenizer.ggml.tokens" in file.metadata:
            AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
    return str(config.to_json_string(use_diff=False))


def main() -> None:
    import gguf

    kind, path = sys.argv[1], Path(sys.argv[2]).absolute()
    # transformers imports the name when it reads. Were it to stop that, the result would be the same, but slower.
    setattr(gguf, "GGUFReader", LeanReader)  # noqa: B010
    print(_convert(read_gguf(path), Path(sys.argv[3]) if kind == "files" else None))


if __name__ == "__main__":
    main()
