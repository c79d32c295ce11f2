#!/usr/bin/env -S bash -c 'PATH="$(realpath "${0%/*}/..")/.venv/bin:$PATH" exec python3 "$0" "$@"'
"""Trains the demo's ReLU model, or its draft, on documentation that Debian packages ship."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from demonstration.text import Page, read_pages
from demonstration.training import SEED, Plan, train
from flags import FlagParser
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, distributed
from torch.multiprocessing.spawn import spawn
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 4096
CONTEXT_TOKENS_MAX = 512
PAD, END = "<pad>", "</s>"
TEXT_CHARACTERS_MIN = 100_000
# The tokenizer's 4096 tokens are chosen on every fourth page. That is enough, and takes seconds.
TOKENIZER_PAGE_STRIDE = 4


def main() -> int:
    options = _parser().parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if not (options.work / "tokens.pt").exists():
        pages = read_pages(options.text_root)
        if sum(len(page.text) for page in pages) < TEXT_CHARACTERS_MIN:
            places = ", ".join(map(str, options.text_root))
            sys.exit(f"too little HTML or POD under {places}: install python3-doc and linux-doc, or pass --text-root")
        tokenizer = _tokenizer(pages, options.tokenizer or options.work / "tokenizer")
        torch.save(encode(tokenizer, [page for page in pages if not page.held_out]), options.work / "tokens.pt")
        del pages
    with TemporaryDirectory() as folder:
        meeting = Path(folder) / "workers"
        if options.workers == 1:
            _work(0, options, meeting)
        else:
            run: Any = spawn
            run(_work, (options, meeting), options.workers)
    return 0


def _work(worker: int, options: argparse.Namespace, meeting: Path) -> None:
    """One of the processes that train together."""
    torch.manual_seed(SEED)
    torch.set_num_threads(options.threads)
    if options.workers > 1:
        distributed.init_process_group("gloo", f"file://{meeting}", rank=worker, world_size=options.workers)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(options.tokenizer or options.work / "tokenizer")
    tokens = torch.load(options.work / "tokens.pt", weights_only=True, mmap=True)
    teacher = _load(options.teacher, options.device) if options.teacher else None
    model = OPTForCausalLM(config(options.hidden, options.layers, options.heads)).to(options.device)
    plan = Plan(options.steps, options.rows, options.context, options.learning_rate, options.firing, options.workers)
    if worker == 0:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(f"{parameters} parameters, {len(tokens)} tokens, {plan}", flush=True)
    train(model, tokenizer, tokens, plan, options.work / options.name, options.save_every_s, teacher, worker)


def _load(folder: Path, device: str) -> OPTForCausalLM:
    model: Any = OPTForCausalLM.from_pretrained(folder)
    return model.to(device).eval()  # type: ignore[no-any-return]


def _parser() -> FlagParser:
    parser = FlagParser(__doc__)
    parser.add_argument("--text-root", type=Path, nargs="+", default=[Path("/usr/share")], help="folders to read")
    parser.add_argument("--work", type=Path, default=Path("checkpoints-in-progress"))
    parser.add_argument("--name", default="relu-6m")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--firing", type=float, default=0.07)
    parser.add_argument("--workers", type=int, default=2, help="processes; 1 on a GPU")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--save-every-s", type=float, default=180)
    return parser


def config(hidden_size: int, layers: int, heads: int) -> OPTConfig:
    """A small OPT: tied embeddings, norm before each block, FFN four times as wide as the hidden size."""
    return OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        word_embed_proj_dim=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        ffn_dim=4 * hidden_size,
        max_position_embeddings=CONTEXT_TOKENS_MAX,
        activation_function="relu",
        do_layer_norm_before=True,
        dropout=0.0,
        attention_dropout=0.0,
        layerdrop=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )


def _tokenizer(pages: list[Page], folder: Path) -> PreTrainedTokenizerFast:
    if folder.exists():
        return PreTrainedTokenizerFast.from_pretrained(folder)  # type: ignore[no-any-return]
    byte_pairs = Tokenizer(models.BPE())
    byte_pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_pairs.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [page.text for page in pages[::TOKENIZER_PAGE_STRIDE] if not page.held_out]
    byte_pairs.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=byte_pairs, pad_token=PAD, bos_token=END, eos_token=END, model_max_length=CONTEXT_TOKENS_MAX
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerFast, pages: list[Page]) -> Tensor:
    """The pages' tokens [n] int16 on one string, in a shuffled order, each ended by `</s>`."""
    order = torch.randperm(len(pages), generator=torch.Generator().manual_seed(SEED))
    encodings = tokenizer.backend_tokenizer.encode_batch([pages[int(place)].text + END for place in order])
    return torch.cat([torch.tensor(encoding.ids, dtype=torch.int16) for encoding in encodings])


if __name__ == "__main__":
    sys.exit(main())
