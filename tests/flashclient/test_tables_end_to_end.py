"""Models whose embeddings are tables: the same bits as with resident embeddings, through a real weightd."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_checkpoint
from daemon import serving
from mortal_daemon import mortal
from multimodal_checkpoints import make_whole
from torch import Tensor
from transformers import LogitsProcessor

from flashclient import FlashClient
from flashclient.errors import AbsentWeightError, CorruptionError
from weightd.importing.convert import import_checkpoint
from weightd.serving.served_models import demand_of
from weightd.store.store import Store
from weightd_proto import weightd_pb2
from weightd_proto.tables import table_name

NEW_TOKENS = 32
TRANSPORTS = ("shm", "grpc")
RESIDENT, TABLES = "resident", "tables"
# A prompt with every token of the vocabulary: more rows than a small pool holds.
ALL_TOKENS = list(range(3, 200))
PROMPTS = ([5, 17, 200, 31, 8], [290, 3, 3, 77, 150, 9, 21, 60, 118, 4, 44, 45, 46, 47, 48, 49], [99])
CASES = {
    "llama": ["model.embed_tokens"],
    "opt": ["model.decoder.embed_positions"],
    "gemma3n": ["model.embed_tokens_per_layer"],
    "gemma4": ["model.embed_tokens_per_layer"],
}


def checkpoint_of(case: str, folder: Path) -> Path:
    if case.startswith("gemma"):
        make_whole(case, folder)
        return folder
    dtype = "bfloat16" if case == "llama" else "float32"
    return make_checkpoint(case, folder, dtype=dtype, tie_word_embeddings=case == "opt")


def import_twice(case: str, folder: Path) -> Path:
    """A store with a model as it is, and once more with all its embeddings as tables."""
    checkpoint = checkpoint_of(case, folder / "checkpoint")
    with Store.open(folder / "store", create=True) as store:
        import_checkpoint(checkpoint, store, RESIDENT)
        import_checkpoint(checkpoint, store, TABLES, tables_above_bytes=0)
    return folder / "store"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return import_twice("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def address(llama: Path) -> Iterator[str]:
    with serving(llama) as daemon:
        yield daemon.address


def record_of(store: Path) -> weightd_pb2.Model:
    with Store.open(store, readonly=True) as opened:
        return opened.model(TABLES)


def results(client: FlashClient) -> list[Tensor]:
    """Logits and tokens of single prompts and of a padded batch."""
    made = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            made.append(client.model(ids).logits)
        made.append(client.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1))
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in PROMPTS])
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    made.append(client.generate(batch, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1))
    return made


@pytest.mark.parametrize("case", CASES)
def test_logits_and_tokens_have_the_bits_of_the_resident_model(case: str, tmp_path: Path) -> None:
    store = import_twice(case, tmp_path)
    record = record_of(store)
    assert [table.layers[0].module for table in record.tables] == CASES[case]
    assert {tensor.name for tensor in record.resident}.isdisjoint(f"{module}.weight" for module in CASES[case])
    with serving(store) as daemon:
        with FlashClient(RESIDENT, address=daemon.address) as client:
            expected = results(client)
        for transport in TRANSPORTS:
            with FlashClient(TABLES, address=daemon.address, transport=transport) as client:
                for made, wanted in zip(results(client), expected, strict=True):
                    assert torch.equal(made, wanted)


def test_the_smallest_dram_is_enough_for_a_prompt_of_many_rows(llama: Path) -> None:
    record = record_of(llama)
    with Store.open(llama, readonly=True) as store:
        sums = sum(8 * layer.neurons + layer.cells for layer in store.model(RESIDENT).layers)
    dram_bytes = demand_of(record).minimum_bytes + sums  # the other model is not used, but it is in the catalog
    ids = torch.tensor([ALL_TOKENS])
    with (
        serving(llama, "--dram", str(dram_bytes)) as daemon,
        FlashClient(TABLES, address=daemon.address) as client,
        torch.no_grad(),
    ):
        small = client.model(ids).logits
        assert client.generate([PROMPTS[0]], max_new_tokens=4, eos_token_id=-1)
    with serving(llama) as daemon, FlashClient(RESIDENT, address=daemon.address) as client, torch.no_grad():
        assert torch.equal(client.model(ids).logits, small)


def test_the_embedding_looks_rows_up_and_refuses_the_rest(address: str) -> None:
    with FlashClient(TABLES, address=address) as client, FlashClient(RESIDENT, address=address) as other:
        embedding: Any = client.model.get_input_embeddings()
        resident: Any = other.model.get_input_embeddings()
        for ids in (torch.tensor([[1, 2], [300, 1]]), torch.tensor(7), torch.tensor([[]], dtype=torch.int64)):
            assert torch.equal(embedding(ids), resident(ids))
        assert isinstance(embedding, torch.nn.Embedding)
        assert client.model.device == torch.device("cpu")
        assert embedding.weight.shape == resident.weight.shape
        limits = (torch.tensor([3, 3, 9]), embedding.weight, None, 0.1, 1.0)
        limited = torch.nn.functional.embedding(limits[0], resident.weight.clone(), *limits[2:])
        assert torch.equal(torch.nn.functional.embedding(*limits), limited)
        for wrong in (320, -1):
            with pytest.raises(IndexError, match="index out of range"):
                embedding(torch.tensor([wrong]))
        for use in (lambda: embedding.weight.sum(), lambda: client.model.resize_token_embeddings(400)):
            with pytest.raises(AbsentWeightError, match=r"model\.embed_tokens"):
                use()
        assert torch.equal(embedding(torch.tensor([5])), resident(torch.tensor([5])))


class Deed(LogitsProcessor):
    """Does something once, before the fifth token is chosen."""

    def __init__(self, what: Any) -> None:
        self._what = what
        self._calls = 0

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self._calls += 1
        if self._calls == 5:
            self._what()
        return scores


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_weightd_that_was_killed_and_started_again_gives_the_same_tokens(llama: Path, transport: str) -> None:
    prompt = torch.tensor([PROMPTS[1]])
    with mortal(llama) as daemon, FlashClient(TABLES, address=daemon.address, transport=transport) as client:
        settings: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": -1}
        expected = client.generate(prompt, **settings)
        made = client.generate(prompt, logits_processor=[Deed(daemon.restart)], **settings)
    assert torch.equal(made, expected)


def test_clients_share_the_rows_that_were_read(llama: Path) -> None:
    name = table_name(TABLES, CASES["llama"][0])
    ids = torch.tensor([PROMPTS[1]])

    def misses() -> int:
        models = daemon.stub.Stats(weightd_pb2.StatsRequest()).models
        return sum(model.misses for model in models if model.name == name)

    with serving(llama, "--cold-start") as daemon, FlashClient(TABLES, address=daemon.address) as client:
        before = misses()
        with torch.no_grad():
            client.model(ids)
        read = misses()
        assert 0 < read - before <= len(set(PROMPTS[1]))
        with FlashClient(TABLES, address=daemon.address) as other, torch.no_grad():
            other.model(ids)
        assert misses() == read
        assert name not in daemon.stub.ListModels(weightd_pb2.ListModelsRequest()).names


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_damaged_row_is_an_error_that_names_it(transport: str, tmp_path: Path) -> None:
    store = import_twice("llama", tmp_path)
    row, table = 70, record_of(store).tables[0]
    place = row // table.bundle.bundles_per_cell * table.bundle.cell_bytes
    place += row % table.bundle.bundles_per_cell * table.bundle.stride_bytes
    with (store / table.name / "bundles.bin").open("r+b") as file:
        file.seek(place + 5)
        byte = file.read(1)[0]
        file.seek(place + 5)
        file.write(bytes([byte ^ 1]))
    with serving(store) as daemon, FlashClient(TABLES, address=daemon.address, transport=transport) as client:
        embedding: Any = client.model.get_input_embeddings()
        with pytest.raises(CorruptionError, match=f"model tables, table model.embed_tokens, row {row}: it differs"):
            embedding(torch.tensor([3, row]))
        embedding(torch.tensor([3, 200]))  # other cells are served
