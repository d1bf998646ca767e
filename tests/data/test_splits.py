"""Documents are dealt by a keyed hash: exact shares in the long run, one split each, the same however it is asked."""

from __future__ import annotations

import numpy as np
import pytest

from modelyard.data.splits import deal


def test_shares_and_no_order():
    choice = deal(0, 100_000, {"training": 0.98, "validation": 0.015, "test": 0.005}, seed=1)
    share = np.bincount(choice, minlength=3) / 100_000
    assert share == pytest.approx([0.98, 0.015, 0.005], abs=0.002)
    # No split is a stretch of the collection: each tenth of it has its part of the validation documents.
    tenths = np.bincount(np.flatnonzero(choice == 1) // 10_000, minlength=10)
    assert tenths.min() > 100


def test_shares_are_normalised():
    assert (
        deal(0, 1000, {"a": 98.0, "b": 2.0}, 3).tolist() == deal(0, 1000, {"a": 0.98, "b": 0.02}, 3).tolist()
    )


def test_pure_in_the_number():
    whole = deal(0, 1000, {"a": 0.5, "b": 0.5}, 7)
    pieces = [deal(begin, min(37, 1000 - begin), {"a": 0.5, "b": 0.5}, 7) for begin in range(0, 1000, 37)]
    assert np.concatenate(pieces).tolist() == whole.tolist()
    assert (
        np.concatenate([deal(i, 1, {"a": 0.5, "b": 0.5}, 7) for i in range(5)]).tolist() == whole[:5].tolist()
    )


def test_the_seed_is_a_key():
    splits = {"a": 0.5, "b": 0.5}
    same = (deal(0, 10_000, splits, 1) == deal(0, 10_000, splits, 2)).mean()
    assert same == pytest.approx(0.5, abs=0.03)


def test_one_split_takes_all():
    assert deal(5, 10, {"all": 0.1}, 0).tolist() == [0] * 10


@pytest.mark.parametrize("seed", range(20))
def test_small_shares_are_not_empty(seed):
    splits = {"training": 0.998, "validation": 0.001, "test": 0.001}
    assert sorted(deal(0, 3, splits, seed)) == [0, 1, 2]


def test_known_values():
    """Worked out once with integers in plain Python; a change would reshuffle everybody's splits."""

    def mix(value: int) -> int:
        mask = (1 << 64) - 1
        value = (value + 0x9E3779B97F4A7C15) & mask
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        return value ^ (value >> 31)

    assert mix(0) == 0xE220A8397B1DCDAF  # splitmix64's published first output for seed 0
    expected = [int((mix(number ^ mix(42)) >> 11) * 2.0**-53 >= 0.25) for number in range(2, 200)]
    assert deal(2, 198, {"a": 0.25, "b": 0.75}, 42).tolist() == expected
