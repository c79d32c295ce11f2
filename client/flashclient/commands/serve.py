"""`flashclient serve`: the OpenAI interface over HTTP."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from itertools import repeat
from pathlib import Path
from typing import Any

from flashclient.batching.bounds import CACHE_TOKENS_MAX, KEPT_TOKENS_MAX, SEQUENCES_MAX, WAITING_MAX
from flashclient.commands.arguments import add_command, add_kv_dtype_flag, add_mode_flag, not_negative, positive, size
from flashclient.commands.opening import open_client
from flashclient.commands.run import own_folder
from flashclient.errors import FlashClientError, OptionError
from flashclient.standard_streams import complain, say

PORT_DEFAULT = 8080
LOOPBACK = ("127.0.0.1", "::1", "localhost")
PACKAGES = ("fastapi", "uvicorn", "llguidance")
BACKLOG = 128
MODELS_MAX = 16
KEPT_FILE_BYTES = 8 << 30
KEPT_FILE_SHARE = 10  # of what is free


def add(commands: Any) -> None:
    """Adds the command."""
    command = add_command(commands, "serve", _run, "serve the OpenAI interface over HTTP", several=True)
    add_mode_flag(command)
    add_kv_dtype_flag(command)
    command.add_argument("--host", default=LOOPBACK[0], help="address to listen at (default: this machine only)")
    command.add_argument("--port", type=_port, default=PORT_DEFAULT, help=f"default: {PORT_DEFAULT}")
    command.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="keys that may ask, one a line; needed for other hosts"
    )
    command.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        type=_origin,
        metavar="ORIGIN",
        help="a site whose pages may use the server, such as http://localhost:3000; may be repeated",
    )
    command.add_argument(
        "--lora-modules",
        action="append",
        default=[],
        type=_adapter,
        metavar="NAME=DIR",
        help="a LoRA adapter of the first model, which requests name as their model; may be repeated",
    )
    command.add_argument("--ui", action="store_true", help="also serve a page to chat and to watch the model, at /")
    command.add_argument(
        "--sequences",
        type=positive,
        default=SEQUENCES_MAX,
        metavar="N",
        help="requests that advance at once (at most 16)",
    )
    command.add_argument(
        "--waiting", type=positive, default=WAITING_MAX, metavar="N", help=f"further ones that may wait ({WAITING_MAX})"
    )
    command.add_argument(
        "--cache-tokens",
        type=positive,
        default=CACHE_TOKENS_MAX,
        metavar="N",
        help=f"tokens of keys and values of all of them together ({CACHE_TOKENS_MAX})",
    )
    command.add_argument(
        "--kept-tokens",
        type=not_negative,
        default=KEPT_TOKENS_MAX,
        metavar="N",
        help=f"of these, at most so many of requests that have ended, for prompts that begin alike ({KEPT_TOKENS_MAX})",
    )
    command.add_argument(
        "--kept-bytes",
        type=size,
        metavar="SIZE",
        help="room on flash for what then leaves memory; 0: none (default: 8GiB, a tenth of what is free at most)",
    )
    command.add_argument(
        "--kept-folder", type=Path, metavar="DIR", help="where it lies (default: the store, else ~/.cache/flashclient)"
    )


def _port(text: str) -> int:
    value = int(text) if text.isdecimal() else -1
    if not 0 <= value < 65536:
        raise argparse.ArgumentTypeError(f"'{text}' is not a port from 0 to 65535")
    return value


def _origin(text: str) -> str:
    if text != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", text):
        raise argparse.ArgumentTypeError(f"'{text}' is not a site such as http://localhost:3000")
    return text


def _adapter(text: str) -> tuple[str, Path]:
    name, separator, folder = text.partition("=")
    if not (name and separator and folder):
        raise argparse.ArgumentTypeError(f"'{text}' is not a name and a folder such as sql=./sql-lora")
    return name, Path(folder)


def _run(options: argparse.Namespace) -> int:
    keys = _checked(options)
    with ExitStack() as opened:
        listening = opened.enter_context(_listening(options))  # first: an import and a model's start may take long
        _serve(_hosted(options, opened), options, keys, listening)
    return 0


def _checked(options: argparse.Namespace) -> list[str]:
    """The API keys. Raises OptionError and FlashClientError for what cannot be served."""
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if missing:
        raise FlashClientError(f"this needs {' and '.join(missing)}: pip install 'weightd[serve]'")
    if options.sequences > SEQUENCES_MAX:
        most = f"more than {SEQUENCES_MAX}, which is what a kernel computes at once"
        raise OptionError(f"--sequences {options.sequences} is {most}")
    if len(options.models) > MODELS_MAX:
        raise OptionError(f"{len(options.models)} models are more than {MODELS_MAX}: start another server for the rest")
    if twice := [name for name in options.models if options.models.count(name) > 1]:
        raise OptionError(f"model '{twice[0]}' is given twice: give each once")
    if options.json:
        raise OptionError("--json is not for serve: leave it out")
    _check_adapters(options.lora_modules)
    if options.kept_folder is not None and not options.kept_folder.is_dir():
        raise OptionError(f"--kept-folder {options.kept_folder} is not a folder: make it first")
    if options.api_key_file is None:
        if "*" in options.allow_origin:
            raise OptionError("--allow-origin * lets in every page that a browser here shows: pass --api-key-file, too")
        if options.host not in LOOPBACK:
            raise OptionError(f"--host {options.host} may be reached by others: pass --api-key-file, too")
        return []
    from flashclient.server.access import read_keys

    return read_keys(options.api_key_file)


def _check_adapters(adapters: list[tuple[str, Path]]) -> None:
    """Before anything starts. Raises OptionError and FlashClientError."""
    from flashclient.batching.adapter_folder import require_adapter, require_peft

    names = [name for name, _ in adapters]
    if len(set(names)) < len(names):
        raise OptionError(f"--lora-modules {max(names, key=names.count)}: give each adapter a name of its own")
    if adapters:
        require_peft()
    for name, folder in adapters:
        require_adapter(name, folder)


def _hosted(options: argparse.Namespace, opened: ExitStack) -> dict[str, Any]:
    """The models by name, each with a scheduler. They share a weightd and its pool, and take turns."""
    from flashclient.batching.step_order import StepOrder

    models: dict[str, Any] = {}
    order = StepOrder()
    files = _kept_files(options, opened)
    bounds = (options.sequences, options.waiting, options.cache_tokens, options.kept_tokens)
    for asked in options.models:
        more = {"dram": None} if models else {}  # the first has started the weightd
        more |= {"mode": options.mode, "kv_dtype": options.kv_dtype}
        client = opened.enter_context(open_client(options, asked, tells=True, **more))
        # Not before: open_client() imports what these need, sooner and with Ctrl-C in mind.
        from flashclient.batching.scheduler import Scheduler
        from flashclient.server.hosted_model import HostedModel

        name = client.record.name
        if name in models:
            raise OptionError(f"model '{name}' is given twice: give each once")
        if client.tokenizer is None:
            raise FlashClientError(f"model '{name}' was stored without a tokenizer, and the server answers with text")
        for hosted, before_step in _variants(client, [] if models else options.lora_modules):
            if hosted in models:
                raise OptionError(f"--lora-modules {hosted}: a model has that name: give the adapter another one")
            file = next(files) if hosted == name else None
            scheduler = Scheduler(client.loaded, *bounds, order, file, before_step)
            opened.callback(scheduler.close)
            models[hosted] = HostedModel(hosted, client, scheduler, None if hosted == name else name)
    return models


def _variants(client: Any, adapters: list[tuple[str, Path]]) -> Iterator[tuple[str, Callable[[], None] | None]]:
    """The names of a model alone and with each of its adapters, and what is called before a step of it."""
    if not adapters:
        yield client.record.name, None
        return
    from flashclient.batching.adapters import Adapters

    loaded = Adapters(client.loaded)
    for name, folder in adapters:
        loaded.load(name, folder)
    yield client.record.name, partial(loaded.use, None)
    for name, _ in adapters:
        yield name, partial(loaded.use, name)


def _kept_files(options: argparse.Namespace, opened: ExitStack) -> Iterator[Any]:
    """A file for each model; None where there can be none. Raises OptionError if the folder was given."""
    from flashclient.batching.kept_file import KeptFile

    folder: Path | None = options.kept_folder
    if not options.kept_tokens or options.kept_bytes == 0:
        yield from repeat(None)
    try:
        if folder is None:
            folder = Path(options.store) if options.store is not None else _cache_folder()
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        bytes_max = options.kept_bytes
        if bytes_max is None:
            bytes_max = min(KEPT_FILE_BYTES, shutil.disk_usage(folder).free // KEPT_FILE_SHARE)
        for _ in options.models:
            file = KeptFile(folder, bytes_max // len(options.models))
            opened.callback(file.close)
            yield file
    except (OSError, RuntimeError) as error:
        where = "" if folder is None else f" {folder}"
        reason = (getattr(error, "strerror", None) or str(error)).rstrip(".").lower()
        if options.kept_folder is not None or options.kept_bytes:
            raise OptionError(f"--kept-folder{where}: {reason}: give a folder of a local disk") from error
        complain("flashclient", f"no file for kept keys and values{where}: {reason}: pass --kept-folder")
    yield from repeat(None)


def _cache_folder() -> Path:
    return own_folder(os.environ, "XDG_CACHE_HOME", "~/.cache") / "flashclient"


def _serve(models: dict[str, Any], options: argparse.Namespace, keys: list[str], listening: socket.socket) -> None:
    import uvicorn

    from flashclient.server.access import Access
    from flashclient.server.api import make_api
    from flashclient.server.connections import ENDING_S, HEAD_BYTES_MAX, STOPPING_S, AnsweringServer, PatientProtocol

    api = make_api(models, Access(keys), options.ui, options.allow_origin)
    host, port = listening.getsockname()[:2]
    served = ", ".join(f"{name} (mode {model.client.mode})" for name, model in models.items())
    say(f"serving {served} at http://{f'[{host}]' if ':' in host else host}:{port}/v1")
    if options.ui:
        say(f"the page is at http://{f'[{host}]' if ':' in host else host}:{port}/")
    config = uvicorn.Config(
        api,
        log_level="warning",
        lifespan="off",
        timeout_graceful_shutdown=STOPPING_S + ENDING_S,
        http=PatientProtocol,
        h11_max_incomplete_event_size=HEAD_BYTES_MAX,
        ws="none",
    )

    AnsweringServer(config, lambda: [model.scheduler.stop() for model in models.values()]).run(sockets=[listening])


def _listening(options: argparse.Namespace) -> socket.socket:
    """A socket that listens at the address: of sockets that do not, several may have the same.

    Who connects while the model loads waits for it. Raises FlashClientError where the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        with ExitStack() as opened:
            made = opened.enter_context(socket.socket(family, socket.SOCK_STREAM))
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind((options.host, options.port))
            made.listen(BACKLOG)
            opened.pop_all()
            return made
    except (OSError, UnicodeError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise FlashClientError(f"cannot listen at {options.host}:{options.port}: {reason}") from error
