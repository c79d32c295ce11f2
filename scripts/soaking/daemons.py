"""The weightd of the soak. It is killed and restarted at the same addresses, which another user can reach too."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from planted.calibration import publish_planted

from flashclient.daemon.private import is_serving
from soaking.hostile_frames import Target
from soaking.store import SHAPES
from weightd.machine.budget import INTERPRETER_BYTES
from weightd.serving.served_models import demand_of
from weightd.store.store import Store

POOL_SHARE = 0.7  # of all bundles: enough for the rings and shares of all clients, too little for all their cells
START_WITHIN_S = 60.0
STOP_WITHIN_S = 30.0
POLL_S = 0.05
TRAVERSABLE = 0o711
LOOPBACK = "127.0.0.1"


class MortalWeightd:
    """The daemon at one Unix socket and one port. `down` lists intervals of time.monotonic() without a daemon."""

    def __init__(self, store: Store, folder: Path, port: int) -> None:
        """`folder` also holds the checkpoints. The daemon serves when the constructor returns."""
        demands = [demand_of(model) for model in store.models()]
        bundles_bytes = sum(model.bundles_file_bytes for model in store.models())
        self.dram_bytes = sum(demand.minimum_bytes for demand in demands) + int(POOL_SHARE * bundles_bytes)
        self._sockets = Path(tempfile.mkdtemp(prefix="soak-"))  # a short path, which other users can reach
        self._sockets.chmod(TRAVERSABLE)
        self._log = self._sockets / "weightd.log"
        self._port = port
        self._command = [
            sys.executable, "-m", "weightd", "--store", str(folder / "store"), "--dram", str(self.dram_bytes),
            "--listen", self.address, "--listen", f"{LOOPBACK}:{port}",
        ]  # fmt: skip
        self.down: list[tuple[float, float]] = []
        self._killed_s: float | None = None
        self._start()
        self.wait()
        for name in SHAPES:
            publish_planted(folder / name, name, self.address)

    def _start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    @property
    def address(self) -> str:
        return f"unix:{self._sockets / 'weightd.sock'}"

    @property
    def target(self) -> Target:
        """The target of hostile clients."""
        return Target(self.address.removeprefix("unix:"), self._port, next(iter(SHAPES)))

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def memory_max_bytes(self) -> int:
        return self.dram_bytes + INTERPRETER_BYTES

    def kill(self) -> None:
        self._killed_s = time.monotonic()
        self._process.kill()

    def start_again(self) -> None:
        if self.has_ended_within(STOP_WITHIN_S):
            self._start()

    def has_ended_within(self, seconds: float) -> bool:
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def serves(self) -> bool:
        """Whether the daemon serves now. If it serves again, the interval in `down` ends."""
        if self._killed_s is None:
            return True
        if self._process.poll() is not None or not is_serving(self.address):
            return False
        self.down.append((self._killed_s, time.monotonic()))
        self._killed_s = None
        return True

    def was_down(self, begin_s: float, end_s: float) -> bool:
        down = [*self.down, *([(self._killed_s, end_s)] if self._killed_s is not None else [])]
        return any(first <= end_s and begin_s <= last for first, last in down)

    def wait(self) -> None:
        give_up_s = time.monotonic() + START_WITHIN_S
        while self._process.poll() is not None or not is_serving(self.address):
            if self._process.poll() is not None or time.monotonic() > give_up_s:
                raise RuntimeError(f"weightd does not serve: {self.last_words()}")
            time.sleep(POLL_S)
        self.serves()

    def last_words(self) -> str:
        return self._log.read_text(errors="replace").strip().rpartition("\n")[2]

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        if not self.has_ended_within(STOP_WITHIN_S):
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._sockets, ignore_errors=True)


def charged_bytes(pid: int) -> int:
    """The memory charged to a weightd: its own and that of its memfds, without what the kernel takes for it."""
    process = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    anonymous, shared = (int(status[kind].split()[0]) << 10 for kind in ("RssAnon", "RssShmem"))
    memfds = {}
    for descriptor in (process / "fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            if str(descriptor.readlink()).startswith("/memfd:"):
                facts = descriptor.stat()
                memfds[facts.st_ino] = facts.st_blocks * 512
    return anonymous + max(shared, sum(memfds.values()))
