"""Blending: every prefix has each dataset's share to within one row, and each dataset's rows come in order."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from modelyard.data.blend import Blend
from modelyard.errors import UserError

AWKWARD = {
    "a third": [1 / 3, 2 / 3],
    "decimals": [0.7, 0.2, 0.1],
    "rare": [1e-3, 0.999],
    "rarer": [1e-5, 1.0],
    "not normalised": [3.0, 1.0, 7.0, 5.0],
    "equal": [1.0] * 7,
    "two tokens counts": [123_456_789.0, 987_654_321.0],
    "one heavy, many light": [0.5] + [0.01] * 50,
    "a zero": [0.25, 0.0, 0.75],
    "three irrational": [2**0.5, 3**0.5, 5**0.5],
}


def schedule(blend: Blend, rows: int) -> tuple[np.ndarray, np.ndarray]:
    located = np.array([blend.locate(row) for row in range(rows)])
    return located[:, 0], located[:, 1]


@pytest.mark.parametrize("name", AWKWARD)
def test_any_prefix_to_within_one_row(name):
    weights = AWKWARD[name]
    rows = 150_000
    blend = Blend(weights)
    datasets, inside = schedule(blend, rows)
    seen = np.arange(1, rows + 1)
    for dataset, weight in enumerate(weights):
        taken = np.cumsum(datasets == dataset)
        assert np.abs(taken - seen * weight / sum(weights)).max() < 1.0
        assert np.array_equal(inside[datasets == dataset], np.arange(taken[-1]))
    for prefix in (0, 1, 17, rows // 3, rows):
        assert blend.rows_of(prefix) == np.bincount(datasets[:prefix], minlength=len(weights)).tolist()


def test_by_hand():
    # Two to one: by slot 1 the first dataset must have one row, by slot 2 both of it or one of each.
    assert [Blend([2.0, 1.0]).locate(row) for row in range(6)] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (0, 2),
        (0, 3),
        (1, 1),
    ]


def test_decimals_as_written_are_exact():
    assert (Blend([0.7, 0.2, 0.1]).period, Blend([0.7, 0.2, 0.1]).counts) == (10, [7, 2, 1])
    assert (Blend([1 / 3, 2 / 3]).period, Blend([1 / 3, 2 / 3]).drift) == (3, 0.0)
    assert Blend([1e-6, 1.0 - 1e-6]).counts == [1, 999_999]


def test_far_away_rows_cost_nothing_and_fit():
    blend = Blend([0.7, 0.2, 0.1])
    row = 10**12 + 3
    dataset, inside = blend.locate(row)
    before = blend.rows_of(row)
    assert inside == before[dataset]
    assert sum(before) == row
    assert before[0] == pytest.approx(0.7 * row, abs=1)


def test_weights_without_a_short_period_drift_slowly():
    weights = np.random.default_rng(0).random(10).tolist()
    blend = Blend(weights)
    exact = [Fraction(repr(w)) / sum(Fraction(repr(w)) for w in weights) for w in weights]
    assert blend.period <= 1 << 19
    assert all(abs(Fraction(c, blend.period) - w) <= blend.drift for c, w in zip(blend.counts, exact))
    # Less than one row in a million beyond the schedule's own.
    assert blend.drift < 1e-6


def test_a_weight_too_small_to_be_met():
    with pytest.raises(UserError, match=r"weight 1e-09 of dataset 1 is less than one row in 1,048,576"):
        Blend([1.0, 1e-9])


def test_many_datasets():
    weights = np.random.default_rng(1).random(300).tolist()
    blend = Blend(weights)
    assert min(blend.counts) >= 1
    datasets, _ = schedule(blend, 20_000)
    taken = np.bincount(datasets, minlength=300)
    assert np.abs(taken - 20_000 * np.array(weights) / sum(weights)).max() < 1.1
