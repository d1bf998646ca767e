"""Packing: every document that fits, once, whole, with little padding."""

from __future__ import annotations

import time

import numpy as np
import pytest

from modelyard.data.packing import Packed, pack_best_fit


def rows_of(packed: Packed) -> list[list[int]]:
    return [packed.members[a:b].tolist() for a, b in zip(packed.bounds, packed.bounds[1:])]


def test_by_hand():
    # Longest first: 7 opens a row (3 free), 5 a second (5 free); 5 fits the second exactly; 3 the first exactly; 2 and 1 a third.
    lengths = np.array([3, 5, 2, 7, 5, 1])
    packed = pack_best_fit(lengths, 10, None)
    assert rows_of(packed) == [[0, 3], [1, 4], [2, 5]]
    assert (packed.over_long, packed.longest) == (0, 7)


def test_goes_where_it_leaves_the_least_space():
    # 6 → 4 free, 7 → 3 free; 3 fits both and goes to the tighter one, although the other was opened earlier.
    assert rows_of(pack_best_fit(np.array([3, 6, 7]), 10, None)) == [[0, 2], [1]]


def test_over_long_and_empty_documents_take_no_part():
    packed = pack_best_fit(np.array([11, 10, 0, 12]), 10, None)
    assert rows_of(packed) == [[1]]
    assert (packed.over_long, packed.longest) == (2, 12)
    nothing = pack_best_fit(np.array([11]), 10, 3)
    assert (nothing.rows, nothing.over_long, nothing.longest) == (0, 1, 11)


def test_key_shuffles_rows_and_nothing_else():
    lengths = np.random.default_rng(0).integers(1, 100, 500)
    unshuffled, one, two = (pack_best_fit(lengths, 128, key) for key in (None, 1, 2))
    assert sorted(rows_of(one)) == sorted(rows_of(two)) == sorted(rows_of(unshuffled))
    assert rows_of(one) != rows_of(two)
    assert rows_of(one) == rows_of(pack_best_fit(lengths, 128, 1))
    first_members = [row[0] for row in rows_of(unshuffled)]
    assert first_members == sorted(first_members)


@pytest.mark.parametrize("seed", range(8))
def test_every_document_once_and_no_row_overfull(seed):
    random = np.random.default_rng(seed)
    capacity = int(random.integers(5, 3000))
    lengths = random.integers(0, capacity + capacity // 4, int(random.integers(1, 3000)))
    packed = pack_best_fit(lengths, capacity, seed)
    fits = np.flatnonzero((lengths > 0) & (lengths <= capacity))
    assert sorted(packed.members.tolist()) == fits.tolist()
    assert packed.over_long == np.count_nonzero(lengths > capacity)
    for row in rows_of(packed):
        assert row == sorted(row)  # inside a row, documents keep their order
        assert 0 < lengths[row].sum() <= capacity


DISTRIBUTIONS = {
    "web pages, 2048": (lambda r: r.lognormal(6, 1.0, 10_000), 2048),
    "web pages, 8192": (lambda r: r.lognormal(6.5, 1.0, 10_000), 8192),
    "chat, 8192": (lambda r: r.lognormal(5, 0.7, 10_000), 8192),
    "long documents, 131072": (lambda r: r.lognormal(7, 1.5, 10_000), 131_072),
    "uniform, 2048": (lambda r: r.uniform(1, 2048, 10_000), 2048),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_fill_and_time(name):
    draw, capacity = DISTRIBUTIONS[name]
    lengths = np.maximum(draw(np.random.default_rng(1)), 1).astype(np.int64)
    begin = time.perf_counter()
    packed = pack_best_fit(lengths, capacity, 1)
    # Measured 5 to 10 ms on an idle core; the bound only catches an algorithm gone quadratic.
    assert time.perf_counter() - begin < 1
    assert lengths[packed.members].sum() / (packed.rows * capacity) >= 0.99
