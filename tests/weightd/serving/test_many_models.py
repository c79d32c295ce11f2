"""A store with many models: each takes memory from the start, used or not, which what is said of --dram counts."""

from __future__ import annotations

import re
from pathlib import Path

from daemon import refused, serving
from tiny_store import write_model

from weightd_proto import weightd_pb2 as pb


def test_the_least_dram_that_is_told_serves_a_model(tmp_path: Path) -> None:
    for number in range(12):
        write_model(tmp_path / "store", f"m{number}", neurons=20_000)
    status, told = refused(tmp_path / "store", "--dram", "1MiB")
    found = re.search(r"m3 needs at least (\S+) ", told)
    assert status == 1
    assert found is not None, told
    with serving(tmp_path / "store", "--dram", found[1]) as daemon:
        assert daemon.stub.OpenSession(pb.OpenSessionRequest(model="m3")).share_slots >= 2
