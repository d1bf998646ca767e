"""What a scan counts, against numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from modelyard.data.datasets import ConcatenatedDatasets, SlicedDataset, StoredDataset, read_documents
from modelyard.report import inspect_scan
from modelyard.report.inspect_scan import Scan, read_lengths, scan
from tests.data.in_memory import InMemory, write_store

BOS, EOS = 1, 2
DOCUMENTS = [
    [1, 5, 6, 2],  # as it should be
    [1, 1, 5, 2],  # begins twice
    [5, 6, 2],  # no begin
    [1, 5, 6],  # no end
    [1, 5, 2, 2],  # ends twice
    [1, 5, 1, 6, 2],  # a begin in the middle
    [1, 5, 6, 2],  # a copy of the first
    [1],  # a begin and nothing else: no end
    [1, 5, 99, 2],  # 99 is beyond a vocabulary of 50
]
MASKS = [
    [1, 1, 0, 0],
    [0, 0, 0, 0],
    [0, 1, 1],  # its first token is no target, so nothing is trained
    [1, 1, 1],
    [0, 0, 0, 0],
    [0, 0, 0, 0, 0],
    [1, 1, 0, 0],
    [0],  # a document of its first token alone
    [0, 0, 0, 0],
]


def look(dataset, **changes) -> Scan:
    settings = {"vocabularies": {"small": 50, "large": 100}, "bos": BOS, "eos": EOS, "limit": 10**9}
    return scan(dataset, **(settings | changes))


@pytest.fixture
def store(tmp_path: Path) -> StoredDataset:
    return StoredDataset(write_store(tmp_path / "store", DOCUMENTS, vocab_size=100, masks=MASKS))


def check(found: Scan) -> None:
    assert (found.documents, found.tokens, found.whole, found.largest) == (9, 32, True, 99)
    assert found.masked == 2 + 2 + 3 + 2
    assert (found.double_bos.count, found.double_bos.first) == (1, 1)
    assert (found.missing_bos.count, found.missing_bos.first) == (1, 2)
    assert (found.missing_eos.count, found.missing_eos.first) == (2, 3)
    assert (found.double_eos.count, found.double_eos.first) == (1, 4)
    assert (found.inner_bos.count, found.inner_bos.first) == (1, 5)
    assert (found.untrained.count, found.untrained.first) == (3, 2)
    assert (found.outside["small"].count, found.outside["small"].first) == (1, 8)
    assert found.outside["large"].count == 0
    assert (found.copies, found.most_copied, found.compared) == (1, 2, 9)


@pytest.mark.parametrize("chunk", [2, 3, 4, 7, 1 << 20])
def test_counts_do_not_depend_on_what_is_held_at_a_time(store, monkeypatch, chunk):
    monkeypatch.setattr(inspect_scan, "CHUNK_TOKENS", chunk)
    check(look(store))


def test_every_kind_of_dataset(store, tmp_path):
    check(look(InMemory([np.array(d) for d in DOCUMENTS], [np.array(m) for m in MASKS])))
    halves = [
        StoredDataset(write_store(tmp_path / name, DOCUMENTS[part], vocab_size=100, masks=MASKS[part]))
        for name, part in (("a", slice(0, 4)), ("b", slice(4, 9)))
    ]
    both = ConcatenatedDatasets("both", halves)
    check(look(both))
    sliced = SlicedDataset(both, 2 / 9, 7 / 9)
    found = look(sliced)
    assert (found.documents, found.tokens, found.missing_bos.first) == (5, 19, 0)
    assert read_documents(sliced, 1, 4).tolist() == [1, 5, 6, 1, 5, 2, 2, 1, 5, 1, 6, 2]
    assert read_documents(sliced, 1, 3, "loss_mask").tolist() == [1, 1, 1, 0, 0, 0, 0]
    assert read_documents(sliced, 2, 2).tolist() == []


def test_empty_documents_are_passed_over(tmp_path):
    dataset = StoredDataset(write_store(tmp_path / "s", [[], [1, 1, 2], [], [9, 2], []], vocab_size=10))
    found = look(dataset)
    assert (found.documents, found.tokens, found.masked) == (5, 5, None)
    assert (found.double_bos.first, found.missing_bos.first) == (1, 3)
    assert read_lengths(dataset).empty == 3


def test_one_token_that_begins_and_ends(tmp_path):
    """As in GPT-2: a document of begin and end alone does not begin twice."""
    dataset = StoredDataset(write_store(tmp_path / "s", [[7, 7], [7, 5, 7], [7, 7, 5, 7]], vocab_size=10))
    found = look(dataset, bos=7, eos=7)
    assert (found.double_bos.count, found.double_bos.first) == (1, 2)
    assert found.missing_bos.count == found.missing_eos.count == found.inner_bos.count == 0


def test_a_part_of_the_data_is_spread_over_it(tmp_path, monkeypatch):
    monkeypatch.setattr(inspect_scan, "CHUNK_TOKENS", 100)
    documents = [np.full(10, number) for number in range(1000)]
    dataset = StoredDataset(write_store(tmp_path / "s", documents, vocab_size=1000))
    told = []
    found = look(dataset, limit=1000, progress=told.append, bos=None, eos=None)
    assert (found.whole, found.documents, found.tokens, sum(told)) == (False, 100, 1000, 1000)
    # Ten stretches of ten documents, one in every tenth.
    assert found.largest >= 900
    assert found.outside["large"].count == 90
    assert look(dataset, limit=0).documents == 0


def test_lengths():
    lengths = read_lengths(InMemory.of_lengths([3, 0, 1, 3, 9, 100, 4, 4, 4, 2]))
    assert (lengths.documents, lengths.empty) == (10, 1)
    assert [lengths.quantile(q) for q in (0, 0.1, 0.5, 0.9, 1.0)] == [0, 0, 3, 9, 100]
    assert lengths.longer_than(4) == (2, 109)
    assert lengths.longer_than(100) == (0, 0)
    assert lengths.buckets() == [
        (0, 0, 1), (1, 1, 1), (2, 3, 3), (4, 7, 3), (8, 15, 1), (16, 31, 0), (32, 63, 0), (64, 127, 1),
    ]  # fmt: skip


def test_very_long_documents_are_counted_too(monkeypatch):
    monkeypatch.setattr(inspect_scan, "_COUNTED_LENGTH", 8)
    monkeypatch.setattr(inspect_scan, "_LENGTHS_AT_ONCE", 3)
    lengths = read_lengths(InMemory.of_lengths([3, 20, 1, 8, 30, 7]))
    assert [lengths.quantile(q) for q in (0.01, 0.5, 0.7, 1.0)] == [1, 7, 20, 30]
    assert lengths.longer_than(7) == (3, 58)
    assert lengths.longer_than(8) == (2, 50)
    assert lengths.buckets() == [(1, 1, 1), (2, 3, 1), (4, 7, 1), (8, 15, 1), (16, 31, 2)]
