"""The command `flashclient`."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from flashclient import standard_streams
from flashclient.errors import FlashClientError, OptionError
from flashclient.options import Options
from flashclient.standard_streams import complain, say

# They take seconds to import: a usage error or --help should not wait for them.
PACKAGES = ("torch", "transformers")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise OptionError(f"{message}; see {self.prog} --help")


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"'{text}' must be a whole number of at least 1")
    return value


def _not_negative(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' must be a whole number of at least 0")
    return int(text)


def _text(text: str) -> str:
    """The UTF-8 that the command line holds, whatever the locale is."""
    try:
        return os.fsencode(text).decode()
    except UnicodeDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8 ({error.reason} at byte {error.start})") from error


def _percentage(text: str) -> float:
    """A share such as 2% or 0.02."""
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a share such as 2% or 0.02") from None


def _ranks(text: str) -> tuple[int, ...]:
    return tuple(_positive(one) for one in text.split(","))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="flashclient", description="Run large language models from flash, through a weightd.")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_generate(_command(commands, "generate", _generate, "continue a prompt and print the text as it comes"))
    _add_calibrate(_command(commands, "calibrate", _calibrate, "make and publish a model's predictors"))
    _add_eval(_command(commands, "eval", _eval, "compare the quality of the modes on a text"))
    return parser


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], int], purpose: str) -> Any:
    """A subcommand with the arguments that all of them take."""
    command = commands.add_parser(name, help=purpose)
    command.set_defaults(run=run)
    command.add_argument(
        "model", help="name in the store; with --store also the path of a checkpoint, or a model of the hub"
    )
    where = command.add_mutually_exclusive_group()
    where.add_argument(
        "--address",
        help="address of a weightd: unix:/path, or host:port with TLS (default: your own weightd, else the system's)",
    )
    where.add_argument("--store", metavar="DIR", help="attach to the weightd of this store, or start a private one")
    command.add_argument("--dram", metavar="SIZE", help="memory cap of a private weightd, such as 6.5GiB or 50%%")
    add_tls_flags(command)
    command.add_argument(
        "--transport", choices=("auto", "shm", "grpc"), default="auto", help="shm needs a weightd on this machine"
    )
    command.add_argument("--timeout-s", type=float, default=30.0, help="how long to wait for a weightd")
    command.add_argument("--json", action="store_true", help="print one JSON object instead")
    return command


def add_tls_flags(parser: Any) -> None:
    """--tls-ca, --tls-cert and --tls-key: the files of TlsOptions."""
    parser.add_argument("--tls-ca", metavar="FILE", help="certificate that signed the daemon's; turns TLS on")
    parser.add_argument("--tls-cert", metavar="FILE", help="certificate of this client, for a daemon that asks for one")
    parser.add_argument("--tls-key", metavar="FILE", help="private key of --tls-cert")


def _add_generate(command: Any) -> None:
    command.add_argument("prompt", type=_text, help="text to continue")
    command.add_argument(
        "--mode", default="auto", help="auto (default: as calibration decided), exact, predict or threshold"
    )
    window = "number of last tokens whose neurons stay leased (default: 4 in mode predict, 0 in mode threshold)"
    command.add_argument("--window", type=_not_negative, metavar="K", help=window)
    command.add_argument(
        "--max-new-tokens", type=_positive, metavar="N", help="number of new tokens (default: the model's own, or 256)"
    )
    command.add_argument("--stats", action="store_true", help="print statistics on standard error")


def _add_calibrate(command: Any) -> None:
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
        type=_positive,
        metavar="N",
        help="tokens to use (default: all, at most 65536, in mode threshold 32768)",
    )
    command.add_argument(
        "--max-perplexity-loss",
        type=_percentage,
        metavar="SHARE",
        help="in mode threshold: the loss of perplexity to accept, such as 2%% (the default)",
    )
    command.add_argument(
        "--target-recall", type=float, help="in mode predict: share of firing neurons to predict (default: 0.95)"
    )
    command.add_argument(
        "--ranks", type=_ranks, metavar="R,R", help="in mode predict: ranks to choose from (default: 16,32,64,128)"
    )
    command.add_argument(
        "--kind",
        choices=("low_rank", "sign"),
        help="in mode predict: kind of predictor to publish (default: low_rank)",
    )
    command.add_argument("--seed", type=int, help="in mode predict: seed of the random order of training (default: 0)")


def _add_eval(command: Any) -> None:
    command.add_argument(
        "--text", required=True, type=Path, metavar="FILE", help="UTF-8 text, other than that of the calibration"
    )
    command.add_argument("--tokens", type=_positive, metavar="N", help="tokens to use (default: all, at most 16384)")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, 1 (failed) or 2 (usage)."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # before the import: gRPC's core would write its own log lines
    return standard_streams.run("flashclient", lambda: _main(arguments))


def _main(arguments: list[str] | None) -> int:
    try:
        options = _parser().parse_args(arguments)
        _check_packages()
        status: int = options.run(options)
    except FlashClientError as error:
        complain("flashclient", in_flags(str(error)))
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    return status


def _check_packages() -> None:
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if missing:
        raise FlashClientError(f"this needs {' and '.join(missing)}: pip install 'weightd[client]'")


_KEYWORD = re.compile(
    r"\b(address|store|dram|mode|window|transport|timeout_s|tls_ca|tls_cert|tls_key|max_new_tokens)=(?=(\S?))"
)


def in_flags(text: str) -> str:
    """An error's text in one line, with the command's flags in place of the library's keyword arguments."""

    def flag(found: re.Match[str]) -> str:
        gap = " " if found[2].isalnum() or found[2] in tuple("'\"/.-") else ""
        return f"--{found[1].replace('_', '-')}{gap}"

    line = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
    return _KEYWORD.sub(flag, line)


def _client(options: argparse.Namespace, **more: Any) -> Any:
    """The FlashClient that `options` ask for."""
    names = ("address", "store", "dram", "transport", "timeout_s", "tls_ca", "tls_cert", "tls_key")
    given = {name: getattr(options, name) for name in names}
    given = {name: value for name, value in given.items() if value is not None} | more
    _check_served(options.model, Options(**given))

    from transformers import logging as transformers_logging

    from flashclient.client import FlashClient

    logging: Any = transformers_logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return FlashClient(options.model, **given)


def _check_served(model: str, options: Options) -> None:
    """Raises the errors of a weightd or a model that is not there before torch is imported."""
    from flashclient.daemon.address import default_address
    from flashclient.daemon.channel import Connection

    if options.store is not None:  # the model may have to be imported first
        return
    address = options.address or default_address(os.geteuid(), os.environ)
    connection = Connection(address, options.timeout_s, options.tls)
    try:
        options.mode_of(connection.describe(model))
    finally:
        connection.close()


def _generate(options: argparse.Namespace) -> int:
    with _client(options, mode=options.mode, window=options.window) as client:
        lengths = {} if options.max_new_tokens is None else {"max_new_tokens": options.max_new_tokens}
        if options.json:
            text = client.generate(options.prompt, **lengths)
            say(json.dumps({"text": text, "stats": client.stats().as_dict()}))
        else:
            _print_stream(client, options.prompt, lengths)
        if options.stats:
            print(client.stats().table(), file=sys.stderr)
    return 0


def _print_stream(client: Any, prompt: str, lengths: dict[str, int]) -> None:
    for piece in client.stream(prompt, **lengths):
        say(piece, end="")
    say("")


def _sequences(loaded: Any, options: argparse.Namespace, tokens_max: int) -> Any:
    """The text as token sequences for a LoadedModel."""
    from flashclient.calibration.sequences import read_sequences

    if loaded.tokenizer is None:
        raise OptionError(f"model '{loaded.record.name}' was stored without a tokenizer, so it cannot read a text")
    return read_sequences(options.text, loaded.tokenizer, loaded.context_tokens, options.tokens, tokens_max)


def _calibrate(options: argparse.Namespace) -> int:
    from flashclient.calibration.calibrate import publish_result
    from flashclient.calibration.publishing import check_may_publish
    from flashclient.calibration.sequences import check_text

    check, tokens_max, run = _calibration_of(options)
    check_text(options.text)  # before the model is imported or opened
    with _client(options, mode="exact") as client:
        loaded = client.loaded
        check(loaded)  # before anything is read
        check_may_publish(loaded.connection, loaded.record)
        result = run(loaded, _sequences(loaded, options, tokens_max))
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


def _eval(options: argparse.Namespace) -> int:
    from flashclient.calibration.evaluate import TOKENS_DEFAULT, calibrated_mode, evaluate_exact, evaluate_lossy
    from flashclient.calibration.sequences import check_text

    check_text(options.text)
    progress = sys.stderr.isatty()
    with _client(options, mode="exact") as client:
        result = evaluate_exact(client.loaded, _sequences(client.loaded, options, TOKENS_DEFAULT), progress)
        mode = calibrated_mode(client.loaded)
    if mode is not None:
        with _client(options, mode=mode) as client:
            evaluate_lossy(client.loaded, result, progress)
    say(json.dumps(result.as_dict()) if options.json else result.table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
