"""FlashClient over gRPC: kinds of prompts, generation arguments, streams, statistics, options, errors."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from checkpoints import VOCABULARY, make_config, make_model, make_tokenizer
from cut_model import CutModel, FetchServer, cut
from transformers import (
    DynamicCache,
    GenerationConfig,
    MaxLengthCriteria,
    PreTrainedModel,
    StaticCache,
    StoppingCriteriaList,
    TextStreamer,
)

from flashclient import FlashClient
from flashclient.client import NEW_TOKENS_DEFAULT
from flashclient.errors import (
    CalibrationError,
    CorruptionError,
    FlashClientError,
    ForkedError,
    ModelNotFoundError,
    NoDaemonError,
    OptionError,
)
from flashclient.kernels.growing_cache import GrowingCache

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def dense() -> PreTrainedModel:
    model = make_model(make_config("llama"))
    model.generation_config.eos_token_id = None  # random weights may end a text at once
    return model


@pytest.fixture(scope="module")
def parts(dense: PreTrainedModel) -> CutModel:
    return cut(dense, make_tokenizer())


@pytest.fixture
def server(parts: CutModel, tmp_path: Path) -> Iterator[FetchServer]:
    with FetchServer([parts], tmp_path / "socket") as server:
        yield server


@pytest.fixture
def client(server: FetchServer) -> Iterator[FlashClient]:
    with FlashClient("tiny", address=server.address, transport="grpc") as client:
        yield client


def not_printable() -> list[int]:
    """The tokens that are not printable ASCII; a model of random weights often picks them."""
    tokenizer = make_tokenizer()
    return [token for token in range(VOCABULARY) if not re.fullmatch("[ -~]+", str(tokenizer.decode(token)))] + [
        0,
        1,
        2,
    ]


def dense_text(dense: PreTrainedModel, prompts: list[str], **arguments: Any) -> list[str]:
    tokenizer = make_tokenizer()
    encoded = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    model: Any = dense
    sequences = model.generate(**encoded, **arguments)
    return tokenizer.batch_decode(sequences[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_new_tokens": 24},
        {"max_new_tokens": 12, "num_beams": 3},
        {"max_new_tokens": 12, "do_sample": True, "top_k": 20, "temperature": 0.7},
        {"max_new_tokens": 12, "num_beams": 3, "num_return_sequences": 2},
        {"max_new_tokens": 12, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    ],
)
def test_text_is_that_of_the_dense_model(
    client: FlashClient, dense: PreTrainedModel, arguments: dict[str, Any]
) -> None:
    torch.manual_seed(7)
    made = client.generate(PROMPT, **arguments)
    torch.manual_seed(7)
    expected = dense_text(dense, [PROMPT], **arguments)
    assert made == (expected if len(expected) > 1 else expected[0])


def test_batch_of_texts_is_that_of_the_dense_model(client: FlashClient, dense: PreTrainedModel) -> None:
    prompts = ["hello", PROMPT, "a much longer prompt than the two before it"]
    made = client.generate(prompts, max_new_tokens=16)
    assert made == dense_text(dense, prompts, max_new_tokens=16)
    assert made == [client.generate(prompt, max_new_tokens=16) for prompt in prompts]


def test_the_kind_that_is_given_comes_back(client: FlashClient) -> None:
    ids = client.tokenizer(PROMPT)["input_ids"]
    expected = client.generate(ids, max_new_tokens=5)
    assert isinstance(expected, list)
    assert expected[: len(ids)] == ids
    assert len(expected) == len(ids) + 5
    row, rows = torch.tensor(ids), torch.tensor([ids, ids])
    assert client.generate(row, max_new_tokens=5).tolist() == expected
    assert client.generate(rows, max_new_tokens=5).tolist() == [expected, expected]
    assert client.generate([ids, ids], max_new_tokens=5) == [expected, expected]
    encoded = client.tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    assert client.generate(encoded, max_new_tokens=5).tolist() == [expected]
    assert client.generate([PROMPT], max_new_tokens=5) == [client.generate(PROMPT, max_new_tokens=5)]
    output = client.generate(PROMPT, max_new_tokens=5, return_dict_in_generate=True, output_scores=True)
    assert output.sequences.tolist() == [expected]
    assert len(output.scores) == 5


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ({}, GrowingCache),
        ({"generation_config": GenerationConfig(max_new_tokens=3, use_cache=True)}, GrowingCache),  # type: ignore[no-untyped-call]
        ({"num_beams": 2, "num_return_sequences": 2}, GrowingCache),
        ({"cache_implementation": "dynamic"}, DynamicCache),
        ({"cache_implementation": "static"}, StaticCache),
        ({"generation_config": GenerationConfig(max_new_tokens=3, cache_implementation="static")}, StaticCache),  # type: ignore[no-untyped-call]
        ({"use_cache": False}, type(None)),
        ({"generation_config": GenerationConfig(max_new_tokens=3, use_cache=False)}, type(None)),  # type: ignore[no-untyped-call]
    ],
)
def test_the_cache_is_the_growing_one_unless_another_is_asked_for(
    client: FlashClient, arguments: dict[str, Any], kind: type
) -> None:
    length = {} if "generation_config" in arguments else {"max_new_tokens": 3}
    output = client.generate([5, 6, 7, 8], **arguments, **length, return_dict_in_generate=True)
    assert type(output.past_key_values) is kind


def test_a_cache_that_is_given_is_used(client: FlashClient) -> None:
    cache = DynamicCache(config=client.model.config)
    first = client.generate([5, 6, 7, 8], max_new_tokens=3, past_key_values=cache)
    assert cache.get_seq_length() == len(first) - 1
    expected = client.generate([*first, 9, 10], max_new_tokens=5)
    assert client.generate([*first, 9, 10], max_new_tokens=5, past_key_values=cache) == expected


@pytest.mark.parametrize(
    "prompt",
    [
        3,
        None,
        [],
        "",
        ["a", ""],
        [[1], []],
        [True],
        b"bytes",
        ["a", 1],
        torch.zeros(2, 2),
        torch.zeros(0, dtype=torch.long),
    ],
)
def test_other_kinds_are_refused(client: FlashClient, prompt: Any) -> None:
    with pytest.raises(OptionError, match=r"pass text|pass whole numbers|pass some text"):
        client.generate(prompt, max_new_tokens=2)


def test_stopping(client: FlashClient) -> None:
    ids = client.tokenizer(PROMPT)["input_ids"]
    criteria = StoppingCriteriaList([MaxLengthCriteria(len(ids) + 3)])
    assert len(client.generate(ids, stopping_criteria=criteria)) == len(ids) + 3
    length_max = client.model.config.max_position_embeddings
    assert len(ids) + NEW_TOKENS_DEFAULT > length_max
    assert len(client.generate(ids)) == length_max
    free = client.generate(PROMPT, max_new_tokens=30, suppress_tokens=not_printable())
    stopped = client.generate(PROMPT, max_new_tokens=30, suppress_tokens=not_printable(), stop_strings=[free[3:5]])
    assert free.startswith(stopped)
    assert stopped.endswith(free[3:5])
    assert len(stopped) < len(free)


def test_streamer(client: FlashClient, capsys: pytest.CaptureFixture[str]) -> None:
    text = client.generate(PROMPT, max_new_tokens=8, streamer=TextStreamer(client.tokenizer, skip_prompt=True))
    assert capsys.readouterr().out == text + "\n"


def test_stream(client: FlashClient) -> None:
    arguments = {"max_new_tokens": 60, "do_sample": True, "suppress_tokens": not_printable()}
    torch.manual_seed(3)
    pieces = list(client.stream(PROMPT, **arguments))
    torch.manual_seed(3)
    assert "".join(pieces) == client.generate(PROMPT, **arguments)
    assert len(pieces) > 1


def test_a_stream_may_be_left(client: FlashClient) -> None:
    stream = client.stream(PROMPT, max_new_tokens=100_000, do_sample=True, suppress_tokens=not_printable())
    next(iter(stream))
    stream.close()  # type: ignore[attr-defined]
    client.generate(PROMPT, max_new_tokens=2)
    assert client.stats().new_tokens == 2


def test_a_stream_raises_what_happens(client: FlashClient) -> None:
    with pytest.raises(OptionError, match="has no argument 'temprature'"):
        list(client.stream(PROMPT, temprature=1.0))


def test_chat(client: FlashClient) -> None:
    messages = [{"role": "user", "content": "hello"}]
    with pytest.raises(OptionError, match="has no chat template"):
        client.chat(messages)
    client.tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}>"
    assert client.chat(messages, max_new_tokens=6) == client.generate("[hello]>", max_new_tokens=6)


def test_stats(client: FlashClient, parts: CutModel) -> None:
    assert client.stats().new_tokens == 0
    client.generate(PROMPT, max_new_tokens=9)
    stats = client.stats()
    assert (stats.new_tokens, stats.steps, stats.rows) == (9, 9, 1)
    assert stats.prompt_tokens == len(client.tokenizer(PROMPT)["input_ids"])
    assert stats.read_bytes <= sum(layer.nbytes for layer in parts.bundles)
    assert stats.read_bytes > 0
    assert stats.hit_rate > 0.8
    assert 0 < stats.first_step_s < stats.seconds
    parts_s = (stats.ffn_s, stats.attention_s, stats.head_s, stats.overhead_s)
    assert min(parts_s) > 0
    assert sum(parts_s) + stats.wait_s == pytest.approx(stats.seconds)
    assert 0 < stats.overhead_share < 1
    assert (stats.mode, stats.predict_s, stats.drafted_tokens) == ("exact", 0, 0)
    assert stats.as_dict()["tokens_per_s"] == stats.tokens_per_s > 0
    assert "tokens/s" in stats.table()
    assert stats.native_layers_share == 1
    assert "100 % native" in stats.table()


def test_threads_take_turns(client: FlashClient) -> None:
    expected = {prompt: client.generate(prompt, max_new_tokens=8) for prompt in ("one", "two", "three")}
    made: dict[str, str] = {}
    threads = [
        threading.Thread(target=lambda prompt=prompt: made.update({prompt: client.generate(prompt, max_new_tokens=8)}))
        for prompt in expected
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == expected


def test_a_client_that_was_not_closed_goes_away(server: FetchServer) -> None:
    client = FlashClient("tiny", address=server.address, transport="grpc")
    client.generate("a", max_new_tokens=1)
    del client
    gc.collect()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("flashclient-fetch")]


def test_closed(server: FetchServer) -> None:
    client = FlashClient("tiny", address=server.address, transport="grpc")
    client.close()
    client.close()
    model: Any = client.model
    for generate in (client.generate, client.chat, model.generate):
        with pytest.raises(FlashClientError, match="this client is closed"):
            generate("a")


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copies_are_refused(client: FlashClient, copied: Any) -> None:
    with pytest.raises(OptionError, match="cannot be copied or sent to another process"):
        copied(client)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_forked(client: FlashClient) -> None:
    reading_end, writing_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            client.generate("a")
        except ForkedError as error:
            os.write(writing_end, str(error).encode())
        os._exit(0)
    os.close(writing_end)
    os.waitpid(pid, 0)
    with os.fdopen(reading_end) as said:
        assert said.read() == "this client was made before fork(): make a new one in the child process"
    client.generate("a", max_new_tokens=2)
    assert client.stats().new_tokens == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "fast"}, "mode='fast' is not known: use 'auto' or 'exact' or 'predict' or 'threshold'"),
        ({"device": "cuda"}, "device='cuda' is not known: use 'cpu'"),
        ({"transport": "tcp"}, "transport='tcp' is not known"),
        ({"window": -1}, "window=-1 must be a whole number of tokens from 0"),
        ({"window": 2.5}, "window=2.5 must be a whole number"),
        ({"timeout_s": 0}, "timeout_s=0 must be above 0"),
        ({"pool_bytes": -1, "transport": "grpc"}, "pool_bytes=-1 must be above 0"),
        ({"pool_bytes": 100, "transport": "grpc"}, "pool_bytes=100 is too small"),
        ({"pool_bytes": 2**20, "transport": "shm"}, r"pool_bytes= is for transport='grpc'"),
        ({"dtype": "bfloat16"}, "dtype=bfloat16 is not the stored dtype, float32"),
        ({"dtype": torch.float16}, r"dtype=torch.float16 is not the stored dtype, float32"),
        ({"dram": "1GiB"}, "dram=1GiB is for a private weightd"),
        ({"store": "/tmp"}, "address= and store= each name a weightd"),
    ],
)
def test_options_are_refused(server: FetchServer, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        FlashClient("tiny", address=server.address, **options)
    assert issubclass(OptionError, TypeError)


def test_unknown_options_are_refused(server: FetchServer) -> None:
    with pytest.raises(TypeError, match="windw"):
        FlashClient("tiny", address=server.address, windw=3)  # type: ignore[call-arg]


def test_predict_mode_needs_a_calibration(server: FetchServer) -> None:
    with pytest.raises(CalibrationError, match=r"'tiny' was never calibrated: run `flashclient calibrate tiny --text"):
        FlashClient("tiny", address=server.address, mode="predict")


def test_shared_memory_needs_a_local_daemon() -> None:
    with pytest.raises(NoDaemonError):
        FlashClient("tiny", address="localhost:1", timeout_s=2.0)


def test_the_stored_dtype_is_accepted(server: FetchServer) -> None:
    FlashClient("tiny", address=server.address, transport="grpc", dtype="float32").close()


def test_generation_arguments_are_refused(client: FlashClient) -> None:
    with pytest.raises(OptionError, match="has no argument 'max_new_token'"):
        client.generate(PROMPT, max_new_token=3)


def test_no_daemon() -> None:
    with pytest.raises(NoDaemonError, match=r"no weightd at unix:/run/weightd/none: start it with"):
        FlashClient("tiny", address="unix:/run/weightd/none")


def test_unknown_model(server: FetchServer) -> None:
    with pytest.raises(ModelNotFoundError, match="no model 'large': there is tiny"):
        FlashClient("large", address=server.address, transport="grpc")


def test_corruption_during_a_generation(client: FlashClient, server: FetchServer) -> None:
    server.failures.append((grpc.StatusCode.DATA_LOSS, "model 'tiny' layer 1 neuron 8: bytes differ"))
    with pytest.raises(CorruptionError, match="layer 1 neuron 8"):
        client.generate(PROMPT, max_new_tokens=3)
    client.generate(PROMPT, max_new_tokens=3)
    assert client.stats().new_tokens == 3


def test_a_model_without_tokenizer(dense: PreTrainedModel, tmp_path: Path) -> None:
    with (
        FetchServer([cut(dense)], tmp_path / "socket") as server,
        FlashClient("tiny", address=server.address, transport="grpc") as client,
    ):
        assert client.tokenizer is None
        assert len(client.generate([5, 6, 7], max_new_tokens=4)) == 7
        with pytest.raises(OptionError, match="stored without a tokenizer: pass input_ids"):
            client.generate("text")


def test_a_tokenizer_without_padding_token(dense: PreTrainedModel, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    with (
        FetchServer([cut(dense, tokenizer)], tmp_path / "socket") as server,
        FlashClient("tiny", address=server.address, transport="grpc") as client,
    ):
        prompts = ["hello", "a longer one"]
        made = client.generate(prompts, max_new_tokens=6)
        assert made == [client.generate(prompt, max_new_tokens=6) for prompt in prompts]


def test_torch_before_flashclient_is_warned_of() -> None:
    kept = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [sys.executable, "-c", "import torch, flashclient"]
    done = subprocess.run(command, env=kept, capture_output=True, text=True, check=True)
    assert "import flashclient first" in done.stderr


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "0"),
        ({"GOMP_SPINCOUNT": "500"}, "500"),
        ({"OMP_WAIT_POLICY": "active"}, "None"),
    ],
)
def test_idle_threads_of_torch_are_told_to_sleep(given: dict[str, str], expected: str) -> None:
    kept = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    program = "import os, sys, flashclient; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], env=kept | given, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [expected, "False"]
