"""`flashclient run`: imports a model if it is new, starts a weightd, and chats."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashclient.commands import chat
from flashclient.commands.arguments import add_command
from flashclient.errors import OptionError


def add(commands: Any) -> None:
    """Adds the command."""
    command = add_command(commands, "run", _run, "chat with a model of the hub, a folder or a .gguf file")
    command.epilog = (
        "Imports the model on its first use, into --store (default: a folder of your own), and starts a private "
        "weightd unless one serves that store."
    )
    chat.add_chat_flags(command)


def _run(options: argparse.Namespace) -> int:
    if options.address is None and options.store is None:
        try:
            options.store = str(default_store(os.environ))
        except RuntimeError as error:
            raise OptionError("there is no home folder for a store of your own: pass --store, or set HOME") from error
    return chat.run(options)


def default_store(environment: Mapping[str, str]) -> Path:
    """A user's own store, in the folder for data of the XDG base directory specification. Raises RuntimeError."""
    return own_folder(environment, "XDG_DATA_HOME", "~/.local/share") / "weightd"


def own_folder(environment: Mapping[str, str], variable: str, usual: str) -> Path:
    """A folder of that specification. Raises RuntimeError where a user has no home, as some in containers have none."""
    given = environment.get(variable, "")
    return Path(given) if given.startswith("/") else Path(usual).expanduser()
