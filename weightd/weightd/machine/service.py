"""`weightd install-service`: a systemd service for the system, or for the calling user alone (--user).

The system's service has a user of its own, the store /var/lib/weightd (or --store), a configuration in
/etc/weightd.toml, and the hardened unit of deploy/. A configuration that is there is kept. The service is not started:
a store needs a model first.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from flashclient.standard_streams import complain, say
from weightd.errors import ServiceError, UsageError
from weightd.flags import FlagParser
from weightd.sizes import parse_size

HERE = Path(__file__).parent  # weightd.service and weightd.toml are links to deploy/
USER = "weightd"
STORE = Path("/var/lib/weightd")
CONFIG = Path("/etc/weightd.toml")
SYSTEM_UNIT = Path("/etc/systemd/system/weightd.service")
HIDDEN = ("/home", "/root", "/run/user")  # by ProtectHome= in the unit
NOLOGIN = "/usr/sbin/nologin"
COMMAND = "/opt/weightd/bin/weightd"  # in the unit of deploy/

USER_UNIT = """\
[Unit]
Description=weightd: language model weights served from flash

[Service]
Type=notify
ExecStart={command} --store {store}{more}
ExecReload=/bin/kill -HUP $MAINPID
Restart=on-failure
WatchdogSec=60
TimeoutStartSec=300

[Install]
WantedBy=default.target
"""


def _parser() -> FlagParser:
    parser = FlagParser(
        prog="weightd install-service", allow_abbrev=False, description="Installs weightd as a systemd service."
    )
    parser.add_argument("--user", action="store_true", help="for yourself alone, without root")
    store = "the folder of the models (default: /var/lib/weightd, or with --user ~/.local/share/weightd)"
    parser.add_argument("--store", type=Path, metavar="DIR", help=store)
    parser.add_argument("--dram", metavar="SIZE", help="all memory for weights, such as 8GiB or 50%%")
    parser.add_argument("--root", type=Path, default=Path("/"), metavar="DIR", help="of an image that is being made")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Writes the files and says what comes next. Raises UsageError, ServiceError, OSError."""
    options = _parser().parse_args(list(arguments))
    if options.dram is not None:
        _check_dram(options.dram)
    if options.user:
        install_for_user(options.store, options.dram, os.environ)
    else:
        install_for_system(options.store, options.dram, options.root)
    return 0


def _check_dram(text: str) -> None:
    if not (text.endswith("%") and text[:-1].isdecimal() and 0 < int(text[:-1]) <= 100):
        parse_size(text)


def install_for_user(store: Path | None, dram: str | None, environment: Mapping[str, str]) -> None:
    """Writes a unit of the calling user's service manager. Raises UsageError, OSError."""
    home = Path(environment.get("HOME") or pwd.getpwuid(os.geteuid()).pw_dir)
    folder = Path(environment.get("XDG_CONFIG_HOME") or home / ".config") / "systemd" / "user"
    data = Path(environment.get("XDG_DATA_HOME") or home / ".local" / "share")
    store = (store or data / "weightd").absolute()
    more = "" if dram is None else f" --dram {dram.replace('%', '%%')}"
    folder.mkdir(parents=True, exist_ok=True)
    unit = folder / SYSTEM_UNIT.name
    unit.write_text(USER_UNIT.format(command=_quoted(*_command()), store=_quoted(str(store)), more=more))
    say(f"wrote {unit}")
    say("next:")
    if not store.exists():
        say(f"  weightd import SRC --store {store}")
    say("  systemctl --user daemon-reload && systemctl --user enable --now weightd")
    say("  loginctl enable-linger                 so that it also runs while you are logged out")


def install_for_system(store: Path | None, dram: str | None, root: Path) -> None:
    """Makes user, store, configuration and unit below `root`. Raises UsageError, ServiceError, OSError."""
    if os.geteuid() != 0:
        raise UsageError("a service of the system needs root: use sudo, or give --user for a service of your own")
    command = _command()
    config, unit = (root / path.relative_to("/") for path in (CONFIG, SYSTEM_UNIT))
    kept = config.exists()
    if kept and (store is not None or dram is not None):
        raise UsageError(f"{config} is there already and is kept: leave --store and --dram out, and set them there")
    store = _store_in(config) if kept else store or STORE
    if not store.is_absolute():
        raise UsageError(f"--store {store} must be an absolute path")
    if hidden := [path for path in (*command[:1], str(store)) if path.startswith(tuple(f"{one}/" for one in HIDDEN))]:
        raise UsageError(
            f"the service cannot see {hidden[0]} (ProtectHome=): install it in /opt, and the store in /var"
        )
    account = _account(root)
    folder = root / store.relative_to("/")
    folder.mkdir(mode=0o750, parents=True, exist_ok=True)
    if account is not None:
        os.chown(folder, account.pw_uid, account.pw_gid)
    if not kept:
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(_configured(store, dram))
    unit.parent.mkdir(parents=True, exist_ok=True)
    unit.write_text(_unit(command, store))
    say(f"{'kept' if kept else 'wrote'} {config}, wrote {unit}; the store is {store}")
    if root == Path("/") and Path("/run/systemd/system").exists():
        _run("systemctl", "daemon-reload")
    say("next:")
    say(f"  sudo -u {USER} {_quoted(*command)} import SRC --store {store}")
    say("  systemctl enable --now weightd")
    say(f"  usermod -aG {USER} NAME                lets a user connect")


def _command() -> list[str]:
    """The command of this installation: its script, or where there is none its interpreter."""
    script = Path(sys.executable).parent / "weightd"
    return [str(script)] if script.exists() else [sys.executable, "-m", "weightd"]


def _quoted(*words: str) -> str:
    """Words of a command in a unit; systemd reads percent signs, and quotes as a shell does."""
    return " ".join(f'"{word}"' if set(word) & set(" \t'") else word for word in words).replace("%", "%%")


def _store_in(config: Path) -> Path:
    """The store of a configuration that is kept."""
    try:
        return Path(tomllib.loads(config.read_text()).get("store", STORE))
    except (ValueError, TypeError) as error:
        raise UsageError(f"{config} cannot be read: {error}") from error


def _configured(store: Path, dram: str | None) -> str:
    text = (HERE / "weightd.toml").read_text()
    text = text.replace(f'store = "{STORE}"', f'store = "{store}"', 1)
    return text if dram is None else text.replace('\ndram = "50%"', f'\ndram = "{dram}"', 1)


def _unit(command: Sequence[str], store: Path) -> str:
    text = (HERE / "weightd.service").read_text().replace(COMMAND, _quoted(*command))
    if store == STORE:
        return text
    lines = [line for line in text.splitlines() if not line.startswith("StateDirectory")]
    at = lines.index("ProtectSystem=strict")
    return "\n".join([*lines[: at + 1], f"ReadWritePaths={_quoted(str(store))}", *lines[at + 1 :]]) + "\n"


def _account(root: Path) -> pwd.struct_passwd | None:
    """The service's user, made if there is none. None for an image: the package of the image makes it at its start."""
    if root != Path("/"):
        complain("weightd", f"make the user {USER} in the image, and give it the store")
        return None
    try:
        return pwd.getpwnam(USER)
    except KeyError:
        _run("useradd", "--system", "--user-group", "--no-create-home", "--shell", NOLOGIN, USER)
        return pwd.getpwnam(USER)


def _run(*command: str) -> None:
    program = shutil.which(command[0]) or shutil.which(command[0], path="/usr/sbin:/sbin")
    if program is None:
        raise ServiceError(f"there is no {command[0]}: run `{' '.join(command)}` in another way, and this again")
    done = subprocess.run([program, *command[1:]], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ServiceError(f"{' '.join(command)} failed: {(done.stderr or done.stdout).strip()}")
