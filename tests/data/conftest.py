"""A tokenizer trained on the spot, and writers of small sources."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from modelyard.data import assemble, bytestream, ranks, sources
from modelyard.data.tokenizer_training import train_tokenizer

WORDS = [
    "the",
    "ship",
    "sails",
    "over",
    "a",
    "wide",
    "sea",
    "and",
    "naïve",
    "Möwen",
    "follow",
    "42",
    "times",
    "🚢",
]


def sentence(number: int) -> str:
    """A text that differs from number to number, of 3 to 12 words, some not ASCII."""
    return " ".join(WORDS[(number * 7 + i * (number % 5 + 1)) % len(WORDS)] for i in range(3 + number % 10))


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer of 300 tokens: <|begin_of_text|> is 0, <|end_of_text|> is 1."""
    folder = tmp_path_factory.mktemp("tokenizer")
    assert train_tokenizer((sentence(i) for i in range(200)), folder, vocab_size=300) == 300
    return folder


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Write records as .jsonl, .jsonl.gz or .jsonl.zst, as the name says."""

    def write(records: list[Any], name: str = "texts.jsonl") -> Path:
        data = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
        if name.endswith(".gz"):
            data = gzip.compress(data, mtime=0)
        elif name.endswith(".zst"):
            data = zstandard.compress(data)
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    return write


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many parts of a small source, no waiting, and no environment of a launcher."""
    monkeypatch.setattr(sources, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(sources, "PART_CHUNKS", 1)
    monkeypatch.setattr(sources, "CUT_COMPRESSED", 4)
    monkeypatch.setattr(bytestream, "BLOCK", 200)
    monkeypatch.setattr(assemble, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(ranks, "WATCH_SECONDS", 0.2)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # no machine is lost here, and each takes 10 ms
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
