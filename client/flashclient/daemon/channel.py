"""The control plane of the client: one gRPC channel, and the only place where gRPC statuses become errors."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import grpc
import grpc.experimental
import numpy as np
from numpy.typing import NDArray

from flashclient import errors
from flashclient._native import checksum
from flashclient.daemon.address import NO_TLS, TlsOptions, parse_address
from flashclient.daemon.call_threads import CalledStub, CallThreads
from flashclient.daemon.identity import IdentifiedStub
from weightd_proto import encodings, weightd_pb2, weightd_pb2_grpc
from weightd_proto.addresses import Address

# A response carries at most 1 MiB of data and a few bytes around it; a model's record grows with its layers.
MESSAGE_BYTES_MAX = 16 * 2**20
# If the daemon's machine is gone, a call fails within 30 s, whatever its timeout. weightd allows a ping every 10 s.
KEEPALIVE_MS = 20_000
KEEPALIVE_TIMEOUT_MS = 10_000
# How long a channel that cannot connect waits before it tries again, so that a restarted weightd is found soon. (gRPC's
# default: 1 to 120 s.)
RECONNECT_MIN_MS, RECONNECT_MAX_MS = 100, 500
CHANNEL_OPTIONS = [
    ("grpc.initial_reconnect_backoff_ms", RECONNECT_MIN_MS),
    ("grpc.max_reconnect_backoff_ms", RECONNECT_MAX_MS),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.enable_retries", 0),
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.http2.max_pings_without_data", 0),  # a call that waits for a slow device sends nothing for long
    # Without it each stream needs a thread that its caller starts. An interrupt (Ctrl-C) just before that leaves the
    # stream without its thread, and close() waits for it for ever. It also saves a new thread for each Fetch.
    (grpc.experimental.ChannelOptions.SingleThreadedUnaryStream, 1),
]

RETRY_S = 0.05  # the pause between attempts while the daemon is busy or restarts
# At most this much of one attempt to attach again counts as waiting. An attempt that takes longer was frozen: this
# process was stopped, or weightd was.
ATTEMPT_S = 10.0
OPEN_TIMEOUT_S = 600.0  # enough to read 100 GB of resident weights from a slow device

Result = TypeVar("Result")
logger = logging.getLogger("flashclient")


class SessionLostError(errors.DaemonLostError):
    """weightd is gone or has closed the session: reattach(), then ask again. Users see it only before a generation."""

    said = ""  # by gRPC, if it was a call


_ERROR_OF_STATUS: dict[grpc.StatusCode, type[errors.FlashClientError]] = {
    grpc.StatusCode.UNAVAILABLE: SessionLostError,
    grpc.StatusCode.CANCELLED: SessionLostError,
    grpc.StatusCode.DEADLINE_EXCEEDED: SessionLostError,  # or this process was stopped for so long
    grpc.StatusCode.NOT_FOUND: errors.ModelNotFoundError,
    grpc.StatusCode.ABORTED: errors.BusyError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.BusyError,  # of OpenSession: ShareError
    grpc.StatusCode.DATA_LOSS: errors.CorruptionError,
}


def in_arguments(text: str) -> str:
    """A text of a private weightd, with the argument `dram=` in place of the flag that the user did not type."""
    return re.sub(r"--dram\b(?!-)(?: (?=\d))?", "dram=", text)


def open_channel(address: Address, tls: TlsOptions, *more: tuple[str, int]) -> grpc.Channel:
    """A channel with `more` gRPC options. Raises OptionError for a file of `tls` that cannot be used."""
    target, options = _uri(address), [*CHANNEL_OPTIONS, *more]
    if address.local:
        options.append(("grpc.enable_http_proxy", 0))  # no proxy can reach it
    if tls.given:
        ca, cert, key = tls.read()
        return grpc.secure_channel(target, grpc.ssl_channel_credentials(ca, key, cert), options)
    return grpc.insecure_channel(target, options)


def _uri(address: Address) -> str:
    """The target as gRPC reads it: in the path of a URI, `#`, `?`, `%` and what is not ASCII have to be escaped."""
    return address.target if address.socket_path is None else f"unix:{quote(os.fsencode(address.socket_path))}"


def stub_of(channel: grpc.Channel, address: Address) -> Any:
    """The calls of weightd.v1.Weightd; over a Unix socket each carries the caller's identity."""
    stub = weightd_pb2_grpc.WeightdStub(channel)  # type: ignore[no-untyped-call]
    return stub if address.socket_path is None else IdentifiedStub(stub, address.socket_path)


def _details(error: Any) -> str:
    """gRPC's message in one line."""
    return " ".join((error.details() or "").split())


def _nobody_there(address: Address, tls: TlsOptions, said: str) -> str:
    """The error text after a first call that failed: what to try depends on the transport."""
    if address.socket_path is not None and "Permission denied" in said:
        whose = "is for the user and the group of its weightd (`ls -ld` shows them)"
        return f"cannot use {address.target}: permission denied: the socket {whose}; join the group, or pass store="
    if address.socket_path is not None:
        return f"no weightd at {address.target}: start it with `weightd --store DIR`, or pass store="
    if not tls.given:
        return f"no weightd at {address.target}, or one that needs TLS: start it, or pass tls_ca="
    return f"no weightd at {address.target}, or one of the two certificates was not accepted: {said}"


class Connection:
    """A channel to the weightd at `address`, checked to be alive.

    Args:
        address: `unix:/path` or `host:port`.
        timeout_s: how long an answer may take, the first one included, and how long a lost weightd may stay away.
        tls: for TCP; needed for another machine.
        revive: called repeatedly while the client waits for a lost weightd.
        private: whether FlashClient has started the weightd: then errors name `dram=` and not --dram.

    Raises:
        NoDaemonError: nothing answers at the address, or one of the two certificates is not accepted.
        OptionError: the address is not valid, or a file cannot be read.
    """

    def __init__(
        self,
        address: str,
        timeout_s: float,
        tls: TlsOptions = NO_TLS,
        revive: Callable[[], None] = lambda: None,
        private: bool = False,
    ) -> None:
        parsed = parse_address(address, tls)
        self.address = parsed.target
        self.timeout_s = timeout_s
        self._revive = revive
        self._private = private
        self._closed = False
        self._channel = open_channel(parsed, tls)
        self._threads = CallThreads()
        self.stub: Any = CalledStub(stub_of(self._channel, parsed), self._threads)
        try:
            self.stats()
        except SessionLostError as error:
            self.close()
            raise errors.NoDaemonError(_nobody_there(parsed, tls, error.said)) from None

    @contextmanager
    def rpc_errors(self) -> Iterator[None]:
        """Turns gRPC's errors into those of flashclient.errors, by their status. They say all that gRPC's say."""
        try:
            yield
        except grpc.RpcError as error:
            raise self._translated(error) from None
        except ValueError:  # gRPC raises it after close()
            raise self._closed_error() from None

    def _closed_error(self) -> errors.DaemonLostError:
        return errors.DaemonLostError(f"the connection to weightd at {self.address} was closed")

    def _translated(self, error: Any) -> errors.FlashClientError:
        translated = self._error_of(error)
        translated.status = error.code().name
        return translated

    def _error_of(self, error: Any) -> errors.FlashClientError:
        kind = _ERROR_OF_STATUS.get(error.code(), errors.RefusedError)
        if kind is SessionLostError and self._closed:
            return self._closed_error()
        if kind is SessionLostError:
            lost = SessionLostError(f"weightd at {self.address} does not answer: {_details(error)}")
            lost.said = _details(error)
            return lost
        return kind(self._text_of(error) or f"weightd at {self.address} refused: {error.code().name.lower()}")

    def _text_of(self, error: Any) -> str:
        text = error.details() or ""
        return in_arguments(text) if self._private else text

    def _call(self, method: Callable[..., Any], request: Any, timeout_s: float | None = None) -> Any:
        """Calls `method`, again and again while the daemon is busy."""
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        give_up_s = time.monotonic() + timeout_s
        while True:
            try:
                with self.rpc_errors():
                    return method(request, timeout=timeout_s)
            except errors.BusyError as error:
                if error.status != grpc.StatusCode.ABORTED.name or time.monotonic() > give_up_s:
                    raise
            time.sleep(RETRY_S)

    def attach_again(self, attach: Callable[[], Result], lost: SessionLostError) -> Result:
        """The result of `attach`, which is tried until weightd is back and has room, for at most timeout_s.

        The log gets one line at the start and one at the end.

        Raises:
            DaemonLostError: weightd has not come back in time.
            ShareError, BusyError: weightd is back and had no room in all that time.
        """
        logger.warning("%s; waiting up to %g s to attach again at %s", lost, self.timeout_s, self.address)
        began_s = time.monotonic()
        waited_s = 0.0
        while True:
            asked_s = time.monotonic()
            try:
                self._revive()
                self.stats(min(self.timeout_s, ATTEMPT_S))  # is it there? attaching itself may take longer
                result = attach()
            except SessionLostError as error:
                if waited_s > self.timeout_s:
                    raise errors.DaemonLostError(
                        f"weightd at {self.address} has not come back within {self.timeout_s:g} s: start it again, or "
                        "raise timeout_s="
                    ) from error
            except (errors.ShareError, errors.BusyError):
                if waited_s > self.timeout_s:
                    raise
            else:
                logger.info("attached again at %s after %.2f s", self.address, time.monotonic() - began_s)
                return result
            time.sleep(RETRY_S)
            waited_s += min(time.monotonic() - asked_s, ATTEMPT_S)

    def stats(self, timeout_s: float | None = None) -> weightd_pb2.StatsResponse:
        """The daemon's statistics. `timeout_s`: by default that of all calls."""
        answer: weightd_pb2.StatsResponse = self._call(self.stub.Stats, weightd_pb2.StatsRequest(), timeout_s)
        return answer

    def remove(self, name: str, replaced: bool = False) -> None:
        """Deletes a model from the store that the daemon serves. Raises ModelNotFoundError, RefusedError.

        Args:
            replaced: only closes imports of it that another one has replaced in the store.
        """
        self._call(self.stub.RemoveModel, weightd_pb2.RemoveModelRequest(name=name, replaced=replaced))

    def describe(self, name: str) -> weightd_pb2.Model:
        """The model's record.

        Raises:
            ModelNotFoundError: names the models of the store.
            ModelError: the model is stored in a way that this flashclient does not know.
        """
        name = os.fsencode(name).decode(errors="replace")  # a name in the store is UTF-8
        model: weightd_pb2.Model = self._call(self.stub.DescribeModel, weightd_pb2.DescribeModelRequest(name=name))
        try:
            encodings.upgrade(model)  # that of a weightd before store format 3
            encodings.check(model)
        except ValueError as error:
            raise errors.ModelError(f"cannot read model '{name}': {error}; upgrade flashclient") from error
        return model

    def open_session(
        self, model: weightd_pb2.Model, slots_wanted: int, predicts: bool = True
    ) -> weightd_pb2.OpenSessionResponse:
        """Opens a session with a share of the pool.

        Args:
            predicts: whether it gets the predictors of the newest calibration, if there is one.

        Raises:
            ShareError: the pool has no room; the text gives the numbers.
            BusyError: the daemon has too many calls.
            RefusedError: the store has another import of the model now.
        """
        request = weightd_pb2.OpenSessionRequest(
            model=model.name, slots_wanted=slots_wanted, import_id=model.import_id, without_predictors=not predicts
        )
        try:  # the first session waits until the resident weights have been read
            opened: weightd_pb2.OpenSessionResponse = self.stub.OpenSession(request, timeout=OPEN_TIMEOUT_S)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise errors.ShareError(self._text_of(error)) from None
            raise self._translated(error) from None
        return opened

    def fetch(self, request: weightd_pb2.FetchRequest, timeout_s: float | None = None) -> Iterator[bytes]:
        """Sends the request, then yields the bytes in pieces of at most 1 MiB. Waits for a busy daemon."""
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        return self._pieces(self._ask(request, timeout_s), request, timeout_s)

    def _ask(self, request: weightd_pb2.FetchRequest, timeout_s: float) -> Any:
        with self.rpc_errors():
            return self.stub.Fetch(request, timeout=timeout_s)

    def _pieces(self, responses: Any, request: weightd_pb2.FetchRequest, timeout_s: float) -> Iterator[bytes]:
        give_up = time.monotonic() + timeout_s
        given_bytes = 0
        while True:
            try:
                passed_bytes = 0  # a repeated request starts from the first byte
                with self.rpc_errors():
                    for response in responses:
                        fresh = response.data[max(0, given_bytes - passed_bytes) :]
                        passed_bytes += len(response.data)
                        given_bytes += len(fresh)
                        if fresh:
                            yield fresh
                return
            except errors.BusyError:
                if time.monotonic() > give_up:
                    raise
                time.sleep(RETRY_S)
                responses = self._ask(request, timeout_s)

    def save_files(self, model: weightd_pb2.Model, folder: Path) -> None:
        """Writes the files of the model's hf/ (configuration, tokenizer) into `folder`.

        Raises CorruptionError for a file whose bytes do not match the checksum in weightd's catalog.
        """
        for file in model.files:
            target = (folder / file.name).resolve()
            if folder.resolve() not in target.parents:
                raise errors.RefusedError(f"file '{file.name}' of model '{model.name}' would leave its folder")
            target.parent.mkdir(parents=True, exist_ok=True)
            data = b"".join(self.fetch(weightd_pb2.FetchRequest(model=model.name, file=file.name)))
            if len(data) != file.size_bytes or checksum(np.frombuffer(data, np.uint8)) != file.checksum:
                raise errors.CorruptionError(
                    f"model {model.name}, file hf/{file.name}: the bytes received do not match its checksum; try "
                    "again, and if that fails too, check the network and the memory of both machines"
                )
            target.write_bytes(data)

    def placement(self, model: weightd_pb2.Model, layer: int) -> NDArray[np.uint32]:
        """The neuron at each position of `layer`: [neurons] uint32."""
        data = b"".join(self.fetch(weightd_pb2.FetchRequest(model=model.name, placement_of=layer)))
        order, neurons = np.frombuffer(data, "<u4"), encodings.bundle_neurons(model.bundle)
        if neurons > 1:  # the order is that of slabs
            order = np.add.outer(order * np.uint32(neurons), np.arange(neurons, dtype=np.uint32)).reshape(-1)
        return order

    def close(self) -> None:
        """Closes the channel and ends every call on it, for which no other thread waits to attach again."""
        self._closed = True
        self._threads.call(self._channel.close)
        self._threads.close()
