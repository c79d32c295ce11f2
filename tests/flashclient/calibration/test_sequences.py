"""A text file cut into sequences, and the files that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import make_tokenizer
from sparse_model import write_text

from flashclient.calibration.sequences import read_sequences
from flashclient.errors import OptionError

TOKENIZER = make_tokenizer()


def ids_of(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False).input_ids)


def test_the_beginning_of_the_text_in_order(tmp_path: Path) -> None:
    path = write_text(tmp_path / "text", 9000)
    sequences = read_sequences(path, TOKENIZER, 256, None, 10**6)
    ids = ids_of(path.read_text())
    assert sequences.shape == (len(ids) // 256, 256)
    assert sequences.flatten().tolist() == ids[: sequences.numel()]


def test_no_more_than_asked_for(tmp_path: Path) -> None:
    path = write_text(tmp_path / "text", 9000)
    assert read_sequences(path, TOKENIZER, 256, 4096, 10**6).numel() == 4096
    assert read_sequences(path, TOKENIZER, 256, None, 4096).numel() == 4096


def test_a_short_text_gives_shorter_sequences(tmp_path: Path) -> None:
    sequences = read_sequences(write_text(tmp_path / "text", 2000), TOKENIZER, 256, None, 10**6)
    assert len(sequences) >= 16


def test_sequences_begin_as_the_tokenizer_begins_a_text(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    path = write_text(tmp_path / "text", 3000)
    sequences = read_sequences(path, tokenizer, 64, None, 10**6)
    assert torch.equal(sequences[:, 0], torch.ones(len(sequences), dtype=torch.int64))
    assert sequences[:, 1:].flatten().tolist() == ids_of(path.read_text())[: sequences[:, 1:].numel()]


def test_pieces_are_those_of_one_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_text(tmp_path / "text", 9000)
    whole = read_sequences(path, TOKENIZER, 256, None, 10**6)
    monkeypatch.setattr("flashclient.calibration.sequences.PIECE_CHARACTERS", 777)
    assert torch.equal(read_sequences(path, TOKENIZER, 256, None, 10**6), whole)


@pytest.mark.parametrize(
    ("content", "tokens", "message"),
    [
        (None, None, "cannot read .*no such file or directory"),
        (b"", None, "is empty: pass a text of at least 1024 tokens"),
        (b"short", None, "has 5 tokens and at least 1024 are needed: pass a longer text"),
        (b"a" * 2000, 4096, "has 2000 tokens and --tokens asks for 4096"),
        (b"a" * 2000, 10, "--tokens 10 are too few: at least 1024 are needed"),
        (b"\xff\xfe" * 2000, None, r"is not text in UTF-8: invalid start byte \(0xff\)"),
        (b"a" * 5000 + b"\xc3", None, "is not text in UTF-8: unexpected end of data"),
    ],
)
def test_refused_texts(content: bytes | None, tokens: int | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(OptionError, match=message) as refused:
        read_sequences(path, TOKENIZER, 256, tokens, 10**6)
    assert "\n" not in str(refused.value)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"cannot read .*is a directory"):
        read_sequences(tmp_path, TOKENIZER, 256, None, 10**6)
