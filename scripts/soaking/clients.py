"""Client processes that can be killed and frozen. They are forked from a process that has imported torch already.

    with ClientProcesses() as clients:
        clients.start(0, address="unix:/run/weightd.sock", model="opt", prompts=[[5, 6, 7]], mode="exact")
        event = clients.next_event(timeout_s=10)

An event is a dict such as {"client": 0, "pid": 17, "event": "started"}. The other events: "ready", the client has
attached; "tokens" after each generation, with the prompt's index, the tokens, began_s (of time.monotonic()), made_s of
each token but the first, and the process's descriptors, threads and memory; "corruption" instead, with the error's
text; "error" with the error's class and text; "ended" with the exit status, negative for a signal. A client uses its
prompts in turn. Each generation is greedy, so the same prompt gives the same tokens.
"""

from __future__ import annotations

import faulthandler
import json
import os
import select
import signal
import sys
import time
import traceback
from collections import deque
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.processes import module_command

from soaking.parent import ParentProcess

Event = dict[str, Any]
REAP_S = 0.1  # how late the end of a client may be reported
CORRUPT_PAUSE_S = 0.2  # before the next attempt
SILENT_S = 100.0  # longer than any healthy client is silent, even on a slow and busy machine
SPEAKS_WITHIN_S = 5.0  # for a silent client's stack trace, before the client is killed


class ClientProcesses:
    """Client processes and the process that forks them. All of them end with the `with` statement."""

    def __enter__(self) -> ClientProcesses:
        self._parent = ParentProcess(module_command("soaking.clients", "-W", "ignore"))
        self._unread = b""
        self._events: deque[Event] = deque()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._parent.end()

    def start(self, index: int, **what: Any) -> None:
        """Starts client `index`.

        Args:
            what: address, model and prompts; generations to make (0: until it is killed or gets SIGTERM), tokens of
                each, and options of FlashClient.
        """
        self._parent.stdin.write(json.dumps({"index": index} | what).encode() + b"\n")
        self._parent.stdin.flush()

    def pids(self) -> list[int]:
        """The process ids of the clients."""
        children = Path(f"/proc/{self._parent.pid}/task/{self._parent.pid}/children").read_text()
        return [int(pid) for pid in children.split()]

    def next_event(self, timeout_s: float) -> Event | None:
        """The next event, or None after the timeout. Time in which this process was frozen counts as one second."""
        left_s = timeout_s
        while not self._events:
            ready, _, _ = select.select([self._parent.stdout], [], [], min(left_s, 1.0))
            if not ready:
                left_s -= 1.0
                if left_s <= 0:
                    return None
                continue
            data = os.read(self._parent.stdout.fileno(), 1 << 16)
            if not data:
                raise RuntimeError(f"the parent process of the clients ended with status {self._parent.wait()}")
            *lines, self._unread = (self._unread + data).split(b"\n")
            self._events += map(json.loads, lines)
        return self._events.popleft()


class Silences:
    """How long each client has been silent. After SILENT_S a client must write its stack trace, then it is killed."""

    def __init__(self) -> None:
        self._silent_s: dict[int, float] = {}
        self._pids: dict[int, int] = {}

    def begin(self, index: int, pid: int) -> None:
        self._pids[index] = pid
        self.heard(index)

    def heard(self, index: int) -> None:
        self._silent_s[index] = 0.0

    def end(self, index: int) -> None:
        self._pids.pop(index, None)

    def pid(self, index: int) -> int:
        return self._pids[index]

    def watched(self) -> list[int]:
        return sorted(self._pids)

    def passed(self, index: int, seconds: float) -> bool:
        """Adds time without an event. Returns True once: when the silence must be reported."""
        before_s = self._silent_s[index]
        self._silent_s[index] = after_s = before_s + seconds
        if before_s <= SILENT_S < after_s:
            send_signal(self._pids[index], signal.SIGUSR1)
            return True
        if after_s > SILENT_S + SPEAKS_WITHIN_S:
            send_signal(self._pids[index], signal.SIGKILL)
        return False


def send_signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):  # it has ended by itself; an event follows
        os.kill(pid, number)


def tell(event: Event) -> None:
    """Writes less than PIPE_BUF at once, so that lines of several processes do not mix."""
    os.write(1, json.dumps(event).encode() + b"\n")


def run_parent() -> int:
    """Forks a client for each line of standard input and reports its end. Kills all clients when the input ends."""
    import flashclient.client

    assert flashclient.client is not None
    children: dict[int, int] = {}  # pid -> index
    unread = b""
    while True:
        if select.select([0], [], [], REAP_S)[0]:
            data = os.read(0, 1 << 16)
            if not data:
                break
            *lines, unread = (unread + data).split(b"\n")
            for line in lines:
                what = json.loads(line)
                children[_fork(what)] = what["index"]
        _reap(children)
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return 0


def _reap(children: dict[int, int]) -> None:
    for pid in list(children):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            tell(
                {"client": children.pop(pid), "pid": pid, "event": "ended", "status": os.waitstatus_to_exitcode(status)}
            )


def _fork(what: dict[str, Any]) -> int:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(0)
            status = run_client(**what)
        except BaseException:  # only the parent may return from here
            traceback.print_exc()
        os._exit(status)
    return pid


class _Stop(BaseException):
    """SIGTERM raised as an exception, at any moment, like KeyboardInterrupt."""

    told = False  # stays True even if the exception is lost, as in a finalizer


def _stop(*_: object) -> None:
    _Stop.told = True
    raise _Stop


def run_client(
    index: int,
    address: str,
    model: str,
    prompts: list[list[int]],
    tokens: int = 16,
    generations: int = 0,
    **options: Any,
) -> int:
    """Generates and reports events. Any error except corruption ends the client. Returns the exit status."""
    import torch

    from flashclient import FlashClient
    from flashclient.errors import CorruptionError, FlashClientError

    told_s: list[float] = []  # the time of each token of the generation

    def note_token(ids: torch.Tensor, _: Any, **__: Any) -> torch.Tensor:
        """A stopping criterion that never stops."""
        told_s.append(time.monotonic())
        return torch.zeros(len(ids), dtype=torch.bool)

    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, _stop)
    faulthandler.register(signal.SIGUSR1)  # writes a stack trace to standard error
    about = {"client": index, "pid": os.getpid()}
    tell(about | {"event": "started"})
    began_s = time.monotonic()
    try:
        with FlashClient(model, address=address, **options) as client:
            client.model.generation_config.eos_token_id = None  # random weights may produce the end token at any time
            tell(about | {"event": "ready"})
            done = 0
            while not _Stop.told and (generations == 0 or done < generations):
                prompt = done % len(prompts)
                began_s = time.monotonic()
                told_s.clear()
                try:
                    made = client.generate(
                        prompts[prompt], max_new_tokens=tokens, do_sample=False, stopping_criteria=[note_token]
                    )
                except CorruptionError as error:
                    tell(about | {"event": "corruption", "says": str(error), "began_s": began_s})
                    time.sleep(CORRUPT_PAUSE_S)
                else:
                    made_s = [round(after - before, 6) for before, after in pairwise(told_s)]
                    event = {"event": "tokens", "prompt": prompt, "tokens": made, "began_s": began_s, "made_s": made_s}
                    tell(about | event | holdings())
                done += 1
    except _Stop:
        return 0
    except FlashClientError as error:
        tell(about | {"event": "error", "kind": type(error).__name__, "says": str(error), "began_s": began_s})
        return error.exit_status
    return 0


def holdings(pid: int | str = "self") -> dict[str, int]:
    """A process's descriptors (without those of shared memory), threads, and bytes of anonymous and shared memory."""
    process = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    return {
        "descriptors": sum(not _is_memory(descriptor) for descriptor in (process / "fd").iterdir()),
        "threads": int(status["Threads"]),
        "anonymous_bytes": int(status["RssAnon"].split()[0]) * 1024,
        "shared_bytes": int(status["RssShmem"].split()[0]) * 1024,
    }


def _is_memory(descriptor: Path) -> bool:
    try:
        return str(descriptor.readlink()).startswith("/memfd:")
    except FileNotFoundError:  # the descriptor of the listing itself
        return True


if __name__ == "__main__":
    sys.exit(run_parent())
