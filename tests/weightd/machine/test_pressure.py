"""Memory pressure: which files are watched, and that the pool shrinks after a signal and grows again."""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from daemon import Daemon, refused, serving
from pressure_cgroup import PressureCgroup, pressed, pressure_cgroup
from tiny_store import write_model

from flashclient.memory_limits import memory_limits
from weightd.machine import pressure
from weightd_proto import weightd_pb2 as pb

DRAM_BYTES = 64 << 20
FLOOR_BYTES = 24 << 20
NEURONS = 20000  # of 1 KiB, in two layers: 40 MiB


@pytest.fixture
def cgroup() -> Iterator[PressureCgroup]:
    with pressure_cgroup() as made:
        yield made


class Kernel:
    """A trigger of the test on the same file: it gets the same signals as the daemon."""

    def __init__(self, file: Path) -> None:
        self._file = os.fdopen(pressure.set_trigger(file), "rb", buffering=0)
        self._poll = select.poll()
        self._poll.register(self._file, select.POLLPRI)

    def close(self) -> None:
        self._file.close()

    def speaks(self, within_s: float) -> bool:
        return bool(self._poll.poll(within_s * 1000))

    def until(self, done: Callable[[], bool], turns: int, what: str) -> None:
        """Waits for the condition. Checks it at each signal of the kernel, or every half second."""
        for _ in range(turns):
            if done():
                return
            self.speaks(0.5)
        raise AssertionError(f"not within {turns / 2} s: {what}")


def stats_of(daemon: Daemon) -> pb.StatsResponse:
    answer: pb.StatsResponse = daemon.stub.Stats(pb.StatsRequest())
    return answer


def fill_pool(daemon: Daemon) -> None:
    for layer in range(2):
        wanted = pb.NeuronSet(layer=layer, positions=[pb.Range(begin=0, end=NEURONS)])
        for _ in daemon.stub.Fetch(pb.FetchRequest(model="tiny", bundles=wanted)):
            pass


def test_the_kernel_tells_of_real_pressure(cgroup: PressureCgroup, tmp_path: Path) -> None:
    with closing(Kernel(cgroup.pressure_file)) as kernel:
        assert not kernel.speaks(0.0)
        with pressed(tmp_path / "file", cgroup):
            assert kernel.speaks(60.0)


def test_the_pool_gives_way_under_pressure_and_comes_back(cgroup: PressureCgroup, tmp_path: Path) -> None:
    store = tmp_path / "store"
    write_model(store, neurons=NEURONS, bundle_bytes=960)
    flags = ("--dram", str(DRAM_BYTES), "--dram-floor", str(FLOOR_BYTES))
    with (
        serving(store, *flags, prefix=cgroup.prefix) as daemon,
        closing(Kernel(cgroup.pressure_file)) as kernel,
    ):
        fill_pool(daemon)
        before = stats_of(daemon)
        assert str(cgroup.pressure_file) in before.memory_pressure.watched
        assert before.dram_pool_bytes > 36 << 20
        with pressed(tmp_path / "file", cgroup):
            kernel.until(lambda: stats_of(daemon).memory_pressure.signals > 0, 120, "the daemon hears it")
            kernel.until(lambda: stats_of(daemon).dram_pool_bytes < before.dram_pool_bytes, 60, "the pool shrinks")
            fill_pool(daemon)  # it still serves
            under = stats_of(daemon)
            assert under.memory_pressure.pressed
            assert under.memory_pressure.dram_target_bytes >= FLOOR_BYTES
            assert under.dram_pool_bytes < before.dram_pool_bytes
            kernel.until(
                lambda: stats_of(daemon).memory_pressure.dram_target_bytes == FLOOR_BYTES, 240, "it falls to the floor"
            )
            assert memory_of(daemon) <= FLOOR_BYTES
        kernel.until(
            lambda: stats_of(daemon).memory_pressure.dram_target_bytes > FLOOR_BYTES, 120, "the target rises again"
        )
        kernel.until(lambda: stats_of(daemon).memory_pressure.dram_target_bytes > DRAM_BYTES // 2, 120, "and on")
        fill_pool(daemon)
        assert memory_of(daemon) > FLOOR_BYTES


def memory_of(daemon: Daemon) -> int:
    stats = stats_of(daemon)
    return stats.dram_pool_bytes + stats.dram_resident_bytes + stats.dram_tables_bytes


def test_the_whole_cap_as_floor_ignores_pressure(cgroup: PressureCgroup, tmp_path: Path) -> None:
    store = tmp_path / "store"
    write_model(store, neurons=NEURONS, bundle_bytes=960)
    with (
        serving(store, "--dram", "64MiB", "--dram-floor", "100%", prefix=cgroup.prefix) as daemon,
        closing(Kernel(cgroup.pressure_file)) as kernel,
    ):
        fill_pool(daemon)
        before = stats_of(daemon)
        with pressed(tmp_path / "file", cgroup):
            kernel.until(lambda: stats_of(daemon).memory_pressure.signals > 0, 120, "the daemon hears it")
        after = stats_of(daemon)
        assert not after.memory_pressure.pressed
        assert after.dram_pool_bytes == before.dram_pool_bytes


def test_a_neighbour_at_its_own_limit_takes_nothing(tmp_path: Path) -> None:
    """There is pressure on the machine, but the machine has free memory."""
    machine = memory_limits()[0]
    if machine.free_bytes < machine.limit_bytes // 4:
        pytest.skip("this machine is short of memory itself")
    write_model(tmp_path / "store")
    with (
        serving(tmp_path / "store", "--dram", "64MiB") as daemon,
        closing(Kernel(Path("/proc/pressure/memory"))) as kernel,
    ):
        assert "/proc/pressure/memory" in stats_of(daemon).memory_pressure.watched
        with pressed(tmp_path / "file"):
            assert kernel.speaks(60.0)
            assert kernel.speaks(60.0), "and the daemon has heard the first word long ago"
        assert stats_of(daemon).memory_pressure.signals == 0


def test_a_kernel_without_pressure_files_is_named_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/mountinfo").write_text("")
    triggers = pressure.set_triggers(tmp_path)
    assert (triggers.machine_fd, triggers.cgroup_fd, triggers.watched) == (-1, -1, ())
    (line,) = triggers.refused
    assert "proc/pressure/memory: no such file" in line


def test_a_file_that_refuses_a_trigger_leaves_no_descriptor() -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with pytest.raises(OSError, match="Invalid argument"):
        pressure.set_trigger(Path("/proc/pressure/memory"), b"some 1 1\0")
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


@pytest.mark.parametrize(
    ("flag", "status", "words"),
    [("65MiB", 2, ["--dram-floor 65MiB", "--dram 64MiB"]), ("0%", 2, ["--dram-floor '0%'"]), ("x", 2, ["'x'"])],
)
def test_bad_floors_are_one_line(tmp_path: Path, flag: str, status: int, words: list[str]) -> None:
    write_model(tmp_path / "store")
    listen = ("--listen", f"unix:{tmp_path}/w.sock", "--dram", "64MiB")
    done, message = refused(tmp_path / "store", *listen, "--dram-floor", flag)
    assert (done, message.count("\n")) == (status, 1), message
    assert all(word in message for word in words), message
