"""`flashclient run`: imports a model if it is new, starts a weightd, and chats."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from flashclient.commands import chat
from flashclient.commands.arguments import add_command


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
        options.store = str(default_store(os.environ))
    return chat.run(options)


def default_store(environment: Any) -> Path:
    """A user's own store, in the folder for data of the XDG base directory specification."""
    data = environment.get("XDG_DATA_HOME", "")
    return (Path(data) if data.startswith("/") else Path("~/.local/share").expanduser()) / "weightd"
