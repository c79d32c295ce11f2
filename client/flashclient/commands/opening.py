"""Opens the client that a command asks for."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from flashclient.commands.quick_imports import quick_imports
from flashclient.errors import OptionError
from flashclient.garbage import garbage_kept
from flashclient.interrupts import end_quietly, raise_again
from flashclient.options import Options
from flashclient.standard_streams import complain
from weightd_proto.hub_names import is_hub_name


def open_client(options: argparse.Namespace, model: str | None = None, *, tells: bool = False, **more: Any) -> Any:
    """The FlashClient that `options` ask for.

    Args:
        model: of `options` by default.
        tells: says that it loads the model where nobody looks on, too: in the log of a server.
    """
    model = options.model if model is None else model
    names = ("address", "store", "dram", "transport", "timeout_s", "tls_ca", "tls_cert", "tls_key")
    given = {name: getattr(options, name) for name in names}
    given = {name: value for name, value in given.items() if value is not None} | more
    _check_served(model, Options(**given))
    if tells or sys.stderr.isatty():
        complain("flashclient", f"loading {model}")  # the next lines take seconds
    with garbage_kept(), _weightd_starting(model, options):
        with importing(), quick_imports():
            from transformers import logging as transformers_logging

            from flashclient.client import FlashClient

        logging: Any = transformers_logging
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        return FlashClient(model, **given)


@contextmanager
def importing() -> Iterator[None]:
    """Inside the `with` statement a command imports what takes seconds, and has begun nothing else: see interrupts."""
    end_quietly()
    try:
        with garbage_kept():
            yield
    finally:
        raise_again()


def _weightd_starting(model: str, options: argparse.Namespace) -> AbstractContextManager[None]:
    """A private weightd starts while torch is imported. Not before an import: a model that is served stays as it is."""
    if options.store is None or os.path.exists(model) or is_hub_name(model):  # noqa: PTH110
        return nullcontext()
    from flashclient.daemon.private import started_ahead

    return started_ahead(Path(options.store), options.dram)


def _check_served(model: str, options: Options) -> None:
    """Raises the errors of a weightd or a model that is not there before torch is imported."""
    from flashclient.daemon.address import default_address
    from flashclient.daemon.channel import Connection
    from flashclient.daemon.first_import import require_there

    if options.store is not None:  # the model may have to be imported first
        require_there(Path(options.store).resolve(), model)
        return
    address = options.address or default_address(os.geteuid(), os.environ)
    connection = Connection(address, options.timeout_s, options.tls)
    try:
        options.mode_of(connection.describe(model))
    finally:
        connection.close()


def sequences_of(loaded: Any, options: argparse.Namespace, tokens_max: int) -> Any:
    """The text as token sequences for a LoadedModel."""
    from flashclient.calibration.sequences import read_sequences

    if loaded.tokenizer is None:
        raise OptionError(f"model '{loaded.record.name}' was stored without a tokenizer, so it cannot read a text")
    return read_sequences(options.text, loaded.tokenizer, loaded.context_tokens, options.tokens, tokens_max)
