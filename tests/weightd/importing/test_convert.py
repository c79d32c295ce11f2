"""Conversion of a checkpoint into a store: bytes, dtypes, memory."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from byte_flips import flip_bit
from checkpoints import (
    DTYPES,
    FAMILIES,
    GGUF_FAMILIES,
    make_checkpoint,
    make_config,
    make_model,
    make_tokenizer,
    stored_tensors,
    write_gguf,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from page_cache import cached_pages
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stored_model import TORCH_DTYPES, assert_same_bits, read_state
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from weightd import _native
from weightd.checkpoint.opening import open_checkpoint
from weightd.errors import CheckpointError, CorruptionError, SpaceError
from weightd.importing.convert import import_checkpoint
from weightd.sizes import parse_size
from weightd.store.layout import bundle_layout, native_shape
from weightd.store.store import Store
from weightd.store.verify import verify_model
from weightd_proto import encodings
from weightd_proto.encodings import parts_of, plain

REQUESTS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store", create=True)


# From checkpoint to store, against transformers


@pytest.mark.parametrize("format", ["safetensors", "safetensors-sharded", "bin", "bin-sharded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_keep_is_bit_for_bit(tmp_path: Path, store: Store, family: str, format: str) -> None:
    dtype = {"bin": "float16", "safetensors-sharded": "bfloat16"}.get(format, "float32")
    source = make_checkpoint(family, tmp_path / "model", dtype=dtype, format=format, hidden=72, neurons=173)
    import_checkpoint(source, store)
    expected = stored_tensors(make_model(make_config(family, hidden=72, neurons=173), dtype))
    assert_same_bits(read_state(store, "model"), expected)
    assert verify_model(store, "model").bundles == 2 * 173


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_conversion_equals_torch(tmp_path: Path, store: Store, dtype: str, request_: str) -> None:
    source = make_checkpoint("llama", tmp_path / "model", dtype=dtype)
    import_checkpoint(source, store, "converted", request_)
    expected = stored_tensors(make_model(make_config("llama"), dtype))
    assert_same_bits(
        read_state(store, "converted"), {name: tensor.to(REQUESTS[request_]) for name, tensor in expected.items()}
    )


def test_doubles_become_floats(tmp_path: Path, store: Store) -> None:
    """As in transformers, by the dtype of the configuration; also beside tensors of other dtypes."""
    source = make_checkpoint("llama", tmp_path / "model")
    state = load_file(source / "model.safetensors")
    doubles = {name: t.double() * (1 + 1e-12) if "norm" not in name else t.half() for name, t in state.items()}
    save_file(doubles, source / "model.safetensors", {"format": "pt"})
    import_checkpoint(source, store)
    assert_same_bits(read_state(store, "model"), {name: tensor.float() for name, tensor in doubles.items()})


def test_opt_350m_shape(tmp_path: Path, store: Store) -> None:
    changes = {"word_embed_proj_dim": 48, "do_layer_norm_before": False}
    source = make_checkpoint("opt", tmp_path / "model", format="bin", dtype="float16", **changes)
    import_checkpoint(source, store)
    assert_same_bits(read_state(store, "model"), stored_tensors(make_model(make_config("opt", **changes), "float16")))


def transformers_state(path: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The model that transformers' own loader makes of a GGUF file."""
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    return stored_tensors(model)


QUANTISED = {
    "ffn_down": gguf.GGMLQuantizationType.Q8_0,
    "ffn_gate": gguf.GGMLQuantizationType.Q5_0,
    "ffn_up": gguf.GGMLQuantizationType.Q4_0,
    "attn_q": gguf.GGMLQuantizationType.Q4_1,
    "attn_k": gguf.GGMLQuantizationType.F16,
}


def quantise(name: str) -> gguf.GGMLQuantizationType:
    return QUANTISED.get(name.split(".")[-2], gguf.GGMLQuantizationType.Q8_0)


@pytest.mark.parametrize("family", GGUF_FAMILIES)
def test_gguf_equals_transformers_loader(tmp_path: Path, store: Store, family: str) -> None:
    """Quantised types are decoded, rows of Q and K are put back in order, Gemma's one is subtracted; stored in F32."""
    model = make_model(make_config(family, neurons=192))
    path = write_gguf(model, tmp_path / "tiny.gguf", quantise)
    record = import_checkpoint(path, store)
    assert record.name == "tiny"
    assert record.compute_dtype == "F32"
    assert_same_bits(read_state(store, "tiny"), transformers_state(path))


def test_gguf_without_its_packages_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "weightd.checkpoint.gguf_files.find_spec", lambda package: None if package == "gguf" else object()
    )
    with pytest.raises(CheckpointError, match=r"needs gguf to be read: pip install 'weightd\[import\]'"):
        open_checkpoint(make_checkpoint("llama", tmp_path, format="gguf"))


def test_quantised_gguf_converts_to_bf16(tmp_path: Path, store: Store) -> None:
    path = write_gguf(make_model(make_config("gemma3", neurons=192)), tmp_path / "tiny.gguf", quantise)
    import_checkpoint(path, store, dtype="bf16")
    assert_same_bits(read_state(store, "tiny"), transformers_state(path, torch.bfloat16))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_gguf_keeps_its_dtype_when_norms_fit(tmp_path: Path, store: Store, dtype: str) -> None:
    """llama.cpp widens norms to F32; that loses nothing on the way back."""
    source = make_checkpoint("llama", tmp_path / "model", dtype=dtype, format="gguf")
    assert import_checkpoint(source, store).compute_dtype == {"float16": "F16", "bfloat16": "BF16"}[dtype]
    assert_same_bits(read_state(store, "model"), stored_tensors(make_model(make_config("llama"), dtype)))


def test_half_precision_is_widened_when_a_norm_does_not_fit(tmp_path: Path, store: Store) -> None:
    model = make_model(make_config("llama"), "float16")
    folder = tmp_path / "model"
    make_tokenizer().save_pretrained(folder)
    model.config.save_pretrained(folder)
    state = stored_tensors(model)
    state["model.norm.weight"] = torch.full((64,), 1 / 3)
    save_file(state, folder / "model.safetensors")
    assert import_checkpoint(folder, store).compute_dtype == "F32"
    assert_same_bits(read_state(store, "model"), {name: tensor.float() for name, tensor in state.items()})


def test_files_are_what_transformers_needs(tmp_path: Path, store: Store) -> None:
    folder = make_checkpoint("opt", tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "README.md").write_text("not copied")
    record = import_checkpoint(folder, store)
    names = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {file.name for file in record.files} == names
    for name in names:
        assert (store.files_path("model") / name).read_bytes() == (folder / name).read_bytes()


def test_gguf_files_load_in_transformers(tmp_path: Path, store: Store) -> None:
    source = make_checkpoint("qwen2", tmp_path / "model", format="gguf")
    import_checkpoint(source, store)
    config = AutoConfig.from_pretrained(store.files_path("model"))
    assert config.architectures == ["Qwen2ForCausalLM"]
    tokenizer = AutoTokenizer.from_pretrained(store.files_path("model"))
    assert tokenizer.decode(tokenizer("hello, world").input_ids, skip_special_tokens=True) == "hello, world"


# The files


def test_resident_is_aligned_safetensors(tmp_path: Path, store: Store) -> None:
    model = import_checkpoint(make_checkpoint("opt", tmp_path / "model", dtype="float16"), store)
    path = store.resident_path("model")
    assert path.stat().st_size == model.resident_file_bytes
    assert model.resident[0].offset_bytes % model.bundle.block_bytes == 0
    # All of these come before fc1.bias, whose 352 bytes put what follows off alignment.
    assert all(tensor.offset_bytes % 64 == 0 for tensor in model.resident if tensor.size_bytes % 64 == 0)
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == {tensor.name for tensor in model.resident}
        assert "model.decoder.layers.0.fc1.bias" in file.keys()  # noqa: SIM118


def test_nothing_of_the_store_is_in_the_page_cache(tmp_path: Path, store: Store) -> None:
    import_checkpoint(make_checkpoint("llama", tmp_path / "model", hidden=128, neurons=640), store)
    verify_model(store, "model")
    assert cached_pages(store.bundles_path("model")) == 0
    assert cached_pages(store.resident_path("model")) == 0


def test_no_space_is_refused_before_writing(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("weightd.importing.convert.shutil.disk_usage", lambda _path: usage)
    source = make_checkpoint("llama", tmp_path / "model")
    with pytest.raises(SpaceError, match=r"model needs .*KiB in .*, but .*KiB are free: make room$"):
        import_checkpoint(source, store)
    assert sorted(path.name for path in store.path.iterdir()) == ["catalog.mdb", "catalog.mdb-lock"]


@pytest.mark.parametrize(
    ("sizes", "dtype", "left_bytes", "remedy"),
    [
        ({"hidden": 128, "neurons": 640}, "keep", 2 << 20, "make room, or import with --dtype bf16"),
        ({"hidden": 128, "neurons": 640}, "int8", 4 << 10, "make room"),
        ({}, "keep", 4 << 10, "make room"),
    ],
)
def test_bf16_is_advised_where_it_makes_enough_room(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch, sizes: dict[str, Any], dtype: str, left_bytes: int,
    remedy: str,
) -> None:  # fmt: skip
    source = make_checkpoint("llama", tmp_path / "model", **sizes)
    usage = type("Usage", (), {"free": left_bytes})
    monkeypatch.setattr("weightd.importing.convert.shutil.disk_usage", lambda _path: usage)
    with pytest.raises(SpaceError, match=f"are free: {remedy}$"):
        import_checkpoint(source, store, dtype=dtype)


@pytest.mark.parametrize("sizes", [{}, {"hidden": 128, "neurons": 640}, {"layers": 20}])
def test_an_import_takes_what_it_says(tmp_path: Path, store: Store, sizes: dict[str, Any]) -> None:
    source, said = make_checkpoint("llama", tmp_path / "model", **sizes), list[str]()
    import_checkpoint(source, store, progress=lambda _read, _total: None, tell=said.append)
    text = next(re.search(r"model takes (\S+) in", one) for one in said if "takes" in one)
    assert text is not None
    taken_bytes = sum(path.stat().st_blocks * 512 for path in store.path.rglob("*"))
    assert taken_bytes <= parse_size(text[1]) <= taken_bytes + (1 << 20)
    assert any("model has no chat template, as base models have none: a chat continues its text" in one for one in said)


# Corruption


@pytest.fixture
def imported(tmp_path: Path, store: Store) -> Store:
    import_checkpoint(make_checkpoint("opt", tmp_path / "tiny"), store)
    return store


@pytest.mark.parametrize(("layer", "neuron"), [(0, 0), (1, 175), (1, 9)])
def test_flipped_bit_names_the_neuron(imported: Store, layer: int, neuron: int) -> None:
    model = imported.model("tiny")
    cell, place = divmod(neuron, model.bundle.bundles_per_cell)
    offset_bytes = model.layers[layer].offset_bytes + cell * model.bundle.cell_bytes + place * model.bundle.stride_bytes
    flip_bit(imported.bundles_path("tiny"), offset_bytes + 7)
    with pytest.raises(CorruptionError, match=f"model tiny, layer {layer}, neuron {neuron}:"):
        verify_model(imported, "tiny")


def test_flipped_bit_names_the_tensor(imported: Store) -> None:
    tensor = imported.model("tiny").resident[5]
    flip_bit(imported.resident_path("tiny"), tensor.offset_bytes + tensor.size_bytes - 1)
    with pytest.raises(CorruptionError, match=f"model tiny, tensor {tensor.name}:"):
        verify_model(imported, "tiny")


def test_changed_file_and_missing_bundles_are_named(imported: Store) -> None:
    flip_bit(imported.files_path("tiny") / "config.json", 3)
    with pytest.raises(CorruptionError, match=r"model tiny, file hf/config\.json:"):
        verify_model(imported, "tiny")
    imported.bundles_path("tiny").unlink()
    with pytest.raises(CorruptionError, match=r"bundles\.bin is missing"):
        verify_model(imported, "tiny")


# The native functions, against numpy and torch


def reference_cells(layout: Any, rows: list[torch.Tensor], down: torch.Tensor) -> np.ndarray:
    """Cells computed by the definition of the format."""
    parts = torch.cat([*rows, down.T], dim=1).contiguous().view(torch.uint8).numpy()
    count = len(parts)
    cells = np.zeros(-(-count // layout.bundles_per_cell) * layout.cell_bytes, np.uint8)
    for position, bundle in enumerate(parts):
        cell, place = divmod(position, layout.bundles_per_cell)
        begin = cell * layout.cell_bytes + place * layout.stride_bytes
        cells[begin : begin + layout.bundle_bytes] = bundle
    return cells


def as_bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


@settings(max_examples=60, deadline=None)
@given(
    hidden=st.integers(1, 700),
    neurons=st.integers(1, 90),
    dtype=st.sampled_from(sorted(TORCH_DTYPES)),
    row_dtype=st.sampled_from(sorted(TORCH_DTYPES)),
    parts=st.sampled_from([("up", "down"), ("gate", "up", "down")]),
    data=st.data(),
)
def test_cutting_equals_the_reference(
    hidden: int, neurons: int, dtype: str, row_dtype: str, parts: tuple[str, ...], data: st.DataObject
) -> None:
    layout = bundle_layout(parts_of(parts, plain(dtype)), hidden, 4096)
    begin = data.draw(st.integers(0, (neurons - 1) // layout.bundles_per_cell)) * layout.bundles_per_cell
    end = data.draw(st.integers(begin + 1, neurons))
    generator = torch.Generator().manual_seed(hidden * 1000 + neurons)
    given, expected_parts = [], []
    for _ in parts:
        columns, step = data.draw(st.booleans()), data.draw(st.integers(1, 3))
        first = data.draw(st.integers(0, 5))
        first = first if not columns else first % step
        matrix = torch.randn(first + neurons * step, hidden, generator=generator)
        matrix = matrix.to(TORCH_DTYPES[dtype if columns else row_dtype])
        expected_parts.append(matrix[first::step][begin:end].to(TORCH_DTYPES[dtype]))
        stored = matrix[: neurons * step + (0 if columns else first)]
        stored = stored.T if columns else stored
        given.append((as_bytes(stored), dtype if columns else row_dtype, columns, first + begin * step, step))
    *rows, down = expected_parts
    expected = reference_cells(layout, rows, down.T)
    cells = np.full(len(expected), 0xA5, np.uint8)
    checksums = np.zeros(end - begin, np.uint64)
    shape = native_shape(layout)
    _native.cut_bundles(shape, given, cells, checksums)
    np.testing.assert_array_equal(cells, expected)
    again = np.zeros_like(checksums)
    _native.checksum_bundles(shape, expected, again)
    np.testing.assert_array_equal(checksums, again)


def converted(values: torch.Tensor, source: str, target: str) -> torch.Tensor:
    out = np.zeros(values.numel() * encodings.DTYPES[target].bytes, np.uint8)
    _native.convert(as_bytes(values), source, out, target)
    return torch.from_numpy(out).view(TORCH_DTYPES[target])


@pytest.mark.parametrize("target", sorted(TORCH_DTYPES))
@pytest.mark.parametrize("source", ["BF16", "F16"])
def test_every_half_precision_value_converts_as_torch_does(source: str, target: str) -> None:
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(TORCH_DTYPES[source])
    assert_converts(values, source, target)


@pytest.mark.parametrize("target", ["BF16", "F16"])
def test_floats_round_to_nearest_even(target: str) -> None:
    """Floats with every upper half and the lower halves around ties, and random ones."""
    upper = torch.arange(1 << 16, dtype=torch.int64) << 16
    lower = torch.tensor([0, 1, 0xFFF, 0x1000, 0x1001, 0x2000, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = (upper[:, None] | lower[None, :]).reshape(-1)
    assert_converts(bits.to(torch.uint32).view(torch.float32), "F32", target)
    random = torch.randint(0, 1 << 32, (1 << 20,), generator=torch.Generator().manual_seed(0), dtype=torch.int64)
    assert_converts(random.to(torch.uint32).view(torch.float32), "F32", target)


def assert_converts(values: torch.Tensor, source: str, target: str) -> None:
    found, expected = converted(values, source, target), values.to(TORCH_DTYPES[target])
    number = ~values.isnan()
    assert found[~number].isnan().all()
    kind = {4: torch.int32, 2: torch.int16}[encodings.DTYPES[target].bytes]
    assert torch.equal(found[number].view(kind), expected[number].view(kind))
    if source == target:
        assert torch.equal(found.view(kind), values.view(kind))


def test_native_functions_check_their_arrays() -> None:
    shape = native_shape(bundle_layout(parts_of(("up", "down"), plain("F32")), 8, 4096))
    small, sums = np.zeros(32, np.uint8), np.zeros(1, np.uint64)
    cells = np.zeros(4096, np.uint8)
    rows, columns = (small, "F32", False, 0, 1), (small, "F32", True, 0, 1)
    for parts, refused in (
        ([rows], "parts do not fit"),
        ([rows, (small, "F32", True, 1, 1)], "neurons beyond the columns"),
        ([(small, "F32", False, 1, 1), columns], "neurons beyond the rows"),
        ([rows, (small, "BF16", True, 0, 1)], "not in the dtype of their part"),
        ([rows, (small[:28], "F32", True, 0, 1)], "do not have hidden_size values"),
        ([rows, (small, "F32", True, 0, 99)], "lie too far apart"),
        ([rows, (small, "F32", True, 0, 0)], "not a matrix"),
    ):
        with pytest.raises(ValueError, match=refused):
            _native.cut_bundles(shape, parts, cells, sums)
    with pytest.raises(ValueError, match="cells do not fit"):
        _native.cut_bundles(shape, [rows, columns], np.zeros(64, np.uint8), sums)
    with pytest.raises(ValueError, match="unknown dtype"):
        _native.convert(small, "I8", small, "F32")
    with pytest.raises(ValueError, match="differ in elements"):
        _native.convert(small, "F32", small, "BF16")


# Memory

PEAK_SCRIPT = """
import json, sys
from pathlib import Path
import torch, gguf, gguf.quants
from weightd.checkpoint.opening import open_checkpoint
from weightd.importing.convert import import_checkpoint
from weightd.store.store import Store
import weightd.checkpoint.folder, weightd.checkpoint.gguf, weightd.disk.safetensors_file

def peak_bytes():  # not ru_maxrss: that starts with the peak of the process that forked this one
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024

before = peak_bytes()
with Store.open(sys.argv[1], create=True) as store:
    model = import_checkpoint(Path(sys.argv[2]), store, dtype=sys.argv[3])
print(json.dumps({"added_bytes": peak_bytes() - before, "layer_bytes": model.bundles_file_bytes // len(model.layers)}))
"""


def test_memory_of_an_import_is_bounded(tmp_path: Path) -> None:
    """A checkpoint of 512 MiB, with an embedding of 125 MiB and layers of 128 MiB."""
    folder = tmp_path / "model"
    folder.mkdir()
    config = make_config("llama", layers=3, hidden=2048, neurons=11264, vocab_size=32000, tie_word_embeddings=True)
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = stored_tensors(AutoModelForCausalLM.from_config(config))  # type: ignore[no-untyped-call]
    save_file(
        {name: torch.zeros(tensor.shape, dtype=torch.bfloat16) for name, tensor in shapes.items()},
        folder / "model.safetensors",
    )
    command = [sys.executable, "-c", PEAK_SCRIPT, str(tmp_path / "store"), str(folder), "keep"]
    result = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    down_bytes = result["layer_bytes"] // 3
    assert 2 * down_bytes < result["added_bytes"] <= max(256 << 20, 2 * result["layer_bytes"])
