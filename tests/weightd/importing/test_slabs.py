"""Quantised GGUF files kept as published, in slabs: what is stored, what a client makes of it, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from blocks import decoded, random_rows, spoil
from byte_flips import flip_bit
from checkpoints import make_checkpoint, make_config, make_model, write_gguf
from gguf_models import CASES, make_gguf
from stored_model import read_state
from test_quantising import IDS, SETTINGS, with_state

from flashclient import FlashClient
from flashclient.errors import CalibrationError, CorruptionError
from weightd import cli
from weightd.disk.tensors import SourceTensor
from weightd.errors import CheckpointError
from weightd.errors import CorruptionError as StoredCorruption
from weightd.importing import plan
from weightd.importing.convert import import_checkpoint
from weightd.importing.dequantise import first_unusable
from weightd.importing.stored_dtype import kept_slabs
from weightd.importing.units import TensorMatrix, Unit, UnitPart
from weightd.importing.update import KEPT, REPLACED, update
from weightd.store.store import Store
from weightd.store.verify import verify_model
from weightd_proto.encodings import BLOCK_FORMATS, in_blocks

Kinds = Callable[[str], gguf.GGMLQuantizationType]
WIDE = torch.arange(3, 63).view(1, 60)  # several groups of rows


def types(gate: str, up: str, *downs: str) -> Kinds:
    """Of a file's matrices; that of down by layer."""

    def kind(name: str) -> gguf.GGMLQuantizationType:
        parts = name.split(".")
        layer = int(parts[1]) if parts[0] == "blk" else 0
        of_parts = {"ffn_gate": gate, "ffn_up": up, "ffn_down": downs[layer % len(downs)]}
        return gguf.GGMLQuantizationType[of_parts.get(parts[-2], "Q8_0")]

    return kind


def gguf_of(family: str, folder: Path, kinds: Kinds, **sizes: int) -> Path:
    return write_gguf(make_model(make_config(family, **{"neurons": 192} | sizes)), folder / "m.gguf", kinds)


def close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Blocks may be multiplied with integers of 16 bits, which move numbers by 1 / 32768 of the greatest of 32."""
    return bool((actual - expected).abs().max() < 5e-4 * expected.abs().max())


@pytest.mark.parametrize(
    ("family", "kinds", "transport"),
    [
        ("llama", types("Q4_0", "Q4_1", "Q8_0"), "shm"),
        ("gemma3", types("Q8_0", "Q8_0", "Q4_0", "Q8_0"), "grpc"),  # the slabs of a layer are smaller
        ("qwen2", types("F16", "Q4_0", "F32"), "shm"),  # parts that are not quantised
        ("qwen3", types("Q4_1", "TQ1_0", "Q4_1"), "shm"),  # a format without kernels
        ("llama", types("Q4_K", "Q4_K", "Q6_K", "Q4_K"), "shm"),  # as in Q4_K_M
        ("gemma3", types("Q5_0", "Q5_1", "Q5_K", "IQ4_XS"), "shm"),
        ("qwen2", types("Q2_K", "Q3_K", "Q6_K"), "grpc"),
        ("llama", types("IQ4_NL", "MXFP4", "MXFP4"), "shm"),
    ],
)
def test_a_file_is_run_with_its_own_numbers(
    family: str, kinds: Kinds, transport: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "CHUNK_BYTES", 30000)  # several steps
    down = kinds("blk.0.ffn_down.weight").name
    hidden, neurons = (256, 512) if family == "qwen3" or "K" in down else (64, 192)
    path = gguf_of(family, tmp_path, kinds, hidden=hidden, neurons=neurons)
    notes: list[str] = []
    with Store.open(tmp_path / "store", create=True) as store:
        record = import_checkpoint(path, store, tell=notes.append)
        assert record.bundle.slab_neurons == (256 if "K" in down else 32)
        verify_model(store, "m")
    assert any("stay quantised as published" in note for note in notes)
    widened = "2 tensors cannot be kept and become F32, first blk.0.ffn_up.weight, of TQ1_0"
    assert any(widened in note for note in notes) == (family == "qwen3")
    reference: Any = with_state(
        make_model(make_config(family, neurons=neurons, hidden=hidden)), tmp_path / "store", "m"
    )
    with FlashClient("m", store=tmp_path / "store", transport=transport) as client, torch.no_grad():
        model: Any = client.model
        together = model(WIDE).logits
        assert close(together, reference(WIDE).logits)
        assert torch.equal(model(WIDE[:, :7]).logits, together[:, :7]), "bits depend on other rows"
        tokens = reference.generate(IDS, attention_mask=torch.ones_like(IDS), **SETTINGS)
        assert client.generate(IDS.tolist(), **SETTINGS) == tokens.tolist()


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [("qwen3moe", "Q4_0"), ("mixtral", "Q8_0"), ("qwen3moe", "Q4_K"), ("gpt-oss", "MXFP4")],
)
def test_experts_are_ranges_of_slabs(architecture: str, kind: str, tmp_path: Path) -> None:
    case, neurons = CASES[architecture], 256 if kind == "Q4_K" else 32
    if architecture == "qwen3moe":
        config = {**case.config, "moe_intermediate_size": 2 * neurons}
        keys = {**case.keys, "expert_feed_forward_length": 2 * neurons}
        if kind == "Q4_K":
            config["hidden_size"] = keys["embedding_length"] = 256
        case = replace(case, config=config, keys=keys)
    path, _ = make_gguf(case, tmp_path / "m", kind)
    with Store.open(tmp_path / "store", create=True) as store:
        record = import_checkpoint(path, store, "kept")
        import_checkpoint(path, store, "apart", layout="neuron")
        verify_model(store, "kept")
        assert record.bundle.slab_neurons == neurons
        assert [part.encoding.format for part in record.bundle.parts] == [kind] * 3
        kept, apart = read_state(store, "kept"), read_state(store, "apart")
        assert kept.keys() == apart.keys()
        assert all(torch.equal(tensor.float(), apart[name].float()) for name, tensor in kept.items())
    runs = []
    for name in ("kept", "apart"):
        with FlashClient(name, store=tmp_path / "store") as client, torch.no_grad():
            model: Any = client.model
            runs.append((model(WIDE).logits, client.generate(IDS.tolist(), **SETTINGS)))
    (logits, tokens), (expected, expected_tokens) = runs
    assert close(logits, expected)
    assert tokens == expected_tokens


def test_the_layout_is_said_and_can_be_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, store = gguf_of("llama", tmp_path, types("Q4_0", "Q4_0", "Q4_0")), tmp_path / "store"

    def run(*arguments: str) -> dict[str, Any]:
        assert cli.main([*arguments, "--store", str(store), "--json"]) == 0
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        return result

    kept = run("import", str(path))
    assert (kept["layout"], kept["bundle_neurons"], kept["dtype"]) == ("slab", 32, "Q4_0")
    apart = run("import", str(path), "--name", "apart", "--layout", "neuron")
    assert (apart["layout"], apart["bundle_neurons"], apart["dtype"]) == ("neuron", 1, "F32")
    assert kept["ffn_bytes"] < apart["ffn_bytes"] / 4
    assert cli.main(["ls", "--store", str(store)]) == 0
    assert "384 neurons in slabs of 32 of" in capsys.readouterr().out
    assert run("verify", "m")["verified"][0]["bundles"] == 12
    assert run("import", str(path), "--name", "m", "--update")["done"] == KEPT
    assert run("import", str(path), "--name", "m", "--update", "--layout", "neuron")["done"] == REPLACED
    with Store.open(store) as opened:
        assert update(path, opened, "m")[1] == KEPT, "the layout of the last import is the default"
        assert opened.model("m").bundle.slab_neurons == 0


def test_slabs_that_cannot_be_had_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = gguf_of("llama", tmp_path, types("Q4_0", "Q4_0", "Q4_0"))
    plain = make_checkpoint("llama", tmp_path / "plain")
    with Store.open(tmp_path / "store", create=True) as store:
        with pytest.raises(CheckpointError, match="leave --dtype bf16 out"):
            import_checkpoint(path, store, "m", "bf16", layout="slab")
        with pytest.raises(CheckpointError, match="so slabs would keep nothing: leave --layout slab out"):
            import_checkpoint(plain, store, "m", layout="slab")
        assert store.names() == []
    assert cli.main(["import", str(path), "--store", str(tmp_path / "store"), "--layout", "row"]) == 2
    assert "invalid choice: 'row'" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["ffn_gate", "ffn_down"])
def test_a_damaged_scale_is_refused_with_its_neurons(part: str, tmp_path: Path) -> None:
    path = gguf_of("llama", tmp_path, types("Q4_1", "Q4_1", "Q4_1"))
    tensor = next(each for each in gguf.GGUFReader(path).tensors if each.name == f"blk.1.{part}.weight")
    block_of_neuron_40 = 40 * 64 // 32 if part == "ffn_gate" else 3 * 192 // 32 + 1
    with path.open("r+b") as file:
        file.seek(int(tensor.data_offset) + block_of_neuron_40 * 20 + 2)
        file.write(np.array([np.nan], "<f2").tobytes())
    where = rf"blk.1.{part}.weight in .*Q4_1 .*in neurons 32 to 63 of model.layers.1.mlp: download the file again"
    with Store.open(tmp_path / "store", create=True) as store:
        with pytest.raises(CheckpointError, match=where):
            import_checkpoint(path, store)
        assert store.names() == []
        assert not list(store.path.glob("m*"))


def test_damage_is_reported_with_its_slab(tmp_path: Path) -> None:
    path = gguf_of("llama", tmp_path, types("Q4_0", "Q4_0", "Q4_0"))
    with Store.open(tmp_path / "store", create=True) as store:
        record = import_checkpoint(path, store)
        assert record.bundle.bundles_per_cell == 1
        flip_bit(store.bundles_path("m"), record.layers[1].offset_bytes + 2 * record.bundle.cell_bytes + 99)
        with pytest.raises(StoredCorruption, match=r"layer 1, slab 2 \(neurons 64 to 95\)"):
            verify_model(store, "m")
    for transport in ("shm", "grpc"):
        named = pytest.raises(CorruptionError, match=r"layer 1, slab 2 \(neurons 64 to 95\)")
        with FlashClient("m", store=tmp_path / "store", transport=transport) as client, named:
            client.generate(IDS.tolist(), **SETTINGS)


def test_other_modes_are_refused(tmp_path: Path) -> None:
    path = gguf_of("llama", tmp_path, types("Q4_0", "Q4_0", "Q4_0"))
    with Store.open(tmp_path / "store", create=True) as store:
        import_checkpoint(path, store)
    with pytest.raises(CalibrationError, match="import it with --dtype bf16"):
        FlashClient("m", store=tmp_path / "store", mode="predict")


@pytest.mark.parametrize("format", BLOCK_FORMATS)
def test_blocks_with_unusable_scales_are_those_that_gguf_makes_no_numbers_of(format: str) -> None:
    record = BLOCK_FORMATS[format]
    rows = random_rows(format, 5, record.values, 1.0, 0)
    assert first_unusable(format, rows) is None
    spoil(format, rows[3], np.inf)
    assert first_unusable(format, rows) == 3
    if record.scale_dtype == "F16":
        rows = np.random.default_rng(0).integers(0, 256, (1000, record.bytes), np.uint8)
        found = [first_unusable(format, row) is not None for row in rows]
        assert any(found)
        assert np.array_equal(found, ~np.isfinite(decoded(format, rows)).all(axis=1))


def test_layers_with_blocks_of_different_lengths(tmp_path: Path) -> None:
    """As in Qwen1.5-MoE: 256 values in the blocks of shared experts, 32 in those of experts, of 1408 neurons."""

    def unit(layer: int, neurons: int, format: str) -> Unit:
        tensor = SourceTensor(f"down{layer}", (64, neurons), in_blocks(format), tmp_path / "m.gguf", 0)
        down = UnitPart(TensorMatrix(tensor, 0, 64), columns=True, first=0, step=1)
        return Unit(layer, 0, neurons, (down, down))

    slabs, notes = kept_slabs([unit(0, 512, "Q4_K"), unit(1, 96, "Q5_0")], "keep", "")
    assert slabs is not None
    assert slabs.neurons == 32
    assert [encodings[-1].format for encodings in slabs.layers] == ["F32", "Q5_0"]
    assert any("cannot be kept and become F32, first down0, of Q4_K" in note for note in notes)
    odd = [unit(0, 512, "Q4_0"), unit(1, 40, "Q8_0")]
    slabs, notes = kept_slabs(odd, "keep", "")
    assert slabs is None
    assert "neuron by neuron: layer 1 has 40 neurons, which are not whole slabs of 32" in notes[0]
    with pytest.raises(CheckpointError, match="not whole slabs of 32: leave --layout slab out"):
        kept_slabs(odd, "keep", "slab")


def test_ffns_in_blocks_without_a_kernel_are_dequantised_with_a_note(tmp_path: Path) -> None:
    """The store may take many times what the file does."""
    path = gguf_of("llama", tmp_path, types("TQ2_0", "TQ2_0", "TQ1_0"), hidden=256, neurons=256)
    notes: list[str] = []
    with Store.open(tmp_path / "store", create=True) as store:
        record = import_checkpoint(path, store, tell=notes.append)
    assert {part.encoding.format for part in record.bundle.parts} == {"F32"}
    expected = (
        "the FFNs are dequantised to fp32, because their blocks of TQ2_0, TQ1_0 cannot be kept: with --dtype int4"
    )
    assert [note[: len(expected)] for note in notes] == [expected]
