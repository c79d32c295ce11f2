"""FlashClient: a transformers model whose FFN weights stay with a weightd."""

from __future__ import annotations

import atexit
import os
import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from transformers import PreTrainedModel

from flashclient.daemon.address import default_address
from flashclient.daemon.channel import Connection
from flashclient.daemon.first_import import import_if_new
from flashclient.daemon.private import attach_or_start, revive
from flashclient.errors import OptionError
from flashclient.generation.chat import conversation
from flashclient.generation.generate import NEW_TOKENS_DEFAULT, Generator
from flashclient.generation.import_requests import answering
from flashclient.generation.kept_cache import KeptCache
from flashclient.generation.prompts import encode, require_tokenizer
from flashclient.generation.stats import Stats
from flashclient.generation.texts import TextStream
from flashclient.model.loaded import load_model
from flashclient.options import Options
from flashclient.source.bundle_source import BundleSource
from flashclient.source.grpc_chunks import GrpcSource
from flashclient.source.ring import RingSource
from flashclient.standard_streams import fill as fill_standard_streams
from flashclient.torch_state import on_cpu
from flashclient.turns import Turns
from weightd_proto import weightd_pb2
from weightd_proto.modes import KV_PLAIN


class FlashClient:
    """Generates text with a model of a weightd's store.

        with FlashClient("gemma-3-270m", store="/var/lib/weights") as client:
            print(client.generate("The capital of France is", max_new_tokens=20))

    Several threads may use one client: their generations run one after the other. A forked child may not use it.

    Args:
        model: a name in the store. With store= also the path of a checkpoint: it is imported on first use, and again
            when it has changed. Its name in the store is that of its folder, or of its file without the extension. Or
            ORGANISATION/NAME of a model on the Hugging Face hub: it is taken from the hub's cache, or downloaded, and
            imported on first use; `weightd import --update` takes a newer revision.
        address: of a weightd: `unix:/path`, or for TCP `host:port` or `dns:///host:port`. Default: the socket of the
            user's own weightd, or else of the system's service. TCP to another machine needs TLS.
        store: folder of a store. The client attaches to the weightd that serves it, or starts a private one, which ends
            with the last of this user's clients that attached by store=.
        dram: memory cap of a private weightd, in bytes or as `6.5GiB` or `50%`.
        mode: "exact" computes every neuron. "predict" computes those that the model's predictors expect to fire; the
            loss of quality is small, and calibration has measured it. "threshold" skips those whose gate is small; the
            loss is at most what calibration was told. "auto" takes "predict" or "exact", what calibration found best,
            and "exact" without a calibration.
        window: in modes "predict" and "threshold", the number of last tokens whose neurons stay leased. It does not
            change the result. Default: 4 in mode "predict"; 0 in mode "threshold", where the neurons of a few tokens
            are nearly all.
        device: "cpu".
        dtype: only the stored dtype is accepted; another would need private copies of shared weights.
        transport: "shm" computes on the daemon's pool, "grpc" on a local one; "auto" takes "shm" on a Unix socket.
        timeout_s: how long to wait for a daemon, at the start and when it is lost. If weightd comes back in that time,
            a generation goes on with the same tokens. A private weightd is started again.
        pool_bytes: size of the local pool of transport "grpc"; by default what the FFNs need, at most 256 MiB.
        tls_ca: PEM file of the certificate that signed the daemon's; turns TLS on.
        tls_cert, tls_key: PEM files of this client's certificate and key, for a daemon with --tls-client-ca.
        kv_dtype: of keys and values. "plain" is the dtype of the model. "int8" takes and reads about half as much, at a
            small loss (client/README.md); a model whose attention is not native is refused.

    Raises:
        OptionError, NoDaemonError, StartError, ModelNotFoundError, ModelError, CalibrationError, ShareError: see
            flashclient.errors.

    Attributes:
        model: transformers' own model; its FFNs stream their weights.
        tokenizer: transformers' own; None where the model was stored without one.
        clock: where the time of all forward passes went; stats() is about the last generation.
        loaded: what calibration and evaluation take (flashclient.calibration).
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        address: str | None = None,
        store: str | os.PathLike[str] | None = None,
        dram: str | int | None = None,
        mode: str = "auto",
        window: int | None = None,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype | None = None,
        transport: str = "auto",
        timeout_s: float = 30.0,
        pool_bytes: int | None = None,
        tls_ca: str | os.PathLike[str] | None = None,
        tls_cert: str | os.PathLike[str] | None = None,
        tls_key: str | os.PathLike[str] | None = None,
        kv_dtype: str = KV_PLAIN,
    ) -> None:
        fill_standard_streams()
        tls = (tls_ca, tls_cert, tls_key)
        self._options = Options(
            address, store, dram, mode, window, str(device), dtype, transport, timeout_s, pool_bytes, *tls, kv_dtype
        )
        with ExitStack() as opened:
            self._open(os.fspath(model), opened)
            self._close = weakref.finalize(self, _close_in, os.getpid(), opened.pop_all())
        _close_at_exit(self._turns, self._close)

    def _open(self, name: str, opened: ExitStack) -> None:
        name, address, private = self._find_daemon(name, opened)
        connection = Connection(address, self._options.timeout_s, self._options.tls, partial(revive, address), private)
        record = connection.describe(name)
        self._options.check_dtype(record.compute_dtype)
        window = self._options.window_of(self._options.mode_of(record))
        predicts = window is not None
        source = self._open_source(connection, record, address, predicts)
        self._turns = Turns()
        opened.callback(self._turns.await_exit)
        opened.callback(source.close)
        opened.callback(connection.close)  # before the source: it ends the calls that the source would wait for
        self.loaded = load_model(connection, record, source, self._turns, window, self._options.kv_dtype)
        opened.callback(self._turns.close)
        self.model: PreTrainedModel = self.loaded.model
        self.tokenizer: Any = self.loaded.tokenizer
        self.clock = self.loaded.built.ffn.clock
        self._generator = Generator(self.loaded)
        self._conversation = KeptCache()

    def _find_daemon(self, name: str, opened: ExitStack) -> tuple[str, str, bool]:
        """The model's name in the store, the address of the weightd that serves it, and whether it is a private one."""
        if self._options.store is None:
            return name, self._options.address or default_address(os.geteuid(), os.environ), False
        store = Path(self._options.store).resolve()
        name = import_if_new(store, name, answering())
        address, daemon = attach_or_start(store, self._options.dram, self._options.timeout_s)
        if daemon is not None:
            opened.callback(daemon.stop)
        return name, address, daemon is not None

    def _open_source(
        self, connection: Connection, record: weightd_pb2.Model, address: str, predicts: bool
    ) -> BundleSource:
        if not self._options.uses_shared_memory(address):
            return GrpcSource(connection, record, pool_bytes=self._options.pool_bytes)
        if self._options.pool_bytes is not None:
            raise OptionError("pool_bytes= is for transport='grpc': over shared memory the pool is the daemon's")
        return RingSource(connection, record, predicts)

    @on_cpu()
    def generate(self, prompt: Any = None, **arguments: Any) -> Any:
        """Continues a prompt, with any argument of transformers' generate().

        `client.model.generate()` does the same with transformers' own inputs and outputs. client/README.md lists every
        argument: whether it works, and if not, why.

        Args:
            prompt: a text or a list of texts; input_ids as a tensor, array, list, or list of lists of any lengths; or a
                tokenizer's output. None with input_ids= or inputs_embeds= instead. If a text already begins with the
                tokenizer's first token, that token is not added again.
            arguments: assistant_model is a transformers model or the path of a small checkpoint; it is held in memory
                and proposes tokens. If no argument and no generation config sets a length, 256 new tokens are made.

        Returns:
            The same kind as the prompt. For text, the new text only. For ids, as in transformers, all ids, those of the
            prompt included. A list with num_return_sequences; transformers' own output with
            return_dict_in_generate=True.

        Raises:
            OptionError: an unknown argument or kind of prompt, or one that cannot work; before anything is computed.
            DaemonLostError, CorruptionError: while streaming the weights.
        """
        with self._turns.taken():  # for encoding too: a tokenizer serves one thread at a time
            return self._generator.answer(encode(prompt, arguments, self.tokenizer), arguments)

    def stream(self, prompt: Any = None, **arguments: Any) -> Iterator[str]:
        """Yields the new text piece by piece; together the pieces are what generate() returns. One sequence, no beams.

        Args:
            prompt, arguments: those of generate().
        """
        self._turns.check()
        tokenizer = require_tokenizer(self.tokenizer, "its ids to generate()")
        return TextStream(tokenizer).pieces(self.generate, prompt, arguments)

    @on_cpu()
    def chat(self, messages: Any, *, stream: bool = False, **arguments: Any) -> Any:
        """The model's answer to a conversation, formatted by the model's chat template.

        The client keeps the keys and values of the last conversation. So a turn that continues it computes only what is
        new, and gives the same text as it would alone.

        Args:
            messages: a user's text, or [{"role": ..., "content": ...}, ...]; or a list of such lists.
            stream: give the answer piece by piece, as stream() does.
            arguments: those of generate(); tools, documents, chat_template, add_generation_prompt and
                continue_final_message of a tokenizer's apply_chat_template(); and names that the template uses, such
                as enable_thinking.

        Returns:
            The new text; a list of texts for several conversations or with num_return_sequences. With stream=True, an
            iterator of pieces of the text.

        Raises:
            OptionError: as generate(); or the model has no chat template, or the template refuses the messages.
        """
        if stream:
            self._turns.check()
            tokenizer = require_tokenizer(self.tokenizer, "its ids to generate()")
            return TextStream(tokenizer).pieces(self.chat, messages, arguments)
        with self._turns.taken():
            tokenizer = require_tokenizer(self.tokenizer, "its ids to generate()")
            prompt, rest = conversation(tokenizer, messages, arguments, self._generator.known)
            return self._generator.answer(prompt, rest, self._conversation)

    def stats(self) -> Stats:
        """Statistics of the last generation."""
        return self._generator.stats

    @property
    def mode(self) -> str:
        """The mode that the client runs in: "exact", "predict" or "threshold"."""
        return self.loaded.mode

    @property
    def record(self) -> weightd_pb2.Model:
        """The daemon's record of the model."""
        return self.loaded.record

    def close(self) -> None:
        """Ends the session and a private weightd, after a running generation. May be called twice."""
        with self._turns.last():
            self._close()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise OptionError("a FlashClient cannot be copied or sent to another process: make one there, which shares all")

    def __enter__(self) -> FlashClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _close_in(owner_pid: int, opened: ExitStack) -> None:
    """Closes nothing in a forked child: sockets, threads and daemon are its parent's."""
    if os.getpid() == owner_pid:
        opened.close()


# Turns and finalizer of every open client. weakref's own exit handler cannot close them: at exit, other threads must be
# told before any client is closed.
_open_clients: list[tuple[Turns, weakref.finalize[..., Any]]] = []


def _close_at_exit(turns: Turns, close: weakref.finalize[..., Any]) -> None:
    if not _open_clients:
        atexit.unregister(_exit)
        atexit.register(_exit)
    _open_clients[:] = [(one, closing) for one, closing in _open_clients if closing.alive] + [(turns, close)]
    close.atexit = False


def _exit() -> None:
    for turns, _ in _open_clients:
        turns.exit()
    for _, close in _open_clients:
        close()


__all__ = ["NEW_TOKENS_DEFAULT", "FlashClient"]
