"""What --dram may be: daemon and client check it, because a client passes it on to its private weightd."""

from __future__ import annotations

DRAM_BYTES_MIN = 1 << 20  # every model needs more, so a smaller number without a unit is a mistake
