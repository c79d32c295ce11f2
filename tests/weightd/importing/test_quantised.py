"""Published quantised checkpoints, MXFP4 and FP8: what is imported are the numbers that transformers dequantises."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantised_checkpoints import DTYPES, Quantised, make_fp8, make_gpt_oss
from safetensors.torch import load_file, save_file
from stored_model import read_bundles, read_matrices

from flashclient import FlashClient
from weightd.errors import CheckpointError
from weightd.importing import plan
from weightd.importing.convert import import_checkpoint
from weightd.store.store import Store

IDS = torch.tensor([[3, 4, 5, 6, 7, 8]])
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Quantised:
    return make_gpt_oss(tmp_path_factory.mktemp("mxfp4"))


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Quantised:
    return make_fp8("deepseek_v3", tmp_path_factory.mktemp("fp8"))


@pytest.fixture(scope="module")
def fbgemm(tmp_path_factory: pytest.TempPathFactory) -> Quantised:
    return make_fp8("llama", tmp_path_factory.mktemp("fbgemm"), "row")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["gpt_oss", "deepseek"])
def test_every_weight_is_what_transformers_dequantises(
    kind: str, dtype: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "DEQUANTISED_CHUNK_BYTES", 3000)  # runs begin inside of blocks
    made: Quantised = request.getfixturevalue(kind)
    import_into(tmp_path / "store", made.folder, dtype)
    plain = made.dequantised(DTYPES[dtype], tmp_path / "plain")
    import_into(tmp_path / "plain_store", plain, "keep")
    with Store.open(tmp_path / "store") as ours, Store.open(tmp_path / "plain_store") as theirs:
        record, expected = ours.model("m"), theirs.model("m")
        assert record.compute_dtype == expected.compute_dtype
        for index in range(len(record.layers)):
            pairs = zip(read_bundles(ours, record, index), read_bundles(theirs, expected, index), strict=True)
            assert all((a == b).all() for a, b in pairs)
        assert ours.resident_path("m").read_bytes() == theirs.resident_path("m").read_bytes()
        config = json.loads((ours.files_path("m") / "config.json").read_text())
        assert "quantization_config" not in config


@pytest.mark.parametrize("kind", ["gpt_oss", "deepseek"])
def test_tokens_are_those_of_transformers(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    made: Quantised = request.getfixturevalue(kind)
    record = import_into(tmp_path / "store", made.folder, "keep")
    assert record.compute_dtype == "BF16"  # that of the configuration
    import_into(tmp_path / "store32", made.folder, "fp32")
    reference = made.reference(tmp_path / "plain")
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}
    expected = reference.generate(IDS, attention_mask=torch.ones_like(IDS), **settings)
    with FlashClient("m", store=tmp_path / "store32") as client:
        assert client.generate(IDS.tolist(), **settings) == expected.tolist()


@pytest.mark.parametrize(("kind", "format"), [("gpt_oss", "MXFP4"), ("deepseek", "FP8_32"), ("fbgemm", "FP8_32")])
def test_floats_are_kept(kind: str, format: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """In slabs. The halves of MXFP4's blocks are in another order than the published ones."""
    made: Quantised = request.getfixturevalue(kind)
    record = import_into(tmp_path / "store", made.folder, "keep")
    assert [part.encoding.format for part in record.bundle.parts] == [format] * 3
    assert any(tensor.dtype == format for tensor in record.resident) == (kind != "gpt_oss")
    plain = import_into(tmp_path / "store32", made.folder, "fp32")
    with Store.open(tmp_path / "store") as ours, Store.open(tmp_path / "store32") as theirs:
        for index in range(len(record.layers)):
            pairs = zip(read_matrices(ours, record, index), read_matrices(theirs, plain, index), strict=True)
            assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    import_into(tmp_path / "store16", made.folder, "bf16")
    logits = []
    for store in ("store", "store16"):
        with FlashClient("m", store=tmp_path / store) as client, torch.no_grad():
            logits.append(client.model(IDS).logits)
    ours, of_bf16 = logits
    assert (ours - of_bf16).abs().max() < 0.03 * ours.abs().max()


@pytest.mark.parametrize("scales", ["tensor", "row", "ragged", "exponents", "packed"])
def test_scales_of_other_publishers(scales: str, tmp_path: Path) -> None:
    """One for a tensor, one for a row, blocks that do not divide the matrix, exponents, two values in a byte."""
    made = make_fp8("llama", tmp_path / "fp8", scales)
    import_into(tmp_path / "store", made.folder, "fp32")
    import_into(tmp_path / "plain_store", made.dequantised(torch.float32, tmp_path / "plain"), "keep")
    with Store.open(tmp_path / "store") as ours, Store.open(tmp_path / "plain_store") as theirs:
        record, expected = ours.model("m"), theirs.model("m")
        for index in range(len(record.layers)):
            pairs = zip(read_bundles(ours, record, index), read_bundles(theirs, expected, index), strict=True)
            assert all((a == b).all() for a, b in pairs)
        assert ours.resident_path("m").read_bytes() == theirs.resident_path("m").read_bytes()


def without_scales(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.mlp.down_proj.weight_scale_inv"]


def with_wrong_scales(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.down_proj.weight_scale_inv"] = torch.ones(3, 7)


@pytest.mark.parametrize(
    ("spoil", "quantisation", "message"),
    [
        (without_scales, {}, r"model\.layers\.1\.mlp\.down_proj\.weight is F8_E4M3 in .*, which has no scales for it"),
        (
            with_wrong_scales,
            {},
            r"shape \[3, 7\] of F32 in .*, which are no scales of model\.layers\.1\.mlp\.down_proj",
        ),
        (None, {"quant_method": "hqq"}, r"is quantised \(hqq\): import the unquantised"),
        (None, {"quant_method": "mxfp4"}, r"holds 14 tensors that its configuration has no place for"),
    ],
)
def test_what_is_not_read_is_refused_in_one_line(
    spoil: Callable[[dict[str, torch.Tensor]], None] | None, quantisation: dict[str, Any], message: str, tmp_path: Path
) -> None:
    made = make_fp8("llama", tmp_path / "m")
    if spoil is not None:
        tensors = load_file(made.folder / "model.safetensors")
        spoil(tensors)
        save_file(tensors, made.folder / "model.safetensors")
    path = made.folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= quantisation
    path.write_text(json.dumps(config))
    with Store.open(tmp_path / "store", create=True) as store:
        with pytest.raises(CheckpointError, match=message) as caught:
            import_checkpoint(made.folder, store)
        assert store.names() == []
    assert "\n" not in str(caught.value)


def import_into(path: Path, folder: Path, dtype: str) -> Any:
    with Store.open(path, create=True) as store:
        return import_checkpoint(folder, store, name="m", dtype=dtype)
