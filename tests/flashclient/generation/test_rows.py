"""A row's tokens and logits depend on that row alone, bit for bit, through real clients.

Other rows of the batch, their padding, drafts, chunks of the prompt, threads and transport change nothing: in prefill
and decode, in exact and predict mode, in three dtypes, with and without sliding windows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import VOCABULARY, make_checkpoint
from daemon import Daemon, serving
from predictors import lossy, publish_predictors
from torch import Tensor

from flashclient import FlashClient
from weightd import cli

NEW_TOKENS = 6
GREEDY: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": -1}
WINDOW = {"sliding_window": 16}  # shorter than most prompts
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {  # name: family, dtype, changes of its config
    "opt-float32": ("opt", "float32", {}),
    "opt-bfloat16": ("opt", "bfloat16", {}),
    "llama-float16": ("llama", "float16", {"hidden_act": "relu"}),
    "mistral-float32": ("mistral", "float32", WINDOW),
    "mistral-bfloat16": ("mistral", "bfloat16", WINDOW),
    "qwen2-bfloat16": ("qwen2", "bfloat16", {}),
    "gemma3-float16": ("gemma3", "float16", {}),
}
LENGTHS = (1, 5, 15, 16, 17, 33, 64, 90)  # around the limits of kernels, groups and windows


@dataclass
class Served:
    """A daemon with all models, each calibrated, and their checkpoints."""

    daemon: Daemon
    checkpoints: dict[str, Path]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder, checkpoints = tmp_path_factory.mktemp("rows"), {}
    for name, (family, dtype, changes) in MODELS.items():
        checkpoints[name] = make_checkpoint(family, folder / name, dtype=dtype, neurons=600, **changes)
        assert cli.main(["import", str(checkpoints[name]), "--store", str(folder / "store"), "--name", name]) == 0
    with serving(folder / "store", "--dram", "64MiB") as daemon:
        for name in MODELS:
            publish_predictors(daemon.address, name, lossy)
        yield Served(daemon, checkpoints)


@contextmanager
def client_of(served: Served, name: str, mode: str, threads: int = 1, transport: str = "shm") -> Iterator[FlashClient]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with FlashClient(name, address=served.daemon.address, mode=mode, transport=transport) as client:
            yield client
    finally:
        torch.set_num_threads(before)


def prompt_of(index: int) -> list[int]:
    length = LENGTHS[index % len(LENGTHS)]
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(index)).tolist()


def run(client: FlashClient, indices: list[int], **arguments: Any) -> list[tuple[Tensor, Tensor]]:
    """For each prompt the new tokens, and the logits [tokens, vocabulary] that they were picked from."""
    prompts = [prompt_of(index) for index in indices]
    longest = max(map(len, prompts))
    rows = {
        "input_ids": torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts]),
        "attention_mask": torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
    }
    out = client.generate(rows, **GREEDY | arguments, return_dict_in_generate=True, output_logits=True)
    logits = torch.stack(out.logits, dim=1)
    return [(out.sequences[row, longest:], logits[row]) for row in range(len(prompts))]


def assert_same(made: list[tuple[Tensor, Tensor]], alone: dict[int, tuple[Tensor, Tensor]], rows: list[int]) -> None:
    for place, (index, (tokens, logits)) in enumerate(zip(rows, made, strict=True)):
        assert torch.equal(logits, alone[index][1]), f"logits of row {place} of {rows}"
        assert torch.equal(tokens, alone[index][0]), f"tokens of row {place} of {rows}"


@pytest.mark.parametrize("mode", ["exact", "predict"])
@pytest.mark.parametrize("name", MODELS)
def test_a_row_is_what_it_is_alone(served: Served, name: str, mode: str) -> None:
    with client_of(served, name, mode) as one, client_of(served, name, mode, threads=3, transport="grpc") as other:
        alone = {index: run(one, [index])[0] for index in range(len(LENGTHS))}
        for count in (2, 5, 17, 40):
            rows = [index * 3 % len(LENGTHS) for index in range(count)]
            assert_same(run(one if count == 5 else other, rows), alone, rows)
        assert_same(run(other, [7], prefill_chunk_size=7), alone, [7])
        assert_same(run(other, [5], use_cache=False), alone, [5])


@pytest.mark.parametrize("mode", ["exact", "predict"])
@pytest.mark.parametrize("name", MODELS)
def test_a_draft_changes_no_token(served: Served, name: str, mode: str) -> None:
    """Drafts come from the prompt, and from the model itself, whose proposals are nearly all accepted."""
    with client_of(served, name, mode) as client:
        for index in (1, 6):
            ids = torch.tensor([prompt_of(index) * 2])  # so that prompt lookup finds something
            alone = client.generate(ids, **GREEDY | {"max_new_tokens": 12})
            for draft in ({"prompt_lookup_num_tokens": 4}, {"assistant_model": served.checkpoints[name]}):
                made = client.generate(ids, **GREEDY | {"max_new_tokens": 12}, **draft)
                assert torch.equal(made, alone), f"{draft} of prompt {index}"


TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}{{ m['content'] }};{% endfor %}a:"


@pytest.mark.parametrize("mode", ["exact", "predict"])
@pytest.mark.parametrize("name", MODELS)
def test_a_turn_of_a_conversation_is_what_it_is_alone(served: Served, name: str, mode: str) -> None:
    """Its keys and values are those of the turns before, as far as the two begin alike."""
    logits: dict[str, Any] = GREEDY | {"return_dict_in_generate": True, "output_logits": True}
    with client_of(served, name, mode) as client:
        client.tokenizer.chat_template = TEMPLATE
        messages = [{"role": "user", "content": "Tell me a tale"}]
        kept = []
        for answer in ("Yo", "Once upon a time", ""):
            made = client.chat(messages, **logits)
            kept.append(client.stats().kept_tokens)
            alone = client.generate("".join(f"{m['role'][0]}{m['content']};" for m in messages) + "a:", **logits)
            assert torch.equal(made.sequences, alone.sequences)
            assert torch.equal(torch.stack(made.logits), torch.stack(alone.logits))
            text = client.tokenizer.decode(made.sequences[0, -NEW_TOKENS:])
            messages += [{"role": "assistant", "content": answer or text}, {"role": "user", "content": "Go on"}]
        assert kept[0] == 0
        assert all(kept[1:]) or "sliding_window" in MODELS[name][2] or name.startswith("gemma3")


@pytest.mark.parametrize("name", MODELS)
def test_a_pass_over_a_text_is_its_steps(served: Served, name: str) -> None:
    """The logits of each token: all at once, beside other rows, in pieces with a cache, and token after token."""
    ids = torch.tensor([prompt_of(7), prompt_of(15)])
    with client_of(served, name, "exact", threads=2) as client, torch.no_grad():
        model: Any = client.model
        whole = model(ids).logits
        assert torch.equal(model(ids[1:]).logits, whole[1:])
        for pieces in ([64, 17, 1, 8], [1] * 20 + [70], [16, 16, 16, 42]):
            cache, logits = None, []
            for piece in torch.split(ids, pieces, dim=1):
                out = model(piece, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                logits.append(out.logits)
            assert torch.equal(torch.cat(logits, dim=1), whole), f"in pieces of {pieces}"


@pytest.mark.parametrize("name", MODELS)
def test_what_torch_computes_of_a_row_is_its_own(served: Served, name: str) -> None:
    """torch computes norms, embeddings and rotary angles. An element has the same bits wherever it is in a tensor."""
    with client_of(served, name, "exact", threads=2) as client, torch.no_grad():
        model: Any = client.model
        norms = [module for module in model.modules() if "Norm" in type(module).__name__]
        assert norms
        for rows in (2, 3, 17, 40, 130):
            for norm in norms[:3]:
                width = norm.weight.shape[0]
                x = torch.randn(1, rows, width).to(model.dtype)
                together = norm(x)
                for row in (0, 1, rows // 2, rows - 1):
                    assert torch.equal(norm(x[:, row : row + 1].clone()), together[:, row : row + 1])
            rotary = getattr(model.base_model, "rotary_emb", None)
            if rotary is not None:
                kinds = getattr(rotary, "layer_types", None)
                for arguments in [{}] if kinds is None else [{"layer_type": kind} for kind in sorted(set(kinds))]:
                    position_ids = torch.stack([torch.arange(rows), torch.arange(rows) + 71])
                    together = rotary(x, position_ids, **arguments)
                    for sequence, row in ((0, rows - 1), (1, rows // 2)):
                        alone = rotary(x, position_ids[sequence : sequence + 1, row : row + 1], **arguments)
                        for one, all_of_them in zip(alone, together, strict=True):
                            assert torch.equal(one[0, 0], all_of_them[sequence, row])
