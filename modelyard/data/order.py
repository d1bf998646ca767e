"""In which order the documents of a dataset are read: a pure function of (key, epoch, index).

Nothing of the size of the dataset is ever built. Documents are taken in short runs of neighbours (one read from disk
each); a keyed permutation of the runs, computed point by point, puts them in order; a block is a stretch of that order,
so that its runs come from all over the dataset; and inside a block the documents are shuffled one by one.
"""

from __future__ import annotations

import hashlib

import numpy as np

RUN_DOCUMENTS = 32
"""Neighbours read together: long enough that a disk reads tens of kilobytes at once, short enough that a block holds
hundreds of runs."""
BLOCK_DOCUMENTS = 10_000
"""Documents that are shuffled (and packed) together, at least; a smaller dataset is one block."""

_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FEISTEL_ROUNDS = 6


def derive_key(*parts: int | str) -> int:
    """A 64-bit key that depends on every part and on their order."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def keyed_hash(key: int, counters: np.ndarray) -> np.ndarray:
    """Pseudo-random uint64 for each counter: splitmix64's finalizer, twice.

    Written out instead of taken from `numpy.random`, whose streams may change between versions; the order of the data
    must not.

    Shapes: counters uint64 [n] → uint64 [n]. Source: Steele et al., "Fast Splittable Pseudorandom Number Generators", 2014.
    """
    value = counters * _GOLDEN + np.uint64(key)
    for _ in range(2):
        value = (value ^ (value >> np.uint64(30))) * _MIX_1
        value = (value ^ (value >> np.uint64(27))) * _MIX_2
        value = value ^ (value >> np.uint64(31))
    return value


def keyed_shuffle(key: int, size: int) -> np.ndarray:
    """A permutation of `range(size)`, int64 [size]; for sizes that fit in memory."""
    return np.argsort(keyed_hash(key, np.arange(size, dtype=np.uint64)), kind="stable")


def permute(key: int, indices: np.ndarray, size: int) -> np.ndarray:
    """Where a keyed permutation of `range(size)` sends each index, without building the permutation.

    A Feistel network over the next power of four, walked until it lands inside (four steps on average at the worst).

    Shapes: indices int64 [n], each in [0, size) → int64 [n].
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    round_keys = [derive_key(key, "round", number) for number in range(_FEISTEL_ROUNDS)]

    def once(value: np.ndarray) -> np.ndarray:
        left, right = value >> shift, value & mask
        for round_key in round_keys:
            left, right = right, left ^ (keyed_hash(round_key, right) & mask)
        return (left << shift) | right

    result = once(indices.astype(np.uint64))
    outside = np.flatnonzero(result >= size)
    while outside.size:
        result[outside] = once(result[outside])
        outside = outside[result[outside] >= size]
    return result.astype(np.int64)


class DocumentOrder:
    """Blocks of documents, for ever: block 0, 1, 2, … through the first epoch, then the next, without an end.

    `shuffle` is one of `epoch`, `full`, `skip_first_epoch`, `disabled`. With `full`, `passes` epochs are permuted together
    (each document appears that often among them); otherwise `passes` is 1.
    """

    def __init__(self, num_documents: int, *, key: int, shuffle: str, passes: int = 1):
        self.num_documents = num_documents
        self.key = key
        self.shuffle = shuffle
        self.passes = passes
        self._runs_per_pass = -(-num_documents // RUN_DOCUMENTS)
        self._runs = self._runs_per_pass * passes
        runs_per_block = -(-BLOCK_DOCUMENTS // RUN_DOCUMENTS)
        self.blocks_per_cycle = max(1, self._runs // runs_per_block)
        """Blocks in one cycle, which is one epoch (`passes` of them with `full`)."""

    def shuffled(self, block: int) -> bool:
        """Whether that block's documents are shuffled, or read as they are stored."""
        first_cycle = block < self.blocks_per_cycle
        return self.shuffle != "disabled" and not (self.shuffle == "skip_first_epoch" and first_cycle)

    def runs(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The runs of neighbours that make up a block: first document and one after the last, int64 [runs] each."""
        cycle, place = divmod(block, self.blocks_per_cycle)
        # The runs are dealt out evenly, so that no block is a small remainder.
        begin = place * self._runs // self.blocks_per_cycle
        end = (place + 1) * self._runs // self.blocks_per_cycle
        if not self.shuffled(block):
            first, last = np.array([begin * RUN_DOCUMENTS]), np.array([end * RUN_DOCUMENTS])
        else:
            run = (
                permute(derive_key(self.key, "runs", cycle), np.arange(begin, end), self._runs)
                % self._runs_per_pass
            )
            first, last = run * RUN_DOCUMENTS, (run + 1) * RUN_DOCUMENTS
        return first, np.minimum(last, self.num_documents)

    def documents(self, block: int) -> int:
        """How many documents a block has."""
        first, last = self.runs(block)
        return int((last - first).sum())

    def shuffle_documents(self, block: int, count: int) -> np.ndarray:
        """The order of a block's `count` documents, as positions in its concatenated runs, int64 [count]."""
        if not self.shuffled(block):
            return np.arange(count)
        return keyed_shuffle(derive_key(self.key, "documents", block), count)

    def row_key(self, block: int) -> int | None:
        """Key for shuffling the packed rows of a block, or None where they stay in order."""
        return derive_key(self.key, "rows", block) if self.shuffled(block) else None
