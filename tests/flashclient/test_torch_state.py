"""A program may set torch's global state. That does not change what a client computes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from checkpoints import make_checkpoint
from daemon import serving
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flashclient import FlashClient
from weightd import cli

PROMPT = [[5, 17, 200, 31, 8]]
NEW_TOKENS = 8
CHANGED_AT = 3  # tokens made before another thread changes the state
TOLERANCE = 1e-4  # of logits; rounding to 16 bits anywhere changes them by more


State = Callable[[], AbstractContextManager[object]]


class Halving(TorchFunctionMode):
    """Makes torch use 16-bit floats where no dtype is given."""

    FACTORIES = (torch.empty, torch.zeros, torch.zeros_like, torch.ones, torch.full, torch.arange, torch.tensor)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in self.FACTORIES and "dtype" not in (kwargs or {}) and made.is_floating_point():
            return made.to(torch.bfloat16)
        return made


@contextmanager
def setting(put: Callable[[Any], object], value: Any, before: Callable[[], Any]) -> Iterator[None]:
    kept = before()
    put(value)
    try:
        yield
    finally:
        put(kept)


def default_dtype(dtype: torch.dtype) -> AbstractContextManager[None]:
    return setting(torch.set_default_dtype, dtype, torch.get_default_dtype)


def deterministic() -> AbstractContextManager[None]:
    return setting(torch.use_deterministic_algorithms, True, torch.are_deterministic_algorithms_enabled)


def threads(count: int) -> AbstractContextManager[None]:
    return setting(torch.set_num_threads, count, torch.get_num_threads)


STATES: dict[str, State] = {
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default dtype float16": lambda: default_dtype(torch.float16),
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default device meta": lambda: setting(torch.set_default_device, "meta", lambda: None),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "grad": torch.enable_grad,
    "deterministic algorithms": deterministic,
    "a mode of torch's functions": Halving,
    "one thread": lambda: threads(1),
    "three threads": lambda: threads(3),
}


@dataclass
class Served:
    """A tiny model, a client made in torch's ordinary state, and the tokens that it generates there."""

    address: str
    family: str
    client: FlashClient
    expected: tuple[Tensor, Tensor]

    def another(self) -> FlashClient:
        return FlashClient(self.family, address=self.address, mode="exact")

    def same(self, made: tuple[Tensor, Tensor]) -> bool:
        tokens, logits = self.expected
        return torch.equal(made[0], tokens) and torch.allclose(made[1], logits, atol=TOLERANCE, rtol=0)


def generate(client: FlashClient, **arguments: Any) -> tuple[Tensor, Tensor]:
    """Greedy tokens [1, prompt and new tokens], and the logits [new tokens, vocabulary] that chose them."""
    wanted = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    made = client.generate(PROMPT, output_logits=True, return_dict_in_generate=True, **wanted, **arguments)
    return made.sequences, torch.cat(made.logits)


@pytest.fixture(scope="module", params=["llama", "opt"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    family: str = request.param
    folder = tmp_path_factory.mktemp(family)
    checkpoint, store = make_checkpoint(family, folder / family), folder / "store"
    assert cli.main(["import", str(checkpoint), "--store", str(store)]) == 0
    with serving(store) as daemon, FlashClient(family, address=daemon.address, mode="exact") as client:
        yield Served(daemon.address, family, client, generate(client))


@pytest.fixture(params=STATES)
def state(request: pytest.FixtureRequest) -> Iterator[State]:
    yield STATES[request.param]
    assert torch.get_default_dtype() == torch.float32
    assert torch.get_default_device() == torch.device("cpu")


def test_set_before_the_client_is_made(served: Served, state: State) -> None:
    with ExitStack() as opened:
        with state():
            client = opened.enter_context(served.another())
            inside = generate(client)
        assert served.same(inside)
        assert served.same(generate(client))
        assert not any(tensor.is_inference() for tensor in client.model.parameters())
        assert not any(tensor.is_inference() for tensor in client.model.buffers())


def test_set_after_the_client_is_made(served: Served, state: State) -> None:
    with state():
        inside = generate(served.client)
    assert served.same(inside)


def test_set_by_another_thread_while_generating(served: Served, state: State) -> None:
    entered, over = threading.Event(), threading.Event()

    def hold() -> None:
        with state():
            entered.set()
            over.wait()

    thread = threading.Thread(target=hold)

    def change(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] == len(PROMPT[0]) + CHANGED_AT:
            thread.start()
            entered.wait()
        return scores

    try:
        made = generate(served.client, logits_processor=[change])
        assert entered.is_set()
    finally:
        over.set()
        thread.join()
    assert served.same(made)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(served: Served, dtype: torch.dtype) -> None:
    """Autocast rounds what transformers computes, as with any model. A client made under it works without it."""
    with ExitStack() as opened:
        with torch.autocast("cpu", dtype):
            client = opened.enter_context(served.another())
            tokens, logits = generate(client)
        assert tokens.shape == served.expected[0].shape
        assert logits.isfinite().all()
        assert torch.allclose(logits[0], served.expected[1][0], atol=0.5)
        assert served.same(generate(client))
