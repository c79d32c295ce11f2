"""The files of a planted mixture: a checkpoint, the store into which it is imported, and a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter
from planted.mixture import DTYPE, MIXTURES, NORM_EPSILON, MixtureShape, PlantedMixture
from planted.shapes import checkpoint_shapes
from planted.shards import Shards, new_folder, write_json
from planted.store import PlantedStore, import_once
from safetensors import safe_open
from tqdm import tqdm

PLAN_FILE = "plan.json"
SEED = 0
ROPE_THETA = 10000.0
PARTS = ("gate", "up", "down")
GGUF_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
GGUF_OF_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate_inp.weight": "mlp.gate.weight",
}


@dataclass(frozen=True)
class MixtureFiles(PlantedStore):
    """A planted mixture. Methods that end in `d` make what is missing."""

    shape: MixtureShape

    @property
    def gguf(self) -> Path:
        return self.checkpoint.parent / f"gguf-{self.name}" / f"{self.name}.gguf"

    @cached_property
    def plan(self) -> dict[str, Any]:
        """See PlantedMixture.plan()."""
        content: dict[str, Any] = json.loads((self.checkpoint / PLAN_FILE).read_text())
        return content

    def planted(self) -> None:
        """Raises OSError if the disk is too small."""
        if self.checkpoint.exists():
            return
        shapes = checkpoint_shapes(self.shape.config()).values()
        size_bytes = DTYPE.itemsize * sum(torch.Size(one).numel() for one in shapes)
        with new_folder(self.checkpoint, size_bytes) as folder:
            mixture = PlantedMixture(self.shape, SEED)
            shards = Shards(folder, 1 + self.shape.layers)
            shards.write(mixture.outside())
            progress = tqdm(mixture.layers(), total=self.shape.layers, unit="layer", disable=None)
            for layer, tensors in enumerate(progress):
                shards.write({f"model.layers.{layer}.{name}": tensor for name, tensor in tensors.items()})
            shards.write_index()
            write_json(folder / "config.json", self.shape.config())
            write_json(folder / "generation_config.json", {"do_sample": False, "pad_token_id": 1})
            write_json(folder / PLAN_FILE, mixture.plan())

    def imported(self) -> None:
        """Raises BenchError with the error of the import."""
        import_once(self)

    def converted(self) -> None:
        """Writes the same weights as llama.cpp reads them: the experts of a layer are one tensor for each part."""
        if self.gguf.exists():
            return
        size_bytes = sum(path.stat().st_size for path in self.checkpoint.glob("*.safetensors"))
        with new_folder(self.gguf.parent, size_bytes) as folder:
            _write_gguf(folder / self.gguf.name, self.checkpoint, self.shape)


def mixture_files(shape: str, layers: int | None, folder: Path) -> MixtureFiles:
    """The files of a shape, with fewer layers if `layers` is given."""
    chosen, name = MIXTURES[shape], f"planted-{shape}"
    if layers is not None:
        chosen, name = replace(chosen, layers=layers), f"{name}-{layers}"
    return MixtureFiles(folder / name, folder / f"store-{name}", name, chosen)


def _write_gguf(path: Path, checkpoint: Path, shape: MixtureShape) -> None:
    """Tensors are written one by one, so no more than one is in memory."""
    writer = GGUFWriter(path, "olmoe")
    for key, value in _keys(shape).items():
        if isinstance(value, float):
            writer.add_float32(f"olmoe.{key}", value)
        else:
            writer.add_uint32(f"olmoe.{key}", value)
    writer.add_file_type(1)  # mostly F16
    writer.add_tokenizer_model("none")
    read = _Tensors(checkpoint)
    names = dict(_gguf_tensors(shape))
    for name, sources in names.items():
        kind = np.float32 if _is_f32(name) else np.float16
        of_one = read.shape(sources[0])
        full = of_one if len(sources) == 1 else (len(sources), *of_one)
        writer.add_tensor_info(name, full, np.dtype(kind), int(np.prod(full)) * np.dtype(kind).itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, sources in tqdm(names.items(), unit="tensor", disable=None):
        tensor = np.concatenate([read(source)[None] for source in sources]) if len(sources) > 1 else read(sources[0])
        writer.write_tensor_data(tensor.astype(np.float32) if _is_f32(name) else tensor)
    writer.close()


def _keys(shape: MixtureShape) -> Mapping[str, int | float]:
    return {
        "context_length": shape.context_tokens,
        "embedding_length": shape.hidden_size,
        "block_count": shape.layers,
        "feed_forward_length": shape.expert_size,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.heads,
        "attention.layer_norm_rms_epsilon": NORM_EPSILON,
        "rope.freq_base": ROPE_THETA,
        "expert_count": shape.experts,
        "expert_used_count": shape.chosen,
        "vocab_size": shape.vocabulary,
    }


def _gguf_tensors(shape: MixtureShape) -> Iterator[tuple[str, list[str]]]:
    """Each tensor of the file, and the tensors of the checkpoint that it holds, one after the other."""
    for name, source in GGUF_OUTSIDE.items():
        yield name, [source]
    for layer in range(shape.layers):
        of_layer = f"model.layers.{layer}"
        for name, source in GGUF_OF_LAYER.items():
            yield f"blk.{layer}.{name}", [f"{of_layer}.{source}"]
        for part in PARTS:
            of_experts = [f"{of_layer}.mlp.experts.{expert}.{part}_proj.weight" for expert in range(shape.experts)]
            yield f"blk.{layer}.ffn_{part}_exps.weight", of_experts


def _is_f32(name: str) -> bool:
    """llama.cpp computes norms and routers in F32."""
    return "norm" in name or "gate_inp" in name


class _Tensors:
    """The tensors of a checkpoint in shards."""

    def __init__(self, checkpoint: Path) -> None:
        index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
        self._folder: Path = checkpoint
        self._file_of: dict[str, str] = index["weight_map"]
        self._open: dict[str, Any] = {}

    def __call__(self, name: str) -> np.ndarray[Any, Any]:
        tensor: np.ndarray[Any, Any] = self._file(name).get_tensor(name)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file(name).get_slice(name).get_shape())

    def _file(self, name: str) -> Any:
        file = self._file_of[name]
        if file not in self._open:
            self._open[file] = safe_open(self._folder / file, "numpy")
        return self._open[file]
