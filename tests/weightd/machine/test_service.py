"""`weightd install-service`: units that systemd accepts, a configuration that weightd reads, nothing lost."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

from weightd.cli import main
from weightd.serving.config import load_config

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="a service of the system needs root")


def command() -> str:
    return str(Path(sys.executable).parent / "weightd")


def verify(unit: Path) -> None:
    """systemd's own opinion of the unit, where it is installed."""
    analyze = shutil.which("systemd-analyze")
    if analyze is not None:
        done = subprocess.run([analyze, "verify", str(unit)], capture_output=True, text=True, check=False)
        complaints = [line for line in done.stderr.splitlines() if "weightd" in line]
        assert not complaints


def test_a_users_own_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "a home"))
    assert main(["install-service", "--user", "--dram", "50%"]) == 0
    unit = tmp_path / "a home" / ".config" / "systemd" / "user" / "weightd.service"
    text = unit.read_text()
    assert f'--store "{tmp_path}/a home/.local/share/weightd" --dram 50%%' in text
    assert command() in text
    verify(unit)
    assert "systemctl --user enable --now weightd" in capsys.readouterr().out


@AS_ROOT
def test_a_service_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("weightd.machine.service.HIDDEN", ("/nowhere",))  # this checkout may lie in a home
    arguments = ["install-service", "--root", str(tmp_path), "--store", "/srv/models", "--dram", "3GiB"]
    assert main(arguments) == 0
    config = load_config(["--config", str(tmp_path / "etc" / "weightd.toml")])
    assert config.store == Path("/srv/models")
    assert config == load_config(
        ["--config", str(ROOT / "deploy" / "weightd.toml"), "--store", "/srv/models", "--dram", "3GiB"]
    )
    unit = tmp_path / "etc" / "systemd" / "system" / "weightd.service"
    assert f"ExecStart={command()} --config /etc/weightd.toml" in unit.read_text()
    assert "ReadWritePaths=/srv/models" in unit.read_text()
    assert (tmp_path / "srv" / "models").is_dir()
    verify(unit)
    (tmp_path / "etc" / "weightd.toml").write_text('store = "/srv/mine"  # mine')
    capsys.readouterr()
    assert main(arguments) == 2
    assert "weightd.toml is there already and is kept" in capsys.readouterr().err
    assert "/srv/models" in unit.read_text()
    assert main(["install-service", "--root", str(tmp_path)]) == 0
    assert "ReadWritePaths=/srv/mine" in unit.read_text()
    assert "the store is /srv/mine" in capsys.readouterr().out
    assert (tmp_path / "etc" / "weightd.toml").read_text().endswith("# mine")


@AS_ROOT
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--store", "/home/me/models"], "the service cannot see /home/me/models (ProtectHome=)"),
        (["--store", "models"], "--store models must be an absolute path"),
        (["--dram", "much"], "much"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("weightd.machine.service._command", lambda: ["/opt/weightd/bin/weightd"])
    assert main(["install-service", "--root", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_service_of_the_system_needs_root(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert main(["install-service"]) == 2
    assert "needs root: use sudo, or give --user" in capsys.readouterr().err
