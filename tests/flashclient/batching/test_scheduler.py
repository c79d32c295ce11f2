"""Requests that run at once: each gets what it gets alone, in every mode; they come, go, fail and wait."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import VOCABULARY, make_checkpoint, make_tokenizer
from daemon import Daemon, serving
from predictors import lossy, publish_predictors

from flashclient import FlashClient
from flashclient.batching.batch import Batch
from flashclient.batching.kept_prefixes import KeptPrefixes
from flashclient.batching.request import Progress, TextRequest
from flashclient.batching.sampling import Sampling
from flashclient.batching.scheduler import CHUNK_TOKENS, Scheduler
from flashclient.batching.step_order import StepOrder
from flashclient.errors import BusyError, DaemonLostError, FlashClientError
from weightd import cli

ANSWER_S = 60.0
TOKENIZER = make_tokenizer()


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("scheduler")
    for name, family in (("opt", "opt"), ("llama", "llama")):
        checkpoint = make_checkpoint(family, folder / name, neurons=600, max_position_embeddings=1024)
        assert cli.main(["import", str(checkpoint), "--store", str(folder / "store")]) == 0
    with serving(folder / "store", "--dram", "64MiB") as started:
        publish_predictors(started.address, "opt", lossy)
        yield started


@dataclass
class Listener:
    """A request, and what its scheduler tells of it."""

    request: TextRequest
    told: queue.SimpleQueue[Progress] = field(default_factory=queue.SimpleQueue)

    def next(self) -> Progress:
        return self.told.get(timeout=ANSWER_S)

    def end(self) -> tuple[list[int], Progress]:
        tokens = []
        while True:
            step = self.next()
            tokens += [step.picked.token] if step.picked is not None else []
            if step.finished is not None or step.error is not None:
                return tokens, step


def asked(prompt: list[int], tokens_max: int = 8, **more: Any) -> Listener:
    told: queue.SimpleQueue[Progress] = queue.SimpleQueue()
    fields: dict[str, Any] = {"sampling": Sampling(temperature=0.0), "ends": frozenset(), "stops": ()} | more
    return Listener(TextRequest(prompt, TOKENIZER, tokens_max=tokens_max, tell=told.put, **fields), told)


def prompt_of(index: int, length: int) -> list[int]:
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(index)).tolist()


@contextmanager
def scheduler_of(client: FlashClient, *sizes: int) -> Iterator[Scheduler]:
    names = ("sequences_max", "waiting_max", "cache_tokens_max", "kept_tokens_max")
    bounds: dict[str, Any] = dict(zip(names, sizes, strict=False))
    scheduler = Scheduler(client.loaded, **bounds)
    try:
        yield scheduler
    finally:
        scheduler.close()


@pytest.mark.parametrize(("name", "mode"), [("opt", "exact"), ("opt", "predict"), ("llama", "exact")])
def test_a_request_gets_what_it_gets_alone(daemon: Daemon, name: str, mode: str) -> None:
    with FlashClient(name, address=daemon.address, mode=mode) as client:
        prompts = [prompt_of(index, length) for index, length in enumerate((1, 7, 20, 33, CHUNK_TOKENS + 5, 3, 64))]
        greedy: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1}
        expected = [client.generate(torch.tensor([prompt]), **greedy)[0, len(prompt) :].tolist() for prompt in prompts]
        with scheduler_of(client, 4) as scheduler:
            for _ in range(2):
                listeners = [asked(prompt) for prompt in prompts]
                for listener in listeners:
                    scheduler.submit(listener.request)
                for listener, tokens in zip(listeners, expected, strict=True):
                    got, last = listener.end()
                    assert (got, last.finished) == (tokens, "length")
            assert scheduler.steps < 2 * 8 * len(prompts), "steps are shared"
        assert torch.equal(client.generate(torch.tensor([prompts[1]]), **greedy)[0, 7:], torch.tensor(expected[1]))


def test_ends_and_stop_texts(daemon: Daemon) -> None:
    with FlashClient("llama", address=daemon.address) as client, scheduler_of(client) as scheduler:
        plain = asked(prompt_of(1, 7))
        scheduler.submit(plain.request)
        tokens, _ = plain.end()
        ended = asked(prompt_of(1, 7), ends=frozenset([tokens[3]]))
        scheduler.submit(ended.request)
        got, last = ended.end()
        assert (got, last.finished, last.text) == (tokens[: tokens.index(tokens[3])], "stop", "")
        text = str(TOKENIZER.decode(tokens))
        stop = text[3:5]
        stopped = asked(prompt_of(1, 7), stops=[stop])
        scheduler.submit(stopped.request)
        said = ""
        while (step := stopped.next()).finished is None:
            said += step.text
        assert step.finished == "stop"
        assert said + step.text == text[: text.index(stop)]


def test_a_text_that_cannot_go_on_fails_alone(daemon: Daemon) -> None:
    with FlashClient("llama", address=daemon.address) as client, scheduler_of(client) as scheduler:
        wrong, right = asked(prompt_of(1, 7), sampling=Sampling(logit_bias={10**6: 1.0})), asked(prompt_of(1, 7))
        scheduler.submit(wrong.request, right.request)
        assert isinstance(wrong.end()[1].error, IndexError)
        assert right.end()[1].finished == "length"


def test_prompts_that_cannot_begin_fail(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(*_: Any) -> Any:
        raise MemoryError

    with FlashClient("llama", address=daemon.address) as client, scheduler_of(client) as scheduler:
        listeners = [asked(prompt_of(index, 7)) for index in range(2)]
        with monkeypatch.context() as patched:
            patched.setattr(KeptPrefixes, "begin", begin)
            scheduler.submit(*(listener.request for listener in listeners))
            assert all(isinstance(listener.end()[1].error, MemoryError) for listener in listeners)
        after = asked(prompt_of(1, 7))
        scheduler.submit(after.request)
        assert after.end()[1].finished == "length"


def test_a_cancelled_request_ends(daemon: Daemon) -> None:
    with FlashClient("llama", address=daemon.address) as client, scheduler_of(client, 1) as scheduler:
        endless, after = asked(prompt_of(1, 7), 100_000), asked(prompt_of(2, 7), 2)
        scheduler.submit(endless.request)
        endless.next()
        scheduler.submit(after.request)
        endless.request.cancel()
        assert after.end()[1].finished == "length"  # with one sequence at a time, it had to wait


def test_a_bounded_number_waits(daemon: Daemon) -> None:
    with FlashClient("llama", address=daemon.address) as client, scheduler_of(client, 1, 2) as scheduler:
        running = asked(prompt_of(1, 7), 100_000)
        scheduler.submit(running.request)
        running.next()
        waiting = [asked(prompt_of(index, 5), 1) for index in range(2)]
        scheduler.submit(*(listener.request for listener in waiting))
        with pytest.raises(BusyError, match="2 requests wait already"):
            scheduler.submit(asked([5]).request)
        running.request.cancel()
        assert all(listener.end()[1].finished == "length" for listener in waiting)


def test_keys_and_values_are_bounded(daemon: Daemon) -> None:
    with FlashClient("llama", address=daemon.address) as client, scheduler_of(client, 4, 8, 50) as scheduler:
        long, short = asked(prompt_of(1, 7), 100), asked(prompt_of(2, 7), 3)  # the first is longer than the bound
        scheduler.submit(long.request)
        long.next()
        scheduler.submit(short.request)
        assert long.end()[1].finished == "length"
        assert short.request.made <= 1, "it waited"
        assert short.end()[1].finished == "length"
        with pytest.raises(FlashClientError, match="9 sequences at once, and 8 may wait"):
            scheduler.submit(*(asked([5]).request for _ in range(9)))


def test_what_is_kept_of_a_full_batch_is_within_the_bound(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    held, keep = [], Batch.keep

    def keep_and_count(batch: Batch, row: int, tokens: Any, owner: int, kept: KeptPrefixes) -> None:
        keep(batch, row, tokens, owner, kept)
        held.append(batch.tokens + kept.tokens)

    monkeypatch.setattr(Batch, "keep", keep_and_count)
    with FlashClient("llama", address=daemon.address) as client, scheduler_of(client, 4, 8, 100, 100) as scheduler:
        listeners = [asked(prompt_of(index, 10)) for index in range(4)]
        scheduler.submit(*(listener.request for listener in listeners))
        assert all(listener.end()[1].finished == "length" for listener in listeners)
    assert len(held) == 4
    assert 70 < max(held) <= 100


def test_closing_fails_what_runs_and_waits(daemon: Daemon) -> None:
    with FlashClient("llama", address=daemon.address) as client, scheduler_of(client, 1) as scheduler:
        running, waiting = asked(prompt_of(1, 7), 100_000), asked(prompt_of(2, 7))
        scheduler.submit(running.request, waiting.request)
        running.next()
        scheduler.close()
        assert isinstance(running.end()[1].error, FlashClientError)
        assert isinstance(waiting.end()[1].error, FlashClientError)
        with pytest.raises(FlashClientError, match="the server is stopping"):
            scheduler.submit(asked([5]).request)


def test_without_its_daemon_a_request_fails_and_the_next_one_too(tmp_path: Path) -> None:
    checkpoint = make_checkpoint("llama", tmp_path / "tiny")
    assert cli.main(["import", str(checkpoint), "--store", str(tmp_path / "store")]) == 0
    with (
        serving(tmp_path / "store", "--dram", "64MiB") as daemon,
        FlashClient("tiny", address=daemon.address, timeout_s=1.0) as client,
        scheduler_of(client) as scheduler,
    ):
        running = asked(prompt_of(1, 7), 100_000)
        scheduler.submit(running.request)
        running.next()
        daemon.process.kill()
        assert isinstance(running.end()[1].error, DaemonLostError)
        after = asked(prompt_of(2, 7))
        scheduler.submit(after.request)
        assert isinstance(after.end()[1].error, FlashClientError)


@pytest.mark.parametrize(("name", "mode"), [("opt", "exact"), ("opt", "predict"), ("llama", "exact")])
def test_the_next_turn_computes_only_what_is_new(daemon: Daemon, name: str, mode: str) -> None:
    with FlashClient(name, address=daemon.address, mode=mode) as client, scheduler_of(client, 4) as scheduler:
        first = asked(prompt_of(1, CHUNK_TOKENS + 40))
        scheduler.submit(first.request)
        made, _ = first.end()
        turn = [*first.request.prompt, *made, *prompt_of(2, 9)]
        turns = [asked([*turn, *prompt_of(3 + index, 5)]) for index in range(3)] + [asked(prompt_of(9, 5))]
        scheduler.submit(*(listener.request for listener in turns))
        for listener in turns:
            prompt = torch.tensor([listener.request.prompt])
            with_cache = listener.end()[0]
            alone = client.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=-1)
            assert with_cache == alone[0, prompt.shape[1] :].tolist()
        known = len(first.request.prompt) + (len(made) - 1 if mode == "exact" else 0)
        assert [listener.request.kept_tokens for listener in turns] == [known, known, known, 0]


def test_a_turn_comes_in_the_order_of_asking() -> None:
    order, took, asked_for = StepOrder(), queue.SimpleQueue[int](), threading.Semaphore(0)

    def take(number: int) -> None:
        asked_for.release()
        with order.turn():
            took.put(number)

    with order.turn():
        threads = []
        for number in range(3):
            threads.append(threading.Thread(target=take, args=(number,)))
            threads[-1].start()
            asked_for.acquire()
            while order.waiting < number + 1:
                pass
    for thread in threads:
        thread.join()
    assert [took.get() for _ in range(3)] == [0, 1, 2]


def test_what_is_kept_makes_room_for_what_runs(daemon: Daemon) -> None:
    with FlashClient("llama", address=daemon.address) as client, scheduler_of(client, 4, 8, 100, 80) as scheduler:
        for index in range(3):
            listener = asked(prompt_of(index, 40), 4)
            scheduler.submit(listener.request)
            assert listener.end()[1].finished == "length"
        assert 40 <= scheduler.kept_tokens <= 80
        long = asked(prompt_of(5, 90), 4)
        scheduler.submit(long.request)
        long.next()
        long.next()
        assert scheduler.kept_tokens <= 10
