"""Starts a command whose kernel refuses io_uring, as containers' default seccomp profiles do.

python without_io_uring.py COMMAND [ARGUMENT ...]
"""

from __future__ import annotations

import errno
import os
import sys

import seccomp

IO_URING_SETUP = 425  # on every architecture
REFUSAL: list[seccomp.Instruction] = [
    (seccomp.LOAD_WORD, 0, 0, seccomp.NUMBER_OFFSET_BYTES),
    (seccomp.JUMP_EQUAL, 0, 1, IO_URING_SETUP),
    (seccomp.RETURN, 0, 0, seccomp.FAIL | errno.EPERM),
    (seccomp.RETURN, 0, 0, seccomp.ALLOW),
]

if __name__ == "__main__":
    seccomp.install(REFUSAL)
    os.execvp(sys.argv[1], sys.argv[1:])
