"""Planted GGUF files: a checkpoint in shards with the same weights, matrices in F16; and matrices in blocks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter, TokenType
from numpy.typing import NDArray
from safetensors import safe_open
from tqdm import tqdm

from planted.blocks import BlockKind, BlockMatrix, Matrix

BYTES_FROM = 3  # the ids of "<unk>", "<s>" and "</s>" come before those of bytes
TEXTS_FROM = BYTES_FROM + 256
FIRST_TEXT = 0x20000  # code points of a plane that has letters only
OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
ATTENTION = {  # and its norms, of one layer
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}


def write_gguf(
    path: Path,
    architecture: str,
    keys: Mapping[str, int | float],
    tensors: Mapping[str, Sequence[str]],
    checkpoint: Path,
    paired_heads: int = 0,
    ones: Mapping[str, int] | None = None,
) -> None:
    """Writes the tensors one by one, so no more than one is in memory.

    Args:
        keys: of the header, without the architecture; vocab_size is one of them.
        tensors: for each tensor of the file those of the checkpoint that it holds, one after the other. Experts have a
            dimension of their own.
        paired_heads: the heads of queries and keys, if llama.cpp rotates neighbouring rows of this architecture, where
            transformers rotates a row of the first half with one of the second. Else 0.
        ones: norms that the checkpoint lacks, by their length: they are ones.
    """
    writer = new_writer(path, architecture, keys)
    _add_vocabulary(writer, int(keys["vocab_size"]))
    writer.add_file_type(1)  # mostly F16
    read = _Tensors(checkpoint)
    for name, sources in tensors.items():
        kind = _kind(name)
        full = _full_shape(name, read.shape(sources[0]), len(sources))
        writer.add_tensor_info(name, full, kind, int(np.prod(full)) * kind.itemsize)
    norms = {name: np.ones(length, np.float32) for name, length in (ones or {}).items()}
    for name, norm in norms.items():
        name_tensor(writer, name, norm)
    write_front(writer)
    for name, sources in tqdm(tensors.items(), unit="tensor", disable=None):
        parts = [read(source, _kind(name)) for source in sources]
        tensor = parts[0] if len(parts) == 1 else np.concatenate(parts)  # the shape is in the header
        if paired_heads and name.endswith(("attn_q.weight", "attn_k.weight")):
            tensor = _in_pairs(tensor, paired_heads)
        writer.write_tensor_data(tensor)
    for norm in norms.values():
        writer.write_tensor_data(norm)
    writer.close()


def new_writer(path: Path, architecture: str, keys: Mapping[str, int | float]) -> GGUFWriter:
    """A file whose vocabulary is still to be added. keys: of the header, without the architecture."""
    writer = GGUFWriter(path, architecture)
    for key, value in keys.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{architecture}.{key}", value)  # type: ignore[arg-type]
    return writer


def text_of(token: int) -> str:
    """The text of a token that stands for neither a byte nor an end: one character, so that texts have one reading."""
    return chr(FIRST_TEXT + token)


def _add_vocabulary(writer: GGUFWriter, tokens: int) -> None:
    """One of SentencePiece, as Llama has. Servers need it, which take texts and stream them."""
    special = [("<unk>", TokenType.UNKNOWN), ("<s>", TokenType.CONTROL), ("</s>", TokenType.CONTROL)]
    of_bytes = [(f"<0x{byte:02X}>", TokenType.BYTE) for byte in range(TEXTS_FROM - BYTES_FROM)]
    texts = [(text_of(token), TokenType.NORMAL) for token in range(TEXTS_FROM, tokens)]
    named = [*special, *of_bytes, *texts][:tokens]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([text for text, _ in named])
    writer.add_token_types([kind for _, kind in named])
    writer.add_token_scores([0.0] * len(named))
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)


def write_front(writer: GGUFWriter) -> None:
    """What comes before the tensors' data, once all tensors are named."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def joined(name: str, matrices: Sequence[Matrix]) -> NDArray[Any]:
    """A tensor's blocks or numbers. Several matrices have a dimension more."""
    kind = _kind(name)
    arrays = [one.blocks if isinstance(one, BlockMatrix) else one.float().numpy().astype(kind) for one in matrices]
    return arrays[0] if len(arrays) == 1 else np.stack(arrays)


def name_tensor(writer: GGUFWriter, name: str, data: NDArray[Any], blocks: BlockKind | None = None) -> None:
    """Adds a tensor like `data`, which joined() has returned, to the front of the file.

    Args:
        blocks: what the bytes of `data` are, if it has bytes.
    """
    encoding = blocks.encoding if blocks and data.dtype == np.uint8 else None
    writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, encoding)


def _kind(name: str) -> np.dtype[Any]:
    """llama.cpp computes norms, routers and biases in F32."""
    is_fp32 = "norm" in name or "gate_inp" in name or name.endswith(".bias")
    return np.dtype(np.float32 if is_fp32 else np.float16)


def _full_shape(name: str, of_one: tuple[int, ...], count: int) -> tuple[int, ...]:
    """The shape of `count` tensors, one after the other."""
    return (count, *of_one) if "_exps" in name else (count * of_one[0], *of_one[1:])


def _in_pairs(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, -1)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


class _Tensors:
    """The tensors of a checkpoint in shards."""

    def __init__(self, checkpoint: Path) -> None:
        index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
        self._folder: Path = checkpoint
        self._file_of: dict[str, str] = index["weight_map"]
        self._open: dict[str, Any] = {}

    def __call__(self, name: str, kind: np.dtype[Any]) -> NDArray[Any]:
        """The tensor as numbers of `kind`."""
        tensor: NDArray[Any] = self._file(name).get_tensor(name).float().numpy()  # numpy has no bfloat16
        return tensor.astype(kind)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file(name).get_slice(name).get_shape())

    def _file(self, name: str) -> Any:
        file = self._file_of[name]
        if file not in self._open:
            self._open[file] = safe_open(self._folder / file, "pt")
        return self._open[file]
