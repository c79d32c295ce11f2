#!/usr/bin/env -S bash -c 'PATH="$(realpath "${0%/*}/..")/.venv/bin:$PATH" exec python3 "$0" "$@"'
"""Writes the trained demo models as they ship: bf16 weights, tokenizer, held-out sample, card of measured facts."""

from __future__ import annotations

import json
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import torch
from demonstration.measures import measure, windows
from demonstration.text import HELD_OUT_PERCENT, Page, read_pages
from flags import FlagParser
from train_demo_model import encode
from transformers import GenerationConfig, OPTForCausalLM, PreTrainedTokenizerFast

MODEL, DRAFT = "relu-6m", "relu-draft"
# Only texts of Python's documentation ship: its licence allows that, with a notice (PYTHON_LICENSE.txt).
SAMPLE_PAGES = "doc/python3"
SAMPLE_BYTES_MAX = 200_000
# This gives more tokens than `flashclient calibrate` uses.
CALIBRATION_BYTES_MAX = 300_000
# This many held-out tokens of all packages give three digits of perplexity.
MEASURED_TOKENS_MAX = 400_000
WHAT = {
    MODEL: "A language model for demos and tests of sparse decoding",
    DRAFT: f"The draft for speculative decoding of {MODEL}",
}
LEARNT_FROM = {MODEL: "", DRAFT: f" and the divergence from {MODEL}'s distributions"}
OPTIONS = {
    MODEL: "",
    DRAFT: f" --name {DRAFT} --layers 2 --hidden 128 --learning-rate 3e-3 \\\n"
    f"        --teacher checkpoints-in-progress/{MODEL}",
}
CARD = Path(__file__).parent / "models" / "card.template.md"


def main() -> int:
    parser = FlagParser(__doc__)
    parser.add_argument("--text-root", type=Path, nargs="+", default=[Path("/usr/share")])
    parser.add_argument("--work", type=Path, default=Path("checkpoints-in-progress"))
    parser.add_argument("--into", type=Path, default=Path(__file__).parent / "models")
    options = parser.parse_args()
    pages = read_pages(options.text_root)
    held_out = [page for page in pages if page.held_out]
    sample = excerpt(held_out, SAMPLE_BYTES_MAX)
    (options.into / "held_out.txt").write_text(sample)
    learned = [page for page in pages if not page.held_out]
    (options.into / "calibration.txt").write_text(excerpt(learned, CALIBRATION_BYTES_MAX))
    for name in (MODEL, DRAFT):
        if (options.work / name).exists():
            facts = _ship(options.work / name, options.into, sample, held_out)
            print(json.dumps({"model": name} | facts))
            facts["text"] = _sources(pages)
            (options.into / name / "MODEL_CARD.md").write_text(_card(name, facts))
    return 0


def excerpt(pages: list[Page], bytes_max: int) -> str:
    """Whole pages of Python's documentation, as many as fit. They are sorted by a hash, so that all parts occur."""
    text = ""
    for page in sorted(pages, key=lambda page: sha256(page.name.encode()).digest()):
        longer = f"{text}{page.text}\n\n"
        if page.name.startswith(SAMPLE_PAGES) and len(longer.encode()) <= bytes_max:
            text = longer
    return text


def _ship(source: Path, into: Path, sample: str, held_out: list[Page]) -> dict[str, Any]:
    """Stores the model at `source` in bf16 under `into`. Returns the measured facts."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    rows = windows(torch.tensor(tokenizer.backend_tokenizer.encode(sample).ids))
    trained: Any = OPTForCausalLM.from_pretrained(source)
    before = measure(trained, rows).perplexity
    trained.to(torch.bfloat16)
    trained.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=1, eos_token_id=1, pad_token_id=0
    )
    trained.save_pretrained(into / source.name)
    tokenizer.save_pretrained(into / source.name)
    shipped = trained.float()
    measured = measure(shipped, rows)
    everywhere = windows(encode(tokenizer, held_out)[:MEASURED_TOKENS_MAX])
    facts = {
        "parameters": sum(parameter.numel() for parameter in shipped.parameters()),
        "training": json.loads((source / "training.json").read_text()),
        "perplexity_fp32_sample": before,
        "perplexity_sample": measured.perplexity,
        "perplexity_all": measure(shipped, everywhere).perplexity,
        "firing": measured.firing,
        "sample_tokens": rows.numel(),
        "all_tokens": everywhere.numel(),
    }
    if source.name == DRAFT:
        model: Any = OPTForCausalLM.from_pretrained(into / MODEL, dtype=torch.float32)
        facts["agreement"] = measure(model, rows).agreement(measured)
    return facts


def _sources(pages: list[Page]) -> list[tuple[str, str, float]]:
    """Package, version and megabytes of text of each root; for a root that is no package, its folder's name."""
    sizes: dict[str, int] = {}
    for page in pages:
        sizes[page.root.name] = sizes.get(page.root.name, 0) + len(page.text.encode(errors="replace"))
    told = []
    for folder, size in sorted(sizes.items()):
        package, _, version = unquote(folder).removesuffix("_all").partition("_")
        told.append((package, version, size / 1e6))
    return told


def _card(name: str, facts: dict[str, Any]) -> str:
    run = facts["training"]
    trained = run["step"] * run["batch_rows"] * run["context_tokens"]
    return CARD.read_text().format(
        name=name,
        what=WHAT[name],
        parameters=f"{facts['parameters'] / 1e6:.2f} M",
        options=OPTIONS[name],
        learnt_from=LEARNT_FROM[name],
        steps=run["steps"],
        trained=f"{trained / 1e6:.1f} M",
        learning_rate=run["learning_rate"],
        firing_target=f"{run['firing_target']:.0%}",
        held_out_percent=HELD_OUT_PERCENT,
        text="\n".join(f"| {package} | {version} | {size:.1f} |" for package, version, size in facts["text"]),
        perplexity_sample=f"{facts['perplexity_sample']:.2f}",
        perplexity_fp32_sample=f"{facts['perplexity_fp32_sample']:.2f}",
        perplexity_all=f"{facts['perplexity_all']:.2f}",
        sample_tokens=facts["sample_tokens"],
        all_tokens=facts["all_tokens"],
        firing="\n".join(f"| {layer} | {share:.2%} |" for layer, share in enumerate(facts["firing"])),
        agreement=f"| next token likeliest as in {MODEL} | {facts['agreement']:.1%} |\n"
        if "agreement" in facts
        else "",
    )


if __name__ == "__main__":
    sys.exit(main())
