"""A model loaded from a weightd: what generation, calibration and evaluation run on."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from flashclient._native import Workers
from flashclient.daemon.channel import Connection
from flashclient.errors import OptionError
from flashclient.garbage import garbage_kept
from flashclient.kernels.growing_cache import GrowingCache
from flashclient.model.build import BuiltModel, build_model
from flashclient.source.bundle_source import BundleSource
from flashclient.turns import Turns
from weightd_proto import weightd_pb2
from weightd_proto.modes import KV_PLAIN, lossy_mode

# Files that hold the vocabulary of one of transformers' tokenizers. Its other files are useless without one of these.
VOCABULARY_PATTERNS = ("tokenizer.json", "*.model", "tokenizer.model.*", "vocab*", "*.tiktoken", "tekken.json")

PLACES_BESIDE_MAX = 2  # rows that an embedding of places has besides: that of OPT begins with two for padding


@dataclass(frozen=True)
class LoadedModel:
    """transformers' model and tokenizer, and the weightd that keeps its FFN weights.

    Attributes:
        connection: to the weightd.
        record: what the weightd says of the model, completed (old_records.py).
        source: of the FFNs' bundles.
        turns: code that runs the model takes a turn first.
        tokenizer: transformers' own; None where the model was stored without one.
        kv_dtype: of keys and values, one of KV_DTYPES.
    """

    connection: Connection
    record: weightd_pb2.Model
    source: BundleSource
    turns: Turns
    built: BuiltModel
    tokenizer: PreTrainedTokenizerBase | None
    kv_dtype: str = KV_PLAIN

    def new_cache(self) -> GrowingCache:
        """An empty cache of keys and values."""
        return GrowingCache(self.model.config, self.kv_dtype)

    @property
    def model(self) -> PreTrainedModel:
        return self.built.model

    @property
    def mode(self) -> str:
        """exact, predict or threshold."""
        return "exact" if self.built.steps is None else lossy_mode(self.record.calibration)

    @property
    def perplexity_loss(self) -> float:
        """Of the mode, relative, as calibration has measured it; 0 in exact mode, or if it was not stored."""
        return 0.0 if self.built.steps is None else self.record.calibration.perplexity_loss

    @property
    def context_tokens(self) -> int | None:
        """The longest sequence that the model was made for; None if its config does not say."""
        tokens: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return tokens

    @cached_property  # asked for each row of each step
    def short_tokens(self) -> int | None:
        """The longest sequence whose tokens rotate by short factors. All tokens of longer ones do by long factors.

        None where the rotation does not depend on the length (rope type longrope, arXiv 2402.13753).
        """
        rotation: dict[str, Any] = getattr(self.model.config.get_text_config(), "rope_parameters", None) or {}
        kinds = [one for one in (rotation, *rotation.values()) if isinstance(one, dict)]
        bounds = [one["original_max_position_embeddings"] for one in kinds if one.get("rope_type") == "longrope"]
        return min(bounds, default=None)

    def is_long(self, tokens: int) -> bool:
        """Whether a sequence of so many tokens rotates by long factors."""
        return self.short_tokens is not None and tokens > self.short_tokens

    @property
    def context_is_fixed(self) -> bool:
        """Whether no sequence can be longer, because the model has a learned embedding for each place in a sequence."""
        model, tokens = self.model, self.context_tokens
        tables = {module for module in model.modules() if isinstance(module, nn.Embedding)}
        tables.discard(model.get_input_embeddings())
        besides = (table.num_embeddings - tokens for table in tables) if tokens is not None else ()
        return any(0 <= rows <= PLACES_BESIDE_MAX for rows in besides)

    @contextmanager
    def taken(self) -> Iterator[None]:
        """The caller's turn with the model; afterwards nothing is leased or fetched ahead. Raises what Turns does."""
        with self.turns.taken():
            try:
                yield
            finally:
                self.built.ffn.idle()

    def placement(self, layer: int) -> NDArray[np.uint32]:
        """The neuron at each position of `layer`: [neurons] uint32."""
        return self.connection.placement(self.record, layer)


def load_model(
    connection: Connection,
    record: weightd_pb2.Model,
    source: BundleSource,
    turns: Turns,
    window: int | None,
    kv_dtype: str = KV_PLAIN,
) -> LoadedModel:
    """The model of `record`.

    Args:
        window: None for exact mode; in predict mode the tokens whose neurons are kept.
        kv_dtype: of keys and values, one of KV_DTYPES.

    Raises:
        OptionError: the model's attention cannot compute on keys and values of this dtype.
        ModelError, CalibrationError: as build_model() does.
        CorruptionError, DaemonLostError: while its files were fetched.
    """
    placement = partial(connection.placement, record)
    with tempfile.TemporaryDirectory(prefix="flashclient-") as scratch:
        folder = Path(scratch)
        connection.save_files(record, folder)
        with garbage_kept():
            tokenizer = load_tokenizer(folder)
        built = build_model(record, folder, source, placement, Workers(torch.get_num_threads()), window)
    if kv_dtype != KV_PLAIN and not built.native_attention:
        raise OptionError(
            f"kv_dtype='{kv_dtype}' needs attention that is native, and that of model '{record.name}' is not "
            f"(client/README.md, \"What is native\"): leave it out, or use '{KV_PLAIN}'"
        )
    turns.watch_passes(built.model)
    return LoadedModel(connection, built.record, source, turns, built, tokenizer, kv_dtype)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer, padding on the left; None where its files hold none, or need code from their publisher."""
    if not any(path for pattern in VOCABULARY_PATTERNS for path in folder.glob(pattern)) or _needs_code(folder):
        return None
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = _template_of_processor(folder)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:  # padding is masked: any token will do
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def _template_of_processor(folder: Path) -> str | None:
    """The chat template of a multimodal model's processor, which has a file of its own (Mistral Small 3.1)."""
    file = folder / "chat_template.json"
    values = json.loads(file.read_bytes()) if file.exists() else None
    found = values.get("chat_template") if isinstance(values, dict) else None
    return found if isinstance(found, str) else None


def _needs_code(folder: Path) -> bool:
    """Whether transformers has no class for the tokenizer. Another one would read its files and differ in silence."""
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_bytes()) if file.exists() else None
    if not isinstance(config, dict) or "AutoTokenizer" not in (config.get("auto_map") or ()):
        return False
    name = str(config.get("tokenizer_class")).removesuffix("Fast")
    return not any(hasattr(transformers, known) for known in (name, f"{name}Fast"))
