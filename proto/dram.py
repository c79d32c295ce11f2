"""What --dram may be, and how much of it a client asks for.

Daemon and client check --dram, because a client passes it on to its private weightd.
"""

from __future__ import annotations

DRAM_BYTES_MIN = 1 << 20  # every model needs more, so a smaller number without a unit is a mistake
# Cells that are leased ahead take room in the pool from cells that stay; 8 MiB in flight give a device its full speed.
LOOK_AHEAD_BYTES = 8 << 20
LOOK_AHEAD_CELLS_MIN = 4


def slots_wanted(cell_bytes: int) -> int:
    """The share of the pool that a client over shared memory asks for."""
    return max(LOOK_AHEAD_CELLS_MIN, LOOK_AHEAD_BYTES // cell_bytes)
