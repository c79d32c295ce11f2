"""The daemon's flags and configuration file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flashclient.daemon.address import default_address
from weightd.errors import UsageError
from weightd.gateway.addresses import MetricsAddress, default_listen
from weightd.serving.config import load_config
from weightd.sizes import Amount


def test_defaults() -> None:
    config = load_config(["--store", "/s"])
    assert config.store == Path("/s")
    assert (config.io_engine, config.io_threads, config.io_depth) == ("auto", 32, 0)
    assert config.dram == Amount()
    assert not config.allow_buffered
    assert len(config.listen) == 1


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "weightd.toml"
    file.write_text('store = "/a"\ndram = "50%"\nlisten = ["unix:/x"]\nio-threads = 8\nallow-buffered = true\n')
    config = load_config(["--config", str(file), "--store", "/b", "--io-threads", "4"])
    assert (config.store, config.dram.percent, config.io_threads) == (Path("/b"), 50.0, 4)
    assert config.allow_buffered
    assert [address.target for address in config.listen] == ["unix:/x"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("9464", MetricsAddress("127.0.0.1", 9464, True)),
        (":9464", MetricsAddress("127.0.0.1", 9464, True)),
        ("localhost:1", MetricsAddress("localhost", 1, True)),
        ("[::1]:9464", MetricsAddress("::1", 9464, True)),
        ("0.0.0.0:9464", MetricsAddress("0.0.0.0", 9464, False)),
    ],
)
def test_metrics_are_for_this_machine_unless_told(text: str, expected: MetricsAddress) -> None:
    assert load_config(["--store", "/s", "--metrics", text]).metrics == expected


def test_metrics_may_be_a_number_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "weightd.toml"
    file.write_text('store = "/a"\nmetrics = 9464\nlog-format = "json"\ndram-floor = "4GiB"\n')
    config = load_config(["--config", str(file)])
    assert config.metrics == MetricsAddress("127.0.0.1", 9464, True)
    assert (config.log_format, config.log_level, config.dram_floor.bytes) == ("json", "info", 4 << 30)


def test_sizes() -> None:
    assert load_config(["--store", "/s", "--dram", "6.5GiB"]).dram.bytes == int(6.5 * (1 << 30))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--store"]),
        (["--store", "/s", "--drem", "1GiB"], ["--drem", "--dram"]),
        (["--store", "/s", "--dra", "1GiB"], ["--dra", "--dram"]),
        (["--store", "/s", "--dram", "much"], ["much"]),
        (["--store", "/s", "--dram", "0%"], ["0%"]),
        (["--store", "/s", "--dram", "101%"], ["101%"]),
        (["--store", "/s", "--dram", "x%"], ["x%"]),
        (["--store", "/s", "--io-engine", "spdk"], ["spdk", "io_uring"]),
        (["--store", "/s", "--io-threads", "0"], ["--io-threads 0", "1 to 256"]),
        (["--store", "/s", "--io-depth", "many"], ["--io-depth", "many"]),
        (["--store", "/s", "--config", "/no/such/file"], ["/no/such/file", "No such file"]),
        (["--store"], ["--store"]),
        (["--store", "/s", "--metrics", "here"], ["'here'", "127.0.0.1:9464"]),
        (["--store", "/s", "--metrics", "localhost:0"], ["localhost:0", "1 to 65535"]),
        (["--store", "/s", "--metrics", "http://h:9464"], ["http://h:9464"]),
        (["--store", "/s", "--log-format", "xml"], ["xml", "json"]),
        (["--store", "/s", "--log-level", "loud"], ["loud", "warning"]),
        (["--store", "/s", "--dram-floor", "101%"], ["--dram-floor", "101%"]),
    ],
)
def test_bad_flags_are_one_clear_line(arguments: list[str], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        load_config(arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words)
    assert caught.value.exit_status == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('strore = "/s"', ["strore", "store"]),
        ('io_engine = "threads"', ["io_engine", "io-engine"]),
        ("store = [", ["not TOML"]),
        ('store = "/s"\nlisten = 5', ["listen", "5"]),
        ('store = "/s"\nlisten = []', ["listen"]),
        ('store = "/s"\nallow-buffered = "yes"', ["allow-buffered", "yes"]),
        ('store = "/s"\ndram = true', ["--dram"]),
        ('store = "/s"\nio-engine = 3', ["--io-engine", "3"]),
        ("store = 3", ["--store"]),
    ],
)
def test_bad_files_are_one_clear_line(tmp_path: Path, content: str, words: list[str]) -> None:
    file = tmp_path / "weightd.toml"
    file.write_text(content)
    with pytest.raises(UsageError) as caught:
        load_config(["--config", str(file)])
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words)


def test_default_addresses() -> None:
    assert default_listen(0, {}).target == "unix:/run/weightd/weightd.sock"
    assert default_listen(7, {"XDG_RUNTIME_DIR": "/run/user/7"}).target == "unix:/run/user/7/weightd.sock"
    assert default_listen(7, {}).target.endswith("/weightd-7/weightd.sock")


def test_a_client_finds_the_weightd_that_its_user_has_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user, system = os.geteuid(), default_listen(0, {}).target
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    for folder, environment in ((tmp_path / f"weightd-{user}", {}), (tmp_path, {"XDG_RUNTIME_DIR": str(tmp_path)})):
        assert default_address(user, environment) == system, "nobody listens there"
        folder.mkdir(exist_ok=True)
        (folder / "weightd.sock").touch()
        assert default_address(user, environment) == f"unix:{folder}/weightd.sock"
        assert default_address(user + 1, environment) == system, "it is another's"
    assert default_listen(user + 1, environment).target == f"unix:{tmp_path}/weightd.sock"
    assert default_listen(user + 1, {}).socket_path == tmp_path / f"weightd-{user + 1}" / "weightd.sock"


@pytest.mark.parametrize(
    ("dram", "hint"), [("2", "2GiB or 2%"), ("50", "50GiB or 50%"), ("0", "512MiB"), ("2g", "2GiB")]
)
def test_a_dram_without_its_unit_is_refused_with_a_hint(dram: str, hint: str, tmp_path: Path) -> None:
    file = tmp_path / "weightd.toml"
    file.write_text(f"dram = {dram}" if dram.isdecimal() else f"dram = '{dram}'")
    for arguments in (["--dram", dram], ["--config", str(file)]):
        with pytest.raises(UsageError, match=f"--dram .*{dram}.*{hint}"):
            load_config(["--store", "s", *arguments], {})
