"""What a refusal says of --dram is enough: with that, the same clients in the same order get what they want."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
from checkpoints import make_checkpoint
from daemon import serving

from flashclient import FlashClient
from flashclient.errors import ShareError
from weightd import cli
from weightd.machine.budget import minimum_beside
from weightd.serving.served_models import demand_of
from weightd.store.store import Store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refused")
    for name, family in (("one", "llama"), ("other", "opt"), ("third", "gemma3")):
        checkpoint = make_checkpoint(family, folder / name)
        assert cli.main(["import", str(checkpoint), "--store", str(folder / "store")]) == 0
    return folder / "store"


def refused(store: Path, dram: str, names: Sequence[str]) -> tuple[int, str]:
    """The clients that one weightd serves beside each other, and the words that refuse the next one."""
    with serving(store, "--dram", dram) as daemon, ExitStack() as opened:
        for number, name in enumerate(names):
            try:
                opened.enter_context(FlashClient(name, address=daemon.address))
            except ShareError as error:
                return number, str(error)
    return len(names), ""


@pytest.mark.parametrize(
    "names",
    [
        ("one", "other"),
        ("other", "one"),
        ("one", "one", "other"),
        ("one", "other", "third"),
        ("third", "third", "third", "third", "third", "third"),
    ],
)
def test_what_is_said_is_enough(store: Path, names: Sequence[str]) -> None:
    with Store.open(store, readonly=True) as opened:
        demands = {record.name: demand_of(record) for record in opened.models()}
    dram = str(minimum_beside(demands[names[0]], list(demands.values())))
    served = 0
    for _ in names:
        number, words = refused(store, dram, names)
        assert number >= served, f"with {dram}: {words}"
        if number == len(names):
            return
        found = re.search(r"raise --dram to ([\d.]+) MiB$", words)
        assert found is not None, words
        dram, served = f"{found[1]}MiB", number + 1
    pytest.fail("it takes more attempts than there are clients")
