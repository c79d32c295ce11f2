"""Dtypes and encodings: one table for numpy, torch, safetensors and C++."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from repository import ROOT

from weightd_proto.encodings import (
    BLOCK_FORMATS,
    COMPUTE_DTYPES,
    DTYPES,
    SLAB_NEURONS_MAX,
    SLAB_NEURONS_MIN,
    check,
    fill_old_fields,
    formats_of,
    is_plain,
    part_bytes,
    parts_of,
    plain,
    stored_bytes,
    upgrade,
)
from weightd_proto.weightd_pb2 import Activation, BundleLayout, BundlePart, Encoding, Layer, Model

Q4_K = Encoding(format="Q4_K", block_values=256, block_bytes=144, scales=Encoding.IN_BLOCK)
HEADER = (ROOT / "proto" / "encoding.h").read_text()


@pytest.mark.parametrize("name", DTYPES)
def test_sizes_are_those_of_numpy_and_torch(name: str) -> None:
    dtype = DTYPES[name]
    assert np.dtype(dtype.numpy).itemsize == getattr(torch, dtype.torch).itemsize == dtype.bytes


def test_cpp_has_the_same_names_and_sizes() -> None:
    (table,) = re.findall(r"DTYPES\[\] = \{(.*)\};", HEADER)
    found = re.findall(r'\{"(\w+)", (\d+)\}', table)
    assert {name: int(size) for name, size in found} == {name: DTYPES[name].bytes for name, _ in found}
    (order,) = re.findall(r"enum class Dtype[^{]*\{ ?([\w, ]*) ?\}", HEADER)
    assert [name.lower() for name, _ in found] == order.replace(" ", "").split(",")
    assert {name for name, _ in found} >= set(COMPUTE_DTYPES.values())


def test_cpp_has_the_same_blocks_and_slabs() -> None:
    found = re.findall(r'\{"(\w+)", (\d+), (\d+)\}', HEADER)
    assert {name: (int(values), int(size)) for name, values, size in found} == {
        name: (record.values, record.bytes) for name, record in BLOCK_FORMATS.items()
    }
    slabs = {name: int(size) for name, size in re.findall(r"(SLAB_\w+) = (\d+)", HEADER)}
    assert slabs == {"SLAB_NEURONS_MIN": SLAB_NEURONS_MIN, "SLAB_NEURONS_MAX": SLAB_NEURONS_MAX}


def test_cpp_numbers_the_places_of_scales_as_protobuf_does() -> None:
    (order,) = re.findall(r"enum class Scales[^{]*\{ ?([\w, ]*) ?\}", HEADER)
    places = {name.upper(): number for number, name in enumerate(order.replace(" ", "").split(","))}
    assert places == dict(Encoding.Scales.items())


def test_bytes_are_those_of_whole_blocks() -> None:
    assert stored_bytes(plain("BF16"), 7) == 14
    assert stored_bytes(Q4_K, 512) == 288
    with pytest.raises(AssertionError):
        stored_bytes(Q4_K, 100)


def test_what_is_in_blocks_is_not_plain() -> None:
    assert is_plain(plain("F16"))
    assert not is_plain(Q4_K)
    assert not is_plain(Encoding(format="F16", block_values=2, block_bytes=4))


def test_parts_may_differ() -> None:
    layout = BundleLayout(hidden_size=256, parts=parts_of(("gate", "up"), Q4_K))
    layout.parts.append(BundlePart(name="down", encoding=plain("F16")))
    assert part_bytes(layout) == [144, 144, 512]
    assert formats_of(Model(bundle=layout)) == "Q4_K/F16"


def test_old_clients_find_the_dtype_of_plain_parts_and_none_of_others() -> None:
    layout = BundleLayout(hidden_size=256, parts=parts_of(("up", "down"), plain("BF16")))
    fill_old_fields(layout)
    assert (layout.old_dtype, list(layout.old_parts)) == ("BF16", ["up", "down"])
    layout.parts[1].encoding.CopyFrom(Q4_K)
    fill_old_fields(layout)
    assert layout.old_dtype == ""


def test_a_record_of_before_gets_its_encodings_once() -> None:
    model = Model(name="m", bundle=BundleLayout(old_dtype="F16", old_parts=["up", "down"], hidden_size=8))
    upgrade(model)
    assert list(model.bundle.parts) == parts_of(("up", "down"), plain("F16"))
    assert model.compute_dtype == "F16"
    again = Model()
    again.CopyFrom(model)
    upgrade(again)
    assert again == model


def test_records_without_bundles_stay_without() -> None:
    model = Model(name="m")
    upgrade(model)
    assert model == Model(name="m")


def quantised_model() -> Model:
    layout = BundleLayout(hidden_size=512, bundle_bytes=3 * 288, parts=parts_of(("gate", "up", "down"), Q4_K))
    return Model(name="m", compute_dtype="BF16", bundle=layout)


def test_a_record_whose_encodings_fit_is_accepted() -> None:
    check(quantised_model())


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda model: model.bundle.ClearField("parts"), "bundles without parts"),
        (lambda model: model.bundle.parts[1].ClearField("encoding"), "'up' of 512 values in blocks of 0"),
        (lambda model: setattr(model.bundle, "hidden_size", 500), "'gate' of 500 values in blocks of 256"),
        (lambda model: setattr(model.bundle, "bundle_bytes", 863), "bundles of 863 bytes, their parts have 864"),
        (
            lambda model: setattr(model.bundle.parts[2].encoding, "scales", 9),
            "scales of the unknown kind 9",
        ),
        (lambda model: setattr(model, "compute_dtype", ""), "compute dtype '', known are F32, BF16, F16"),
        (lambda model: setattr(model, "compute_dtype", "I8"), "compute dtype 'I8'"),
    ],
)
def test_a_record_whose_encodings_do_not_fit_is_refused(damage: Callable[[Model], object], text: str) -> None:
    model = quantised_model()
    damage(model)
    with pytest.raises(ValueError, match=text):
        check(model)


def mixture() -> Model:
    """A dense FFN, then four experts of 32 neurons."""
    model = quantised_model()
    model.bundle.bundles_per_cell = 16
    model.model_class = "MixtralForCausalLM"
    model.activation.MergeFrom(Activation(function="swish", parameter=1.702, gate_max=7.0))
    model.layers.add(module="mlp", neurons=40, place=Layer.PARTS, weights=["gate_up", "gate_up", "down"])
    experts = model.layers.add(module="experts", neurons=128, place=Layer.EXPERTS, experts=4)
    experts.weights[:] = ["gate_up", "gate_up", "down"]
    experts.biases.add(part="up", tensor="experts.bias", first=1, step=2)
    return model


def test_a_record_of_a_mixture_is_accepted() -> None:
    check(mixture())


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda model: setattr(model.layers[0], "place", 7), "mlp in the unknown place 7"),
        (lambda model: setattr(model.layers[0], "experts", 2), "mlp with 2 experts in place PARTS"),
        (lambda model: setattr(model.layers[1], "experts", 0), "experts with 0 experts in place EXPERTS"),
        (lambda model: setattr(model.layers[1], "neurons", 120), "120 neurons of 4 experts in cells of 16, not whole"),
        (lambda model: model.layers[0].weights.pop(), "mlp with 2 weights for 3 parts"),
        (lambda model: setattr(model.layers[1].biases[0], "part", "down"), "experts with biases of down"),
        (lambda model: model.ClearField("activation"), "FFNs without an activation"),
        (
            lambda model: setattr(model.activation, "up_limit", float("nan")),
            "an activation with the numbers 1.7.*, nan",
        ),
    ],
)
def test_a_record_whose_layers_do_not_fit_is_refused(damage: Callable[[Model], object], text: str) -> None:
    model = mixture()
    damage(model)
    with pytest.raises(ValueError, match=text):
        check(model)
