"""A weightd that reads each part of a bundle with a request of its own: PART_BYTES, then the arguments of weightd.

For the rows without bundling. It serves one model, and counts in Stats the requests and bytes that it really read.
"""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.native_module import bench_native

from weightd import cli
from weightd._native import EngineOptions
from weightd.serving import serve


def engine_thread(part_bytes: int) -> type:
    """A class that stands in for weightd._native.EngineThread."""
    base: type = bench_native().UnbundledEngineThread

    class Unbundled(base):  # type: ignore[misc]
        def __init__(self, options: EngineOptions) -> None:
            super().__init__(options, part_bytes)

        def stats(self) -> dict[str, Any]:
            stats: dict[str, Any] = super().stats()
            (model,) = stats["models"]
            return stats | {"models": [model | {"reads": self.reads, "read_bytes": self.read_bytes}]}

    return Unbundled


def main() -> int:
    vars(serve)["EngineThread"] = engine_thread(int(sys.argv[1]))
    return cli.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
