"""Slices, concatenations and random tokens read the same documents as the stores below them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter

from modelyard.config.data import DatasetConfig
from modelyard.data.datasets import (
    ConcatenatedDatasets,
    IndexedDataset,
    RandomTokens,
    SlicedDataset,
    open_dataset,
)
from modelyard.data.resolve import resolve
from modelyard.data.store import StoreWriter
from modelyard.errors import UserError
from tests.data.in_memory import InMemory, write_store

CONFIG: TypeAdapter[DatasetConfig] = TypeAdapter(DatasetConfig)
DOCUMENTS = [np.arange(10 * n, 10 * n + length) for n, length in enumerate([3, 1, 5, 2, 4, 6, 1])]
MASKS = [document % 2 for document in DOCUMENTS]


def opened(config: dict, base: Path | None = None) -> IndexedDataset:
    return open_dataset(
        resolve(CONFIG.validate_python(config), base), vocab_size=100, sequence_length=8, seed=1
    )


def check(dataset: IndexedDataset, expected: list[np.ndarray]) -> None:
    """Everything the dataset says agrees with its documents."""
    lengths = [len(document) for document in expected]
    assert (dataset.num_documents, dataset.num_tokens) == (len(expected), sum(lengths))
    for begin in range(len(expected) + 1):
        assert dataset.offset(begin) == sum(lengths[:begin])
        for end in range(begin, len(expected) + 1):
            assert dataset.lengths(begin, end).tolist() == lengths[begin:end]
    for index, document in enumerate(expected):
        assert dataset.document(index).tolist() == document.tolist()
        assert dataset.document(index, 1).tolist() == document[1:].tolist()
        assert dataset.document(index, 0, 1).tolist() == document[:1].tolist()


def test_store_slices_and_concatenation(tmp_path):
    write_store(tmp_path / "a", DOCUMENTS[:4], masks=MASKS[:4])
    write_store(tmp_path / "b", DOCUMENTS[4:], masks=MASKS[4:])
    a, b = ({"type": "memmap", "path": name} for name in "ab")
    check(opened(a, tmp_path), DOCUMENTS[:4])
    both = {"type": "concatenated", "datasets": [a, b]}
    dataset = opened(both, tmp_path)
    check(dataset, DOCUMENTS)
    assert dataset.lanes == {"loss_mask"}
    assert [dataset.lane("loss_mask", n).tolist() for n in range(7)] == [mask.tolist() for mask in MASKS]
    assert dataset.where(5) == f"document 1 of {tmp_path / 'b'}"
    middle = {
        "type": "slice",
        "begin": 0.3,
        "end": 0.8,
        "dataset": both,
    }  # documents round(2.1) to round(5.6)
    sliced = opened(middle, tmp_path)
    check(sliced, DOCUMENTS[2:6])
    assert sliced.where(0) == f"document 2 of {tmp_path / 'a'}"
    assert sliced.lane("loss_mask", 3, 2, 4).tolist() == MASKS[5][2:4].tolist()
    check(opened({"type": "slice", "begin": 0.5, "dataset": middle}, tmp_path), DOCUMENTS[4:6])


def test_slices_of_one_dataset_share_no_document():
    whole = InMemory.of_lengths([2] * 103)
    parts = [SlicedDataset(whole, a, b) for a, b in ((0, 0.9), (0.9, 0.97), (0.97, 1))]
    assert [part.num_documents for part in parts] == [93, 7, 3]
    tokens = [t for part in parts for n in range(part.num_documents) for t in part.document(n).tolist()]
    assert tokens == list(range(206))


def test_lanes_only_where_every_part_has_them(tmp_path):
    masked = write_store(tmp_path / "masked", DOCUMENTS, masks=MASKS)
    plain = write_store(tmp_path / "plain", DOCUMENTS)
    stores = [{"type": "memmap", "path": str(path)} for path in (masked, plain)]
    assert opened({"type": "concatenated", "datasets": stores}).lanes == frozenset()
    assert opened(stores[1]).lane("loss_mask", 0) is None


def test_fingerprints_follow_the_content():
    data, other = InMemory.of_lengths([1, 2, 3]), InMemory.of_lengths([3, 2, 1])
    prints = [
        ConcatenatedDatasets("x", [data, other]).fingerprint,
        ConcatenatedDatasets("x", [other, data]).fingerprint,
        SlicedDataset(data, 0, 0.5).fingerprint,
        SlicedDataset(data, 0.5, 1).fingerprint,
        data.fingerprint,
    ]
    assert len(set(prints)) == 5
    assert ConcatenatedDatasets("y", [data, other]).fingerprint == prints[0]  # a name is not content


def test_counts_in_the_config_are_checked(tmp_path):
    write_store(tmp_path / "a", DOCUMENTS)
    with pytest.raises(UserError) as caught:
        opened({"type": "memmap", "path": "a", "num_documents": 8, "num_tokens": 23}, tmp_path)
    assert caught.value.problems == [
        f"{tmp_path / 'a'} has 7 documents, but the config says 8: prepared again since, or the wrong folder?",
        f"{tmp_path / 'a'} has 22 tokens, but the config says 23: prepared again since, or the wrong folder?",
    ]


def test_random_tokens():
    dataset = RandomTokens("dummy", num_documents=50, document_length=40, vocab_size=7, seed=3)
    documents = [dataset.document(n) for n in range(50)]
    check(dataset, documents)
    assert set(np.concatenate(documents).tolist()) == set(range(7))
    again = RandomTokens("dummy", num_documents=50, document_length=40, vocab_size=7, seed=3)
    other = RandomTokens("dummy", num_documents=50, document_length=40, vocab_size=7, seed=4)
    assert again.document(49, 5, 9).tolist() == documents[49][5:9].tolist()
    assert other.document(0).tolist() != documents[0].tolist()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"type": "memmap", "path": "stor"}, r"stor does not exist .*nearest there: .*store"),
        ({"type": "memmap", "path": "other"}, r"other.bin is missing, and .*other.idx is of no use"),
        ({"type": "memmap", "path": "folder"}, r"folder is not a token store"),
        (
            {"type": "slice", "end": 0.01, "dataset": {"type": "memmap", "path": "store"}},
            r"store\[0:0.01\] has no tokens \(0 documents\)",
        ),
        (
            {
                "type": "concatenated",
                "datasets": [{"type": "blended", "weights": [1], "datasets": [{"type": "random"}]}],
            },
            r"type 'blended' cannot stand inside 'concatenated'",
        ),
    ],
)
def test_what_cannot_be_read_says_why(tmp_path, config, message):
    write_store(tmp_path / "store", DOCUMENTS)
    (tmp_path / "folder").mkdir()
    (tmp_path / "other.idx").write_bytes(b"MMIDIDX\0\0")
    with pytest.raises(UserError, match=message):
        opened(config, tmp_path)


def test_hints_name_the_bytes_that_will_be_read(tmp_path, monkeypatch):
    for name in "ab":
        with StoreWriter(tmp_path / name, vocab_size=300, tokens_per_shard=8) as writer:
            for document in DOCUMENTS:  # shards of 4, 7, 4, 7 tokens, two bytes each
                writer.append(document)
    asked: list[tuple[str, int, int]] = []
    files: dict[int, Path] = {}
    real_open = os.open

    def record_open(path, flags, *rest, **more):
        descriptor = real_open(path, flags, *rest, **more)
        files[descriptor] = Path(path)
        return descriptor

    def record(descriptor: int, begin: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        asked.append((f"{files[descriptor].parent.name}/{files[descriptor].name}", begin, length))

    monkeypatch.setattr(os, "open", record_open)
    monkeypatch.setattr(os, "posix_fadvise", record)
    both = {
        "type": "concatenated",
        "datasets": [{"type": "memmap", "path": str(tmp_path / name)} for name in "ab"],
    }
    dataset = opened({"type": "slice", "begin": 1 / 14, "dataset": both})
    dataset.will_need([(7, 8), (0, 3)])  # documents 8 and 1 to 3 of the concatenation
    assert asked == [
        ("a/tokens_00000.bin", 6, 2),
        ("a/tokens_00001.bin", 0, 14),
        ("b/tokens_00000.bin", 6, 2),
    ]
