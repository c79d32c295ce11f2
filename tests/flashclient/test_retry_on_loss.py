"""weightd is lost during or between generations and comes back: the same tokens, or one clear error."""

from __future__ import annotations

import queue
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_checkpoint
from mortal_daemon import mortal
from predictors import lossy, publish_predictors

from flashclient import FlashClient
from flashclient.batching.request import Progress, TextRequest
from flashclient.batching.sampling import Sampling
from flashclient.batching.scheduler import Scheduler
from flashclient.errors import DaemonLostError, FlashClientError, RefusedError
from flashclient.model.ffn import StreamedFFN
from flashclient.source.ring import RingSource
from weightd import cli
from weightd.serving.served_models import demand_of
from weightd.store.store import Store
from weightd_proto import weightd_pb2

LAYERS, HIDDEN, NEURONS = 3, 128, 1024
ANSWER_S = 60.0
PROMPT = [5, 17, 200, 31, 8]
GREEDY: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": -1}
OPTIONS: dict[str, dict[str, Any]] = {"shm": {"transport": "shm"}, "grpc": {"transport": "grpc", "pool_bytes": 700_000}}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one calibrated model."""
    folder = tmp_path_factory.mktemp("loss")
    import_model(folder / "store", folder / "tensors", seed=0)
    with mortal(folder / "store") as daemon:
        publish_predictors(daemon.address, "tiny", lossy)
    return folder / "store"


def import_model(store: Path, checkpoint: Path, seed: int) -> None:
    make_checkpoint("opt", checkpoint, layers=LAYERS, hidden=HIDDEN, neurons=NEURONS, seed=seed)
    assert cli.main(["import", str(checkpoint), "--store", str(store), "--name", "tiny"]) == 0


@pytest.fixture
def store(stored: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stored, tmp_path / "store"))


def dram(store: Path, share_of_ffn: float = 0.3) -> str:
    """The --dram for a pool that holds only a part of the FFNs, so that bundles are read all the time."""
    model = Store.open(store, readonly=True).model("tiny")
    return str(demand_of(model).minimum_bytes + int(share_of_ffn * model.bundles_file_bytes))


@contextmanager
def at_ffn(client: FlashClient, number: int, act: Callable[[], object]) -> Iterator[None]:
    """Starts a thread that runs `act` when the FFN call number `number` of the client begins."""
    calls = 0
    thread = threading.Thread(target=act)

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            thread.start()

    ffns: list[Any] = [module for module in client.model.modules() if isinstance(module, StreamedFFN)]
    hooks = [ffn.register_forward_pre_hook(count) for ffn in ffns]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        thread.join()


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "flashclient"]


@pytest.mark.parametrize("mode", ["exact", "predict"])
def test_a_generation_over_the_ring_makes_no_grpc_call(store: Path, mode: str) -> None:
    """So it also works when other clients use up weightd's calls. Its counters come from its ring."""
    with (
        mortal(store, "--dram", dram(store)) as daemon,
        FlashClient("tiny", address=daemon.address, mode=mode, transport="shm") as client,
    ):
        client.loaded.connection.close()
        client.generate(PROMPT, **GREEDY)
        stats = client.stats()
        counted = daemon.daemon.stub.Stats(weightd_pb2.StatsRequest()).attached[0]
        # The daemon may count more: cells that were requested ahead may arrive after the end of the generation.
        assert 0 < stats.misses <= counted.misses
        assert stats.misses <= stats.read_bytes // 4096 <= counted.read_bytes // 4096
        assert stats.hits <= counted.hits


MODES = pytest.mark.parametrize("mode", ["exact", "predict"])
TRANSPORTS = pytest.mark.parametrize("transport", ["shm", "grpc"])


@MODES
@TRANSPORTS
def test_killing_weightd_during_a_generation_changes_no_token(
    store: Path, mode: str, transport: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is killed at several moments: in the prompt, after it, in the middle and near the end."""
    with (
        mortal(store, "--dram", dram(store)) as daemon,
        FlashClient("tiny", address=daemon.address, mode=mode, **OPTIONS[transport]) as client,
    ):
        expected = client.generate(PROMPT, **GREEDY)
        assert said(caplog) == []
        for number in (1, 2, 7, 38, 66):
            caplog.clear()
            with at_ffn(client, number, daemon.restart):
                assert client.generate(PROMPT, **GREEDY) == expected
            assert len(said(caplog)) == 1, "logged once"
            assert "waiting up to 30 s to attach again at unix:" in said(caplog)[0]
        assert client.stats().hits + client.stats().misses > 0


@MODES
def test_stopping_weightd_during_a_generation_changes_no_token(store: Path, mode: str) -> None:
    with (
        mortal(store, "--dram", dram(store)) as daemon,
        FlashClient("tiny", address=daemon.address, mode=mode) as client,
    ):
        expected = client.generate(PROMPT, **GREEDY)

        def stop_and_start() -> None:
            daemon.stop()
            daemon.start()

        with at_ffn(client, 11, stop_and_start):
            assert client.generate(PROMPT, **GREEDY) == expected


@MODES
@TRANSPORTS
def test_a_generation_waits_for_a_killed_weightd(store: Path, mode: str, transport: str) -> None:
    with (
        mortal(store, "--dram", dram(store)) as daemon,
        FlashClient("tiny", address=daemon.address, mode=mode, **OPTIONS[transport]) as client,
    ):
        expected = client.generate(PROMPT, **GREEDY)
        daemon.kill()
        starting = threading.Thread(target=daemon.start)
        starting.start()
        assert client.generate(PROMPT, **GREEDY) == expected
        starting.join()


@MODES
@TRANSPORTS
def test_a_weightd_that_does_not_come_back_is_one_error(store: Path, mode: str, transport: str) -> None:
    with (
        mortal(store, "--dram", dram(store)) as daemon,
        FlashClient("tiny", address=daemon.address, mode=mode, timeout_s=1.0, **OPTIONS[transport]) as client,
    ):
        expected = client.generate(PROMPT, **GREEDY)
        lost = f"weightd at {daemon.address} has not come back within 1 s: start it again, or raise timeout_s="
        with at_ffn(client, 20, daemon.kill), pytest.raises(DaemonLostError, match=re.escape(lost)):
            client.generate(PROMPT, **GREEDY)
        daemon.start()
        assert client.generate(PROMPT, **GREEDY) == expected, "the client works again"


@TRANSPORTS
def test_another_import_after_the_restart_is_one_error(store: Path, tmp_path: Path, transport: str) -> None:
    with (
        mortal(store, "--dram", dram(store)) as daemon,
        FlashClient("tiny", address=daemon.address, **OPTIONS[transport]) as client,
    ):
        client.generate(PROMPT, **GREEDY)

        def import_another() -> None:
            daemon.kill()
            assert cli.main(["rm", "tiny", "--store", str(store)]) == 0
            import_model(store, tmp_path / "other", seed=1)
            daemon.start()

        with at_ffn(client, 5, import_another), pytest.raises(RefusedError, match="'tiny' is another import than"):
            client.generate(PROMPT, **GREEDY)


def test_a_server_whose_model_was_replaced_is_not_healthy(store: Path, tmp_path: Path) -> None:
    with mortal(store, "--dram", dram(store)) as daemon, FlashClient("tiny", address=daemon.address) as client:
        scheduler = Scheduler(client.loaded)
        try:
            assert finished(scheduler, client).error is None
            scheduler.check_runs()
            daemon.kill()
            assert cli.main(["rm", "tiny", "--store", str(store)]) == 0
            import_model(store, tmp_path / "other", seed=1)
            daemon.start()
            assert isinstance(finished(scheduler, client).error, RefusedError)
            with pytest.raises(FlashClientError, match="start the server again: 'tiny' is another import than"):
                scheduler.check_runs()
        finally:
            scheduler.close()


def finished(scheduler: Scheduler, client: FlashClient) -> Progress:
    """What a server is told at the end of a request."""
    told: queue.SimpleQueue[Progress] = queue.SimpleQueue()
    scheduler.submit(TextRequest(PROMPT, client.tokenizer, Sampling(temperature=0.0), 4, frozenset(), (), told.put))
    while True:
        progress = told.get(timeout=ANSWER_S)
        if progress.finished is not None or progress.error is not None:
            return progress


def test_another_calibration_after_the_restart_changes_no_token(store: Path) -> None:
    """A client keeps the predictors that it began with."""
    with mortal(store, "--dram", dram(store)) as daemon:
        with FlashClient("tiny", address=daemon.address, mode="predict") as client:
            expected = client.generate(PROMPT, **GREEDY)

            def calibrate_again() -> None:
                daemon.kill()
                daemon.start(f"unix:{store}.elsewhere.sock")
                publish_predictors(daemon.daemon.address, "tiny", partial(lossy, seed=7))
                daemon.stop()
                daemon.start()

            with at_ffn(client, 20, calibrate_again):
                assert client.generate(PROMPT, **GREEDY) == expected
            assert client.generate(PROMPT, **GREEDY) == expected
        with FlashClient("tiny", address=daemon.address, mode="predict") as newcomer:
            assert newcomer.generate(PROMPT, **GREEDY) != expected, "the calibrations differ"


def test_a_generation_goes_on_after_weightd_closed_its_session(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    """weightd closes it for keeping others waiting: the client pauses in the middle of a generation, and when other
    clients come it holds more than its share."""
    with (
        mortal(store, "--dram", dram(store, 0.24)) as daemon,
        FlashClient("tiny", address=daemon.address, mode="predict", window=64) as client,
    ):
        expected = client.generate(PROMPT, **GREEDY)
        paused = False

        def let_others_run(*_: object) -> None:
            nonlocal paused
            source = ring_source(client)
            assert source.window is not None
            if not paused and source.window.cells_held > 0.9 * source.leases.lease_limit():
                paused = True
                with ExitStack() as others:
                    for _other in range(2):
                        lease_a_share(others.enter_context(FlashClient("tiny", address=daemon.address)))

        model: Any = client.model
        model.register_forward_hook(let_others_run)
        assert client.generate(PROMPT, **GREEDY) == expected
        assert paused
        assert ["kept others waiting" in line for line in said(caplog)] == [True]


def ring_source(client: FlashClient) -> RingSource:
    assert isinstance(client.loaded.source, RingSource)
    return client.loaded.source


def lease_a_share(client: FlashClient) -> None:
    leases = ring_source(client).leases
    leases.exchange(0, list(range(leases.share_slots())), [])
    granted = 0
    while arrived := leases.arrived():
        granted += sum(address != 0 for _, address in arrived)
    assert granted == leases.share_slots()


def mapped(name: str) -> set[str]:
    """The inodes of the memory called `name` that weightd shares and this process has mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[4] for line in lines if f"/memfd:{name}" in line}


def test_an_idle_client_unmaps_the_old_pool(store: Path) -> None:
    """It does so before there is a new pool."""
    others = mapped("weightd-resident")  # by clients of other tests, which are not garbage-collected yet
    with mortal(store, "--dram", "64MiB") as daemon, FlashClient("tiny", address=daemon.address) as client:
        expected = client.generate(PROMPT, **GREEDY)
        assert mapped("weightd-pool")
        resident = mapped("weightd-resident") - others
        daemon.kill()
        wait_until(lambda: not mapped("weightd-pool"))
        daemon.start()
        assert client.generate(PROMPT, **GREEDY) == expected
        assert mapped("weightd-pool")
        again = mapped("weightd-resident") - others
        assert len(again) == 1, "the resident weights are in memory once"
        assert again != resident


def test_changes_to_resident_weights_stay(store: Path) -> None:
    with mortal(store, "--dram", dram(store)) as daemon, FlashClient("tiny", address=daemon.address) as client:
        before = client.generate(PROMPT, **GREEDY)
        model: Any = client.model
        model.model.decoder.embed_tokens.weight[300] += 1.0
        model.model.decoder.layers[0].self_attn.q_proj.weight *= -1.0
        changed = client.generate(PROMPT, **GREEDY)
        assert changed != before
        with at_ffn(client, 20, daemon.restart):
            assert client.generate(PROMPT, **GREEDY) == changed


def wait_until(condition: Callable[[], bool]) -> None:
    waiting = threading.Event()
    for _ in range(1000):
        if condition():
            return
        waiting.wait(0.01)
    raise AssertionError("it did not happen within 10 s")
