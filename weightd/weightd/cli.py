"""The command `weightd`: serves a store, or works on one.

    weightd [serve] --store DIR ...          serves the store (weightd.serving.serve)
    weightd import SRC --store DIR [--name N] [--dtype keep|fp32|bf16|fp16|int8|int4] [--layout neuron|slab]
            [--resident-dtype plain|keep|int8|int4] [--tables-above SIZE] [--update] [--revision R] [--file F]
    weightd ls | rm NAME | verify [NAME...] --store DIR
    weightd probe SRC                        (weightd.planning.probe)
    weightd plan MODEL [--dram SIZE]         (weightd.planning.plan)
    weightd doctor --store DIR               (weightd.machine.doctor)
    weightd cert --out DIR --host NAME       (weightd.gateway.certificates)
    weightd install-service [--user]         (weightd.machine.service)
    weightd top [--address ADDR] [--tls-ca FILE [--tls-cert FILE --tls-key FILE]]     (weightd.watching.top)

The exit status is 0, 1 (failed), 2 (wrong usage) or 128 + a signal. With --json, standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

from flashclient import standard_streams
from flashclient.commands.completion import SHELLS, completion
from flashclient.commands.slips import no_command
from flashclient.interrupts import raise_again
from flashclient.standard_streams import complain, say
from weightd.errors import DaemonError, UsageError, WeightdError, described
from weightd.flags import FlagParser
from weightd.log import one_line
from weightd.sizes import format_size, parse_size
from weightd.store.store import Store
from weightd_proto import weightd_pb2
from weightd_proto.encodings import (
    COMPUTE_DTYPES,
    LAYOUTS,
    QUANTISED_DTYPES,
    RESIDENT_DTYPES,
    bundle_neurons,
    formats_of,
    layout_of,
    resident_formats_of,
)
from weightd_proto.modes import lossy_mode

Progress = Callable[[int, int], None]

# Commands with a parser of their own, imported when they are named.
MAINS = {
    "serve": "weightd.serving.serve",
    "probe": "weightd.planning.probe",
    "plan": "weightd.planning.plan",
    "doctor": "weightd.machine.doctor",
    "cert": "weightd.gateway.certificates",
    "install-service": "weightd.machine.service",
    "top": "weightd.watching.top",
}
SIGNALLED = 128  # and a signal's number: the status by which shells know what has ended a command
REMOVED_WITHIN_S = 60.0  # deleting tens of GB takes seconds
COMMANDS = ("import", "ls", "rm", "verify", *MAINS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return standard_streams.run("weightd", lambda: _main(given))


def _main(arguments: list[str]) -> int:
    try:
        return _run(arguments)
    except WeightdError as error:
        complain("weightd", one_line(str(error)))
        return error.exit_status
    except OSError as error:
        complain("weightd", one_line(described(error)))
        return 1
    except KeyboardInterrupt as interrupt:
        complain("weightd", "interrupted")
        return SIGNALLED + int(*interrupt.args or (signal.SIGINT,))


def _run(arguments: list[str]) -> int:
    # Set before gRPC is imported: otherwise its core writes its own lines to standard error, with unescaped bytes.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    match arguments:
        case ["--version", *_]:
            say(f"weightd {version('weightd')}")
            return 0
        case ["--print-completion", shell] if shell in SHELLS:
            say(completion(_whole_parser(), shell))
            return 0
        case ["--print-completion", *_]:
            raise UsageError(f"--print-completion takes one of {', '.join(SHELLS)}")
        case ["help", *command]:
            return _run([*command, "--help"])
        case [command, *rest] if command in MAINS:
            module = import_module(MAINS[command])
            raise_again()
            return int(module.main(rest))
        case []:
            return _run(["serve"])
        case [flag, *_] if flag.startswith("-") and flag not in ("-h", "--help"):
            return _run(["serve", *arguments])
    if not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        raise UsageError(no_command("weightd", arguments[0], COMMANDS))
    options = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], None] = options.run
    raise_again()
    with _ended_as_interrupted():
        run(options)
    return 0


@contextmanager
def _ended_as_interrupted() -> Iterator[None]:
    """SIGTERM, and the SIGHUP of a closing terminal, act like Ctrl-C, so that unfinished work is undone."""

    def interrupt(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second signal must not interrupt the undoing
        raise KeyboardInterrupt(number)

    ours = threading.current_thread() is threading.main_thread()
    ending = [
        number for number in (signal.SIGTERM, signal.SIGHUP) if ours and signal.getsignal(number) == signal.SIG_DFL
    ]
    for number in ending:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in ending:
            signal.signal(number, signal.SIG_DFL)


def _whole_parser() -> FlagParser:
    """With the commands that have a parser of their own."""
    parser = _parser()
    commands = next(one for one in parser._actions if isinstance(one, argparse._SubParsersAction))
    for name, module in MAINS.items():
        commands.choices[name] = import_module("weightd.serving.config" if name == "serve" else module)._parser()
    return parser


def _parser() -> FlagParser:
    parser = FlagParser(
        prog="weightd",
        allow_abbrev=False,
        usage="weightd --store DIR [...]    serves the store; see weightd --store DIR --help\n"
        "       weightd COMMAND ...          see weightd COMMAND --help",
        description="Serves models from flash.",
    )
    commands = parser.add_subparsers(required=True, prog="weightd", metavar="COMMAND")
    common = FlagParser(add_help=False, allow_abbrev=False)
    common.add_argument("--store", type=_path, required=True, metavar="DIR", help="the folder that holds the models")

    def command(name: str, run: Callable[[argparse.Namespace], None], about: str) -> FlagParser:
        added = commands.add_parser(name, parents=[common], help=about, description=about, allow_abbrev=False)
        added.set_defaults(run=run)
        return added

    adding = command("import", _import, "Imports a model from a Hugging Face folder, a .gguf file or the hub.")
    _add_import_flags(adding)
    listing = command("ls", _list, "Lists the models of a store.")
    removing = command("rm", _remove, "Deletes a model, unless somebody uses it.")
    removing.add_argument("name", metavar="NAME")
    verifying = command("verify", _verify, "Reads all stored bytes and compares them with their checksums.")
    verifying.add_argument("names", nargs="*", metavar="NAME", help="default: all models")
    for reporting in (adding, listing, verifying):
        reporting.add_argument("--json", action="store_true", help="print one JSON object")
    for touching in (adding, verifying):
        touching.add_argument(
            "--allow-buffered", action="store_true", help="use buffered I/O where the file system refuses O_DIRECT"
        )
    # _run handles these before this parser is used.
    commands.add_parser("serve", help="Serves a store; without a command, weightd does the same.")
    commands.add_parser("probe", help="Says what an import would make of a model, without writing anything.")
    commands.add_parser("plan", help="Says what a model would cost to run, before it is downloaded.")
    commands.add_parser("doctor", help="Checks this machine and says what to change.")
    commands.add_parser("cert", help="Makes TLS certificates for clients on other machines.")
    commands.add_parser("install-service", help="Installs weightd as a systemd service, of the system or your own.")
    commands.add_parser("top", help="Watches a running weightd.")
    return parser


def _add_import_flags(adding: FlagParser) -> None:
    adding.add_argument(
        "source",
        type=_source,
        metavar="SRC",
        help="the folder or .gguf file, or ORGANISATION/NAME of a model on the hub",
    )
    adding.add_argument("--revision", metavar="R", help="branch, tag or commit of a model on the hub (default: main)")
    adding.add_argument("--file", metavar="F", help="the .gguf file of a model on the hub that has several")
    adding.add_argument("--name", help="the model's name in the store (default: the name of the folder or file)")
    adding.add_argument(
        "--dtype",
        choices=("keep", *COMPUTE_DTYPES, *QUANTISED_DTYPES),
        help="dtype of the stored weights (default: keep, as they are); int8 and int4 quantise the FFNs",
    )
    adding.add_argument(
        "--layout",
        choices=LAYOUTS,
        help="slab keeps published quantised blocks, for exact mode; neuron is for predict mode, too (default: slab "
        "where --dtype keep has such blocks to keep)",
    )
    adding.add_argument(
        "--resident-dtype",
        choices=RESIDENT_DTYPES,
        help="how other matrices are stored: plain is the model's dtype, keep leaves the blocks of a .gguf file "
        "(default: keep with --dtype keep, else plain)",
    )
    adding.add_argument(
        "--activation",
        metavar="NAME",
        help="what the FFNs compute, where the configuration misleads: for example relu, or fatrelu:0.01",
    )
    adding.add_argument(
        "--tables-above",
        type=_size,
        metavar="SIZE",
        help="embeddings that are larger, and only looked up, are read from flash row by row (default: 64MiB)",
    )
    update = "import only if the store lacks the model or its source has changed; waits for a running import of it"
    adding.add_argument("--update", action="store_true", help=update)
    # A connection to a process that has loaded torch already and tries the imported model out.
    adding.add_argument("--client-fd", type=_descriptor, metavar="FD", help=argparse.SUPPRESS)
    # The terminal of the process that started the import, for notes and the progress bar.
    adding.add_argument("--progress-fd", type=_descriptor, metavar="FD", help=argparse.SUPPRESS)


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("a path cannot be empty")
    return Path(text)


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _source(text: str) -> str:
    """As it was given, because `./a/b` is a path and `a/b` may be on the hub."""
    _path(text)
    return text


def _descriptor(text: str) -> int:
    try:
        os.fstat(int(text))
    except (ValueError, OverflowError, OSError):
        raise argparse.ArgumentTypeError(f"'{text}' is not an open descriptor") from None
    return int(text)


def _import(options: argparse.Namespace) -> None:
    from weightd.checkpoint.opening import locate
    from weightd.importing.client_process import starter
    from weightd.importing.convert import import_checkpoint
    from weightd.importing.tables import TABLES_ABOVE_BYTES
    from weightd.importing.update import IMPORTED, KEPT, REPLACED, current_on_hub, update

    ask = None if options.client_fd is None else starter(options.client_fd)
    if options.update and options.file is None:
        others = (options.tables_above, options.layout, options.resident_dtype)
        wanted = (options.name, options.dtype, options.activation, *others)
        known = current_on_hub(options.source, options.revision, options.store, *wanted)
        if known is not None:
            return _say_imported(known, KEPT, options.json)
    source = locate(options.source, options.revision, options.store, options.file)  # before the store is made
    above_bytes = options.tables_above
    terminal = None if options.progress_fd is None else os.fdopen(options.progress_fd, "w")
    tell = partial(_tell, terminal)
    with Store.made(options.store) as store, _progress("importing", terminal) as progress:
        if options.update:
            model, done = update(
                source,
                store,
                options.name,
                options.dtype,
                options.allow_buffered,
                progress,
                ask=ask,
                activation=options.activation,
                tell=tell,
                tables_above_bytes=above_bytes,
                layout=options.layout,
                resident_request=options.resident_dtype,
            )
        else:
            model = import_checkpoint(
                source,
                store,
                options.name,
                options.dtype or "keep",
                options.allow_buffered,
                progress,
                ask=ask,
                activation=options.activation or "",
                tell=tell,
                tables_above_bytes=TABLES_ABOVE_BYTES if above_bytes is None else above_bytes,
                layout=options.layout or "",
                resident_request=options.resident_dtype or "",
            )
            done = IMPORTED
        address = store.served_by() if done == REPLACED else None
    if address is not None:
        try:
            _change_served(model.name, address, replaced=True)
        except DaemonError as error:
            _tell(terminal, f"{error}; it serves the former import for some minutes more")
    return _say_imported(model, done, options.json)


def _tell(terminal: TextIO | None, note: str) -> None:
    if terminal is None:
        complain("weightd", f"note: {one_line(note)}")
    else:
        print(one_line(note), file=terminal, flush=True)


def _say_imported(model: weightd_pb2.Model, done: str, as_json: bool) -> None:
    say(json.dumps(_summary(model) | {"done": done}) if as_json else f"{done} {_line(model)}")


def _list(options: argparse.Namespace) -> None:
    with Store.open(options.store, readonly=True) as store:
        models = store.models()
    if options.json:
        say(json.dumps({"models": [_summary(model) for model in models]}))
    else:
        for model in models:
            say(_line(model))


def _remove(options: argparse.Namespace) -> None:
    with Store.open(options.store) as store:
        store.model(options.name)  # an unknown name is an error of the store
        address = store.served_by()
        if address is None:
            store.remove(options.name)
    if address is not None:
        _change_served(options.name, address)


def _change_served(name: str, address: str, replaced: bool = False) -> None:
    """Asks the weightd that serves the store to remove a model.

    Args:
        replaced: the model stays. The daemon only closes older imports of it.

    Raises DaemonError with the daemon's answer.
    """
    from flashclient.daemon.channel import Connection
    from flashclient.errors import FlashClientError, OptionError

    cannot = f"cannot {'close the former' if replaced else 'remove'} {name!r}"
    try:
        connection = Connection(address, REMOVED_WITHIN_S)
        try:
            connection.remove(name, replaced)
        finally:
            connection.close()
    except OptionError as error:  # its lock file is damaged
        raise DaemonError(f"{cannot}: a weightd at {address} serves the store, stop it first") from error
    except FlashClientError as error:
        raise DaemonError(f"{cannot}: a weightd at {address} serves the store: {error}") from error


def _verify(options: argparse.Namespace) -> None:
    from weightd.store.verify import verify_model

    with Store.open(options.store, readonly=True) as store:
        results = []
        for name in options.names or store.names():
            with _progress(f"verifying {name}") as progress:
                results.append(verify_model(store, name, options.allow_buffered, progress))
    if options.json:
        say(json.dumps({"verified": [vars(result) for result in results]}))
    else:
        for result in results:
            rows = f" {result.rows} rows," if result.rows else ""
            say(f"{result.model}: {result.bundles} bundles,{rows} {result.tensors} tensors, {result.files} files whole")


def _summary(model: weightd_pb2.Model) -> dict[str, Any]:
    return {
        "name": model.name,
        "family": model.family,
        "dtype": formats_of(model),
        "resident_dtype": resident_formats_of(model),
        "quantisation_errors": _quantisation_errors(model),
        "resident_quantisation_error": max((tensor.quantisation_error for tensor in model.resident), default=0.0),
        "layers": len(model.layers),
        "neurons": sum(layer.neurons for layer in model.layers),
        "layout": layout_of(model.bundle),
        "bundle_neurons": bundle_neurons(model.bundle),
        "bundle_bytes": model.bundle.bundle_bytes,
        "ffn_bytes": model.bundles_file_bytes,
        "resident_bytes": model.resident_file_bytes,
        "tables": [_table(table) for table in model.tables],
        "source": model.source,
        "imported_unix_s": model.imported_unix_s,
        "calibration": _calibration(model.calibration),
    }


def _quantisation_errors(model: weightd_pb2.Model) -> list[float]:
    """Of each layer, or none if the import did not quantise."""
    errors = [layer.quantisation_error for layer in model.layers]
    return errors if any(errors) else []


def _table(table: weightd_pb2.Model) -> dict[str, Any]:
    (layer,) = table.layers
    return {
        "module": layer.module,
        "rows": layer.neurons,
        "row_bytes": table.bundle.bundle_bytes,
        "bytes": table.bundles_file_bytes,
    }


def _calibration(calibration: weightd_pb2.Calibration) -> dict[str, Any] | None:
    if not calibration.version:
        return None
    return {
        "version": calibration.version,
        "mode": calibration.mode,
        "lossy_mode": lossy_mode(calibration),
        "perplexity_loss": calibration.perplexity_loss,
        "published_unix_s": calibration.published_unix_s,
        "bytes": sum(file.size_bytes for file in calibration.files),
    }


def _line(model: weightd_pb2.Model) -> str:
    neurons = sum(layer.neurons for layer in model.layers)
    tables = f"tables {format_size(sum(table.bundles_file_bytes for table in model.tables))}, " if model.tables else ""
    slabs = f" in slabs of {model.bundle.slab_neurons}" if bundle_neurons(model.bundle) > 1 else ""
    errors = _quantisation_errors(model)
    error = f" (error {max(errors):.2%} in the worst layer)" if errors else ""
    of_matrices = resident_formats_of(model)
    matrices = f" ({of_matrices})" if of_matrices != model.compute_dtype else ""
    calibration = model.calibration
    calibrated = (
        f"calibrated {calibration.version}, mode {calibration.mode}" if calibration.version else "not calibrated"
    )
    return (
        f"{model.name}: {model.family} {formats_of(model)}{error}, {len(model.layers)} layers, "
        f"{neurons} neurons{slabs} of {format_size(model.bundle.bundle_bytes)}, "
        f"FFN {format_size(model.bundles_file_bytes)}, {tables}resident {format_size(model.resident_file_bytes)}"
        f"{matrices}, {calibrated}"
    )


@contextmanager
def _progress(what: str, terminal: TextIO | None = None) -> Iterator[Progress | None]:
    """A progress bar on `terminal`, or on standard error if that is a terminal."""
    terminal = terminal if terminal is not None or not sys.stderr.isatty() else sys.stderr
    if terminal is None:
        yield None
        return
    from tqdm import tqdm

    bar: tqdm[Any] | None = None  # from the first bytes on, so that what comes before them does not count

    def advance(read_bytes: int, total_bytes: int) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(desc=what, total=total_bytes, unit="B", unit_scale=True, unit_divisor=1024, file=terminal)
        bar.update(read_bytes)

    try:
        yield advance
    finally:
        if bar is not None:
            bar.close()


if __name__ == "__main__":
    sys.exit(main())
