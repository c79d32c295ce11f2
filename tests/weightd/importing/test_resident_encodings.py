"""`weightd import --resident-dtype`: what is stored of matrices outside the FFNs, and what a client makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from checkpoints import make_checkpoint, make_config, make_model, write_gguf
from safetensors.torch import load_file, save_file
from stored_model import read_state
from test_parity import make

from flashclient import FlashClient
from flashclient.calibration.evaluate import dense_model
from flashclient.errors import AbsentWeightError
from flashclient.model.tables.encoded_weights import EncodedWeight
from weightd import cli
from weightd.errors import CheckpointError
from weightd.importing.convert import import_checkpoint
from weightd.importing.update import KEPT, REPLACED, update
from weightd.store.store import Store
from weightd.store.verify import verify_model
from weightd_proto.encodings import BLOCK_FORMATS, QUANTISED_DTYPES, check
from weightd_proto.weightd_pb2 import Model

IDS = torch.tensor([[3, 4, 5, 6, 7, 8]])
WIDE = torch.arange(3, 63).view(2, 30)  # several groups of rows
SETTINGS = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
KINDS = {"attn_q": "Q4_1", "attn_k": "Q5_0", "attn_v": "Q5_1", "attn_output": "Q8_0", "token_embd": "Q4_0"}


def kind_of(name: str) -> gguf.GGMLQuantizationType:
    """Of a GGUF tensor; the FFNs and a head of its own are plain."""
    return gguf.GGMLQuantizationType[KINDS.get(name.split(".")[-2], "F32")]


def formats_in(record: Model) -> dict[str, str]:
    return {tensor.name: tensor.dtype for tensor in record.resident if tensor.dtype in BLOCK_FORMATS}


def agree(client: FlashClient) -> None:
    """With transformers' model that has the stored numbers: logits, tokens, and each row whatever its batch-mates."""
    dense = dense_model(client.loaded)
    model: Any = client.model
    with torch.no_grad():
        for ids in (IDS, WIDE):
            expected, actual = dense(ids).logits, model(ids).logits
            # blocks may be multiplied with integers of 16 bits
            assert (actual - expected).abs().max() < 5e-4 * expected.abs().max()
        assert torch.equal(model(WIDE[1:]).logits[0], model(WIDE).logits[1])
        tokens = dense.generate(IDS, attention_mask=torch.ones_like(IDS), **SETTINGS)
    assert client.generate(IDS.tolist(), **SETTINGS) == tokens.tolist()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_blocks_of_a_gguf_file_are_kept(family: str, tmp_path: Path) -> None:
    """With the rows of Q and K back in order, which Llama's files permute; a tied head (Gemma) shares the bytes."""
    path = write_gguf(make_model(make_config(family, neurons=192)), tmp_path / "tiny.gguf", kind_of)
    with Store.open(tmp_path / "store", create=True) as store:
        import_checkpoint(path, store, "plain", resident_request="plain")
        record = import_checkpoint(path, store, "kept")
        verify_model(store, "kept")
        check(record)
        found, expected = read_state(store, "kept"), read_state(store, "plain")
        assert found.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
        assert set(formats_in(record).values()) == set(KINDS.values())
        assert formats_in(record)["model.layers.1.self_attn.k_proj.weight"] == "Q5_0"
        assert store.resident_path("kept").stat().st_size < 0.5 * store.resident_path("plain").stat().st_size
    with FlashClient("kept", store=tmp_path / "store") as client:
        model: Any = client.model
        weight = model.get_input_embeddings().weight
        assert isinstance(weight, EncodedWeight)
        assert (weight is model.get_output_embeddings().weight) == (family == "gemma3")
        assert model.device == torch.device("cpu")
        agree(client)


@pytest.mark.parametrize("family", ["opt", "llama"])
@pytest.mark.parametrize("dtype", QUANTISED_DTYPES)
def test_any_checkpoint_is_quantised(family: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightd.importing.plan.CHUNK_BYTES", 30000)  # pieces end within rows
    model = make_model(make_config(family))
    model.save_pretrained(tmp_path / "m")
    with Store.open(tmp_path / "store", create=True) as store:
        record = import_checkpoint(tmp_path / "m", store, "m", dtype, resident_request=dtype)
        verify_model(store, "m")
        formats, state = formats_in(record), read_state(store, "m")
        attention = (
            "model.decoder.layers.0.self_attn.out_proj" if family == "opt" else "model.layers.0.self_attn.o_proj"
        )
        assert formats[f"{attention}.weight"] == QUANTISED_DTYPES[dtype]
        source = model.state_dict()
        for tensor in record.resident:
            if tensor.name in formats:
                error = (state[tensor.name] - source[tensor.name]).norm() / source[tensor.name].norm()
                assert float(error) == pytest.approx(tensor.quantisation_error, rel=1e-3)
                assert tensor.quantisation_error < {"int8": 0.01, "int4": 0.1}[dtype]
            else:
                assert torch.equal(state[tensor.name], source[tensor.name])
    with FlashClient("m", store=tmp_path / "store") as client:
        agree(client)


def test_routers_and_what_is_no_whole_block_stay_plain(tmp_path: Path) -> None:
    make("olmoe").save_pretrained(tmp_path / "mixture")
    make_checkpoint("llama", tmp_path / "narrow", hidden=72)
    with Store.open(tmp_path / "store", create=True) as store:
        record = import_checkpoint(tmp_path / "mixture", store, resident_request="int8")
        assert any("q_proj" in name for name in formats_in(record))
        assert not any("mlp.gate" in name for name in formats_in(record))
        assert formats_in(import_checkpoint(tmp_path / "narrow", store, resident_request="int4")) == {}
        assert formats_in(import_checkpoint(tmp_path / "narrow", store, "kept", resident_request="keep")) == {}


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    source = make_checkpoint("llama", tmp_path / "m")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"][5, 7] = torch.nan
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with Store.open(tmp_path / "store", create=True) as store:
        message = r"model\.layers\.1\.self_attn\.o_proj\.weight has a weight that is NaN or infinite: import with"
        with pytest.raises(CheckpointError, match=message):
            import_checkpoint(source, store, resident_request="int8")
        assert store.names() == []


@pytest.mark.parametrize("dtype", ["keep", "bf16"])
@pytest.mark.parametrize("part", ["attn_q", "attn_output"])
def test_a_damaged_scale_is_refused(part: str, dtype: str, tmp_path: Path) -> None:
    path = write_gguf(make_model(make_config("llama", neurons=192)), tmp_path / "tiny.gguf", kind_of)
    tensor = next(each for each in gguf.GGUFReader(path).tensors if each.name == f"blk.1.{part}.weight")
    with path.open("r+b") as file:  # the last block
        file.seek(int(tensor.data_offset) + int(tensor.n_bytes) - BLOCK_FORMATS[KINDS[part]].bytes)
        file.write((0x7E00).to_bytes(2, "little"))
    what = f"has a block of {KINDS[part]} whose scale" if dtype == "keep" else ""
    where = rf"^blk.1.{part}.weight in .*tiny.gguf {what}.*is NaN or infinite.*: download"
    with Store.open(tmp_path / "store", create=True) as store:
        with pytest.raises(CheckpointError, match=where):
            import_checkpoint(path, store, "m", dtype=dtype)
        assert store.names() == []
        assert not [*store.path.glob("m*"), *store.path.glob(".import-*")]


def test_a_weight_in_blocks_gives_its_values_on_request_only(tmp_path: Path) -> None:
    source = make_checkpoint("llama", tmp_path / "m", dtype="bfloat16")
    with Store.open(tmp_path / "store", create=True) as store:
        import_checkpoint(source, store, "m", resident_request="int8")
        expected = read_state(store, "m")
    with FlashClient("m", store=tmp_path / "store") as client:
        linear: Any = client.model.get_submodule("model.layers.0.self_attn.q_proj")
        weight, stored = linear.weight, expected["model.layers.0.self_attn.q_proj.weight"]
        assert weight.shape == stored.shape
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight.dequantize(), stored.bfloat16())
        with pytest.raises(AbsentWeightError, match=r"q_proj\.weight has no values here .* dequantize\(\) returns"):
            weight + 1
        with pytest.raises(AbsentWeightError, match="cannot be set"):
            linear.weight = torch.nn.Parameter(stored)
        x = torch.randn(3, weight.shape[1], requires_grad=True)  # which torch computes, in fp32 too
        assert torch.allclose(torch.nn.functional.linear(x.bfloat16(), weight), linear(x.bfloat16()), atol=0.05)
        with pytest.raises(IndexError, match="out of range"):
            client.model.get_input_embeddings()(torch.tensor([weight.shape[1] * 1000]))


def test_commands_know_the_encoding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_checkpoint("llama", tmp_path / "m")
    arguments = ["--store", str(tmp_path / "store")]
    assert cli.main(["import", str(source), *arguments, "--resident-dtype", "int4"]) == 0
    assert "(IQ4_NL/Q8_0)" in capsys.readouterr().out
    assert cli.main(["ls", *arguments, "--json"]) == 0
    (model,) = json.loads(capsys.readouterr().out)["models"]
    assert (model["dtype"], model["resident_dtype"]) == ("F32", "IQ4_NL/Q8_0")
    assert 0.07 < model["resident_quantisation_error"] < 0.09
    assert cli.main(["verify", *arguments]) == 0


def test_an_update_keeps_the_encoding_and_another_one_is_a_change(tmp_path: Path) -> None:
    source = make_checkpoint("llama", tmp_path / "m")
    with Store.open(tmp_path / "store", create=True) as store:
        import_checkpoint(source, store, resident_request="int8")
        assert update(source, store)[1] == KEPT
        record, done = update(source, store, resident_request="int4")
        assert (done, set(formats_in(record).values())) == (REPLACED, {"IQ4_NL", "Q8_0"})
        assert update(source, store)[1] == KEPT
        assert update(source, store, resident_request="plain")[1] == REPLACED


def test_records_of_other_sizes_are_refused(tmp_path: Path) -> None:
    source = make_checkpoint("llama", tmp_path / "m")
    with Store.open(tmp_path / "store", create=True) as store:
        record = import_checkpoint(source, store, resident_request="int8")
    tensor = next(tensor for tensor in record.resident if tensor.dtype == "Q8_0")
    tensor.size_bytes -= 1
    with pytest.raises(ValueError, match="not rows of whole blocks of Q8_0"):
        check(record)
