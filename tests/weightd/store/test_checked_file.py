"""Files of a model that have changed on flash: the error names the model and the file, and they are never used."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from byte_flips import flip_bit
from checkpoints import make_config, make_model, make_tokenizer
from cut_model import FetchServer, cut
from daemon import serving
from tiny_store import write_model

from flashclient import FlashClient
from flashclient.errors import CorruptionError
from weightd.cli import main
from weightd_proto import weightd_pb2 as pb


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """hf/config.json of the model tiny in a store that also has one named other."""
    write_model(tmp_path / "store")
    write_model(tmp_path / "store", name="other")
    return tmp_path / "store" / "tiny" / "hf" / "config.json"


def replace_by_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def replace_by_fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit": lambda file: flip_bit(file, 3),
    "a byte less": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "nothing": lambda file: file.write_bytes(b""),
    "no file": Path.unlink,
    "a folder": replace_by_folder,
    "a FIFO": replace_by_fifo,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_verify_names_model_and_file(config: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    DAMAGE[damage](config)
    assert main(["verify", "tiny", "--store", str(config.parents[2])]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("weightd: model tiny, file hf/config.json: it ")
    assert printed.count("\n") == 1


def test_a_damaged_file_is_told_at_start_and_to_all_who_ask_and_can_be_put_back(config: Path) -> None:
    whole = config.read_bytes()
    flip_bit(config, 3)
    with serving(config.parents[2], "--dram", "64MiB") as daemon:
        assert daemon.stub.DescribeModel(pb.DescribeModelRequest(name="other")).name == "other"
        for ask in (
            lambda: daemon.stub.DescribeModel(pb.DescribeModelRequest(name="tiny")),
            lambda: daemon.stub.OpenSession(pb.OpenSessionRequest(model="tiny")),
            lambda: list(daemon.stub.Fetch(pb.FetchRequest(model="tiny", file="config.json"))),
        ):
            with pytest.raises(grpc.RpcError, match=r"model tiny, file hf/config\.json: it differs") as caught:
                ask()
            assert caught.value.code() is grpc.StatusCode.DATA_LOSS
        config.write_bytes(whole)
        assert daemon.stub.DescribeModel(pb.DescribeModelRequest(name="tiny")).name == "tiny"
        flip_bit(config, 3)  # while it is served
        with pytest.raises(grpc.RpcError, match=r"model tiny, file hf/config\.json: it differs"):
            list(daemon.stub.Fetch(pb.FetchRequest(model="tiny", file="config.json")))
        _, log = daemon.stop()
    assert log.index("hf/config.json: it differs") < log.index("serving ")


def test_a_store_of_one_damaged_model_is_the_typed_error_of_its_client(tmp_path: Path) -> None:
    write_model(tmp_path / "store")
    flip_bit(tmp_path / "store" / "tiny" / "hf" / "config.json", 3)
    with pytest.raises(CorruptionError, match=r"model tiny, file hf/config\.json: it differs"):
        FlashClient("tiny", store=tmp_path / "store")


def test_a_file_that_changes_on_its_way_is_refused(tmp_path: Path) -> None:
    model = cut(make_model(make_config("llama")), make_tokenizer())
    model.files["generation_config.json"] = model.files["generation_config.json"].replace(b"0", b"1", 1)
    with (
        FetchServer([model], tmp_path / "socket") as server,
        pytest.raises(CorruptionError, match=r"model tiny, file hf/generation_config\.json: the bytes received do not"),
    ):
        FlashClient("tiny", address=server.address, transport="grpc")
