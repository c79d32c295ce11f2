"""Prompts that begin with tokens of earlier ones compute, bit for bit, what they compute alone."""

from __future__ import annotations

import os
import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import VOCABULARY, make_config, make_model
from cut_model import clients_of, cut

from flashclient import FlashClient
from flashclient.batching.batch import feed
from flashclient.batching.kept_file import NAME, PAGE_BYTES, KeptFile
from flashclient.batching.kept_prefixes import KeptPrefixes
from flashclient.kernels.growing_cache import GrowingCache
from weightd_proto.modes import KV_INT8, KV_PLAIN

KINDS = {"llama": "float32", "gemma3": "float32", "opt": "bfloat16"}  # gemma3 has windows of 16 tokens


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, FlashClient]]:
    cuts = [cut(make_model(make_config(family), dtype), name=family) for family, dtype in KINDS.items()]
    with clients_of(cuts, tmp_path_factory.mktemp("prefixes")) as made:
        yield made


def filled(model: Any, tokens: list[int]) -> GrowingCache:
    cache = GrowingCache(model.config)
    feed(model, [tokens], cache, [0])
    return cache


def conversations(chance: random.Random) -> list[list[int]]:
    """Prompts that have beginnings in common."""
    made: list[list[int]] = [[]]
    for _ in range(40):
        start = chance.choice(made)
        more = [chance.randrange(3, VOCABULARY) for _ in range(chance.randint(1, 30))]
        made.append(start[: chance.randint(0, len(start))] + more)
    return made[1:]


@contextmanager
def file_of(folder: Path, pages: int) -> Iterator[KeptFile]:
    file = KeptFile(folder, pages * PAGE_BYTES)
    try:
        yield file
    finally:
        file.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("bound", "pages", "kv_dtype"),
    [(10_000, 0, KV_PLAIN), (150, 0, KV_PLAIN), (150, 7, KV_PLAIN), (150, 1000, KV_PLAIN), (150, 7, KV_INT8)],
)
def test_what_is_kept_changes_no_bit(
    clients: dict[str, FlashClient], kind: str, bound: int, pages: int, kv_dtype: str, tmp_path: Path
) -> None:
    model, chance = clients[kind].model, random.Random(bound + pages)
    with file_of(tmp_path, pages) as file:
        kept = KeptPrefixes(model.config, bound, file, kv_dtype)
        reused = reuse(model, kept, bound, chance, kv_dtype)
        assert reused > 50
        assert (kept.fetched_tokens > 0) == (pages > 0)
        assert file.used_bytes <= pages * PAGE_BYTES
        kept.bound(0)
        for prompt in conversations(random.Random(bound + pages)):
            kept.fetch(prompt, len(prompt))
        assert kept.tokens == 0


def reuse(model: Any, kept: KeptPrefixes, bound: int, chance: random.Random, kv_dtype: str) -> int:
    reused = 0
    for prompt in conversations(chance):
        kept.fetch(prompt, len(prompt) - 1)
        length = kept.usable(prompt, len(prompt) - 1)
        cache = kept.begin([prompt], [length])
        logits = feed(model, [prompt[length:]], cache, [length])
        assert torch.equal(logits, feed(model, [prompt], GrowingCache(model.config, kv_dtype), [0]))
        kept.keep(prompt, cache, 0)
        assert kept.tokens <= bound
        reused += length
        kept.fetch(prompt, len(prompt))
        assert kept.usable(prompt, len(prompt)) == (len(prompt) if len(prompt) <= bound else 0)
    return reused


def test_what_has_gone_comes_back(clients: dict[str, FlashClient], tmp_path: Path) -> None:
    model = clients["llama"].model
    prompts = [[token] * 10 for token in (5, 6, 7)]
    with file_of(tmp_path, 10) as file:
        kept = KeptPrefixes(model.config, 10, file)
        for prompt in prompts:
            kept.keep(prompt, filled(model, prompt), 0)
        assert [kept.usable(prompt, 10) for prompt in prompts] == [0, 0, 10]
        assert (file.used_bytes, file.written_bytes) == (2 * PAGE_BYTES, 2 * PAGE_BYTES)
        kept.fetch([*prompts[0], 9], 10)
        assert [kept.usable(prompt, 10) for prompt in prompts] == [10, 0, 0]
        kept.fetch(prompts[1], 10)
        assert file.written_bytes == 3 * PAGE_BYTES, "what came back is not written again"
        kept.keep([*prompts[0][:5], 8], filled(model, [*prompts[0][:5], 8]), 0)
        assert kept.tokens == 6, "a span was cut: its end has gone to the file"
        kept.fetch(prompts[0], 10)
        assert kept.usable(prompts[0], 10) == 10
        logits = feed(model, [[6]], kept.begin([prompts[0]], [10]), [10])
        assert torch.equal(logits, feed(model, [[*prompts[0], 6]], GrowingCache(model.config), [0]))


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_what_is_damaged_is_computed_again(
    clients: dict[str, FlashClient], tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    model, prompt = clients["opt"].model, [5] * 10
    with file_of(tmp_path, 10) as file:
        kept = KeptPrefixes(model.config, 20, file)
        kept.keep(prompt, filled(model, prompt), 0)
        kept.keep(prompt * 2, filled(model, prompt * 2), 0)
        kept.bound(0)
        assert file.used_bytes == 2 * PAGE_BYTES
        opened = (one for one in Path("/proc/self/fd").iterdir() if one.exists())
        (descriptor,) = (one for one in opened if str(tmp_path) in str(one.readlink()))
        if damage == "cut":
            os.truncate(descriptor, PAGE_BYTES // 2)
        else:
            with descriptor.open("r+b") as written:
                written.seek(PAGE_BYTES + 1000)
                written.write(b"x")
        kept.bound(20)
        kept.fetch(prompt * 2, 20)
        assert kept.usable(prompt * 2, 20) == 0
        assert (file.used_bytes, file.damaged) == (0, 1)
        assert "are computed again: " in caplog.text
        kept.keep(prompt, filled(model, prompt), 0)
        assert kept.usable(prompt, 10) == 10


@pytest.mark.parametrize("limit_pages", [0, 3])
def test_a_full_device_keeps_what_it_holds(
    clients: dict[str, FlashClient], tmp_path: Path, caplog: pytest.LogCaptureFixture, limit_pages: int
) -> None:
    model = clients["llama"].model
    prompts = [[token] * 10 for token in range(5, 12)]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with file_of(tmp_path, 100) as file:
        kept = KeptPrefixes(model.config, 10, file)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_pages * PAGE_BYTES + 4096, before[1]))
        try:
            for prompt in prompts:
                kept.keep(prompt, filled(model, prompt), 0)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert file.used_bytes == limit_pages * PAGE_BYTES
        assert caplog.text.count("MiB is kept: ") == 1
        kept.fetch(prompts[-2], 10)
        assert kept.usable(prompts[-2], 10) == (10 if limit_pages else 0)


def test_the_file_is_private_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = tmp_path / f"{NAME}0123"
    left.touch()
    with file_of(tmp_path, 10):
        assert list(tmp_path.iterdir()) == [left]
    monkeypatch.setattr(os, "O_TMPFILE", 1 << 30)  # a file system without nameless files
    with file_of(tmp_path, 10):
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        KeptFile(tmp_path / "missing", PAGE_BYTES)


def test_rows_that_continue_different_beginnings(clients: dict[str, FlashClient]) -> None:
    model = clients["llama"].model
    kept = KeptPrefixes(model.config, 1000)
    prompts = [list(range(5, 5 + length)) + [number] * 4 for number, length in enumerate((20, 9, 0, 31), 3)]
    for prompt in prompts:
        kept.keep(prompt, filled(model, prompt), 0)
    starts = [len(prompt) - 4 for prompt in prompts]
    logits = feed(model, [prompt[-4:] for prompt in prompts], kept.begin(prompts, starts), starts)
    for row, prompt in enumerate(prompts):
        assert torch.equal(logits[row], feed(model, [prompt], GrowingCache(model.config), [0])[0])


def test_the_least_recently_used_goes_first(clients: dict[str, FlashClient]) -> None:
    model = clients["llama"].model
    kept = KeptPrefixes(model.config, 30)
    first, second, third = ([token] * 10 for token in (5, 6, 7))
    for prompt in (first, second, third):
        kept.keep(prompt, filled(model, prompt), 0)
    kept.begin([first], [10])
    kept.keep([8] * 10, filled(model, [8] * 10), 0)
    assert [kept.usable(prompt, 10) for prompt in (first, second, third)] == [10, 0, 10]
    kept.keep([9] * 31, filled(model, [9] * 31), 0)
    assert kept.usable([9] * 31, 31) == 0, "it is longer than the bound"
    kept.bound(0)
    assert kept.tokens == 0


def test_owners_share_nothing(clients: dict[str, FlashClient]) -> None:
    model, prompt = clients["llama"].model, [5] * 10
    kept = KeptPrefixes(model.config, 30)
    kept.keep(prompt, filled(model, prompt), 0, owner=1)
    assert [kept.usable(prompt, 10, owner) for owner in (0, 1, 2)] == [0, 10, 0]
    kept.keep(prompt, filled(model, prompt), 0, owner=2)
    assert kept.tokens == 20
    logits = feed(model, [[6], [6]], kept.begin([prompt, prompt], [10, 10], [1, 2]), [10, 10])
    assert torch.equal(logits[0], logits[1])
    kept.bound(15)
    assert [kept.usable(prompt, 10, owner) for owner in (1, 2)] == [0, 10]
    kept.keep([7] * 10, filled(model, [7] * 10), 0)
    kept.keep([8] * 16, filled(model, [8] * 16), 0)
    assert kept.tokens == kept.usable([7] * 10, 10) == 10


def test_windows_are_continued_only_where_they_are_whole(clients: dict[str, FlashClient]) -> None:
    model = clients["gemma3"].model
    kept = KeptPrefixes(model.config, 1000)
    prompt = list(range(3, 83))
    kept.keep(prompt, filled(model, prompt), 0)
    assert kept.usable(prompt, 80) == 80
    assert kept.usable(prompt, 79) == 0, "the window before token 79 has lost a token"
    kept.keep(prompt[:40], filled(model, prompt[:40]), 0)
    assert kept.usable(prompt, 79) == 40, "they were known, and now with their window"


def test_states_of_another_kind_are_not_kept() -> None:
    cache = GrowingCache(make_config("llama"))
    kept = KeptPrefixes(make_config("llama"), 0)
    kept.keep([5, 6], cache, 0)
    assert kept.tokens == kept.usable([5, 6], 2) == 0
