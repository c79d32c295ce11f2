"""Predict mode from a published calibration to text, through a real weightd: what changes it, and what does not."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from certificates import Authority
from checkpoints import make_checkpoint, make_config, make_model
from daemon import free_port, serving
from predictors import everything, lossy, oracle, publish_predictors
from stored_model import read_matrices
from torch import Tensor
from transformers import DynamicCache
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from flashclient import FlashClient
from flashclient.errors import CalibrationError, ModelError, OptionError
from weightd import cli
from weightd._native import EngineThread
from weightd.store.store import Store
from weightd_proto import weightd_pb2

LAYERS, HIDDEN, NEURONS = 3, 64, 640
PROMPT = [5, 17, 200, 31, 8]
PROMPTS = (PROMPT, [290, 3, 3, 77, 150, 9, 21, 60, 7, 118, 4, 44, 45, 46, 47, 48, 49, 50, 51], [99])
GREEDY: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": -1}


@dataclass
class Calibrated:
    """A store with one model, calibrated with predictors of several kinds as if it were several models."""

    store: Path
    checkpoint: Path
    names: dict[str, str]  # kind of predictors -> model

    def dram(self, share_of_ffn: float, sessions: int = 1) -> int:
        """The --dram with a pool for this share of one model's FFN cells, or the smallest possible."""
        model = Store.open(self.store).model(self.names["lossy"])
        cells = sum(layer.cells for layer in model.layers)
        neurons = sum(layer.neurons for layer in model.layers)
        predictors = max(file.size_bytes for file in model.calibration.files)
        resident = model.resident_file_bytes + 2 * (predictors // 4096 + 1) * 4096
        least = EngineThread.minimum_dram_bytes(resident, model.bundle.cell_bytes, cells, neurons)
        cells_more = max(0, round(share_of_ffn * cells) - 6) + 6 * (sessions - 1)
        return int(least + cells_more * model.bundle.cell_bytes + 24 * neurons)


@pytest.fixture(scope="module", params=["opt", "llama"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Calibrated:
    folder = tmp_path_factory.mktemp(request.param)
    sizes: dict[str, Any] = {"layers": LAYERS, "hidden": HIDDEN, "neurons": NEURONS}
    relu = {} if request.param == "opt" else {"hidden_act": "relu"}
    checkpoint = make_checkpoint(request.param, folder / "tensors", **sizes | relu)
    names = {kind: f"{request.param}-{kind}" for kind in ("none", "lossy", "oracle", "everything")}
    for name in names.values():
        assert cli.main(["import", str(checkpoint), "--store", str(folder / "store"), "--name", name]) == 0
    model = Calibrated(folder / "store", checkpoint, names)
    with serving(model.store) as daemon:
        for kind in ("lossy", "oracle", "everything"):
            calibrate(daemon.address, model, kind)
    return model


def calibrate(address: str, model: Calibrated, kind: str) -> None:
    """Publishes predictors whose answers are known."""
    makers: dict[str, Callable[[weightd_pb2.Model], bytes]] = {
        "lossy": lossy,
        "everything": everything,
        "oracle": partial(open_all, model),
    }
    publish_predictors(address, model.names[kind], makers[kind])


def open_all(model: Calibrated, record: weightd_pb2.Model) -> bytes:
    store = Store.open(model.store)
    placements = [store.placement(record.name, layer) for layer in range(LAYERS)]
    opening = [read_matrices(store, record, layer)[0].numpy()[placements[layer]] for layer in range(LAYERS)]
    state = AutoModelForCausalLM.from_pretrained(model.checkpoint).state_dict()
    biases = [state.get(f"{layer.module}.fc1.bias") for layer in record.layers]
    by_position = [None if b is None else b.numpy()[p] for b, p in zip(biases, placements, strict=True)]
    return oracle(record, lambda layer: opening[layer], by_position)


@contextmanager
def client_of(model: Calibrated, kind: str, pool: float = 1.0, **options: Any) -> Iterator[FlashClient]:
    with (
        serving(model.store, "--dram", str(model.dram(pool))) as daemon,
        FlashClient(model.names[kind], address=daemon.address, **options) as client,
    ):
        yield client


def batch() -> dict[str, Tensor]:
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    return {"input_ids": ids, "attention_mask": mask}


def run_all(client: FlashClient) -> list[Tensor]:
    """The tokens and scores, which are compared bit for bit."""
    results = []
    greedy = GREEDY | {"max_new_tokens": 12}  # more than any window
    for prompt in PROMPTS:
        out = client.generate(torch.tensor([prompt]), **greedy, return_dict_in_generate=True, output_logits=True)
        results += [out.sequences, torch.stack(out.logits)]
    results.append(client.generate(batch(), **greedy))
    results.append(client.generate(torch.tensor([PROMPT]), **greedy, num_beams=3))
    results.append(client.generate(torch.tensor([PROMPT]), **greedy | {"use_cache": False, "max_new_tokens": 3}))
    model: Any = client.model
    with torch.no_grad():
        attended = batch()["attention_mask"].bool()  # padding is not compared
        results += [model(**batch()).logits[attended], model(torch.tensor([PROMPT])).logits]
    return results


def assert_same(runs: dict[str, list[Tensor]]) -> None:
    (first_name, first), *others = runs.items()
    for name, run in others:
        for i, (one, other) in enumerate(zip(first, run, strict=True)):
            assert torch.equal(one, other), f"{first_name} and {name} differ in {i}"


def test_an_oracle_gives_the_bits_of_exact_mode(model: Calibrated) -> None:
    runs = {}
    with serving(model.store) as daemon:
        for kind, mode in (("none", "exact"), ("oracle", "predict"), ("everything", "predict")):
            with FlashClient(model.names[kind], address=daemon.address, mode=mode) as client:
                runs[kind] = run_all(client)
                assert client.mode == client.stats().mode == mode
    assert_same(runs)


def test_pool_transport_and_window_change_nothing(model: Calibrated) -> None:
    runs = {}
    for pool, transport, window in (
        (1.0, "shm", 4), (1.0, "grpc", 4), (0.5, "shm", 1), (0.5, "shm", 8), (0.1, "shm", 4), (0.1, "shm", 0)
    ):  # fmt: skip
        with client_of(model, "lossy", pool, transport=transport, window=window) as client:
            runs[f"{pool} {transport} {window}"] = run_all(client)
    with client_of(model, "lossy", transport="grpc", window=0, pool_bytes=20_000) as client:
        runs["a tiny local pool"] = run_all(client)
    assert_same(runs)


def test_mutual_tls_over_tcp_changes_no_token(model: Calibrated, tmp_path: Path) -> None:
    authority, port = Authority(tmp_path), free_port()
    server, own = authority.sign("server"), authority.sign("client")
    tls = ["--tls-cert", str(server.cert), "--tls-key", str(server.key), "--tls-client-ca", str(authority.ca)]
    pair: dict[str, Any] = {"tls_ca": authority.ca, "tls_cert": own.cert, "tls_key": own.key}
    with serving(model.store, "--dram", str(model.dram(1.0)), "--listen", f"127.0.0.1:{port}", *tls) as daemon:
        for mode in ("exact", "predict"):
            runs = {}
            for address, given in ((daemon.address, {}), (f"dns:///localhost:{port}", pair)):
                with FlashClient(model.names["lossy"], address=address, mode=mode, **given) as client:
                    runs[address] = run_all(client)
            assert_same(runs)


def test_what_is_predicted_differs_from_exact_mode(model: Calibrated) -> None:
    """Otherwise the tests above would compare equal things."""
    with serving(model.store) as daemon:
        tokens = []
        for mode in ("predict", "exact"):
            with FlashClient(model.names["lossy"], address=daemon.address, mode=mode) as client:
                tokens.append(client.generate(torch.tensor([PROMPT]), **GREEDY))
    assert not torch.equal(*tokens)


def test_rows_of_a_batch_are_what_they_are_alone(model: Calibrated) -> None:
    with client_of(model, "lossy") as client:
        longest = max(map(len, PROMPTS))
        together = client.generate(batch(), **GREEDY)
        for row, prompt in enumerate(PROMPTS):
            alone = client.generate(torch.tensor([prompt]), **GREEDY)
            assert torch.equal(together[row, longest:], alone[0, len(prompt) :]), f"row {row}"


def test_rows_that_are_finished_change_no_other(model: Calibrated) -> None:
    with client_of(model, "lossy") as client:
        longest = max(map(len, PROMPTS))
        free = client.generate(batch(), **GREEDY)
        end = int(free[0, longest + 3])  # row 0 ends after four tokens at the latest
        stopped = client.generate(batch(), **GREEDY | {"eos_token_id": end, "pad_token_id": 0})
        read = client.stats()
        for row in range(len(PROMPTS)):
            made, expected = stopped[row, longest:].tolist(), free[row, longest:].tolist()
            length = expected.index(end) + 1 if end in expected else len(expected)
            assert made[:length] == expected[:length]
        assert read.hits + read.misses > 0


NEGATIVE = torch.tensor([[9, 2, 9, 30, 2, 41, 77, 12]])  # longer than the prompt, with the token that ends
CALLS: dict[str, dict[str, Any]] = {
    "guidance": {"guidance_scale": 1.6},
    "guidance against a prompt": {"guidance_scale": 1.6, "negative_prompt_ids": NEGATIVE, "eos_token_id": 2},
    "a prompt in chunks": {"prefill_chunk_size": 2},
    "the prompt proposes": {"prompt_lookup_num_tokens": 3},
    "early layers propose": {"assistant_early_exit": 1},
    "a static cache": {"cache_implementation": "static"},
    "several samples": {"do_sample": True, "num_return_sequences": 3, "eos_token_id": list(range(40))},
}


def test_calls_of_every_kind_are_exact_where_predictors_are(model: Calibrated) -> None:
    made: list[dict[str, Tensor]] = []
    ids = torch.tensor([PROMPT])
    with serving(model.store) as daemon:
        for kind, mode in (("none", "exact"), ("oracle", "predict")):
            with FlashClient(model.names[kind], address=daemon.address, mode=mode) as client:
                made.append({})
                for name, call in CALLS.items():
                    if "opt" in client.record.name and "assistant_early_exit" in call:
                        with pytest.raises(OptionError, match="this model cannot stop at a layer"):
                            client.generate(ids, **GREEDY | call)
                        continue
                    torch.manual_seed(1)
                    made[-1][name] = client.generate(ids, **GREEDY | call)
    for name, expected in made[0].items():
        assert torch.equal(made[1][name], expected), name


def test_what_a_prompt_comes_as_changes_nothing(model: Calibrated) -> None:
    """A prompt is exact even if the predictors are wrong, whole or in parts, as ids or as embeddings."""
    ids = torch.tensor([PROMPT])
    with client_of(model, "lossy") as client:
        expected = client.generate(ids, **GREEDY)
        streamed: Any = client.model
        assert torch.equal(streamed.generate(ids, **GREEDY), expected)
        embeds = streamed.get_input_embeddings()(ids)
        assert torch.equal(client.generate(inputs_embeds=embeds, **GREEDY), expected[:, len(PROMPT) :])
        assert torch.equal(client.generate(ids, **GREEDY, prefill_chunk_size=2), expected)
        cache = DynamicCache(config=streamed.config)
        with torch.no_grad():
            streamed.generate(ids[:, :3], past_key_values=cache, max_new_tokens=1)  # a cache of three exact tokens
        assert cache.get_seq_length() == 3
        assert torch.equal(client.generate(ids, **GREEDY, past_key_values=cache), expected)
        with pytest.raises(OptionError, match="with use_cache=False is refused in mode 'predict'"):
            client.generate(ids, guidance_scale=2.0, use_cache=False)


@pytest.mark.parametrize("kind", ["its own", "another"])
def test_a_draft_changes_the_speed_and_not_the_tokens(model: Calibrated, tmp_path: Path, kind: str) -> None:
    family = "opt" if "opt" in model.names["lossy"] else "llama"
    draft = model.checkpoint
    if kind == "another":
        draft = make_checkpoint(family, tmp_path / "draft", layers=1, hidden=32, neurons=64, seed=9)
    with client_of(model, "lossy", 0.5) as client:
        ids = torch.tensor([PROMPT])
        alone = client.generate(ids, **GREEDY)
        assert client.stats().drafted_tokens == 0
        assert torch.equal(client.generate(ids, **GREEDY, assistant_model=draft), alone)
        stats = client.stats()
        assert 0 <= stats.accepted_tokens <= stats.drafted_tokens
        assert stats.drafted_tokens > 0
        assert stats.steps + stats.accepted_tokens == stats.new_tokens == 24
        assert stats.draft_s > 0
        assert "drafted accepted" in stats.table()
        loaded = AutoModelForCausalLM.from_pretrained(draft)
        assert torch.equal(client.generate(ids, **GREEDY, assistant_model=loaded), alone)


def test_drafts_that_cannot_be_used_are_refused(model: Calibrated, tmp_path: Path) -> None:
    other = make_model(make_config("opt", vocab_size=77))
    other.save_pretrained(tmp_path / "other")
    with client_of(model, "lossy") as client:
        with pytest.raises(OptionError, match=r"has no config\.json"):
            client.generate(PROMPT, assistant_model=tmp_path)
        with pytest.raises(OptionError, match="assistant_model is a int"):
            client.generate(PROMPT, assistant_model=3)
        with pytest.raises(ModelError, match="vocabulary of 77 tokens"):
            client.generate(PROMPT, assistant_model=str(tmp_path / "other"))


def test_two_clients_at_once(model: Calibrated) -> None:
    made: dict[int, list[Tensor]] = {}

    def run(index: int, client: FlashClient) -> None:
        made[index] = [client.generate(torch.tensor([prompt]), **GREEDY) for prompt in PROMPTS]

    with serving(model.store, "--dram", str(model.dram(0.3, sessions=2))) as daemon:
        with FlashClient(model.names["lossy"], address=daemon.address, window=1) as client:
            run(0, client)
        with (
            FlashClient(model.names["lossy"], address=daemon.address) as first,
            FlashClient(model.names["lossy"], address=daemon.address, window=2) as second,
        ):
            threads = [threading.Thread(target=run, args=(1, first)), threading.Thread(target=run, args=(2, second))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert_same({str(index): run for index, run in made.items()})


def test_auto_is_what_calibration_found(model: Calibrated) -> None:
    with client_of(model, "lossy") as client:
        assert client.mode == "predict"
    with client_of(model, "none") as client:
        assert client.mode == "exact"


def test_a_window_saves_messages(model: Calibrated) -> None:
    """With a window fewer cells are requested. The daemon counts every requested cell."""
    asked = []
    with serving(model.store) as daemon:
        for window in (0, 1, 4):
            with FlashClient(model.names["lossy"], address=daemon.address, window=window) as client:
                client.generate(torch.tensor([PROMPT]), **GREEDY)
                asked.append(client.stats().hits + client.stats().misses)
    assert asked[0] > asked[1] > asked[2]


def test_a_calibration_of_another_import_is_refused(model: Calibrated, tmp_path: Path) -> None:
    with client_of(model, "lossy") as client:
        record = weightd_pb2.Model()
        record.CopyFrom(client.record)
    record.calibration.import_id = b"another import.."
    from flashclient.options import Options

    with pytest.raises(CalibrationError, match="another import of it: run `flashclient calibrate"):
        Options(mode="predict").mode_of(record)
    assert Options(mode="exact").mode_of(record) == "exact"
