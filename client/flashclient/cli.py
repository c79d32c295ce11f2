"""The command `flashclient`."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any, NoReturn

from flashclient.errors import FlashClientError, OptionError

# torch and transformers take seconds to import: a usage error or --help should not wait for them.


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise OptionError(f"{message} (see `{self.prog} --help`)")


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"'{text}' must be a whole number of at least 1")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="flashclient", description="Run large language models from flash, through a weightd.")
    commands = parser.add_subparsers(dest="command", required=True)
    generate = commands.add_parser("generate", help="continue a prompt and print the text as it comes")
    generate.add_argument("model", help="name in the store; with --store also the path of a checkpoint")
    generate.add_argument("prompt")
    where = generate.add_mutually_exclusive_group()
    where.add_argument("--address", help="of a weightd: unix:/path or host:port; default: the system service's socket")
    where.add_argument("--store", metavar="DIR", help="attach to the weightd of this store, or start a private one")
    generate.add_argument("--dram", metavar="SIZE", help="memory cap of a private weightd, such as 6.5GiB or 50%%")
    generate.add_argument("--transport", choices=("auto", "shm", "grpc"), default="auto")
    generate.add_argument("--timeout-s", type=float, default=30.0, help="how long to wait for a weightd")
    generate.add_argument("--max-new-tokens", type=_positive, metavar="N")
    generate.add_argument("--stats", action="store_true", help="print what it took on standard error")
    generate.add_argument("--json", action="store_true", help="print one object with text and statistics instead")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, 1 (failed) or 2 (usage)."""
    try:
        return _generate(_parser().parse_args(arguments))
    except FlashClientError as error:
        print(f"flashclient: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of the text has gone
        sys.stderr.close()
        return 1


def _generate(options: argparse.Namespace) -> int:
    from transformers import logging as transformers_logging

    from flashclient.client import FlashClient

    logging: Any = transformers_logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    given = {name: getattr(options, name) for name in ("address", "store", "dram", "transport", "timeout_s")}
    with FlashClient(options.model, **{name: value for name, value in given.items() if value is not None}) as client:
        lengths = {} if options.max_new_tokens is None else {"max_new_tokens": options.max_new_tokens}
        if options.json:
            text = client.generate(options.prompt, **lengths)
            print(json.dumps({"text": text, "stats": client.stats().as_dict()}))
        else:
            _print_stream(client, options.prompt, lengths)
        if options.stats:
            print(client.stats().table(), file=sys.stderr)
    return 0


def _print_stream(client: Any, prompt: str, lengths: dict[str, int]) -> None:
    for piece in client.stream(prompt, **lengths):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    sys.exit(main())
