#!/usr/bin/env -S bash -c 'PATH="$(realpath "${0%/*}/..")/.venv/bin:$PATH" exec python3 "$0" "$@"'
"""Writes client/MODELS.md: what is streamed of each type of causal language model that transformers has.

    scripts/model_table.py [--out FILE] [TYPE ...]

Each type's default configuration is derived as an import derives it. A tiny instance is saved by transformers, imported
into a store, served by a weightd whose pool holds at most half of its cells, and run by a client. Its logits and 32
greedy tokens must be those of transformers.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.processes import BenchError, Daemon, serving
from flags import FlagParser

import flashclient  # isort: skip  # noqa: F401 - before torch, so that torch's idle threads do not spin
import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from flashclient import FlashClient
from flashclient.daemon.channel import Connection
from flashclient.errors import FlashClientError, ModelError
from flashclient.generation.import_requests import answer
from flashclient.recipes.configs import read_config
from flashclient.recipes.derive import Derivation
from flashclient.recipes.ffns.site import Layer
from flashclient.recipes.ffns.tiny import model_class, one_line
from flashclient.recipes.published import published
from weightd.errors import WeightdError
from weightd.importing.convert import import_checkpoint
from weightd.planning.outline import activation_text
from weightd.serving.served_models import demand_of
from weightd.store.store import Store
from weightd_proto.weightd_pb2 import Model

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "client" / "MODELS.md"
GREEDY_TOKENS = 32
NAME = "tiny"
CHECKPOINT = "checkpoint"
TOLERANCE = 1e-3  # of the largest logit
TIMEOUT_S = 60.0
PLACES = {Layer.MODULE: "module", Layer.PARTS: "parts", Layer.EXPERTS: "experts"}

# What published checkpoints of a type have, and transformers' default configuration lacks.
PUBLISHED: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"kv_n_heads": 8, "rope_theta": 5e5, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "dots1": {
        "n_routed_experts": 128,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 1408,
    },
    "falcon_h1": {"mlp_multipliers": [0.88388, 0.5859375]},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 256,
        "indexer_budget": 2048,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
}
PUBLISHED["qwen4_exp"] = {"text_config": PUBLISHED["qwen4_exp_text"] | {"model_type": "qwen4_exp_text"}}

HEADER = """# Models

What is streamed of each type of causal language model in transformers {version}, by `scripts/model_table.py`. Each was
derived from its class's default configuration and proven: a tiny instance was imported and run with at most half of
its cells in weightd's pool, and its logits and {tokens} greedy tokens were those of transformers.

{proven} of {types} types are proven, {mixtures} of them mixtures of experts.

- *FFNs*: how many are streamed, and whether the streamed one takes the place of the whole module, of the projections
  that a larger module calls, or of a mixture's experts.
- *Resident*: the share of the weights that stays in memory with these sizes.

| Type | Class | FFNs | Activation | Resident |
|---|---|---|---|---|
"""
REFUSED = """
## Not streamed

| Type | Why |
|---|---|
"""


@dataclass(frozen=True)
class Row:
    """A type: `refusal` says why it is not streamed."""

    model_type: str
    cells: tuple[str, ...] = ()
    experts: int = 0
    refusal: str = ""


def config_of(model_type: str) -> PreTrainedConfig:
    values = CONFIG_MAPPING[model_type](**PUBLISHED.get(model_type, {})).to_dict()
    return read_config(published(values).config)


def row_of(model_type: str) -> Row:
    try:
        whole = config_of(model_type)
        found, config = model_class(whole)
        derivation = Derivation(found, config)
        split = derivation.streamed()
        refusal = _difference(derivation.tiny, whole)
    except (ModelError, FlashClientError, WeightdError, BenchError) as error:
        refusal = str(error).rpartition(f"/{CHECKPOINT}: ")[2]
    except Exception as error:  # a default configuration that its own class refuses
        refusal = one_line(error)
    if refusal:
        return Row(model_type, refusal=refusal)
    kinds = Counter(PLACES[site.place] for site in split.sites)
    ffns = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    experts = max(site.experts for site in split.sites)
    share = f"{split.resident_share:.1%}"
    return Row(model_type, (found.__name__, ffns, activation_text(split.sites[0].activation), share), experts)


def _difference(tiny: PreTrainedModel, whole: PreTrainedConfig) -> str:
    """What differs from transformers when `tiny` is imported and run with half of its cells in memory, or nothing.

    Args:
        whole: the config of the type, of which that of `tiny` may be the part for text.
    """
    with tempfile.TemporaryDirectory() as folder:
        tiny.save_pretrained(Path(folder, CHECKPOINT))
        if type(tiny.config) is not type(whole):
            whole.text_config = tiny.config
            whole.save_pretrained(Path(folder, CHECKPOINT))
        store = Store.open(Path(folder, "store"), create=True)
        record = import_checkpoint(Path(folder, CHECKPOINT), store, NAME, ask=answer)
        with _serving_half(store, record) as daemon, FlashClient(NAME, address=daemon.address, mode="exact") as client:
            streamed = client.model
            ids = torch.arange(3, 9)[None]
            with torch.no_grad():
                expected, logits = (model(input_ids=ids).logits for model in (tiny, streamed))
            if not (logits - expected).abs().max() <= TOLERANCE * expected.abs().max():
                return "its logits differ"
            return "" if _same_tokens(tiny, streamed, ids) else f"its {GREEDY_TOKENS} greedy tokens differ"


@contextmanager
def _serving_half(store: Store, record: Model) -> Iterator[Daemon]:
    """A weightd whose pool holds at most half of the cells, or as few as weightd can serve."""
    least_bytes = demand_of(record).minimum_bytes
    dram_bytes = least_bytes + record.bundles_file_bytes // 2
    slots_max = sum(layer.cells for layer in record.layers) // 2
    while True:
        with serving(store.path, dram_bytes) as daemon:
            slots = _slots(daemon)
            if slots <= slots_max or dram_bytes == least_bytes:
                yield daemon
                return
        dram_bytes = max(least_bytes, dram_bytes - (slots - slots_max) * record.bundle.cell_bytes)


def _slots(daemon: Daemon) -> int:
    """The most slots that a session can fill."""
    with FlashClient(NAME, address=daemon.address, mode="exact") as client:
        client.model(input_ids=torch.arange(3, 9)[None])
        connection = Connection(daemon.address, TIMEOUT_S)
        try:
            return int(connection.stats().models[0].slots)
        finally:
            connection.close()


def _same_tokens(tiny: PreTrainedModel, streamed: PreTrainedModel, ids: torch.Tensor) -> bool:
    """Without a cache, so that models whose caches are unusual are compared too."""
    with torch.no_grad():
        for _ in range(GREEDY_TOKENS):
            one, other = (model(input_ids=ids).logits[:, -1].argmax(-1) for model in (tiny, streamed))
            if not torch.equal(one, other):
                return False
            ids = torch.cat([ids, one[:, None]], dim=1)
    return True


def table(rows: list[Row]) -> Iterator[str]:
    proven = [row for row in rows if not row.refusal]
    yield HEADER.format(
        version=transformers.__version__,
        tokens=GREEDY_TOKENS,
        proven=len(proven),
        types=len(rows),
        mixtures=sum(row.experts > 0 for row in proven),
    )
    for row in proven:
        yield f"| {row.model_type} | {' | '.join(row.cells)} |\n"
    if len(proven) < len(rows):
        yield REFUSED
    for row in rows:
        if row.refusal:
            yield f"| {row.model_type} | {row.refusal} |\n"


def main() -> None:
    parser = FlagParser(__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("types", nargs="*", default=sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), metavar="TYPE")
    flags = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.set_num_threads(1)
    rows = []
    for model_type in flags.types:
        rows.append(row_of(model_type))
        print(model_type, rows[-1].refusal or "proven", file=sys.stderr, flush=True)
    flags.out.write_text("".join(table(rows)))


if __name__ == "__main__":
    main()
