"""A seccomp filter on the process itself: instructions of classic BPF over struct seccomp_data."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence

LOAD_WORD, JUMP_EQUAL, JUMP_GREATER_EQUAL, RETURN = 0x20, 0x15, 0x35, 0x06
NUMBER_OFFSET_BYTES = 0  # of the system call in struct seccomp_data
ARGUMENTS_OFFSET_BYTES = 16  # of its arguments, 8 bytes each
KILL_PROCESS, FAIL, ALLOW = 0x80000000, 0x00050000, 0x7FFF0000  # what RETURN says; FAIL | errno
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2

Instruction = tuple[int, int, int, int]  # code, skip if true, skip if false, value


def install(program: Sequence[Instruction]) -> None:
    """Filters every system call of this process, and of those that it starts, from now on."""
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code)
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in ((PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0)):
        if libc.prctl(*arguments) != 0:
            raise OSError(ctypes.get_errno(), "prctl")
