"""How often a decode step in predict mode calls from Python into C++ for the FFNs. Each call makes a token slower."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_checkpoint
from daemon import serving
from predictors import lossy, publish_predictors
from torch import Tensor

from flashclient import FlashClient, _native
from flashclient.kernels.growing_cache import GrowingCache
from flashclient.model.ffn import LayerFFN
from weightd import cli
from weightd.serving.served_models import demand_of
from weightd.store.store import Store

LAYERS = 3
CALLS_PER_LAYER_MAX = 3  # the layer, what its rows are, and whether the session was lost meanwhile
# Products with resident weights outside of layers are not counted.
COUNTED = [
    *(_native.CellSource, _native.Ffn, _native.Leases, _native.LowRankPredictor, _native.PredictStep),
    *(_native.Predictor, _native.Session, _native.SignPredictor, _native.Sweep, _native.Window),
    *(_native.AttentionBlocks, _native.LayerFfn, _native.ExactLayer, _native.PredictLayer),
]


@contextmanager
def counted(calls: list[str]) -> Iterator[None]:
    """Notes each call of a method or getter of the counted classes."""
    with pytest.MonkeyPatch.context() as patches:
        for kind in COUNTED:
            for name, member in list(vars(kind).items()):
                told = f"{kind.__name__}.{name}"
                if type(member) is property:  # not a static one
                    patches.delattr(kind, name)  # a property of a native class cannot be replaced
                    patches.setattr(kind, name, property(noting(told, calls, member.fget)), raising=False)
                elif callable(member) and not name.startswith("__"):
                    patches.setattr(kind, name, noting(told, calls, member))
        for name in ("copy_bundles", "checksum"):
            patches.setattr(_native, name, noting(name, calls, getattr(_native, name)))
        yield


def noting(name: str, calls: list[str], function: Any) -> Callable[..., Any]:
    def called(*arguments: Any, **named: Any) -> Any:
        calls.append(name)
        return function(*arguments, **named)

    return called


@pytest.mark.parametrize("share_of_ffn", [1.0, 0.3])
def test_a_layer_of_a_decode_step_is_three_native_calls(tmp_path: Path, share_of_ffn: float) -> None:
    """Also if the pool is smaller than the model, so that every step waits for flash."""
    checkpoint = make_checkpoint("opt", tmp_path / "tensors", layers=LAYERS, hidden=128, neurons=1024)
    assert cli.main(["import", str(checkpoint), "--store", str(tmp_path / "store"), "--name", "tiny"]) == 0
    record = Store.open(tmp_path / "store", readonly=True).model("tiny")
    dram = demand_of(record).minimum_bytes + int(share_of_ffn * record.bundles_file_bytes)
    calls: list[str] = []
    ends: list[int] = []  # of calls, after each forward pass
    with serving(tmp_path / "store", "--dram", str(dram)) as daemon:
        publish_predictors(daemon.address, "tiny", lossy)
        with FlashClient("tiny", address=daemon.address, mode="predict", transport="shm") as client:
            model: Any = client.model
            model.register_forward_hook(lambda *_: ends.append(len(calls)))
            with counted(calls):
                client.generate([5, 17, 200, 31, 8], max_new_tokens=12, do_sample=False, eos_token_id=-1)
            assert client.stats().misses > 0
    assert len(ends) == 12
    for begin, end in pairwise(ends):
        step = calls[begin:end]
        assert len(step) <= CALLS_PER_LAYER_MAX * LAYERS, step
        assert step.count("AttentionBlocks.layer") == step.count("PredictLayer.at") == LAYERS


@pytest.mark.parametrize("mode", ["exact", "predict"])
@pytest.mark.parametrize("family", ["opt", "gemma3"])
def test_a_native_layer_has_the_bits_of_its_parts(
    family: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With biases of all kinds (OPT), and with norms after attention and FFN (Gemma 3)."""
    checkpoint = make_checkpoint(family, tmp_path / "tensors", layers=LAYERS, hidden=128, neurons=1024)
    flags = ["--store", str(tmp_path / "store"), "--name", "tiny", "--dtype", "bf16"]
    assert cli.main(["import", str(checkpoint), *flags]) == 0
    results: list[list[Tensor]] = []
    with serving(tmp_path / "store", "--dram", "64MiB") as daemon:
        publish_predictors(daemon.address, "tiny", lossy)
        with FlashClient("tiny", address=daemon.address, mode=mode, transport="shm") as client:
            for within in (LayerFFN.within, lambda *_: False):
                monkeypatch.setattr(LayerFFN, "within", within)
                calls: list[str] = []
                results.append([])
                with torch.no_grad(), counted(calls):
                    for rows, tokens in ((1, 40), (1, 1), (3, 4)):
                        ids = torch.arange(rows * tokens).view(rows, tokens) % 200 + 5
                        cache = GrowingCache(client.model.config)
                        results[-1].append(client.model(ids, past_key_values=cache).logits)
                assert ("AttentionBlocks.layer" in calls) == (len(results) == 1)
    assert all(map(torch.equal, *results))
