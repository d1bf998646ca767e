"""What the tests of `modelyard inspect` are made of: small stores, configs that read them, and what was printed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modelyard.chat.conversation import Role
from modelyard.chat.segments import Kind, Segment, lane_value
from modelyard.data.store import StoreWriter
from modelyard.data.tokenizer import load_tokenizer
from tests.config.helpers import TINY
from tests.data.conftest import sentence

BOS, EOS = 0, 1

Run = Callable[..., tuple[int, str]]


def values_of(run: Run, *words: object) -> tuple[int, dict[str, Any]]:
    status, out = run(*words, "--json")
    return status, json.loads(out)


def make_store(
    path: Path,
    tokenizer: Path | None,
    documents: Sequence[Sequence[int]],
    masks: Sequence[Sequence[int]] | None = None,
    *,
    kinds: Sequence[Sequence[int]] | None = None,
    vocab_size: int = 300,
    fingerprint: str | None = None,
) -> Path:
    """A store as `prepare` would make it of these tokens."""
    opened = load_tokenizer(tokenizer) if tokenizer else None
    description = {
        "tokenizer": {
            "fingerprint": fingerprint or (opened.fingerprint if opened else None),
            "bos": {"token": "<|begin_of_text|>", "id": BOS},
            "eos": {"token": "<|end_of_text|>", "id": EOS},
        }
    }
    lanes = {name: of_all for name, of_all in (("loss_mask", masks), ("kind", kinds)) if of_all}
    with StoreWriter(
        path,
        vocab_size=vocab_size,
        lanes=dict.fromkeys(lanes, "uint8"),
        tokenizer_files=opened.files() if opened else None,
        description=description,
    ) as writer:
        for number, document in enumerate(documents):
            values = {name: np.array(of_all[number], np.uint8) for name, of_all in lanes.items()}
            writer.append(np.array(document, np.int64), values)
    return path


def text(tokenizer: Path, number: int) -> list[int]:
    return [BOS, *load_tokenizer(tokenizer).encode(sentence(number)), EOS]


def config(folder: Path, **datasets: str) -> Path:
    """TINY with a vocabulary of 300 and rows of 7 tokens, documents whole and isolated, masks used."""
    listed = ", ".join(f"{name}: {dataset}" for name, dataset in datasets.items())
    content = TINY.replace(
        "data: {datasets: {training: {type: random}}}", f"data: {{datasets: {{{listed}}}}}"
    )
    content = content.replace("vocab_size: 512", "vocab_size: 300").replace(
        "batch: {sequence_length: 64, batch_size: 4}",
        "batch: {sequence_length: 7, batch_size: 2, truncate_documents: no, cross_document_attention: no, use_loss_masking_spans: yes}",
    )
    path = folder / "train.yaml"
    path.write_text(content)
    return path


def byte(kind: Kind, role: Role | None = None, *, trained: bool = True) -> int:
    """The byte of the kind lane."""
    return lane_value(Segment("", kind, role, trained=trained))


def memmap(name: str) -> str:
    return f"{{type: memmap, path: {name}}}"


def small(path: Path, tokenizer: Path | None = None) -> Path:
    """Documents of 5, 4, 3 and 9 tokens. In rows of 8: 5 + 3, 4 and padding; the one of 9 is left out."""
    documents = [[0, 5, 6, 7, 1], [0, 8, 9, 1], [0, 10, 1], [0, *range(20, 27), 1]]
    masks = [[1, 1, 0, 0, 0], [1, 1, 1, 0], [1, 0, 0], [0] * 9]
    return make_store(path, tokenizer, documents, masks)
