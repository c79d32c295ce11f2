"""Bundles from any place: experts, fused, interleaved and transposed matrices, in any order of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from stored_model import read_bundles

from weightd.disk.safetensors_file import read_safetensors
from weightd.errors import CheckpointError
from weightd.importing.assembly import plan_resident
from weightd.importing.plan import plan_bundles
from weightd.importing.resident import lay_out_resident
from weightd.importing.sources import used_tensors
from weightd.importing.stored_dtype import resident_dtype, stored_dtype
from weightd.importing.units import units_of
from weightd.importing.writing import ModelWriter
from weightd.store.layout import bundle_layout, lay_out_layers
from weightd_proto.encodings import parts_of, plain
from weightd_proto.weightd_pb2 import (
    Concatenated,
    ExpertSource,
    FfnSource,
    Layer,
    MatrixSource,
    Model,
    Recipe,
    ResidentSource,
    Slice,
    TensorSource,
    Transposed,
)

HIDDEN, NEURONS, EXPERTS = 96, 40, 4
PARTS = ("gate", "up", "down")


class Written:
    """What an import writes by `recipe` from `tensors`."""

    def __init__(self, recipe: Recipe, tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "in.safetensors")
        stored = read_safetensors(folder / "in.safetensors")
        self.record = recipe.model
        self.record.name, self.record.compute_dtype = "m", "F32"
        self.record.bundle.CopyFrom(bundle_layout(parts_of(PARTS, plain("F32")), HIDDEN, 4096))
        self.record.bundle.bundles_per_cell = 2
        self.record.bundles_file_bytes = lay_out_layers(self.record.bundle, self.record.layers)
        kinds = {
            source.name: (resident_dtype(source, stored, "F32"), tuple(source.shape)) for source in recipe.resident
        }
        header, laid_out = lay_out_resident(kinds, 4096)
        self.record.resident.extend(laid_out)
        self.record.resident_file_bytes = laid_out[-1].offset_bytes + laid_out[-1].size_bytes
        sources = {source.name: source for source in recipe.resident}
        in_order = [sources[tensor.name] for tensor in laid_out]
        units = units_of(recipe, stored)
        self.steps = [*plan_bundles(units, self.record.bundle), *plan_resident(in_order, stored, {})]
        ModelWriter(self.record, header, units, in_order, folder, True, None).run(self.steps)
        self._folder = folder

    def bundles_path(self, _name: str) -> Path:
        return self._folder / "bundles.bin"

    def matrices(self, layer: int) -> list[torch.Tensor]:
        """[neurons, hidden_size] of each part."""
        bundles = torch.from_numpy(np.stack(read_bundles(self, self.record, layer))).view(torch.float32)  # type: ignore[arg-type]
        return list(torch.split(bundles, HIDDEN, dim=1))

    def resident(self) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        return load_file(self._folder / "resident.safetensors")


def mixture(experts: list[list[MatrixSource]]) -> Recipe:
    layer = Layer(module="m", neurons=NEURONS * len(experts), experts=len(experts))
    ffn = FfnSource(experts=[ExpertSource(parts=parts) for parts in experts])
    model = Model(layers=[layer])
    model.bundle.hidden_size = HIDDEN
    norm = ResidentSource(name="norm", shape=[HIDDEN], source=TensorSource(tensor="norm"))
    return Recipe(model=model, ffns=[ffn], resident=[norm])


Arrangement = tuple[dict[str, torch.Tensor], list[list[MatrixSource]]]


def one_tensor_per_expert(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> Arrangement:
    tensors: dict[str, torch.Tensor] = {}
    experts = []
    for e in range(EXPERTS):
        tensors |= {f"{e}.w1": gate[e], f"{e}.w3": up[e], f"{e}.w2": down[e].T}
        rows = [MatrixSource(tensor=f"{e}.{name}", step=1) for name in ("w1", "w3")]
        experts.append([*rows, MatrixSource(tensor=f"{e}.w2", columns=True, step=1)])
    return tensors, experts


def fused_rows(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> Arrangement:
    """[experts, 2 * neurons, hidden] and [experts, hidden, neurons]."""
    tensors = {"gate_up": torch.cat([gate, up], 1), "down": down.transpose(1, 2)}
    return tensors, [
        [
            MatrixSource(tensor="gate_up", matrix=e, step=1),
            MatrixSource(tensor="gate_up", matrix=e, first=NEURONS, step=1),
            MatrixSource(tensor="down", matrix=e, columns=True, step=1),
        ]
        for e in range(EXPERTS)
    ]


def interleaved_columns(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> Arrangement:
    """gpt-oss: [experts, hidden, 2 * neurons], columns of gate and up in turn, and [experts, neurons, hidden]."""
    both = torch.stack([gate, up], 2).reshape(EXPERTS, 2 * NEURONS, HIDDEN)
    return {"gate_up": both.transpose(1, 2), "down": down}, [
        [
            MatrixSource(tensor="gate_up", matrix=e, columns=True, first=0, step=2),
            MatrixSource(tensor="gate_up", matrix=e, columns=True, first=1, step=2),
            MatrixSource(tensor="down", matrix=e, step=1),
        ]
        for e in range(EXPERTS)
    ]


def interleaved_rows(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> Arrangement:
    """All experts one below the other in matrices, up before gate."""
    both = torch.stack([up, gate], 2).reshape(-1, HIDDEN)
    return {"gate_up": both, "down": down.reshape(-1, HIDDEN)}, [
        [
            MatrixSource(tensor="gate_up", first=2 * e * NEURONS + 1, step=2),
            MatrixSource(tensor="gate_up", first=2 * e * NEURONS, step=2),
            MatrixSource(tensor="down", first=e * NEURONS, step=1),
        ]
        for e in range(EXPERTS)
    ]


ARRANGEMENTS = (one_tensor_per_expert, fused_rows, interleaved_columns, interleaved_rows)


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("chunk_bytes", [1, 3000, 1 << 23])
def test_bundles_of_experts(
    tmp_path: Path, arrangement: object, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightd.importing.plan.CHUNK_BYTES", chunk_bytes)
    gate, up, down = (torch.randn(EXPERTS, NEURONS, HIDDEN) for _ in PARTS)
    tensors, experts = arrangement(gate, up, down)  # type: ignore[operator]
    written = Written(mixture(experts), tensors | {"norm": torch.randn(HIDDEN)}, tmp_path)
    for found, expected in zip(written.matrices(0), (gate, up, down), strict=True):
        assert torch.equal(found, expected.reshape(-1, HIDDEN))


def test_interleaved_rows_are_read_once(tmp_path: Path) -> None:
    gate, up, down = (torch.randn(EXPERTS, NEURONS, HIDDEN) for _ in PARTS)
    tensors, experts = interleaved_rows(gate, up, down)
    written = Written(mixture(experts), tensors | {"norm": torch.randn(HIDDEN)}, tmp_path)
    read_bytes = sum(extent.size_bytes for step in written.steps for run in step.runs for extent in run.extents)
    assert read_bytes == sum(tensor.nbytes for tensor in tensors.values()) + HIDDEN * 4


def test_parts_that_do_not_lie_in_their_tensor_are_refused(tmp_path: Path) -> None:
    gate, up, down = (torch.randn(EXPERTS, NEURONS, HIDDEN) for _ in PARTS)
    tensors, _ = fused_rows(gate, up, down)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "in.safetensors")
    stored = read_safetensors(tmp_path / "in.safetensors")
    for wrong in (
        MatrixSource(tensor="gate_up", first=NEURONS + 1, step=1),
        MatrixSource(tensor="gate_up", matrix=EXPERTS, step=1),
        MatrixSource(tensor="gate_up", step=3),
        MatrixSource(tensor="gate_up"),
        MatrixSource(tensor="down", step=1),
    ):
        with pytest.raises(CheckpointError, match=r"has shape .*, which does not hold 40 neurons of 96 values"):
            units_of(mixture([[wrong]]), stored)


# Resident tensors


def source(tensor: str) -> TensorSource:
    return TensorSource(tensor=tensor)


def joined(dim: int, *parts: TensorSource, stacked: bool = False) -> TensorSource:
    return TensorSource(concatenated=Concatenated(dim=dim, stacked=stacked, parts=parts))


def cut(of: TensorSource, dim: int, begin: int, end: int, step: int = 1) -> TensorSource:
    return TensorSource(slice=Slice(of=of, dim=dim, begin=begin, end=end, step=step))


def swapped(of: TensorSource, dim0: int, dim1: int) -> TensorSource:
    return TensorSource(transposed=Transposed(of=of, dim0=dim0, dim1=dim1))


A, B, C = torch.randn(6, 8, 10), torch.randn(8, 10), torch.randn(8, 10)
NUMBERS = torch.arange(12).reshape(3, 4)
RESIDENT: dict[str, tuple[TensorSource, torch.Tensor]] = {
    "whole": (source("a"), A),
    "rows": (cut(source("a"), 0, 2, 5), A[2:5]),
    "some rows": (cut(source("b"), 0, 1, 8, 3), B[1:8:3]),
    "columns": (cut(source("a"), 1, 3, 7), A[:, 3:7]),
    "one below the other": (joined(0, source("b"), source("c"), cut(source("b"), 0, 0, 2)), torch.cat([B, C, B[:2]])),
    "stacked": (joined(0, source("b"), source("c"), stacked=True), torch.stack([B, C])),
    "side by side": (joined(1, source("b"), source("c")), torch.cat([B, C], 1)),
    "stacks side by side": (
        joined(1, joined(0, source("b"), source("c"), stacked=True), cut(source("a"), 0, 0, 2)),
        torch.cat([torch.stack([B, C]), A[:2]], 1),
    ),
    "transposed": (swapped(source("a"), 0, 2), A.transpose(0, 2)),
    "integers": (source("i"), NUMBERS),
    "rows of columns": (cut(swapped(source("b"), 0, 1), 0, 4, 9, 2), B.T[4:9:2]),
}


@pytest.mark.parametrize("range_bytes", [1, 1 << 16])
def test_resident_tensors_are_put_together(tmp_path: Path, range_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces where that pays, and in memory."""
    monkeypatch.setattr("weightd.importing.assembly.RANGE_BYTES_MIN", range_bytes)
    ffn = torch.randn(EXPERTS, NEURONS, HIDDEN)
    tensors, experts = fused_rows(ffn, ffn, ffn)
    recipe = mixture(experts)
    recipe.resident.extend(
        ResidentSource(name=name, shape=value.shape, source=of) for name, (of, value) in RESIDENT.items()
    )
    written = Written(recipe, tensors | {"a": A, "b": B, "c": C, "i": NUMBERS, "norm": torch.randn(HIDDEN)}, tmp_path)
    found = written.resident()
    for name, (_, expected) in RESIDENT.items():
        assert torch.equal(found[name], expected), name


def test_resident_tensor_of_another_size_is_refused(tmp_path: Path) -> None:
    save_file({"b": B}, tmp_path / "in.safetensors")
    stored = read_safetensors(tmp_path / "in.safetensors")
    wrong = ResidentSource(name="x", shape=[7, 10], source=joined(1, source("b"), source("b")))
    with pytest.raises(CheckpointError, match=r"x has shape \[8, 20\] in .*, but the configuration says \[7, 10\]"):
        list(plan_resident([wrong], stored, {}))


def test_dtypes_of_resident_tensors(tmp_path: Path) -> None:
    """Some stay in F32 where a model is stored in 16 bits, and integers stay what they are."""
    half = {"b": B.to(torch.bfloat16), "v": torch.full((4,), 1 / 3), "i": NUMBERS}
    save_file(half, tmp_path / "in.safetensors")
    stored = read_safetensors(tmp_path / "in.safetensors")
    kept = ResidentSource(name="v", shape=[4], source=source("v"), f32_in=["BF16"])
    recipe = Recipe(resident=[ResidentSource(name=name, source=source(name)) for name in ("b", "i")] + [kept])
    tensors = used_tensors(recipe, stored)
    assert stored_dtype(recipe, tensors, "keep") == "BF16"
    assert [resident_dtype(one, tensors, "BF16") for one in recipe.resident] == ["BF16", "I64", "F32"]
    assert resident_dtype(kept, tensors, "F16") == "F16"
    kept.f32_in.clear()
    assert stored_dtype(Recipe(resident=[*recipe.resident[:2], kept]), tensors, "keep") == "F32"
    with pytest.raises(CheckpointError, match="i has dtype I64"):
        used_tensors(mixture([[MatrixSource(tensor="i", step=1)]]), stored | {"norm": stored["v"]})
