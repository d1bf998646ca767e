"""Which split a document goes to: a keyed hash of its number, so that no split is the tail of one source."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def deal(first: int, count: int, splits: Mapping[str, float], seed: int) -> np.ndarray:
    """The split of each of the documents `first : first + count`.

    Pure in (document number, shares, seed). The first documents, one per split, are dealt one to each, so that a small
    share of a small collection is not empty; every other document goes where its hash falls.

    Args:
        first: number of the first document, from 0 over the whole collection.
        count: documents.
        splits: name → share, normalised here.
        seed: key of the hash.

    Returns:
        int64 [count], positions in `splits`.
    """
    shares = np.array(list(splits.values()), np.float64)
    edges = np.cumsum(shares / shares.sum())[:-1]
    numbers = np.arange(first, first + count, dtype=np.uint64)
    choice = np.searchsorted(edges, _uniform(numbers, seed), side="right")
    if first < len(shares):
        dealt = np.argsort(_uniform(np.arange(len(shares), dtype=np.uint64), seed), kind="stable")[
            first : first + count
        ]
        choice[: len(dealt)] = dealt
    return choice


def _uniform(numbers: np.ndarray, seed: int) -> np.ndarray:
    """A number in [0, 1) for each document number: splitmix64 (Steele, Lea & Flood 2014) of it and the key."""
    return (_mix(numbers ^ _mix(np.array([seed], np.uint64))) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(values: np.ndarray) -> np.ndarray:
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
