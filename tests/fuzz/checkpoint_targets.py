"""Fuzz targets: checkpoints that somebody else made, through the whole of an import.

An import succeeds, or is refused with a CheckpointError or a SpaceError. Any other exception is a finding.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from math import prod
from pathlib import Path
from random import Random
from typing import Any

import gguf_fields
from checkpoints import shapes_of
from conftest import client_here
from mutators import Mutator, change_json, json_text, safetensors

from weightd.checkpoint.checkpoint import read_json
from weightd.checkpoint.gguf_file import read_gguf
from weightd.disk.safetensors_file import read_safetensors
from weightd.errors import CheckpointError, SpaceError
from weightd.importing import convert
from weightd.importing.convert import import_checkpoint
from weightd.store.store import Store
from weightd_proto.safetensors_header import header_of

CONFIG_FILES = ("config.json", "generation_config.json", "tokenizer_config.json")
CONFIG_KEYS = [
    "model_type", "architectures", "hidden_size", "intermediate_size", "ffn_dim", "num_hidden_layers", "vocab_size",
    "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "activation_function", "mlp_bias",
    "attention_bias", "tie_word_embeddings", "quantization_config", "rope_scaling", "rope_parameters", "rope_theta",
    "max_position_embeddings", "word_embed_proj_dim", "do_layer_norm_before", "enable_bias", "torch_dtype", "dtype",
    "layer_types", "sliding_window", "final_logit_softcapping", "eos_token_id", "pad_token_id", "bos_token_id",
    "query_pre_attn_scalar", "rms_norm_eps", "text_config", "max_length", "chat_template", "auto_map",
    "_remove_final_layer_norm", "layer_norm_elementwise_affine", "transformers_version",
]  # fmt: skip
WEIGHTS_BYTES_MAX = 1 << 20  # of what is written to fit a configuration
ELEMENT_BYTES = 2
SECRET = b"\x3f\x3f"  # the elements of weights outside of a checkpoint, in BF16


convert.__dict__["child"] = client_here  # not a child process for each input


@cache
def folder() -> Path:
    """One folder for all inputs of this process. It is not removed, so that a finding can be examined."""
    return Path(tempfile.mkdtemp(prefix="weightd-fuzz-"))


def safetensors_header(data: bytes) -> None:
    with suppress(CheckpointError):
        read_safetensors(_file(data))


def gguf_header(data: bytes) -> None:
    with suppress(CheckpointError):
        read_gguf(_file(b"GGUF" + data))


def _file(data: bytes) -> Path:
    path = folder() / "input"
    path.write_bytes(data)
    return path


def model_config(data: bytes) -> None:
    """config.json, generation_config.json and tokenizer_config.json, with a zero byte between them.

    If config.json describes a model of a sensible size, the weights are made to fit it.
    """
    checkpoint = _empty("checkpoint")
    for name, text in zip(CONFIG_FILES, data.split(b"\0"), strict=False):
        if text:
            (checkpoint / name).write_bytes(text)
    with suppress(Exception):  # transformers raises anything for a configuration of unknown origin
        config = read_json(checkpoint / "config.json")
        sizes = [value for value in config.values() if type(value) is int]
        shapes = shapes_of(config) if max(sizes) < WEIGHTS_BYTES_MAX and config["num_hidden_layers"] < 9 else {}
        if sum(map(prod, shapes.values())) * ELEMENT_BYTES <= WEIGHTS_BYTES_MAX:
            _write_weights(checkpoint / "model.safetensors", shapes)
    _import(checkpoint)


def index_file(data: bytes) -> None:
    """The index of sharded weights. The first byte selects the kind, the rest is the file.

    There are two shards, and another file of the same kind outside the checkpoint, which must never get into a store.
    """
    index, shards = ("model.safetensors", _safetensors_shards) if data[:1] < b"\x80" else ("pytorch_model.bin", _torch)
    checkpoint = shards()
    (checkpoint / f"{index}.index.json").write_bytes(data[1:])
    _import(checkpoint)


def _empty(name: str) -> Path:
    path = folder() / name
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    return path


def _write_weights(path: Path, shapes: Any, element: bytes = b"\0\0") -> None:
    """A safetensors file whose elements are all the same."""
    header = header_of({name: ("BF16", shape) for name, shape in shapes.items()}, alignment_bytes=1)
    path.write_bytes(header + element * sum(map(prod, shapes.values())))


def _import(checkpoint: Path) -> None:
    """Imports the checkpoint and deletes the model. Asserts that a refused import leaves nothing."""
    with Store.open(folder() / "store", create=True) as store:
        with suppress(CheckpointError, SpaceError):
            import_checkpoint(checkpoint, store, "m", allow_buffered=True)
            for path in (store.path / "m").rglob("*"):
                assert not path.is_file() or SECRET * 8 not in path.read_bytes(), path
            store.remove("m")
        left = [path.name for path in store.path.iterdir() if path.is_dir()]
        assert not left, left


TINY = {
    "model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 8,
    "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip


@cache
def _safetensors_shards() -> Path:
    return _shards("safetensors", "model-{}.safetensors", _write_weights)


@cache
def _torch() -> Path:
    import torch

    def write(path: Path, shapes: Any, element: bytes = b"\0\0") -> None:
        one = torch.frombuffer(bytearray(element), dtype=torch.bfloat16)
        torch.save({name: one.expand(shape).contiguous() for name, shape in shapes.items()}, path)

    return _shards("bin", "pytorch_model-{}.bin", write)


def _shards(kind: str, file: str, write: Callable[..., None]) -> Path:
    checkpoint = _empty(f"{kind}-shards")
    (checkpoint / "config.json").write_text(json.dumps(TINY))
    shapes = shapes_of(TINY)
    for number in (1, 2):
        write(checkpoint / file.format(number), dict(list(shapes.items())[number - 1 :: 2]))
    write(folder() / file.format("outside"), shapes, SECRET)
    return checkpoint


# Mutators


def _parse_configs(data: bytes) -> list[Any]:
    return [json.loads(part) if part else None for part in data.split(b"\0")]


def _mutate_configs(parsed: list[Any], random: Random) -> bytes:
    at = random.randrange(len(parsed)) if random.randrange(4) == 0 else 0
    parsed[at] = change_json(parsed[at] or {}, random, CONFIG_KEYS)
    return _joined(parsed)


def _joined(parts: Iterable[Any]) -> bytes:
    return b"\0".join(b"" if part is None else json_text(part) for part in parts)


def _mutate_index(parsed: tuple[bytes, Any], random: Random) -> bytes:
    keys = ["weight_map", "metadata", "total_size", "model.norm.weight", "lm_head.weight"]
    kind = bytes([random.randrange(256)]) if random.randrange(16) == 0 else parsed[0]
    return kind + json_text(change_json(parsed[1], random, keys))


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target for target in (safetensors_header, gguf_header, model_config, index_file)
}
MUTATORS: dict[str, Mutator] = {
    "safetensors_header": safetensors(["__metadata__", "F32", "BF16", "x"]),
    "gguf_header": Mutator(gguf_fields.parse, gguf_fields.change),
    "model_config": Mutator(_parse_configs, _mutate_configs),
    "index_file": Mutator(lambda data: (data[:1], json.loads(data[1:])), _mutate_index),
}
