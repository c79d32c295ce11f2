"""Accounts of the front's users: connections, calls, bytes of messages, and the rate at which they may cause work.

A user is a user of this machine (over a Unix socket), the names in a certificate, or an address. Only what the kernel
or TLS has proven counts, never what a client claims.
"""

from __future__ import annotations

import ipaddress
import time
from dataclasses import dataclass, field

CONNECTIONS_MAX = 1024  # connections of all users; each takes about 30 KiB and three descriptors
CONNECTIONS_OF_USER = 256
STREAMS_OF_USER = 256  # open calls; those beyond CALLS_OF_PEER have been refused, but the client has not read that yet
STREAMS_MAX = 1024
# Bytes of messages above 16 KiB. One user's suffice for the calls that it may make at once (call_bounds).
MESSAGE_BYTES_OF_USER = 12 << 20
MESSAGE_BYTES_MAX = 36 << 20  # enough for three such users
COST_PER_S = 5_000  # cost that decays per second, in frames; a user above COST_MAX is read more slowly
COST_MAX = 10_000


@dataclass
class Totals:
    """The sums over all users."""

    connections: int = 0
    streams: int = 0
    message_bytes: int = 0


@dataclass
class User:
    """The account of one user that has a connection, or had one a moment ago."""

    name: str
    totals: Totals
    connections: int = 0
    streams: int = 0
    message_bytes: int = 0
    _cost: float = 0.0
    _counted_s: float = field(default_factory=time.monotonic)

    def open_stream(self) -> None:
        self.streams += 1
        self.totals.streams += 1

    def close_stream(self) -> None:
        self.streams -= 1
        self.totals.streams -= 1

    def reserve(self, size_bytes: int) -> bool:
        """Whether a message of that size may arrive; if so, its bytes are counted."""
        of_all, of_user = self.totals.message_bytes + size_bytes, self.message_bytes + size_bytes
        if of_user > MESSAGE_BYTES_OF_USER or of_all > MESSAGE_BYTES_MAX:
            return False
        self.totals.message_bytes, self.message_bytes = of_all, of_user
        return True

    def give_back(self, size_bytes: int) -> None:
        self.totals.message_bytes -= size_bytes
        self.message_bytes -= size_bytes

    def pause_s(self, cost: float) -> float:
        """Adds `cost` (negative: credit) and returns how long to wait before reading more from this user."""
        now_s = time.monotonic()
        self._cost = max(0.0, self._cost + cost - (now_s - self._counted_s) * COST_PER_S)
        self._counted_s = now_s
        return max(0.0, (self._cost - COST_MAX) / COST_PER_S)

    def is_square(self) -> bool:
        return not self.pause_s(0) and not self._cost


def host_name(host: str) -> str:
    """The user's name for an address. All addresses of one IPv6 /64 network are one user."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if address.version == 6:
        mapped = getattr(address, "ipv4_mapped", None)
        return str(mapped) if mapped else str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)
