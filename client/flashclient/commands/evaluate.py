"""`flashclient eval`: compares the quality of the modes on a text."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from flashclient.commands.arguments import add_command, positive
from flashclient.commands.opening import importing, open_client, sequences_of
from flashclient.standard_streams import say


def add(commands: Any) -> None:
    """Adds the command."""
    command = add_command(commands, "eval", _run, "compare the quality of the modes on a text")
    command.add_argument(
        "--text", required=True, type=Path, metavar="FILE", help="UTF-8 text, other than that of the calibration"
    )
    command.add_argument("--tokens", type=positive, metavar="N", help="tokens to use (default: all, at most 16384)")


def _run(options: argparse.Namespace) -> int:
    with importing():
        from flashclient.calibration.evaluate import TOKENS_DEFAULT, calibrated_mode, evaluate_exact, evaluate_lossy
        from flashclient.calibration.sequences import check_text

    check_text(options.text)
    progress = sys.stderr.isatty()
    with open_client(options, mode="exact") as client:
        result = evaluate_exact(client.loaded, sequences_of(client.loaded, options, TOKENS_DEFAULT), progress)
        mode = calibrated_mode(client.loaded)
    if mode is not None:
        with open_client(options, mode=mode) as client:
            evaluate_lossy(client.loaded, result, progress)
    say(json.dumps(result.as_dict()) if options.json else result.table())
    return 0
