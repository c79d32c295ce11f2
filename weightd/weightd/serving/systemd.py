"""Messages to systemd: ready, reloading, stopping, and signs of life while the engine's loop runs.

The protocol is that of sd_notify(3): datagrams of lines, sent to the socket named in NOTIFY_SOCKET.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from contextlib import suppress
from time import clock_gettime_ns

from weightd._native import EngineThread
from weightd.serving.config import ServiceManager

logger = logging.getLogger(__name__)

FEEDS_PER_DEADLINE = 3  # more than one, so that one late sign of life does not matter
MONOTONIC_CLOCK = 1  # systemd compares microseconds of CLOCK_MONOTONIC


def notify(manager: ServiceManager | None, *lines: str) -> None:
    """Sends `lines` to the service manager, if there is one. A failure is logged and otherwise ignored."""
    if manager is None:
        return
    address = manager.notify_socket
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.setblocking(False)
        try:
            sender.sendto("\n".join(lines).encode(), address)
        except OSError as error:
            logger.warning("the service manager at %s does not listen: %s", manager.notify_socket, error.strerror)


def notify_reloading(manager: ServiceManager | None) -> None:
    notify(manager, "RELOADING=1", f"MONOTONIC_USEC={clock_gettime_ns(MONOTONIC_CLOCK) // 1000}")


async def feed_watchdog(manager: ServiceManager | None, engine: EngineThread) -> None:
    """Feeds the watchdog each time the engine's loop answers. If the loop hangs, systemd restarts the daemon."""
    if manager is None or manager.watchdog_s is None:
        return
    pause_s = manager.watchdog_s / FEEDS_PER_DEADLINE
    while True:
        with suppress(Exception):  # the engine has ended; that is reported elsewhere
            await asyncio.to_thread(engine.stats)
            notify(manager, "WATCHDOG=1")
        await asyncio.sleep(pause_s)
