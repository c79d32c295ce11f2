"""A second, slow reading of the store format, by numpy and the safetensors library: what tests compare with."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file

from weightd.checkpoint import read_json
from weightd.families import recipe_of
from weightd.store import Store
from weightd_proto import weightd_pb2

TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def read_state(store: Store, name: str) -> dict[str, torch.Tensor]:
    """The whole state_dict of a stored model (without a tied head)."""
    model = store.model(name)
    state = dict(load_file(store.resident_path(name)))
    recipe = recipe_of(read_json(store.files_path(name) / "config.json"))
    for index, ffn in enumerate(recipe.layers):
        for tensor_name, matrix in zip(ffn.matrices, read_matrices(store, model, index), strict=True):
            state[tensor_name] = matrix
    return state


def read_matrices(store: Store, model: weightd_pb2.Model, layer: int) -> list[torch.Tensor]:
    """The FFN matrices of a layer, put together: row parts [neurons, hidden], down [hidden, neurons]."""
    bundles = read_bundles(store, model, layer)
    placement = store.placement(model.name, layer)
    values = torch.from_numpy(np.stack(bundles)).view(TORCH_DTYPES[model.bundle.dtype])
    by_neuron = torch.empty_like(values)
    by_neuron[torch.from_numpy(placement.astype(np.int64))] = values
    parts = list(torch.split(by_neuron, model.bundle.hidden_size, dim=1))
    return [part.contiguous() for part in (*parts[:-1], parts[-1].T)]


def read_bundles(store: Store, model: weightd_pb2.Model, layer: int) -> list[npt.NDArray[np.uint8]]:
    """The bytes of each bundle by position, by the arithmetic of the format; padding is seen to be zero."""
    layout, record = model.bundle, model.layers[layer]
    data = np.fromfile(store.bundles_path(model.name), np.uint8)
    extent = data[record.offset_bytes : record.offset_bytes + record.cells * layout.cell_bytes].copy()
    bundles = []
    for position in range(record.neurons):
        cell, place = divmod(position, layout.bundles_per_cell)
        begin = cell * layout.cell_bytes + place * layout.stride_bytes
        bundles.append(extent[begin : begin + layout.bundle_bytes].copy())
        extent[begin : begin + layout.bundle_bytes] = 0
    assert not extent.any(), "padding is not zero"
    return bundles
