"""`weightd import --dtype int8|int4`: what is stored, how far it is from the weights, and what a client makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from blocks import decoded
from checkpoints import make_checkpoint, make_config, make_model
from gguf.quants import quantize
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from stored_model import read_matrices, read_state
from test_parity import KINDS, make
from transformers import PreTrainedModel

from flashclient import FlashClient
from weightd import _native, cli
from weightd.errors import CheckpointError
from weightd.importing import plan
from weightd.importing.convert import import_checkpoint
from weightd.importing.update import KEPT, REPLACED, update
from weightd.store.layout import bundle_layout, native_shape
from weightd.store.store import Store
from weightd.store.verify import verify_model
from weightd_proto.encodings import QUANTISED_DTYPES, in_blocks, parts_of

IDS = torch.tensor([[3, 4, 5, 6, 7, 8]])
SETTINGS = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
# Formats of gguf-py's own quantiser whose error is not to be exceeded: of as many bits.
BESIDE = {"Q8_0": gguf.GGMLQuantizationType.Q8_0, "IQ4_NL": gguf.GGMLQuantizationType.Q4_0}


def relative_error(numbers: NDArray[np.float32], of: NDArray[np.float32]) -> float:
    differences = (numbers - of).astype(np.float64)
    return float(np.sqrt(np.square(differences).sum() / np.square(of.astype(np.float64)).sum()))


def quantised(format: str, rows: NDArray[np.float32]) -> tuple[NDArray[np.uint8], tuple[float, float]]:
    """Rows as an import stores them, with its sums of squares."""
    layout = bundle_layout(parts_of(("row",), in_blocks(format)), rows.shape[1], 4096)
    cells = np.zeros(-(-len(rows) // layout.bundles_per_cell) * layout.cell_bytes, np.uint8)
    part = (np.ascontiguousarray(rows).view(np.uint8).reshape(-1), "F32", False, 0, 1)
    sums = _native.cut_bundles(native_shape(layout), [part], cells, np.zeros(len(rows), np.uint64))
    in_cells = cells.reshape(-1, layout.cell_bytes)[:, : layout.bundles_per_cell * layout.stride_bytes]
    return in_cells.reshape(-1, layout.stride_bytes)[: len(rows), : layout.bundle_bytes].copy(), sums


@pytest.mark.parametrize("format", BESIDE)
def test_numbers_are_nearer_than_those_of_gguf(format: str) -> None:
    rows = np.random.default_rng(0).standard_normal((200, 256)).astype(np.float32) * np.float32(0.02)
    stored, (differences, squares) = quantised(format, rows)
    error = relative_error(decoded(format, stored), rows)
    assert error == pytest.approx(np.sqrt(differences / squares), rel=1e-4)
    assert error < relative_error(gguf.quants.dequantize(quantize(rows, BESIDE[format]), BESIDE[format]), rows)


@pytest.mark.parametrize("format", BESIDE)
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-6, 1e-3, 1.0, 1e4])
def test_every_size_of_weights_has_numbers(format: str, size: float) -> None:
    """Scales below the halves' smallest become zero, and so do their numbers."""
    rows = np.random.default_rng(0).standard_normal((20, 64)).astype(np.float32) * np.float32(size)
    rows[:, 32:] = 0
    numbers = decoded(format, quantised(format, rows)[0])
    assert not numbers[:, 32:].any()
    bound = np.abs(rows).max(axis=1, keepdims=True) / (200 if format == "Q8_0" else 4) + 127 * 2.0**-25
    assert (np.abs(numbers - rows) <= bound).all()


@pytest.mark.parametrize("format", BESIDE)
def test_one_large_value_of_any_sign_is_kept(format: str) -> None:
    for extreme in (5.0, -5.0):
        rows = np.full((1, 32), 0.01, np.float32)
        rows[0, 9] = extreme
        assert decoded(format, quantised(format, rows)[0])[0, 9] == pytest.approx(extreme, rel=0.01)


@pytest.mark.parametrize("format", BESIDE)
@pytest.mark.parametrize(
    ("value", "what"), [(np.nan, "NaN or infinite"), (-np.inf, "NaN or infinite"), (3e38, "too large")]
)
def test_what_has_no_number_is_refused_with_its_neuron(format: str, value: float, what: str) -> None:
    rows = np.ones((9, 64), np.float32)
    rows[6, 40] = value
    with pytest.raises(_native.UnquantisableValue, match=what) as raised:
        quantised(format, rows)
    assert raised.value.args[0] == 6


@pytest.mark.parametrize("dtype", QUANTISED_DTYPES)
@pytest.mark.parametrize("kind", ["opt", "llama", "gpt2", "gpt_oss", "olmoe"])
def test_each_row_and_column_is_quantised_along_the_hidden_size(kind: str, dtype: str, tmp_path: Path) -> None:
    """Rows, columns, columns for rows (GPT-2), interleaved parts, and experts; and nothing but FFNs."""
    if kind in KINDS:
        make(kind).save_pretrained(tmp_path / "m")
    else:
        make_checkpoint(kind, tmp_path / "m", neurons=173)
    with Store.open(tmp_path / "store", create=True) as store:
        plain = import_checkpoint(tmp_path / "m", store, "plain")
        record = import_checkpoint(tmp_path / "m", store, "quantised", dtype)
        verify_model(store, "quantised")
        format = QUANTISED_DTYPES[dtype]
        assert [part.encoding.format for part in record.bundle.parts] == [format] * len(plain.bundle.parts)
        assert record.compute_dtype == "F32"
        assert store.resident_path("plain").read_bytes() == store.resident_path("quantised").read_bytes()
        for index, layer in enumerate(record.layers):
            *rows, down = (part.numpy() for part in read_matrices(store, plain, index))
            *numbers, down_numbers = (part.numpy() for part in read_matrices(store, record, index))
            for source, found in zip([*rows, down.T], [*numbers, down_numbers.T], strict=True):
                assert np.array_equal(found, decoded(format, quantised(format, np.ascontiguousarray(source))[0]))
            whole, found = np.concatenate([*rows, down.T]), np.concatenate([*numbers, down_numbers.T])
            assert layer.quantisation_error == pytest.approx(relative_error(found, whole), rel=1e-3)
            assert layer.quantisation_error < {"int8": 0.01, "int4": 0.1}[dtype]


def with_state(reference: PreTrainedModel, store: Path, name: str) -> PreTrainedModel:
    """transformers' model with the numbers that the store holds, in fp32."""
    with Store.open(store, readonly=True) as opened:
        state = {key: tensor.float() for key, tensor in read_state(opened, name).items()}
    reference.load_state_dict(state, strict=False)
    return reference


@pytest.mark.parametrize("transport", ["shm", "grpc"])
@pytest.mark.parametrize("dtype", QUANTISED_DTYPES)
@pytest.mark.parametrize("family", ["opt", "gemma3"])
def test_tokens_are_those_of_transformers_with_the_numbers(
    family: str, dtype: str, transport: str, tmp_path: Path
) -> None:
    reference = make_model(make_config(family))
    reference.save_pretrained(tmp_path / "m")
    with Store.open(tmp_path / "store", create=True) as store:
        import_checkpoint(tmp_path / "m", store, "m", dtype)
    reference = with_state(reference, tmp_path / "store", "m")
    with FlashClient("m", store=tmp_path / "store", transport=transport) as client, torch.no_grad():
        model: Any = client.model
        expected, actual = reference(IDS).logits, model(IDS).logits
        assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()
        tokens = reference.generate(IDS, attention_mask=torch.ones_like(IDS), **SETTINGS)  # type: ignore[operator]
        assert client.generate(IDS.tolist(), **SETTINGS) == tokens.tolist()
        wide = torch.arange(3, 63).view(1, 60)  # several groups of rows
        expected, actual = reference(wide).logits, model(wide).logits
        assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("dtype", QUANTISED_DTYPES)
def test_cells_of_sectors_are_written_and_read(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several steps, which end on blocks, and layers that do not end on one."""
    monkeypatch.setattr(plan, "CHUNK_BYTES", 30000)
    source = make_checkpoint("llama", tmp_path / "m", hidden=640, neurons=107)
    with Store.open(tmp_path / "store", create=True) as store:
        record = import_checkpoint(source, store, "m", dtype)
        assert record.bundle.cell_bytes == {"int8": 2048, "int4": 3584}[dtype]
        assert record.layers[0].cells * record.bundle.cell_bytes % 4096 != 0
        verify_model(store, "m")
    reference = with_state(make_model(make_config("llama", hidden=640, neurons=107)), tmp_path / "store", "m")
    for transport in ("shm", "grpc"):
        with FlashClient("m", store=tmp_path / "store", transport=transport) as client, torch.no_grad():
            expected, actual = reference(IDS).logits, client.model(IDS).logits
            assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("dtype", QUANTISED_DTYPES)
def test_a_bf16_checkpoint_computes_in_bf16_and_is_rounded_once(dtype: str, tmp_path: Path) -> None:
    source = make_checkpoint("llama", tmp_path / "m", dtype="bfloat16")
    tensors = load_file(source / "model.safetensors")
    save_file({name: tensor.float() for name, tensor in tensors.items()}, tmp_path / "wide.safetensors")
    with Store.open(tmp_path / "store", create=True) as store:
        record = import_checkpoint(source, store, "narrow", dtype)
        assert record.compute_dtype == "BF16"
        (source / "model.safetensors").write_bytes((tmp_path / "wide.safetensors").read_bytes())
        wide = import_checkpoint(source, store, "wide", dtype)
        for index in range(len(record.layers)):
            pairs = zip(read_matrices(store, record, index), read_matrices(store, wide, index), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)


def test_a_quantised_gguf_is_quantised_again(tmp_path: Path) -> None:
    source = make_checkpoint("llama", tmp_path / "m", format="gguf")
    with Store.open(tmp_path / "store", create=True) as store:
        record = import_checkpoint(source, store, "m", "int8")
        assert [part.encoding.format for part in record.bundle.parts] == ["Q8_0"] * 3
        verify_model(store, "m")


def test_rows_that_are_no_whole_blocks_are_refused(tmp_path: Path) -> None:
    source = make_checkpoint("llama", tmp_path / "m", hidden=72)
    with Store.open(tmp_path / "store", create=True) as store:
        with pytest.raises(CheckpointError, match="72 inputs, which are not whole blocks of 32 values"):
            import_checkpoint(source, store, dtype="int4")
        assert store.names() == []


@pytest.mark.parametrize("weight", ["up_proj", "down_proj"])
def test_weights_that_are_not_finite_are_refused(weight: str, tmp_path: Path) -> None:
    source = make_checkpoint("llama", tmp_path / "m")
    tensors = load_file(source / "model.safetensors")
    tensors[f"model.layers.1.mlp.{weight}.weight"][5, 7] = torch.nan
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with Store.open(tmp_path / "store", create=True) as store:
        neuron = 5 if weight == "up_proj" else 7
        message = rf"neuron {neuron} of model\.layers\.1\.mlp has a weight that is NaN or infinite: import with"
        with pytest.raises(CheckpointError, match=message):
            import_checkpoint(source, store, dtype="int8")
        assert store.names() == []
        import_checkpoint(source, store)  # as it is


def test_commands_say_what_quantising_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_checkpoint("llama", tmp_path / "m")
    arguments = ["--store", str(tmp_path / "store")]
    assert cli.main(["import", str(source), *arguments, "--dtype", "int4", "--name", "a"]) == 0
    assert "IQ4_NL (error 7." in capsys.readouterr().out
    assert cli.main(["ls", *arguments, "--json"]) == 0
    (model,) = json.loads(capsys.readouterr().out)["models"]
    assert model["dtype"] == "IQ4_NL"
    assert len(model["quantisation_errors"]) == 2
    assert all(0.07 < error < 0.08 for error in model["quantisation_errors"])
    assert cli.main(["import", str(source), *arguments, "--dtype", "bf16", "--name", "b", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["quantisation_errors"] == []
    assert cli.main(["verify", *arguments]) == 0


def test_an_update_keeps_the_encoding_and_another_one_is_a_change(tmp_path: Path) -> None:
    source = make_checkpoint("llama", tmp_path / "m")
    with Store.open(tmp_path / "store", create=True) as store:
        import_checkpoint(source, store, dtype="int8")
        assert update(source, store)[1] == KEPT
        record, done = update(source, store, dtype="int4")
        assert (done, record.bundle.parts[0].encoding.format) == (REPLACED, "IQ4_NL")
        assert update(source, store)[1] == KEPT
