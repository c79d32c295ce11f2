"""A client with kv_dtype="int8": equal texts alone, in a batch, with drafts and in a conversation, in less memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from checkpoints import make_config, make_model, make_tokenizer
from cut_model import FetchServer, cut

from flashclient import FlashClient
from flashclient.errors import OptionError
from flashclient.kernels.growing_cache import row_bytes
from flashclient.model import build

PROMPTS = ["hello", "the capital of the capital of the capital of", "a much longer prompt than the others"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FetchServer]:
    made = []
    for family in ("llama", "gemma3"):
        model = make_model(make_config(family))
        model.generation_config.eos_token_id = None
        made.append(cut(model, make_tokenizer(), name=family))
    with FetchServer(made, tmp_path_factory.mktemp("int8") / "socket") as started:
        yield started


def client_of(server: FetchServer, name: str, **options: str) -> FlashClient:
    return FlashClient(name, address=server.address, transport="grpc", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["llama", "gemma3"])  # gemma3 has windows of 16 tokens
def test_a_text_depends_on_its_prompt_alone(server: FetchServer, name: str) -> None:
    with client_of(server, name, kv_dtype="int8") as client:
        alone = [client.generate(prompt, max_new_tokens=30) for prompt in PROMPTS]
        stats = client.stats()
        assert client.generate(PROMPTS, max_new_tokens=30) == alone
        drafted = [client.generate(prompt, max_new_tokens=30, prompt_lookup_num_tokens=3) for prompt in PROMPTS]
        assert drafted == alone
        assert len(client.generate(PROMPTS[0], max_new_tokens=9, num_beams=3, num_return_sequences=2)) == 2
        client.tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}>"
        said = [{"role": "user", "content": "hi"}]
        said += [
            {"role": "assistant", "content": client.chat(said, max_new_tokens=5)},
            {"role": "user", "content": "?"},
        ]
        text = client.chat(said, max_new_tokens=9)
        assert text == client.generate("".join(f"[{one['content']}]" for one in said) + ">", max_new_tokens=9)
    with client_of(server, name) as client:
        client.generate(PROMPTS[-1], max_new_tokens=30)
        plain = client.stats()
        elements: int = client.model.config.head_dim
    assert (stats.kv_dtype, plain.kv_dtype) == ("int8", "plain")
    assert stats.kv_bytes * 4 * elements == plain.kv_bytes * row_bytes(elements)
    assert "MB of keys and values, int8" in stats.table()


def test_what_cannot_be_is_refused(server: FetchServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="kv_dtype='int4' is not known: use 'plain' or 'int8'"):
        client_of(server, "llama", kv_dtype="int4")
    monkeypatch.setattr(build, "use_fused_attention", lambda model, workers: 0)
    with pytest.raises(OptionError, match="kv_dtype='int8' needs attention that is native, and that of model 'llama'"):
        client_of(server, "llama", kv_dtype="int8")
    with client_of(server, "llama", kv_dtype="plain") as client:
        assert client.generate(PROMPTS[0], max_new_tokens=2)
