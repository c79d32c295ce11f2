"""`weightd top`: in a terminal, in a pipe, as JSON, and when the daemon is not there."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from certificates import Authority
from daemon import Daemon, free_port, serving
from tiny_store import write_model

from flashclient.commands.keywords import in_flags
from flashclient.daemon.address import TlsOptions, parse_address
from flashclient.errors import OptionError
from weightd.errors import DaemonError, UsageError
from weightd.watching import top
from weightd.watching.top_table import lines_of, quantile, view_of
from weightd_proto import weightd_pb2 as pb

WITHIN_S = 60.0
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    write_model(tmp_path / "store", neurons=4000)
    with serving(tmp_path / "store", "--dram", "64MiB") as started:
        yield started


class Screen:
    """A terminal with `weightd top` in it."""

    def __init__(self, descriptor: int, process: subprocess.Popen[bytes]) -> None:
        self.descriptor = descriptor
        self.process = process
        self.shown = ""

    def until(self, pattern: str) -> str:
        """The text up to the end of the first match of `pattern`. The next call continues behind it."""
        deadline = time.monotonic() + WITHIN_S
        while (found := re.search(pattern, self.shown)) is None:
            ready, _, _ = select.select([self.descriptor], [], [], deadline - time.monotonic())
            assert ready, f"{pattern!r} was not shown, but {self.shown!r}"
            try:
                self.shown += os.read(self.descriptor, 1 << 16).decode()
            except OSError:  # EIO: the process has closed the terminal
                raise AssertionError(f"it ended after {self.shown!r}") from None
        before, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return before

    def end(self) -> tuple[int, str]:
        """Waits for the end of the process. Returns its exit status and the rest of the text."""
        while True:
            try:
                more = os.read(self.descriptor, 1 << 16)
            except OSError:
                return self.process.wait(WITHIN_S), self.shown
            self.shown += more.decode()

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def press(self, keys: bytes) -> None:
        os.write(self.descriptor, keys)

    @property
    def echoes(self) -> bool:
        return bool(termios.tcgetattr(self.descriptor)[3] & termios.ECHO)


def command(*flags: str) -> list[str]:
    return [sys.executable, "-m", "weightd", "top", *flags]


@contextmanager
def terminal(*flags: str, rows: int = 24, columns: int = 150) -> Iterator[Screen]:
    ours, theirs = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    process = subprocess.Popen(
        command(*flags), stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, preexec_fn=_own_terminal
    )
    os.close(theirs)  # now only the process has it open, so reading our end fails when the process ends
    try:
        yield Screen(ours, process)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(ours)


def _own_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # makes it the controlling terminal: Ctrl-C and new sizes become signals
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # background jobs of a shell ignore it


def fetch(daemon: Daemon) -> None:
    wanted = pb.NeuronSet(layer=0, positions=[pb.Range(begin=0, end=400)])
    list(daemon.stub.Fetch(pb.FetchRequest(model="tiny", bundles=wanted)))


def plain(text: str) -> list[str]:
    return [line.rstrip("\r") for line in ESCAPES.sub("", text).splitlines()]


def test_it_shows_models_clients_and_memory(daemon: Daemon) -> None:
    fetch(daemon)
    daemon.stub.OpenSession(pb.OpenSessionRequest(model="tiny"))
    with terminal("--address", daemon.address) as screen:
        text = "\n".join(plain(screen.until("AGE(.|\n)*tiny.*s")))
        for word in ("dram", "of 64MiB: pool", "resident 3MiB", "in flight", "MODEL", "READS/s", "P99", "LIMIT"):
            assert word in text, word
        assert daemon.address in text


def test_it_goes_on_and_q_ends_it_and_leaves_the_terminal_as_it_was(daemon: Daemon) -> None:
    with terminal("--address", daemon.address, "--interval", "0.1") as screen:
        assert screen.echoes
        for _ in range(5):
            screen.until("weightd at .* over 0\\.1 s")
        assert not screen.echoes
        screen.press(b"q")
        status, last = screen.end()
        assert status == 0
        assert last.endswith(top_leaves())
        assert screen.echoes


def top_leaves() -> str:
    return "\x1b[?25h\x1b[?1049l"


@pytest.mark.parametrize("ending", ["ctrl-c", "SIGTERM", "SIGINT"])
def test_a_signal_is_a_clean_end(daemon: Daemon, ending: str) -> None:
    with terminal("--address", daemon.address) as screen:
        screen.until("MODEL")
        if ending == "ctrl-c":
            screen.press(b"\x03")
        else:
            screen.process.send_signal(getattr(signal, ending))
        status, last = screen.end()
    assert status == 0
    assert "Traceback" not in last
    assert top_leaves() in last


def test_a_terminal_that_goes_away_ends_it(daemon: Daemon) -> None:
    with terminal("--address", daemon.address) as screen:
        screen.until("MODEL")
        screen.process.send_signal(signal.SIGHUP)
        assert screen.end()[0] != 0


def test_a_new_size_is_drawn_at_once(daemon: Daemon) -> None:
    with terminal("--address", daemon.address, "--interval", "3600") as screen:
        assert "POOL" in screen.until("ERR")
        screen.resize(24, 20)
        screen.until("\x1b\\[J")  # the end of the old drawing
        drawn = plain(screen.until("\x1b\\[J"))
        assert max(map(len, drawn)) == 20


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 10), (5, 40), (0, 0)])
def test_a_small_terminal_is_filled_and_no_more(daemon: Daemon, rows: int, columns: int) -> None:
    with terminal("--address", daemon.address, rows=rows, columns=columns) as screen:
        screen.until("\x1b\\[H")
        drawn = plain(screen.until("\x1b\\[J"))
        assert len(drawn) <= (rows or 24)
        assert all(len(line) <= (columns or 80) for line in drawn)
        screen.press(b"q")
        assert screen.end()[0] == 0


def test_a_daemon_that_goes_is_said_and_ends_with_1(daemon: Daemon) -> None:
    with terminal("--address", daemon.address, "--interval", "0.1") as screen:
        screen.until("MODEL")
        daemon.process.kill()
        status, last = screen.end()
    assert status == 1
    assert top_leaves() in last
    after = last.rpartition(top_leaves())[2]
    assert after.count("\n") == 1
    assert "no weightd answers at" in after


def test_a_frozen_daemon_is_said_too(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(top, "ANSWER_WITHIN_S", 0.2)
    daemon.process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(DaemonError, match="no weightd answers"):
            top.main(["--address", daemon.address, "--json"])
    finally:
        daemon.process.send_signal(signal.SIGCONT)


def test_one_object_of_one_interval(daemon: Daemon) -> None:
    fetch(daemon)
    done = subprocess.run(
        command("--address", daemon.address, "--interval", "0.2", "--json"), capture_output=True, text=True, check=True
    )
    view = json.loads(done.stdout)
    assert done.stderr == ""
    assert view["interval_s"] >= 0.2
    assert view["dram_limit_bytes"] == 64 << 20
    (model,) = view["models"]
    assert (model["name"], model["reads_per_s"], model["hit_rate"]) == ("tiny", 0.0, None)
    assert view["reads_in_flight_limit"] > 0


def test_a_pipe_gets_one_table_and_no_escapes(daemon: Daemon) -> None:
    done = subprocess.run(
        command("--address", daemon.address, "--interval", "0.1"), capture_output=True, text=True, check=True
    )
    assert "\x1b" not in done.stdout
    assert [line.split()[0] for line in done.stdout.splitlines() if line] == ["dram", "reads", "MODEL", "tiny", "PID"]


@pytest.mark.parametrize(
    ("flags", "status", "words"),
    [
        (
            ["--address", "unix:/no/such.sock"],
            1,
            ["no weightd answers at unix:/no/such.sock: nothing listens there; start it", "--address"],
        ),
        (["--address", "127.0.0.1:1"], 1, ["no weightd answers at 127.0.0.1:1: nothing listens there; start it"]),
        (["--address", "nowhere"], 2, ["nowhere"]),
        (["--interval", "0"], 2, ["--interval '0'", "0.1"]),
        (["--interval", "soon"], 2, ["soon"]),
        (["--fast"], 2, ["--fast"]),
    ],
)
def test_bad_input_is_one_line(flags: list[str], status: int, words: list[str]) -> None:
    done = subprocess.run(command(*flags), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (status, 1), done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def show(*flags: str) -> subprocess.CompletedProcess[str]:
    given = command(*flags, "--interval", "0.1", "--json")
    return subprocess.run(given, capture_output=True, text=True, check=False)


def test_a_daemon_with_mutual_tls_is_shown_to_whom_it_knows(tmp_path: Path) -> None:
    write_model(tmp_path / "store")
    authority = Authority(tmp_path)
    server, client = authority.sign("server"), authority.sign("client")
    flags = ["--tls-cert", str(server.cert), "--tls-key", str(server.key), "--tls-client-ca", str(authority.ca)]
    address, credentials = f"localhost:{free_port()}", authority.credentials(client)
    known = ["--tls-ca", str(authority.ca), "--tls-cert", str(client.cert), "--tls-key", str(client.key)]
    with serving(tmp_path / "store", "--dram", "64MiB", *flags, address=address, credentials=credentials):
        shown = show("--address", address, *known)
        assert (shown.returncode, shown.stderr) == (0, "")
        assert [model["name"] for model in json.loads(shown.stdout)["models"]] == ["tiny"]
        plain_text = show("--address", address)
        assert (plain_text.returncode, plain_text.stderr.count("\n")) == (1, 1), plain_text.stderr
        assert "--tls-ca if it wants TLS" in plain_text.stderr
        unknown = show("--address", address, "--tls-ca", str(authority.ca))
        assert (unknown.returncode, unknown.stderr.count("\n")) == (1, 1), unknown.stderr
        assert "check the certificates" in unknown.stderr


@pytest.mark.parametrize(
    ("address", "files"),
    [
        ("weights.example.org:7411", {}),
        ("unix:/x", {"ca": "/ca"}),
        ("localhost:1", {"ca": "/ca", "cert": "/c"}),
        ("localhost:1", {"cert": "/c", "key": "/k"}),
        ("localhost:1", {"ca": "/no/such.pem"}),
        ("localhost:1", {"ca": "/dev/null"}),
    ],
)
def test_tls_options_are_refused_as_the_client_refuses_them(address: str, files: dict[str, str]) -> None:
    def check() -> None:
        tls = TlsOptions(**files)
        parse_address(address, tls)
        tls.read()

    with pytest.raises(OptionError) as clients:
        check()
    given = [word for name, file in files.items() for word in (f"--tls-{name}", file)]
    shown = show("--address", address, *given)
    assert (shown.returncode, shown.stderr) == (2, f"weightd: {in_flags(str(clients.value))}\n")


# ---- what is computed ----


def moment(uptime_s: float, **numbers: int) -> pb.StatsResponse:
    model = pb.ModelStats(name="m", read_latency_counts=[numbers.pop("fast", 0), numbers.pop("slow", 0), 0])
    for name, value in numbers.items():
        setattr(model, name, value)
    attached = [pb.SessionStats(session=1, pid=77, model="m", requests=numbers.get("reads", 0), age_s=uptime_s)]
    return pb.StatsResponse(uptime_s=uptime_s, models=[model], attached=attached, read_latency_bounds_s=[0.001, 0.002])


def test_rates_are_of_the_interval() -> None:
    before = moment(10.0, hits=100, misses=100, reads=50, read_bytes=10**9, fast=50)
    after = moment(12.0, hits=190, misses=110, reads=60, read_bytes=2 * 10**9, fast=59, slow=1)
    after.models[0].reading_s = before.models[0].reading_s + 0.5
    view = view_of(before, after)
    (model,) = view.models
    assert view.interval_s == 2.0
    assert (model.hit_rate, model.reads_per_s, model.gb_per_s, model.gb_per_s_reading) == (0.9, 5.0, 0.5, 2.0)
    assert model.read_ms_p50 == pytest.approx(1.0 * 5 / 9)
    assert model.read_ms_p99 == pytest.approx(1.9)
    assert view.clients[0].requests_per_s == 5.0


def test_another_daemon_counts_from_its_start() -> None:
    view = view_of(moment(1000.0, reads=5000), moment(2.0, reads=10, fast=10))
    assert view.interval_s == 2.0
    assert view.models[0].reads_per_s == 5.0


def test_quantiles() -> None:
    bounds_s = [1.0, 2.0, 4.0]
    assert quantile([0, 0, 0, 0], bounds_s, 0.5) is None
    assert quantile([4, 0, 0, 0], bounds_s, 0.5) == 0.5
    assert quantile([1, 2, 1, 0], bounds_s, 0.5) == 1.5
    assert quantile([0, 0, 0, 3], bounds_s, 0.5) == 4.0
    assert quantile([1, 0, 0, 99], bounds_s, 0.99) == 4.0


def test_names_never_break_lines() -> None:
    stats = pb.StatsResponse(uptime_s=1.0, models=[pb.ModelStats(name="a\n\x1b[2Jb")])
    assert all(line.isprintable() for line in lines_of(view_of(pb.StatsResponse(), stats)))


def test_an_interval_must_be_one() -> None:
    with pytest.raises(UsageError, match="nan"):
        top.main(["--interval", "nan"])
