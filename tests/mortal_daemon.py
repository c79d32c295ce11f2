"""A weightd that is killed and started again at the same address, in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from daemon import Daemon, serving


class MortalDaemon:
    """Serves `store` with `flags` at one address, between its deaths."""

    def __init__(self, store: Path, *flags: str) -> None:
        self._store = store
        self._flags = flags
        self.address = f"unix:{store}.mortal.sock"
        self._life = ExitStack()
        self.daemon: Daemon

    def start(self, address: str | None = None) -> None:
        self.daemon = self._life.enter_context(serving(self._store, *self._flags, address=address or self.address))

    def kill(self) -> None:
        """SIGKILL, and its end."""
        self.daemon.process.kill()
        self.daemon.process.wait()
        self._life.close()

    def restart(self) -> None:
        self.kill()
        self.start()

    def stop(self) -> None:
        self._life.close()


@contextmanager
def mortal(store: Path, *flags: str) -> Iterator[MortalDaemon]:
    daemon = MortalDaemon(store, *flags)
    daemon.start()
    try:
        yield daemon
    finally:
        daemon.stop()
