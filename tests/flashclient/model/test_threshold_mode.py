"""Mode threshold from a published calibration to text, through a real weightd."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint
from daemon import Daemon, serving
from numpy.typing import NDArray
from predictors import gates, publish_predictors
from stored_model import read_matrices
from torch import Tensor

from flashclient import FlashClient
from flashclient.errors import CalibrationError
from weightd import cli
from weightd.store.store import Store
from weightd_proto import weightd_pb2

GREEDY: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": 9999}
PROMPTS = ([5, 17, 200, 31, 8], [290, 3, 3, 77, 150], [9, 2, 9, 30, 2])
THRESHOLDS = {"zero": 0.0, "some": 0.2}
FAMILIES = {"llama": "a gate, silu", "gemma3": "a gate, gelu"}


def rows_of(store: Path, name: str, layer: int) -> NDArray[np.float32]:
    opened = Store.open(store, readonly=True)
    return read_matrices(opened, opened.model(name), layer)[0].float().numpy()[opened.placement(name, layer)]


@pytest.fixture(scope="module", params=FAMILIES)
def daemon(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A weightd with the model "none", which is not calibrated, and one for each threshold."""
    folder = tmp_path_factory.mktemp("threshold")
    store = folder / "store"
    checkpoint = make_checkpoint(request.param, folder / "tensors", neurons=640)
    for name in ("none", *THRESHOLDS):
        assert cli.main(["import", str(checkpoint), "--store", str(store), "--name", name]) == 0
    with serving(store) as daemon:
        for name, threshold in THRESHOLDS.items():
            make = partial(gates, rows=partial(rows_of, store, name), threshold=threshold)
            publish_predictors(daemon.address, name, make, "threshold")
        yield daemon


def tokens_of(client: FlashClient) -> list[Tensor]:
    alone = [client.generate(torch.tensor([prompt]), **GREEDY) for prompt in PROMPTS]
    return [*alone, client.generate(torch.tensor(PROMPTS), **GREEDY)]


def test_a_threshold_of_zero_gives_the_tokens_of_exact_mode(daemon: Daemon) -> None:
    with FlashClient("none", address=daemon.address, mode="exact") as client:
        expected = tokens_of(client)
    with FlashClient("zero", address=daemon.address, mode="threshold") as client:
        assert client.mode == "threshold"
        for one, other in zip(tokens_of(client), expected, strict=True):
            assert torch.equal(one, other)


def test_a_row_is_the_same_alone_and_over_any_transport(daemon: Daemon) -> None:
    made = []
    for options in ({}, {"window": 4}, {"transport": "grpc"}):
        with FlashClient("some", address=daemon.address, mode="threshold", **options) as client:
            *alone, together = tokens_of(client)
            made.append(together)
            stats = client.stats()
        assert torch.equal(together, torch.cat(alone))
        assert torch.equal(made[0], together)
        assert (stats.mode, stats.perplexity_loss) == ("threshold", 0.25)
        assert "threshold, +25.00% perplexity" in stats.table()
    with FlashClient("some", address=daemon.address, mode="exact") as client:
        assert not torch.equal(tokens_of(client)[-1], made[0]), "nothing was skipped"
        assert client.stats().perplexity_loss == 0


def test_it_is_never_chosen_by_itself(daemon: Daemon) -> None:
    with FlashClient("some", address=daemon.address) as client:
        assert client.mode == "exact"


@pytest.mark.parametrize(
    ("name", "mode", "message"),
    [
        ("none", "threshold", "never calibrated: run `flashclient calibrate none --text FILE --mode threshold`"),
        ("some", "predict", "calibrated for mode 'threshold': use that mode, or run `flashclient calibrate some"),
    ],
)
def test_another_calibration_is_refused(daemon: Daemon, name: str, mode: str, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        FlashClient(name, address=daemon.address, mode=mode)


def test_predictors_are_no_thresholds() -> None:
    from flashclient.options import Options

    record = weightd_pb2.Model(name="m", calibration=weightd_pb2.Calibration(version=1, mode="predict"))
    with pytest.raises(CalibrationError, match="needs thresholds, and model 'm' was calibrated for mode 'predict'"):
        Options(mode="threshold").mode_of(record)
    assert Options(mode="auto").mode_of(record) == "predict"
    assert [Options().window_of(mode) for mode in ("exact", "predict", "threshold")] == [None, 4, 0]
    assert [Options(window=2).window_of(mode) for mode in ("exact", "predict", "threshold")] == [None, 2, 2]
