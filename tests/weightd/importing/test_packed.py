"""Checkpoints of GPTQ, AWQ, compressed-tensors and modelopt: what is imported are the numbers that they publish."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packed_checkpoints import AUTO_ROUND, KINDS, make_packed
from safetensors.torch import load_file, save_file
from stored_model import read_matrices, read_state
from test_quantising import IDS, SETTINGS

from flashclient import FlashClient
from weightd.checkpoint.opening import open_checkpoint
from weightd.checkpoint.quantisation.formats import dequantisable
from weightd.errors import CheckpointError
from weightd.importing import plan
from weightd.importing.convert import import_checkpoint
from weightd.store.store import Store
from weightd.store.verify import verify_model

BY_NEURON = ["float8 blocks", "float8 of a tensor"]  # those of rows have another scale for each output


@pytest.mark.parametrize(
    ("kind", "layout"), [*((kind, "") for kind in KINDS), *((kind, "neuron") for kind in BY_NEURON)]
)
def test_numbers_are_those_that_are_published(
    kind: str, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept in blocks where a format holds them, else rounded once."""
    monkeypatch.setattr(plan, "DEQUANTISED_CHUNK_BYTES", 10000)  # several runs of a matrix
    monkeypatch.setattr(plan, "CHUNK_BYTES", 30000)
    made = make_packed(kind, tmp_path / "m")
    notes: list[str] = []
    with Store.open(tmp_path / "store", create=True) as store:
        record = import_checkpoint(made.folder, store, tell=notes.append, layout=layout)
        verify_model(store, "m")
        assert (record.bundle.slab_neurons == 0) == (layout == "neuron" or not KINDS[kind][-1])
        state = {name: tensor for name, tensor in read_state(store, "m").items() if name in made.weights}
        matrices = [read_matrices(store, record, layer) for layer in range(len(record.layers))]
        assert "quantization_config" not in json.loads((store.files_path("m") / "config.json").read_text())
    kept = KINDS[kind][-1]
    assert {part.encoding.format for part in record.bundle.parts} == {kept or record.compute_dtype}
    assert any("stay quantised as published" in note for note in notes) == bool(kept)
    assert any("dequantised" in note for note in notes) == (not kept)
    for name, tensor in state.items():
        assert torch.equal(tensor, made.weights[name].to(tensor.dtype)), name
    for found, published in zip(matrices, ffns_of(made.weights), strict=True):
        for ours, theirs in zip(found, published, strict=True):
            assert torch.equal(ours, theirs.to(ours.dtype))


def ffns_of(weights: dict[str, torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Of each layer: gate and up [neurons, hidden], down [hidden, neurons], those of experts one after the other."""
    for layer in range(2):
        by_part = [
            [t for name, t in weights.items() if name.startswith(f"model.layers.{layer}.mlp.") and f".{part}." in name]
            for part in ("gate_proj", "up_proj", "down_proj")
        ]
        yield torch.cat(by_part[0]), torch.cat(by_part[1]), torch.cat(by_part[2], dim=1)


LEFT = "model.layers.0.mlp"


@pytest.mark.parametrize("kind", ["gptq", "awq gemv", "packed", "float8", "bitsandbytes 8 bits"])
@pytest.mark.parametrize("parts", [("down_proj",), ("gate_proj", "up_proj")])
def test_matrices_that_are_not_quantised_go_beside_those_that_are(
    kind: str, parts: tuple[str, ...], tmp_path: Path
) -> None:
    """As modules_to_not_convert, `dynamic` and `ignore` leave them."""
    made = make_packed(kind, tmp_path / "m")
    tensors = load_file(made.folder / "model.safetensors")
    for name in (f"{LEFT}.{part}" for part in parts):
        plain = made.weights[f"{name}.weight"].to(torch.bfloat16).contiguous()
        tensors = {other: tensor for other, tensor in tensors.items() if not other.startswith(name)}
        tensors[f"{name}.weight"], made.weights[f"{name}.weight"] = plain, plain.float()
    save_file(tensors, made.folder / "model.safetensors")
    with Store.open(tmp_path / "store", create=True) as store:
        record = import_checkpoint(made.folder, store)
        found = read_matrices(store, record, 0)
    for ours, theirs in zip(found, next(ffns_of(made.weights)), strict=True):
        assert torch.equal(ours.float(), theirs.to(ours.dtype).float())


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *(("gptq", "keep"), ("gptq 8 bits", "keep"), ("awq", "fp32"), ("packed", "int8")),
        *(("float8 of a tensor", "keep"), ("float8 blocks", "keep"), ("nvfp4", "keep"), ("modelopt", "keep")),
    ],
)
def test_tokens_are_those_of_transformers(kind: str, dtype: str, tmp_path: Path) -> None:
    """Of the dequantised weights, in fp32."""
    made = make_packed(kind, tmp_path / "m")
    with Store.open(tmp_path / "store", create=True) as store:
        record = import_checkpoint(made.folder, store, dtype=dtype)
        assert any(layer.quantisation_error for layer in record.layers) == (dtype == "int8")
    reference = made.reference()
    with FlashClient("m", store=tmp_path / "store") as client, torch.no_grad():
        expected, logits = reference(IDS).logits, client.model(IDS).logits
        close = max({"keep": 2e-3, "fp32": 1e-4, "int8": 2e-2}[dtype], 2 * torch.finfo(logits.dtype).eps)
        assert (logits - expected).abs().max() < close * expected.abs().max()
        if dtype == "fp32":
            tokens = reference.generate(IDS, attention_mask=torch.ones_like(IDS), **SETTINGS)
            assert client.generate(IDS.tolist(), **SETTINGS) == tokens.tolist()


BITS_8 = "bitsandbytes 8 bits"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    kinds = ("gptq", "packed", "float8", "nvfp4", "nf4", BITS_8)
    return {kind: make_packed(kind, tmp_path_factory.mktemp("published") / "m").folder for kind in kinds}


UP, GPTQ_UP = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj.qweight"
Spoil = Callable[[dict[str, torch.Tensor]], object]


def with_value(name: str, value: float) -> Spoil:
    return lambda tensors: tensors[name].view(-1)[3:4].fill_(value)


def cut(name: str, rows: int) -> Spoil:
    return lambda tensors: tensors.update({name: tensors[name][:rows].contiguous()})


def shaped(name: str, *shape: int) -> Spoil:
    """Cut to fewer values in another shape."""
    return lambda tensors: tensors.update({name: tensors[name].reshape(-1)[: math.prod(shape)].reshape(shape).clone()})


def as_float(name: str) -> Spoil:
    return lambda tensors: tensors.update({name: tensors[name].float()})


def with_state(change: Callable[[str], str]) -> Spoil:
    """`change`: of the JSON of a matrix of nf4."""

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        name = f"{UP}.weight.quant_state.bitsandbytes__nf4"
        changed = change(bytes(tensors[name].tolist()).decode()).encode()
        tensors[name] = torch.tensor(list(changed), dtype=torch.uint8)

    return spoil


def flat_blocks(tensors: dict[str, torch.Tensor]) -> None:
    tensors |= {"a_blocks": torch.zeros(8, dtype=torch.uint8), "a_scales": torch.zeros((), dtype=torch.uint8)}


OUT_SCALES = "model.layers.1.self_attn.o_proj.weight_scale"
FIRST_UP = "model.layers.0.mlp.up_proj.weight_scale"
FAR = "1" + "0" * 400


@pytest.mark.parametrize(
    ("kind", "spoil", "settings", "message"),
    [
        ("gptq", lambda tensors: tensors.pop(f"{UP}.scales"), {}, rf"{GPTQ_UP} has no {UP}\.scales in .*: download"),
        ("gptq", lambda tensors: tensors.pop(f"{UP}.qzeros"), {}, rf"{GPTQ_UP} has no {UP}\.qzeros in .*: download"),
        ("gptq", cut(f"{UP}.qzeros", 1), {}, rf"{UP}\.qzeros has shape \[1, 12\] of I32 in .*, which are no scales of"),
        ("gptq", cut(GPTQ_UP, 7), {}, rf"{GPTQ_UP} is packed in 3 bits|no scales of|not a group for each"),
        ("gptq", with_value(f"{UP}.g_idx", 2), {}, rf"{UP}\.g_idx names a group beyond the 2 that there are"),
        ("gptq", with_value(f"{UP}.scales", np.nan), {}, rf"{UP}\.scales in .* has a scale that is NaN or infinite"),
        ("gptq", None, {"checkpoint_format": "marlin"}, r"checkpoint_format 'marlin', which is packed for one kernel"),
        ("gptq", None, {"quant_method": "awq"}, r"no scales of|holds .* tensors"),
        ("gptq", None, {"quant_method": "awq", "version": "gemv_fast"}, r"AWQ of version gemv_fast, which is"),
        ("gptq", None, {"quant_method": "aqlm"}, r"is quantised \(aqlm\): import the unquantised checkpoint, one"),
        ("gptq", lambda tensors: tensors.pop(f"{UP}.g_idx"), {"desc_act": True}, rf"{GPTQ_UP} has no {UP}\.g_idx"),
        ("gptq", None, AUTO_ROUND | {"packing_format": "auto_round:x"}, r"is auto-round's int with packing_format 'a"),
        ("gptq", None, AUTO_ROUND | {"data_type": "mx_fp"}, r"is auto-round's mx_fp with packing_format 'auto_round:a"),
        ("packed", shaped(OUT_SCALES, 2, 64), {}, rf"{OUT_SCALES} has shape \[2, 64\] of BF16 in .*are no scales of"),
        ("packed", None, {"config_groups": {"0": {"weights": {"symmetric": False}}}}, r"has no .*weight_zero_point"),
        ("nvfp4", shaped(f"{UP}.weight_scale", 256, 8), {}, r"shape \[256, 8\] of F8_E4M3 in .*are no scales"),
        ("packed", with_value(f"{UP}.weight_scale", np.inf), {}, r"has a scale that is NaN or infinite"),
        ("packed", lambda tensors: tensors[f"{UP}.weight_shape"][1:].fill_(0), {}, r"no matrix \[96, 0\] of 4 or 8"),
        ("packed", cut(f"{UP}.weight_scale", 95), {}, r"scale has shape \[95, 2\] of BF16 in .*, which are no scales"),
        ("packed", None, {"format": "marlin-24"}, r"compressed-tensors of format 'marlin-24', read are pack-quantized"),
        ("packed", None, {"sparsity_config": {"format": "sparse-24-bitmask"}}, r"leaves out zeros \(sparsity_config"),
        ("packed", None, {"format": "pack", "config_groups": [1]}, r"compressed-tensors of format 'pack', read are"),
        ("packed", None, {"transform_config": {"config_groups": {}}}, r"rotates activations \(transform_config\)"),
        ("gptq", None, {"checkpoint_format": ["gptq"]}, r"checkpoint_format \['gptq'\], which is packed for one"),
        ("gptq", None, {"quant_method": ["gptq"]}, r"is quantised \(\['gptq'\]\): import the unquantised checkpoint"),
        ("packed", flat_blocks, {"quant_method": "mxfp4"}, r"a_blocks has no a_scales that fits it in"),
        ("float8", shaped(f"{UP}.weight", 96), {}, rf"are no scales of {UP}\.weight \[96\]"),
        ("float8", shaped(f"{UP}.weight_scale", 48), {}, rf"shape \[48\] of BF16 in .*are no scales of {UP}\.weight"),
        ("float8", with_value(f"{UP}.weight", np.nan), {}, rf"{UP}\.weight in .* has a NaN in row 0, column 3: d"),
        ("float8", with_value(f"{UP}.weight_scale", 1e37), {}, rf"{UP}\.weight_scale in .* has a scale of 1e\+37"),
        ("float8", with_value(f"{UP}.weight_scale", np.inf), {}, rf"{UP}\.weight_scale in .* has a scale that is NaN"),
        ("nvfp4", with_value(f"{UP}.weight_scale", np.nan), {}, rf"{UP}\.weight_scale in .* has a scale that is NaN"),
        ("nvfp4", lambda tensors: tensors[f"{UP}.weight_global_scale"].fill_(1e-37), {}, r"products are infinite"),
        ("nvfp4", shaped(f"{UP}.weight_packed", 96), {}, rf"are no scales of {UP}\.weight_packed \[192\]"),
        ("nvfp4", shaped(f"{UP}.weight_packed"), {}, rf"are no scales of {UP}\.weight_packed \[\]"),
        ("gptq", with_value(f"{UP}.g_idx", 2), {"group_size": int(FAR)}, r"names a group beyond|no scales of"),
        ("nf4", with_state(lambda _: "[" * 60000), {}, r"quant_state\.bitsandbytes__nf4 in .* is not JSON: download"),
        ("nf4", with_state(lambda state: state.replace("0.13032276928424835", FAR)), {}, r"has nested_offset = 1000"),
        (BITS_8, shaped(f"{UP}.weight", 96), {}, rf"SCB has shape \[96\] of F32 in .*, which are no scales of {UP}"),
        (BITS_8, as_float(f"{UP}.weight"), {}, rf"{UP}\.weight is F32 in .*, but has scales, {UP}\.SCB: download it"),
        (BITS_8, lambda tensors: tensors[f"{UP}.weight_format"].fill_(1), {}, rf"{UP}\.weight in .* order of one proc"),
    ],
)  # fmt: skip
def test_what_is_damaged_is_refused_in_one_line(
    kind: str, spoil: Spoil | None, settings: dict[str, Any], message: str, published: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(published[kind], tmp_path / "m")
    if spoil is not None:
        tensors = load_file(folder / "model.safetensors")
        spoil(tensors)
        save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= settings
    (folder / "config.json").write_text(json.dumps(config))
    with Store.open(tmp_path / "store", create=True) as store:
        with pytest.raises(CheckpointError, match=message) as caught:
            import_checkpoint(folder, store)
        assert store.names() == []
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
@pytest.mark.parametrize(("name", "value"), [(f"{UP}.weight", np.nan), (f"{UP}.weight_scale", 1e37)])
def test_what_is_no_number_is_refused_where_it_is_dequantised(
    name: str, value: float, dtype: str, published: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(published["float8"], tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    with_value(name, value)(tensors)
    save_file(tensors, folder / "model.safetensors")
    message = rf"^{UP}\.weight in .* is NaN or infinite in row \d, column \d+: download the file again$"
    with Store.open(tmp_path / "store", create=True) as store:
        with pytest.raises(CheckpointError, match=message):
            import_checkpoint(folder, store, dtype=dtype)
        assert store.names() == []


OF_MLX = {"quantization": {"group_size": 64, "bits": 4}}


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("gptq", OF_MLX, r"is quantised \(mlx\): import the unquantised checkpoint, one in gptq"),
        ("gptq", OF_MLX | {"quantization_config": OF_MLX["quantization"]}, r"is quantised \(mlx\): import the"),
        *(
            (kind, {}, r"as quantised checkpoints do, but its config\.json has no")
            for kind in ("gptq", "packed", "nf4")
        ),
        *((kind, {}, r"as quantised checkpoints do, but its config\.json") for kind in ("float8", BITS_8)),
    ],
)
def test_how_a_checkpoint_is_quantised_must_be_said(
    kind: str, config: dict[str, Any], message: str, published: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(published[kind], tmp_path / "m")
    read = json.loads((folder / "config.json").read_text())
    del read["quantization_config"]
    (folder / "config.json").write_text(json.dumps(read | config))
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_a_dtype_that_is_no_name_is_none() -> None:
    """transformers refuses it, when it makes the model."""
    config = {"quantization_config": {"quant_method": "gptq"}, "dtype": {}, "text_config": {"dtype": ["float16"]}}
    assert dequantisable(Path("m"), config, {}) == ({}, ())


def test_scales_of_keys_and_values_are_left_out_with_a_note(published: dict[str, Path], tmp_path: Path) -> None:
    """And groups that are no whole blocks, or scales that half precision does not hold, are dequantised with one."""
    folder = shutil.copytree(published["packed"], tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors |= {f"model.layers.{i}.self_attn.{kv}_scale": torch.tensor(0.1) for i in range(2) for kv in "kv"}
    scales = tensors[f"{UP}.weight_scale"]
    scales[0, 0] = 1.001e-7 * 3
    tensors[FIRST_UP] = torch.full_like(tensors[FIRST_UP], 118, dtype=torch.uint8)  # exponents
    save_file(tensors, folder / "model.safetensors")
    notes: list[str] = []
    with Store.open(tmp_path / "store", create=True) as store:
        record = import_checkpoint(folder, store, tell=notes.append)
        gate, up, _ = read_matrices(store, record, 1)
    said = "\n".join(notes)
    assert "4 scales of keys and values left out, which are not quantised here; first model.layers.0" in said
    assert "2 matrices, first model.layers.0.mlp.up_proj.weight_packed, are dequantised, because half prec" in said
    assert (gate.dtype, up.dtype) == (torch.float32, torch.bfloat16)


def test_older_checkpoints_have_a_file_of_settings_and_biases_of_zero(
    published: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(published["gptq"], tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    settings = config.pop("quantization_config")
    del settings["quant_method"]
    tensors = load_file(folder / "model.safetensors")
    biases = [name.replace("qweight", "bias") for name in tensors if name.endswith("qweight")]
    outputs = {name: tensors[name.replace("bias", "scales")].shape[1] for name in biases}
    tensors |= {name: torch.zeros(size, dtype=torch.float16) for name, size in outputs.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text(json.dumps(settings))
    notes: list[str] = []
    with Store.open(tmp_path / "store", create=True) as store:
        record = import_checkpoint(folder, store, tell=notes.append)
    assert record.bundle.parts[0].encoding.format == "Q4_0"
    assert "14 biases left out, which are all zero; first model.layers.0.mlp.down_proj.bias" in notes
