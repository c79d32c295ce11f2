"""How often a decode step in predict mode calls from Python into C++ for the FFNs. Each call makes a token slower."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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
from flashclient.kernels import layer_runs
from flashclient.kernels.growing_cache import GrowingCache
from flashclient.kernels.layer_runs import NativeStack
from flashclient.model.ffn import LayerFFN
from weightd import cli
from weightd.serving.served_models import demand_of
from weightd.store.store import Store

LAYERS = 3
CALLS_PER_LAYER_MAX = 2  # the layer's arguments, and what its rows are
CALLS_PER_STEP_MAX = 3  # the layers, their end, and whether the session was lost meanwhile
# Products with resident weights outside of layers are not counted.
COUNTED = [
    *(_native.CellSource, _native.Ffn, _native.Leases, _native.LowRankPredictor, _native.PredictStep),
    *(_native.Predictor, _native.Session, _native.SignPredictor, _native.Sweep, _native.Window),
    *(_native.AttentionBlocks, _native.LayerCalls, _native.LayerFfn, _native.ExactLayer, _native.PredictLayer),
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
def test_the_layers_of_a_decode_step_are_one_native_call(tmp_path: Path, share_of_ffn: float) -> None:
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
        assert len(step) <= CALLS_PER_LAYER_MAX * LAYERS + CALLS_PER_STEP_MAX, step
        assert step.count("LayerCalls.add") == step.count("PredictLayer.at") == LAYERS
        assert step.count("LayerCalls.run") == 1


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
            for native in (LayerFFN.native, lambda *_: None):
                monkeypatch.setattr(LayerFFN, "native", native)
                calls: list[str] = []
                results.append([])
                with torch.no_grad(), counted(calls):
                    for rows, tokens in ((1, 40), (1, 1), (3, 4)):
                        ids = torch.arange(rows * tokens).view(rows, tokens) % 200 + 5
                        cache = GrowingCache(client.model.config)
                        results[-1].append(client.model(ids, past_key_values=cache).logits)
                assert ("LayerCalls.run" in calls) == (len(results) == 1)
    assert all(map(torch.equal, *results))


def passes(model: Any) -> list[Tensor]:
    """The logits of a prompt, of steps of one and several rows, and of a batch with padding."""
    made = []
    for rows, steps in ((1, (40, 1, 1, 3)), (3, (7, 1, 2))):
        cache, mask = GrowingCache(model.config), torch.ones(rows, 0, dtype=torch.int64)
        for tokens in steps:
            ids = torch.arange(rows * tokens).view(rows, tokens) % 200 + 5
            new = torch.ones_like(ids)
            if rows > 1 and mask.shape[1] == 0:
                new[1, :3] = 0
            mask = torch.cat([mask, new], 1)
            made.append(model(ids, attention_mask=mask, past_key_values=cache).logits)
    return made


def test_layers_that_are_one_call_have_the_bits_of_single_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where hooks look at a layer or change what it returns, where fewer layers run, and states are asked for."""
    checkpoint = make_checkpoint("gemma3", tmp_path / "tensors", layers=LAYERS, hidden=128, neurons=1024)
    flags = ["--store", str(tmp_path / "store"), "--name", "tiny", "--dtype", "bf16"]
    assert cli.main(["import", str(checkpoint), *flags]) == 0
    with torch.no_grad(), serving(tmp_path / "store", "--dram", "64MiB") as daemon, ExitStack() as opened:
        client = opened.enter_context(FlashClient("tiny", address=daemon.address, mode="exact"))
        model: Any = client.model
        stack: Any = next(one for one in model.modules() if isinstance(one, NativeStack))
        layer = stack.layers[1]

        def both(runs: int | None) -> None:
            """Compares the bits; each of the five steps after a prompt takes `runs` native calls."""
            calls: list[str] = []
            with counted(calls):
                made = passes(model)
            assert runs is None or calls.count("LayerCalls.run") == 2 * LAYERS + 5 * runs
            with monkeypatch.context() as patched:
                patched.setattr(layer_runs, "ROWS_MAX", 0)
                assert all(map(torch.equal, made, passes(model)))

        both(1)
        seen: list[Tensor] = []
        for add, hook, runs in (
            (layer.register_forward_hook, lambda _, given, output: output * 2, 3),
            (layer.register_forward_hook, lambda _, given, output: seen.append(output.clone()), 3),
            (layer.register_forward_pre_hook, lambda _, given: seen.append(given[0].clone()), 3),
            (layer.self_attn.register_forward_hook, lambda _, given, output: seen.append(output[0].clone()), None),
        ):
            seen.clear()
            handle = add(hook)
            both(runs)
            handle.remove()
            half = len(seen) // 2
            assert all(map(torch.equal, seen[:half], seen[half:]))
        handle = torch.nn.modules.module.register_module_forward_pre_hook(lambda *_: None)
        both(None)
        handle.remove()
        model.config.num_hidden_layers = stack.config.num_hidden_layers = 2
        both(None)
        model.config.num_hidden_layers = stack.config.num_hidden_layers = LAYERS
        ids = torch.tensor([[5, 6, 7]])
        states = model(ids, output_hidden_states=True).hidden_states
        monkeypatch.setattr(layer_runs, "ROWS_MAX", 0)
        assert all(map(torch.equal, states, model(ids, output_hidden_states=True).hidden_states))
        both(LAYERS)
