"""`weightd doctor --store DIR`: checks what this system allows weightd to do, and gives advice."""

from __future__ import annotations

import json
import mmap
import os
import resource
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from tempfile import NamedTemporaryFile

from flashclient.memory_limits import free_bytes, memory_limits, tightest
from flashclient.standard_streams import say
from weightd._native import block_size_bytes, probe_huge_pages, probe_io_uring
from weightd.errors import StoreError, WeightdError
from weightd.flags import FlagParser
from weightd.machine import pressure
from weightd.sizes import format_size
from weightd.store.device_profile import DEPTHS, DeviceProfile, known_profile
from weightd.store.store import CATALOG_FILE, Store
from weightd_proto.files import BUNDLES_FILE

OK, WARN, FAIL = "ok", "warn", "fail"
MEMLOCK_WANTED_BYTES = 1 << 30  # larger pools need it for registered buffers: 2.2 us a read, without them 3.2
SPACE_WANTED_BYTES = 1 << 30
MEMORY_WANTED_BYTES = 1 << 30
RANDOM_READS_WANTED_PER_S = 5000  # of 16 KiB; hard disks reach a few hundred
PROFILE_READ_BYTES = 16 << 10
IO_URING_SWITCH = Path("/proc/sys/kernel/io_uring_disabled")
SHMEM_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    level: str  # OK, WARN or FAIL
    value: str
    advice: str = ""  # what to do; empty if nothing needs to be done


def main(arguments: Sequence[str]) -> int:
    """Prints the report. Returns 1 if a check fails. Raises WeightdError for bad input."""
    flags = _parser().parse_args(list(arguments))
    findings, profile = examine(Path(flags.store), flags.measure)
    say(_as_json(findings, profile) if flags.json else _as_text(findings))
    return 1 if any(finding.level == FAIL for finding in findings) else 0


def examine(folder: Path, measure_anew: bool = False) -> tuple[list[Finding], DeviceProfile | None]:
    """All findings about the folder and the system, and the device's profile (None if it cannot be measured)."""
    if not folder.is_dir():
        raise StoreError(f"no folder {folder}: `weightd import SRC --store {folder}` makes a store")
    findings = [
        check_store(folder),
        *check_direct_io(folder),
        check_io_uring(),
        check_memlock(),
        check_memory(),
        check_space(folder),
        check_huge_pages(),
        check_pressure(),
    ]
    try:
        profile = known_profile(folder, measure_anew)
    except WeightdError as error:
        return [*findings, Finding("device", FAIL, str(error), "free space, or repair what the lines above name")], None
    return [*findings, check_profile(profile)], profile


def check_store(folder: Path) -> Finding:
    if not (folder / CATALOG_FILE).exists():
        return Finding("store", WARN, f"{folder} holds no store yet", f"weightd import SRC --store {folder}")
    try:
        names = Store.open(folder, readonly=True).names()
    except StoreError as error:
        return Finding("store", FAIL, str(error), "name another --store, or upgrade weightd")
    return Finding("store", OK, f"{folder}: {', '.join(names) or 'no models yet'}")


def check_direct_io(folder: Path) -> list[Finding]:
    """Tries O_DIRECT on a model's bundles, or on a temporary file in the folder, and finds the unit of direct reads."""
    try:
        bundles = next(iter(sorted(folder.glob(f"*/{BUNDLES_FILE}"))), None)
        block_bytes = _try_direct_io(folder) if bundles is None else block_size_bytes(str(bundles))
        if bundles is not None:
            _read_directly(str(bundles), block_bytes)
    except PermissionError as error:
        return [Finding("direct io", WARN, f"not tried: {folder}: {error.strerror}", "run doctor as the store's owner")]
    except OSError as error:
        advice = "move the store to ext4 or xfs on an NVMe device, or serve with --allow-buffered"
        return [Finding("direct io", FAIL, f"{folder}: {error.strerror}", advice)]
    return [
        Finding("direct io", OK, "O_DIRECT reads work"),
        Finding("block size", OK, f"{block_bytes} bytes are the unit of direct reads"),
    ]


def _try_direct_io(folder: Path) -> int:
    """The unit of direct reads, after a direct read of a temporary file."""
    with NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
        block_bytes = block_size_bytes(file.name)
        file.write(bytes(block_bytes))
        file.flush()
        _read_directly(file.name, block_bytes)
    return block_bytes


def _read_directly(path: str, size_bytes: int) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, size_bytes) as page:  # page-aligned memory, as O_DIRECT needs
            os.preadv(descriptor, [page], 0)
    finally:
        os.close(descriptor)


def check_io_uring(switch: Path = IO_URING_SWITCH) -> Finding:
    setting = switch.read_text().strip() if switch.exists() else "no such setting"
    level, note = probe_io_uring()
    value = f"{level or 'refused'}{f' ({note})' if note else ''}, kernel.io_uring_disabled = {setting}"
    if level and not note:
        return Finding("io_uring", OK, value)
    advice = "sysctl kernel.io_uring_disabled=0, and allow io_uring in the container's seccomp profile"
    if level:
        advice = "raise the memlock limit (next line)"
    return Finding("io_uring", WARN, value, f"{advice}; until then reads cost more CPU")


def check_memlock(limit_bytes: int | None = None, user_id: int | None = None) -> Finding:
    if limit_bytes is None:
        limit_bytes = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    limit = "unlimited" if limit_bytes == resource.RLIM_INFINITY else format_size(limit_bytes)
    if (os.geteuid() if user_id is None else user_id) == 0:
        return Finding("memlock", OK, f"{limit}, and root is not bound by it")
    if limit_bytes == resource.RLIM_INFINITY or limit_bytes >= MEMLOCK_WANTED_BYTES:
        return Finding("memlock", OK, limit)
    advice = "set LimitMEMLOCK=infinity in the service, or memlock in /etc/security/limits.conf"
    return Finding("memlock", WARN, f"{limit}: larger pools are read without registered buffers", advice)


def check_memory(root: Path = Path("/")) -> Finding:
    limits = memory_limits(root)
    bound, free = tightest(limits), free_bytes(limits)
    value = f"{format_size(bound.limit_bytes)} by {bound.source}, {format_size(free)} free"
    if free < MEMORY_WANTED_BYTES:
        return Finding("memory", WARN, value, "end other processes, or raise memory.max of the cgroup")
    return Finding("memory", OK, value)


def check_space(folder: Path) -> Finding:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < SPACE_WANTED_BYTES:
        advice = "delete files, or `weightd rm` a model: an import needs as much as the checkpoint"
        return Finding("space", WARN, f"{format_size(free_bytes)} free", advice)
    return Finding("space", OK, f"{format_size(free_bytes)} free")


def check_huge_pages(given: bool | None = None, setting: Path = SHMEM_HUGE_PAGES) -> Finding:
    """Whether weights in memory get huge pages. `given`: what to assume, instead of asking the kernel for one."""
    if probe_huge_pages() if given is None else given:
        return Finding("huge pages", OK, "given to weights in memory")
    text = setting.read_text() if setting.exists() else "[not built into this kernel]"
    chosen = text[text.index("[") + 1 : text.index("]")]
    if chosen in ("always", "within_size", "advise", "force"):
        return Finding("huge pages", OK, f"shared memory: {chosen}")
    advice = f"echo advise > {setting}, or boot Linux 6.1 or newer: memory is read up to 1.3 times as fast"
    return Finding("huge pages", WARN, f"shared memory: {chosen}", advice)


def check_pressure(root: Path = Path("/")) -> Finding:
    """Whether the kernel signals memory pressure, so that the pool can shrink in favour of other processes."""
    triggers = pressure.set_triggers(root)
    for descriptor in (triggers.machine_fd, triggers.cgroup_fd):
        if descriptor != pressure.NO_DESCRIPTOR:
            os.close(descriptor)
    refused = "; ".join(triggers.refused)
    if triggers.watched:
        return Finding("pressure", OK, ", ".join(triggers.watched) + (f" (not {refused})" if refused else ""))
    advice = "boot with psi=1 (Linux 4.20 or newer); until then the pool keeps --dram whatever others need"
    return Finding("pressure", WARN, f"the kernel does not signal memory pressure: {refused}", advice)


def check_profile(profile: DeviceProfile) -> Finding:
    row = profile.speed(PROFILE_READ_BYTES, DEPTHS[-1])
    reads_per_s = row.gb_per_s * 1e9 / row.read_bytes
    value = (
        f"{reads_per_s:.0f} random 16 KiB reads/s at depth {row.depth} ({row.gb_per_s:.2f} GB/s), "
        f"{profile.speed(PROFILE_READ_BYTES, 1).latency_us:.0f} us each at depth 1, "
        f"sequential {profile.sequential_gb_per_s:.2f} GB/s; "
        f"measured on {datetime.fromtimestamp(profile.measured_unix_s):%Y-%m-%d} (--measure measures again)"
    )
    if reads_per_s < RANDOM_READS_WANTED_PER_S:
        return Finding("device", WARN, value, "put the store on flash: this device is slow at random reads")
    return Finding("device", OK, value)


def _parser() -> FlagParser:
    parser = FlagParser(prog="weightd doctor", allow_abbrev=False, description="Examine this system for weightd.")
    parser.add_argument("--store", metavar="DIR", required=True, help="the store, or the folder that will be one")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--measure", action="store_true", help="measure the device again")
    return parser


def _as_json(findings: Sequence[Finding], profile: DeviceProfile | None) -> str:
    return json.dumps(
        {
            "findings": [asdict(finding) for finding in findings],
            "profile": None if profile is None else asdict(profile),
        }
    )


def _as_text(findings: Sequence[Finding]) -> str:
    lines = []
    for finding in findings:
        lines.append(f"{finding.level:4} {finding.name:10} {finding.value}")
        if finding.advice:
            lines.append(f"{'':15} -> {finding.advice}")
    return "\n".join(lines)
