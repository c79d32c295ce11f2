"""The files of a planted mixture: a checkpoint, the store into which it is imported, and a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from planted.blocks import Matrix
from planted.gguf_file import ATTENTION, OUTSIDE, joined, name_tensor, new_writer, write_front, write_gguf
from planted.mixture import DTYPE, MIXTURES, NORM_EPSILON, MixtureShape, PlantedMixture
from planted.shapes import checkpoint_shapes
from planted.shards import Shards, new_folder, write_json
from planted.store import PlantedStore, import_once
from tqdm import tqdm

PLAN_FILE = "plan.json"
SEED = 0
ROPE_THETA = 10000.0
PARTS = ("gate", "up", "down")
GGUF_OF_LAYER = ATTENTION | {
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "ffn_gate_inp.weight": "mlp.gate.weight",
}


@dataclass(frozen=True)
class MixtureFiles(PlantedStore):
    """A planted mixture. Methods that end in `d` make what is missing."""

    shape: MixtureShape

    @property
    def gguf(self) -> Path:
        return self.checkpoint.parent / f"gguf-{self.name}" / f"{self.name}.gguf"

    @property
    def plan_path(self) -> Path:
        return self.checkpoint / PLAN_FILE

    @cached_property
    def plan(self) -> dict[str, Any]:
        """See PlantedMixture.plan()."""
        content: dict[str, Any] = json.loads(self.plan_path.read_text())
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
            path, tensors = folder / self.gguf.name, dict(_gguf_tensors(self.shape))
            write_gguf(path, self.shape.architecture, _keys(self.shape), tensors, self.checkpoint)


class QuantisedFiles(MixtureFiles):
    """A planted mixture whose checkpoint is a GGUF file, which llama.cpp reads, too."""

    @property
    def gguf(self) -> Path:
        return self.checkpoint

    @property
    def plan_path(self) -> Path:
        return self.checkpoint.parent / PLAN_FILE

    def planted(self) -> None:
        if self.checkpoint.exists():
            return
        shape = self.shape
        size_bytes = 2 * shape.matrix_bytes(shape.vocabulary, shape.hidden_size)
        size_bytes += shape.layers * shape.experts * shape.expert_bytes
        with new_folder(self.checkpoint.parent, size_bytes) as folder:
            mixture = PlantedMixture(shape, SEED)
            _write_quantised(folder / self.checkpoint.name, mixture)
            write_json(folder / PLAN_FILE, mixture.plan())

    def converted(self) -> None:
        """The checkpoint is what llama.cpp reads."""


def mixture_files(shape: str, layers: int | None, folder: Path) -> MixtureFiles:
    """The files of a shape, with fewer layers if `layers` is given."""
    chosen, name = MIXTURES[shape], f"planted-{shape}"
    if layers is not None:
        chosen, name = replace(chosen, layers=layers), f"{name}-{layers}"
    if chosen.blocks:
        return QuantisedFiles(folder / name / f"{name}.gguf", folder / f"store-{name}", name, chosen)
    return MixtureFiles(folder / name, folder / f"store-{name}", name, chosen)


def _keys(shape: MixtureShape) -> Mapping[str, int | float]:
    return {
        "context_length": shape.context_tokens,
        "embedding_length": shape.hidden_size,
        "block_count": shape.layers,
        "feed_forward_length": shape.expert_size,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        "attention.key_length": shape.head_size,
        "attention.value_length": shape.head_size,
        "attention.layer_norm_rms_epsilon": NORM_EPSILON,
        "rope.freq_base": ROPE_THETA,
        "expert_feed_forward_length": shape.expert_size,
        "expert_count": shape.experts,
        "expert_used_count": shape.chosen,
        "vocab_size": shape.vocabulary,
    }


def _write_quantised(path: Path, mixture: PlantedMixture) -> None:
    """Writes the layers one by one, as they are made."""
    shape = mixture.shape
    writer = new_writer(path, shape.architecture, _keys(shape))
    writer.add_tokenizer_model("none")
    outside, layers = mixture.outside(), mixture.layers()
    first = next(layers)  # all layers have the same shapes
    parts = {name: [outside[source]] for name, source in OUTSIDE.items()}
    for name, matrices in parts.items():
        name_tensor(writer, name, joined(name, matrices), shape.blocks)
    like = {name: joined(name, matrices) for name, matrices in _of_layer(shape, first).items()}
    for layer in range(shape.layers):
        for name, data in like.items():
            name_tensor(writer, f"blk.{layer}.{name}", data, shape.blocks)
    write_front(writer)
    for name, matrices in parts.items():
        writer.write_tensor_data(joined(name, matrices))
    for tensors in tqdm(chain([first], layers), total=shape.layers, unit="layer", disable=None):
        for name, matrices in _of_layer(shape, tensors).items():
            writer.write_tensor_data(joined(name, matrices))
    writer.close()


def _of_layer(shape: MixtureShape, tensors: Mapping[str, Matrix]) -> dict[str, list[Matrix]]:
    """The matrices of a layer that make one tensor of the file each."""
    parts = {name: [tensors[source]] for name, source in GGUF_OF_LAYER.items()}
    for part in PARTS:
        names = (f"mlp.experts.{expert}.{part}_proj.weight" for expert in range(shape.experts))
        parts[f"ffn_{part}_exps.weight"] = [tensors[name] for name in names]
    return parts


def _gguf_tensors(shape: MixtureShape) -> Iterator[tuple[str, list[str]]]:
    """Each tensor of the file, and the tensors of the checkpoint that it holds, one after the other."""
    for name, source in OUTSIDE.items():
        yield name, [source]
    for layer in range(shape.layers):
        of_layer = f"model.layers.{layer}"
        for name, source in GGUF_OF_LAYER.items():
            yield f"blk.{layer}.{name}", [f"{of_layer}.{source}"]
        for part in PARTS:
            of_experts = [f"{of_layer}.mlp.experts.{expert}.{part}_proj.weight" for expert in range(shape.experts)]
            yield f"blk.{layer}.ffn_{part}_exps.weight", of_experts
