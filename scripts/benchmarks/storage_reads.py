"""What this process has read from storage. It imports nothing else, so interpreters of peers can import it, too."""

from __future__ import annotations

import re
from pathlib import Path


def read_bytes() -> int:
    """Bytes that this process has read from storage, page faults included."""
    found = re.search(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])
