"""Order: permutations are permutations, blocks come from everywhere, and everything is a function of its arguments."""

from __future__ import annotations

import numpy as np
import pytest

from modelyard.data.order import (
    BLOCK_DOCUMENTS,
    RUN_DOCUMENTS,
    DocumentOrder,
    derive_key,
    keyed_hash,
    keyed_shuffle,
    permute,
)


def documents(order: DocumentOrder, block: int) -> np.ndarray:
    first, last = order.runs(block)
    stored = np.concatenate([np.arange(a, b) for a, b in zip(first, last)])
    return stored[order.shuffle_documents(block, len(stored))]


def epoch(order: DocumentOrder, number: int) -> np.ndarray:
    blocks = order.blocks_per_cycle
    return np.concatenate([documents(order, b) for b in range(number * blocks, (number + 1) * blocks)])


def test_known_values_never_change():
    # A change here is a change of every user's data order: only with a new _LAYOUT_VERSION in rows.py.
    assert derive_key("order", 784569, 0) == 1684953942963905168
    assert keyed_hash(5, np.arange(2, dtype=np.uint64)).tolist() == [
        16717243559324746421,
        12403000284399229050,
    ]
    assert keyed_shuffle(7, 8).tolist() == [5, 2, 7, 6, 4, 1, 3, 0]
    assert permute(7, np.arange(8), 100).tolist() == [95, 88, 3, 30, 64, 19, 23, 20]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 17, 313, 1024, 1025, 5000])
def test_permute_reaches_every_index_once(size):
    for key in (0, 1, derive_key("x")):
        assert sorted(permute(key, np.arange(size), size)) == list(range(size))


def test_permute_is_computed_point_by_point():
    size = 3_000_000_000
    indices = np.array([0, 17, size - 1])
    together = permute(3, indices, size)
    assert [int(permute(3, np.array([index]), size)[0]) for index in indices] == together.tolist()
    assert len(set(together.tolist())) == 3
    assert together.max() < size


def test_permute_mixes():
    # Neighbours must not stay neighbours, and each tenth of the input must reach each tenth of the output alike.
    size = 100_000
    sent = permute(11, np.arange(size), size)
    assert np.count_nonzero(np.abs(np.diff(sent)) == 1) < 20
    table = np.histogram2d(np.arange(size), sent, bins=10)[0]
    assert np.abs(table - size / 100).max() < 5 * np.sqrt(size / 100)
    assert not np.array_equal(sent, permute(12, np.arange(size), size))


@pytest.mark.parametrize("count", [1, 31, 32, 9_999, 25_000, 64_017])
@pytest.mark.parametrize("shuffle", ["epoch", "skip_first_epoch", "disabled", "full"])
def test_every_epoch_has_every_document_once(count, shuffle):
    order = DocumentOrder(count, key=5, shuffle=shuffle)
    for number in range(3):
        assert np.array_equal(np.sort(epoch(order, number)), np.arange(count))


def test_shuffle_modes():
    stored = np.arange(25_000)
    for shuffle, first_as_stored, second_as_stored in (
        ("epoch", False, False),
        ("skip_first_epoch", True, False),
        ("disabled", True, True),
    ):
        order = DocumentOrder(25_000, key=5, shuffle=shuffle)
        first, second = epoch(order, 0), epoch(order, 1)
        assert np.array_equal(first, stored) == first_as_stored
        assert np.array_equal(second, stored) == second_as_stored
        assert np.array_equal(first, second) == (shuffle == "disabled")


def test_full_mixes_the_passes():
    order = DocumentOrder(15_000, key=5, shuffle="full", passes=3)
    cycle = epoch(order, 0)
    assert np.array_equal(np.bincount(cycle), np.full(15_000, 3))
    # Some documents come back before others have come once.
    assert 0 < len(np.unique(cycle[:15_000])) < 15_000


def test_blocks_are_large_enough_and_come_from_everywhere():
    order = DocumentOrder(1_000_000, key=9, shuffle="epoch")
    for block in (0, 50, order.blocks_per_cycle - 1, order.blocks_per_cycle + 3):
        found = documents(order, block)
        assert BLOCK_DOCUMENTS <= len(found) < 2 * BLOCK_DOCUMENTS
        assert order.documents(block) == len(found)
        # 313 runs over 20 twentieths of the dataset: each must have its part (15.6 runs on average).
        runs = np.histogram(found, bins=20, range=(0, 1_000_000))[0] / RUN_DOCUMENTS
        assert runs.min() >= 3
        assert runs.max() <= 40


def test_a_small_dataset_is_one_block():
    assert DocumentOrder(BLOCK_DOCUMENTS - 1, key=1, shuffle="epoch").blocks_per_cycle == 1


def test_keys_differ_by_every_part():
    keys = {derive_key(*parts) for parts in [(1,), (2,), (1, 0), (0, 1), ("1",), (1, "a"), ("a", 1)]}
    assert len(keys) == 7
