"""`weightd doctor`: each line, and the report."""

from __future__ import annotations

import json
import re
import resource
from pathlib import Path

import pytest
from tiny_store import write_model

from weightd.errors import StoreError, UsageError
from weightd.machine import doctor
from weightd.store import device_profile as profile
from weightd.store.device_profile import DeviceProfile, ReadSpeed, kept_profile
from weightd.store.store import Store


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes measurements shorter and their sample smaller. They are still of the real device."""
    monkeypatch.setattr(profile, "SECONDS_EACH", 0.01)
    monkeypatch.setattr(profile, "SAMPLE_BYTES", 16 << 20)


def test_a_report_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "store")
    assert doctor.main(["--store", str(tmp_path / "store")]) == 0
    text = capsys.readouterr().out
    for name in (
        "store",
        "direct io",
        "block size",
        "io_uring",
        "memlock",
        "memory",
        "space",
        "huge pages",
        "pressure",
        "device",
    ):
        assert any(line[5:].startswith(name) for line in text.splitlines()), name
    assert "tiny" in text
    assert re.search(r"device .*; measured on \d{4}-\d\d-\d\d", text)


def test_a_report_for_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "store")
    assert doctor.main(["--store", str(tmp_path / "store"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {finding["level"] for finding in report["findings"]} <= {"ok", "warn", "fail"}
    assert all(finding["advice"] for finding in report["findings"] if finding["level"] != "ok")
    assert report["profile"]["sequential_gb_per_s"] > 0
    assert len(report["profile"]["random"]) == 18


def test_the_profile_is_measured_once(tmp_path: Path) -> None:
    write_model(tmp_path / "store")
    store = Store.open(tmp_path / "store")
    assert kept_profile(store) is None
    _, first = doctor.examine(store.path)
    _, second = doctor.examine(store.path)
    assert first == second == kept_profile(store)
    _, third = doctor.examine(store.path, measure_anew=True)
    assert third != first
    assert [path.name for path in store.path.iterdir() if path.name.startswith(".profile")] == []


def test_a_folder_that_is_no_store_yet(tmp_path: Path) -> None:
    findings, measured = doctor.examine(tmp_path)
    assert findings[0].level == doctor.WARN
    assert "weightd import" in findings[0].advice
    assert measured is not None
    assert list(tmp_path.iterdir()) == []


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no folder"):
        doctor.main(["--store", str(tmp_path / "none")])


@pytest.mark.parametrize("arguments", [[], ["--store", "/", "--fast"]])
def test_wrong_flags(arguments: list[str]) -> None:
    with pytest.raises(UsageError):
        doctor.main(arguments)


def test_a_file_system_without_direct_io_fails() -> None:
    findings = doctor.check_direct_io(Path("/proc/self"))
    assert [finding.level for finding in findings] == [doctor.FAIL]
    assert findings[0].advice


def test_a_store_that_cannot_be_written_is_tried_on_its_own_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "store")
    monkeypatch.setattr(doctor, "NamedTemporaryFile", None)  # a call would be an error
    findings = doctor.check_direct_io(tmp_path / "store")
    assert [finding.level for finding in findings] == [doctor.OK, doctor.OK]


def test_memlock() -> None:
    assert doctor.check_memlock(8 << 20, user_id=0).level == doctor.OK
    assert doctor.check_memlock(resource.RLIM_INFINITY, user_id=1000).level == doctor.OK
    finding = doctor.check_memlock(8 << 20, user_id=1000)
    assert finding.level == doctor.WARN
    assert "8MiB" in finding.value


def test_huge_pages(tmp_path: Path) -> None:
    setting = tmp_path / "shmem_enabled"
    for text, level in (("always [advise] never", doctor.OK), ("always advise [never]", doctor.WARN)):
        setting.write_text(text)
        assert doctor.check_huge_pages(False, setting).level == level
    assert doctor.check_huge_pages(False, tmp_path / "none").level == doctor.WARN
    assert doctor.check_huge_pages(True, tmp_path / "none").level == doctor.OK


def test_pressure_is_told_or_not(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert "/proc/pressure/memory" in doctor.check_pressure().value
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/mountinfo").write_text("")
    finding = doctor.check_pressure(tmp_path)
    assert finding.level == doctor.WARN
    assert "no such file" in finding.value


def test_io_uring_tells_the_switch(tmp_path: Path) -> None:
    switch = tmp_path / "io_uring_disabled"
    switch.write_text("0\n")
    assert "io_uring_disabled = 0" in doctor.check_io_uring(switch).value


def test_a_slow_device_is_named() -> None:
    rows = (ReadSpeed(16384, 1, 8000.0, 0.002), ReadSpeed(16384, 32, 9000.0, 0.05))
    finding = doctor.check_profile(DeviceProfile(0, 0.1, rows))
    assert finding.level == doctor.WARN
    assert "flash" in finding.advice


def test_a_profile_survives_the_catalog() -> None:
    kept = DeviceProfile(7, 1.5, (ReadSpeed(4096, 1, 80.0, 0.05),))
    assert DeviceProfile.from_json(kept.to_json()) == kept
