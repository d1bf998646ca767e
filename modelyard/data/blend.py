"""Which dataset row `i` of a blend comes from: an exact schedule, tabulated once."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import reduce
from heapq import heappop, heappush
from math import lcm

import numpy as np

from modelyard.errors import UserError

MAX_PERIOD = 1 << 19
"""Longest period tabulated for weights that are no ratio of small numbers."""
SMALLEST_SHARE = Fraction(1, 1 << 20)


class Blend:
    """A periodic schedule over datasets: after any number of rows `n`, each dataset has had its share to within one row.

    Weights are read as the decimal numbers they were written as. Where they are ratios of numbers up to `MAX_PERIOD`,
    the shares are exact for ever. Otherwise the period with the smallest rounding is taken, and what rounding is left is in
    `drift`.

    Attributes: `counts` rows of each dataset in one period; `period` rows; `drift` the largest difference between a
    dataset's share and its weight (rows per row).
    """

    def __init__(self, weights: Sequence[float]):
        exact = [Fraction(repr(weight)) for weight in weights]
        total = sum(exact)
        shares = [weight / total for weight in exact]
        for number, share in enumerate(shares):
            if 0 < share < SMALLEST_SHARE:
                raise UserError(
                    f"blended: weight {weights[number]} of dataset {number} is less than one row in "
                    f"{SMALLEST_SHARE.denominator:,}: leave the dataset out or raise its weight"
                )
        self.counts, self.period = _quantise(shares)
        self.drift = max(
            float(abs(share - Fraction(count, self.period))) for share, count in zip(shares, self.counts)
        )
        self._dataset, self._occurrence = _tabulate(self.counts, self.period)

    def locate(self, row: int) -> tuple[int, int]:
        """Row `row` of the blend as (dataset, row of that dataset)."""
        periods, place = divmod(row, self.period)
        dataset = int(self._dataset[place])
        return dataset, periods * self.counts[dataset] + int(self._occurrence[place])

    def rows_of(self, rows: int) -> list[int]:
        """How many of the first `rows` rows come from each dataset."""
        periods, rest = divmod(rows, self.period)
        part = np.bincount(self._dataset[:rest], minlength=len(self.counts))
        return [periods * count + int(extra) for count, extra in zip(self.counts, part)]


def _quantise(shares: list[Fraction]) -> tuple[list[int], int]:
    """Shares that sum to 1, as whole rows in a period."""
    period = reduce(lcm, (share.denominator for share in shares))
    smallest = min(share for share in shares if share > 0)
    # A small share needs a long period to be one row of it at all.
    limit = max(MAX_PERIOD, int(8 / smallest))
    if period > limit:
        period = _best_period(shares, limit)
    floors = [int(share * period) for share in shares]
    # Largest remainders get the rows that rounding down left over; ties go to the earlier dataset.
    remainders = [share * period - floor for share, floor in zip(shares, floors)]
    for number in sorted(range(len(shares)), key=lambda n: -remainders[n])[: period - sum(floors)]:
        floors[number] += 1
    return floors, period


def _best_period(shares: list[Fraction], limit: int) -> int:
    """The period up to `limit` at which the shares are nearest to whole rows, relative to the period's length."""
    periods = np.arange(limit // 64, limit + 1, dtype=np.float64)
    error = np.zeros_like(periods)
    for share in shares:
        rows = periods * float(share)
        np.maximum(error, np.abs(rows - np.rint(rows)), out=error)
    return int(periods[np.argmin(error / periods)])


def _tabulate(counts: list[int], period: int) -> tuple[np.ndarray, np.ndarray]:
    """Dataset (uint16) and occurrence in the period (int32) of each of its rows.

    Row t of a dataset with `count` rows a period may be placed from slot floor(t × period / count) on and must be by
    ceil((t + 1) × period / count): inside these windows its share is never off by a whole row. As the windows fill the
    period exactly, taking the earliest deadline first always succeeds (Liu & Layland 1973; Baruah et al., "Proportionate
    progress", 1996).
    """
    dataset = np.repeat(np.arange(len(counts)), counts)
    occurrence = np.concatenate([np.arange(count) for count in counts])
    count = np.repeat(np.array(counts), counts)
    release = occurrence * period // np.maximum(count, 1)
    deadline = -(-(occurrence + 1) * period // np.maximum(count, 1))
    # One sortable integer for each row: deadline, then dataset, then occurrence.
    datasets = len(counts)
    entries = ((deadline * datasets + dataset) * period + occurrence).astype(np.int64)
    by_release = np.argsort(release, kind="stable")
    waiting = iter(zip(release[by_release].tolist(), entries[by_release].tolist()))
    upcoming = next(waiting, None)
    ready: list[int] = []
    schedule = np.empty(period, dtype=np.int64)
    for slot in range(period):
        while upcoming is not None and upcoming[0] <= slot:
            heappush(ready, upcoming[1])
            upcoming = next(waiting, None)
        schedule[slot] = heappop(ready)
    return (
        (schedule // period % datasets).astype(np.uint16),
        (schedule % period).astype(np.int32),
    )
