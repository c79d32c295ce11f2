"""`flashclient calibrate`: measures which neurons fire, and publishes predictors."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flashclient.commands.arguments import add_command, positive, ranks, share
from flashclient.commands.opening import importing, open_client, sequences_of
from flashclient.errors import OptionError
from flashclient.standard_streams import say


def add(commands: Any) -> None:
    """Adds the command."""
    command = add_command(commands, "calibrate", _run, "make and publish a model's predictors")
    command.add_argument(
        "--text", required=True, type=Path, metavar="FILE", help="UTF-8 text that resembles future prompts"
    )
    command.add_argument(
        "--mode",
        choices=("predict", "threshold"),
        default="predict",
        help="predict (default): predictors of the neurons that fire. threshold: skip neurons whose gate is small, for "
        "models whose neurons are never zero",
    )
    command.add_argument(
        "--tokens",
        type=positive,
        metavar="N",
        help="tokens to use (default: all, at most 65536, in mode threshold 32768)",
    )
    command.add_argument(
        "--max-perplexity-loss",
        type=share,
        metavar="SHARE",
        help="in mode threshold: the loss of perplexity to accept, such as 2%% (the default)",
    )
    command.add_argument(
        "--target-recall", type=float, help="in mode predict: share of firing neurons to predict (default: 0.95)"
    )
    command.add_argument(
        "--ranks", type=ranks, metavar="R,R", help="in mode predict: ranks to choose from (default: 16,32,64,128)"
    )
    command.add_argument(
        "--kind",
        choices=("low_rank", "sign"),
        help="in mode predict: kind of predictor to publish (default: low_rank)",
    )
    command.add_argument("--seed", type=int, help="in mode predict: seed of the random order of training (default: 0)")


def _run(options: argparse.Namespace) -> int:
    with importing():
        from flashclient.calibration.calibrate import publish_result
        from flashclient.calibration.publishing import check_may_publish
        from flashclient.calibration.sequences import check_text

    check, tokens_max, run = _calibration_of(options)
    check_text(options.text)  # before the model is imported or opened
    with open_client(options, mode="exact") as client:
        loaded = client.loaded
        check(loaded)  # before anything is read
        check_may_publish(loaded.connection, loaded.record)
        result = run(loaded, sequences_of(loaded, options, tokens_max))
        version, name = publish_result(result, loaded).version, loaded.record.name
    if options.json:
        say(json.dumps(result.report() | {"version": version}))
    else:
        say(f"{result.table()}\npublished as version {version} of the calibration of '{name}'")
    return 0


def _calibration_of(options: argparse.Namespace) -> tuple[Callable[[Any], None], int, Callable[[Any, Any], Any]]:
    """For the mode: what refuses a model, the most tokens, and what calibrates. Raises OptionError."""
    progress = sys.stderr.isatty()
    if options.mode == "threshold":
        from flashclient.calibration import threshold

        given = _given(options, ("max_perplexity_loss",), ("target_recall", "ranks", "kind", "seed"))
        loss = given.get("max_perplexity_loss", threshold.LOSS_DEFAULT)
        thresholds = threshold.ThresholdOptions(loss, progress)
        return (
            threshold.check_no_experts,
            threshold.TOKENS_DEFAULT,
            lambda loaded, sequences: threshold.calibrate_thresholds(loaded, sequences, thresholds),
        )
    from flashclient.calibration import calibrate

    given = _given(options, ("target_recall", "ranks", "kind", "seed"), ("max_perplexity_loss",))
    wanted = calibrate.CalibrationOptions(**given, progress=progress)
    return (
        calibrate.check_sparse,
        calibrate.TOKENS_DEFAULT,
        lambda loaded, sequences: calibrate.calibrate(loaded, sequences, wanted),
    )


def _given(options: argparse.Namespace, own: Sequence[str], others: Sequence[str]) -> dict[str, Any]:
    """The flags of `own` that were given. Raises OptionError for one of `others`, which are another mode's."""
    for name in others:
        if getattr(options, name) is not None:
            raise OptionError(f"--{name.replace('_', '-')} is not a flag of --mode {options.mode}: leave it out")
    return {name: getattr(options, name) for name in own if getattr(options, name) is not None}
