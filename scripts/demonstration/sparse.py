"""The demo's second part: the small ReLU model in scripts/models, in predict mode and with a draft model.

It has its own store, so that the daemon's memory can be half of this model's FFN weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from demonstration.serving import dram_for_half, facts, ffn_bytes, run, serving
from flashclient import FlashClient
from flashclient.generation.stats import Stats
from weightd.sizes import format_size
from weightd.store.store import Store

MODELS = Path(__file__).parents[1] / "models"
MODEL, DRAFT = "relu-6m", "relu-draft"
PROMPT = "The function returns a list of"
# The dtype of the import. A draft changes no greedy text in any dtype (tests/flashclient/generation/test_rows.py).
DTYPE = "fp32"
# Without a penalty such a small model soon repeats one phrase. The window then always holds what the next token wants.
REPETITION_PENALTY = 1.2
# Calibration takes seconds. The shares that it measures are accurate to one percentage point.
CALIBRATION_TOKENS = 16384
# This model's predictors find almost all of what fires without wanting much else.
TARGET_RECALL = 0.97


def show_sparse(folder: Path, new_tokens: int) -> None:
    """Imports, calibrates, generates with predictors, and again with a draft: the same text in fewer steps."""
    _be_quiet()
    store = folder / "sparse-store"
    if not (store.exists() and MODEL in Store.open(store).names()):
        run("weightd", "import", str(MODELS / MODEL), "--store", str(store), "--name", MODEL, "--dtype", DTYPE)
    report = _calibration(folder / "calibration.json", store)
    with (
        TemporaryDirectory(prefix="weightd-demo-") as socket_folder,
        serving(store, dram_for_half(store, MODEL), Path(socket_folder)) as address,
        FlashClient(MODEL, address=address, mode="predict") as client,
    ):
        text = client.generate(PROMPT, max_new_tokens=new_tokens, repetition_penalty=REPETITION_PENALTY)
        alone = client.stats()
        drafted_text = client.generate(
            PROMPT,
            max_new_tokens=new_tokens,
            repetition_penalty=REPETITION_PENALTY,
            assistant_model=str(MODELS / DRAFT),
        )
        drafted = client.stats()
    print(f"\n{PROMPT}{text.removeprefix(PROMPT)}\n")
    print(table(report, alone, drafted, text == drafted_text, ffn_bytes(store, MODEL)))


def _be_quiet() -> None:
    # Imported after flashclient, which sets how torch's threads wait.
    from transformers import logging as transformers_logging

    logging: Any = transformers_logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _calibration(told: Path, store: Path) -> dict[str, Any]:
    """The report of the calibration, which the first run of the demo makes."""
    if not told.exists():
        answer = run(
            *("flashclient", "calibrate", MODEL, "--store", str(store), "--text", str(MODELS / "calibration.txt")),
            *("--tokens", str(CALIBRATION_TOKENS), "--target-recall", str(TARGET_RECALL), "--json"),
        )
        told.write_text(answer)
    report: dict[str, Any] = json.loads(told.read_text())
    return report


def table(report: dict[str, Any], alone: Stats, drafted: Stats, same_text: bool, ffn: int) -> str:
    """The cost of the runs, one fact per line."""
    fired, predicted = ([layer[name] for layer in report["layers"]] for name in ("firing", "predicted"))
    whole = f"of the FFN weights' {format_size(ffn)}"
    return facts(
        [
            ("tokens/s", f"{alone.tokens_per_s:.1f}; with the draft {drafted.tokens_per_s:.1f}"),
            ("steps", f"{alone.steps}; with the draft {drafted.steps}, {'the same' if same_text else 'another'} text"),
            ("draft's tokens accepted", f"{drafted.acceptance:.0%} of {drafted.drafted_tokens}"),
            ("neurons firing", ", ".join(f"{share:.0%}" for share in fired)),
            ("neurons predicted", ", ".join(f"{share:.0%}" for share in predicted)),
            ("bytes read per token", f"{format_size(int(alone.read_bytes_per_token))} {whole}"),
            ("hit rate of the pool", f"{alone.hit_rate:.1%}"),
            ("perplexity, predicted", f"{report['quality']['loss']:+.2%} of the dense model's"),
        ]
    )
