"""From the order of documents to rows: row `i` of one dataset, for any `i`, as pieces of documents.

A row holds `sequence_length + 1` tokens: the first `sequence_length` are inputs, the last `sequence_length` targets, so
the last token of a row is only ever a target. Two ways to fill them:

- `CutRows`: the documents of all epochs are one stream, cut into `[j * S, j * S + S + 1)`: neighbours overlap by the one
  token that is a target in the first and an input in the second. The rows that begin in one block are then shuffled, so
  that a batch is not one long document.
- `WholeRows`: best-fit packing of whole documents inside each block of the order, with padding; documents that are
  longer than a row are left out and counted, or spread over several rows (`split`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from modelyard.data.datasets import IndexedDataset
from modelyard.data.order import DocumentOrder, derive_key, keyed_shuffle
from modelyard.data.packing import Packed, pack_best_fit
from modelyard.errors import UserError

_LAYOUT_VERSION = 2
"""Raised when the same seed would give other rows than before: tables saved by an older version are not used then."""
_CACHED_BLOCKS = 2
"""Rows are read in order, and a row that is cut touches two blocks."""

_ADVISED_TOKENS = 1 << 27
"""Blocks up to this size are read from disk at once when their first row is; larger ones document by document."""
_SAMPLED_BLOCKS = 8
"""Blocks that are packed to say how many rows an epoch has: about a tenth of a second."""


class _Block(Protocol):
    @property
    def tokens(self) -> int: ...


BlockT = TypeVar("BlockT", bound=_Block)


class Piece(NamedTuple):
    """Tokens `begin:end` of a document, in a row."""

    document: int
    begin: int
    end: int


class BlockTable:
    """Block → first unit (row or token), grown as far as it has been asked for and no further."""

    def __init__(self, size_of: Callable[[int], int], blocks_per_cycle: int):
        self.first = [0]
        self._size_of = size_of
        self._blocks_per_cycle = blocks_per_cycle

    def find(self, unit: int) -> int:
        """The block that holds a unit. Raises LookupError when a whole cycle of blocks holds none."""
        first = self.first
        while first[-1] <= unit:
            self.grow(len(first))
            if len(first) > self._blocks_per_cycle and first[-1] == first[-1 - self._blocks_per_cycle]:
                raise LookupError
        return bisect_right(first, unit) - 1

    def grow(self, blocks: int) -> None:
        """Work out at least the first `blocks` blocks."""
        while len(self.first) <= blocks:
            self.first.append(self.first[-1] + self._size_of(len(self.first) - 1))

    def sizes(self) -> list[int]:
        """Units of each block known so far."""
        return [after - before for before, after in zip(self.first, self.first[1:])]

    def restore(self, sizes: Sequence[int]) -> None:
        """Take sizes that `sizes()` gave before, unless more is known already."""
        if len(sizes) >= len(self.first):
            self.first = [0]
            for size in sizes:
                self.first.append(self.first[-1] + int(size))


class Rows(ABC, Generic[BlockT]):
    """Rows of one dataset, without an end: after the last row of an epoch comes the next epoch."""

    def __init__(self, dataset: IndexedDataset, order: DocumentOrder, sequence_length: int):
        self.dataset = dataset
        self.order = order
        self.sequence_length = sequence_length
        self.table = BlockTable(self._size_of, order.blocks_per_cycle)
        self.fingerprint = f"{derive_key(*self._identity()):016x}"
        """Changes with everything that decides what is in which row."""
        self._blocks: OrderedDict[int, BlockT] = OrderedDict()
        self._advised: deque[int] = deque(maxlen=_CACHED_BLOCKS)

    @abstractmethod
    def row(self, index: int) -> list[Piece]:
        """What row `index` holds, in order; at most `sequence_length + 1` tokens."""

    @abstractmethod
    def one_pass(self) -> Iterator[list[Piece]]:
        """The rows that hold every (usable) document of the first epoch once, and nothing of the next."""

    @abstractmethod
    def rows_per_epoch(self) -> float:
        """Rows in one pass over the dataset: exact where known, else from the blocks seen so far."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What is known about how documents fill rows."""

    @abstractmethod
    def _size_of(self, block: int) -> int: ...

    @abstractmethod
    def _build(self, block: int) -> BlockT: ...

    def _identity(self) -> tuple[int | str, ...]:
        order = self.order
        return (
            _LAYOUT_VERSION,
            type(self).__name__,
            self.dataset.fingerprint,
            order.num_documents,
            order.key,
            order.shuffle,
            order.passes,
            self.sequence_length,
            *self._more_identity(),
        )

    def _more_identity(self) -> tuple[int | str, ...]:
        return ()

    def _block(self, block: int) -> BlockT:
        found = self._blocks.get(block)
        if found is None:
            found = self._blocks[block] = self._build(block)
            if len(self._blocks) > _CACHED_BLOCKS:
                self._blocks.popitem(last=False)
        else:
            self._blocks.move_to_end(block)
        return found

    def _block_to_read(self, block: int) -> BlockT:
        """A block whose tokens are about to be read."""
        found = self._block(block)
        if block not in self._advised:
            self._advised.append(block)
            if found.tokens <= _ADVISED_TOKENS:
                firsts, lasts = self.order.runs(block)
                self.dataset.will_need(list(zip(firsts.tolist(), lasts.tolist())))
        return found

    def _documents(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The block's documents in reading order and their lengths, int64 [documents] each."""
        firsts, lasts = self.order.runs(block)
        documents = np.concatenate([np.arange(first, last) for first, last in zip(firsts, lasts)])
        shuffle = self.order.shuffle_documents(block, len(documents))
        return documents[shuffle], self._run_lengths(firsts, lasts)[shuffle]

    def _run_lengths(self, firsts: np.ndarray, lasts: np.ndarray) -> np.ndarray:
        lengths = self.dataset.lengths
        runs = [lengths(first, last) for first, last in zip(firsts.tolist(), lasts.tolist())]
        return np.concatenate(runs).astype(np.int64)


@dataclass(frozen=True)
class _Stream:
    """A block of documents, one after the other."""

    documents: np.ndarray
    """Int64 [documents]."""
    starts: np.ndarray
    """First token of each in the block, and the block's length: int64 [documents + 1]."""

    @property
    def tokens(self) -> int:
        return int(self.starts[-1])


class _Counts(NamedTuple):
    """What packing one block met. Units: documents, rows, tokens, documents, tokens."""

    documents: int
    rows: int
    tokens: int
    over_long: int
    longest: int


class CutRows(Rows[_Stream]):
    """Rows cut from the stream of documents (`truncate_documents: yes`)."""

    _shuffle: tuple[int, np.ndarray] | None = None
    """The block met last and the order of its rows."""

    def row(self, index: int) -> list[Piece]:
        """Tokens `[j * S, j * S + S + 1)` of the stream, where `j` is the row's place in it."""
        position = self._place(index) * self.sequence_length
        stop = position + self.sequence_length + 1
        pieces = []
        block = self.table.find(position)
        while position < stop:
            stream = self._block_to_read(block)
            start = position - self.table.first[block]
            end = min(stop - self.table.first[block], stream.tokens)
            first = int(np.searchsorted(stream.starts, start, side="right")) - 1
            last = int(np.searchsorted(stream.starts, end, side="left"))
            bounds = stream.starts[first : last + 1].tolist()
            for document, begin, after in zip(stream.documents[first:last].tolist(), bounds, bounds[1:]):
                if begin < after:
                    pieces.append(Piece(document, max(start, begin) - begin, min(end, after) - begin))
            position += end - start
            block += 1
            if position < stop:
                block = self.table.find(position)
        return pieces

    def _place(self, index: int) -> int:
        """Which cut of the stream row `index` is: a permutation of the cuts that begin in its block."""
        block = self.table.find(index * self.sequence_length)
        key = self.order.row_key(block)
        if key is None:
            return index
        begin, end = (-(-self.table.first[b] // self.sequence_length) for b in (block, block + 1))
        if self._shuffle is None or self._shuffle[0] != block:
            self._shuffle = (block, keyed_shuffle(key, end - begin))
        return begin + int(self._shuffle[1][index - begin])

    def one_pass(self) -> Iterator[list[Piece]]:
        """As `row`, but the cut that reaches into the next epoch ends with this one."""
        for index in range(-(-self.dataset.num_tokens // self.sequence_length)):
            left = self.dataset.num_tokens - self._place(index) * self.sequence_length
            pieces = []
            for document, begin, end in self.row(index):
                end = min(end, begin + left)
                left -= end - begin
                if begin < end:
                    pieces.append(Piece(document, begin, end))
            yield pieces

    def rows_per_epoch(self) -> float:
        """Exact: tokens ÷ sequence length."""
        return self.dataset.num_tokens / self.sequence_length

    def facts(self) -> dict[str, Any]:
        """Nothing is left out and nothing padded."""
        return {"fill": 1.0, "over_long_documents": 0}

    def _size_of(self, block: int) -> int:
        return int(self._run_lengths(*self.order.runs(block)).sum())

    def _build(self, block: int) -> _Stream:
        documents, lengths = self._documents(block)
        starts = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=starts[1:])
        return _Stream(documents, starts)


@dataclass(frozen=True)
class _Packing:
    """A block of documents in rows."""

    documents: np.ndarray
    """Int64 [pieces]."""
    begins: np.ndarray
    """First token of each piece in its document, int64 [pieces]: 0 but where documents are split."""
    lengths: np.ndarray
    """Int64 [pieces]."""
    packed: Packed

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())


class WholeRows(Rows[_Packing]):
    """Rows of whole documents (`truncate_documents: no`)."""

    def __init__(
        self, dataset: IndexedDataset, order: DocumentOrder, sequence_length: int, *, split: bool = False
    ):
        self._split = split
        self._packed: dict[int, _Counts] = {}
        super().__init__(dataset, order, sequence_length)

    def row(self, index: int) -> list[Piece]:
        """Whole documents (or parts of those that are too long), in the order of the block."""
        block = self._find(index)
        packing = self._block_to_read(block)
        row = index - self.table.first[block]
        members = packing.packed.members[packing.packed.bounds[row] : packing.packed.bounds[row + 1]]
        columns = (packing.documents, packing.begins, packing.lengths)
        found = zip(*(column[members].tolist() for column in columns))
        return [Piece(document, begin, begin + length) for document, begin, length in found]

    def one_pass(self) -> Iterator[list[Piece]]:
        """The packed rows of the first epoch's blocks."""
        blocks = self.order.blocks_per_cycle
        self._find(0)  # An error, rather than no row, where no document fits.
        self.table.grow(blocks)
        return (self.row(index) for index in range(self.table.first[blocks]))

    def rows_per_epoch(self) -> float:
        """Exact for a dataset of a few blocks, else as the first ones have it; always the same number."""
        blocks = max(self._find(0) + 1, min(_SAMPLED_BLOCKS, self.order.blocks_per_cycle))
        self.table.grow(blocks)
        documents = sum(self.order.documents(block) for block in range(blocks))
        return self.table.first[blocks] * self.dataset.num_documents / documents

    def facts(self) -> dict[str, Any]:
        """Counts over the blocks of the first epoch packed so far (`documents_seen` documents)."""
        self._block(0)
        counts = [sum(column) for column in zip(*self._packed.values())]
        seen = _Counts(*counts)
        return {
            "documents_seen": seen.documents,
            "over_long_documents": seen.over_long,
            "longest_document": max(block.longest for block in self._packed.values()),
            "fill": seen.tokens / (max(seen.rows, 1) * (self.sequence_length + 1)),
        }

    def _more_identity(self) -> tuple[int | str, ...]:
        return ("split",) if self._split else ()

    def _find(self, row: int) -> int:
        try:
            return self.table.find(row)
        except LookupError:
            longest = max(block.longest for block in self._packed.values())
            raise UserError(
                f"{self.dataset.name}: no document fits in a row of sequence_length + 1 = {self.sequence_length + 1:,} "
                f"tokens (the longest has {longest:,}); raise batch.sequence_length or set batch.truncate_documents: yes"
            ) from None

    def _size_of(self, block: int) -> int:
        return self._block(block).packed.rows

    def _build(self, block: int) -> _Packing:
        documents, lengths = self._documents(block)
        count, longest, begins = len(documents), int(lengths.max(initial=0)), np.zeros_like(lengths)
        if self._split:
            numbers, begins, lengths = stretches(lengths, self.sequence_length)
            documents = documents[numbers]
        packed = pack_best_fit(lengths, self.sequence_length + 1, self.order.row_key(block))
        if block < self.order.blocks_per_cycle:
            tokens = int(lengths[packed.members].sum())
            self._packed[block] = _Counts(count, packed.rows, tokens, packed.over_long, longest)
        return _Packing(documents, begins, lengths, packed)


def stretches(lengths: np.ndarray, sequence_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents of these lengths cut where they are longer than a row: stretches of `sequence_length + 1` tokens that overlap
    by one, which is a target in the first and an input in the second.

    Returns:
        Number of its document, first token in it, and tokens of each stretch: int64 [stretches] each.
    """
    counts = np.maximum(-(-(lengths - 1) // sequence_length), 1)
    numbers = np.repeat(np.arange(len(lengths)), counts)
    begins = (np.arange(len(numbers)) - np.repeat(np.cumsum(counts) - counts, counts)) * sequence_length
    return numbers, begins, np.minimum(lengths[numbers] - begins, sequence_length + 1)


_LISTED = 5
"""Of the documents that are too long, how many are named."""
_READ_AT_ONCE = 1 << 20


def refuse_overlong(dataset: IndexedDataset, capacity: int) -> None:
    """Raise UserError where documents are longer than `capacity` tokens; it names the longest."""
    count = 0
    longest: list[tuple[int, int]] = []
    for begin in range(0, dataset.num_documents, _READ_AT_ONCE):
        lengths = dataset.lengths(begin, min(begin + _READ_AT_ONCE, dataset.num_documents))
        over = np.flatnonzero(lengths > capacity)
        count += len(over)
        found = [(int(lengths[number]), begin + int(number)) for number in over]
        longest = sorted(longest + found, key=lambda entry: (-entry[0], entry[1]))[:_LISTED]
    if not count:
        return
    listed = ", ".join(f"{dataset.where(number)} ({length:,} tokens)" for length, number in longest)
    more = f" and {count - len(longest):,} more" if count > len(longest) else ""
    share = f"{count:,} of {dataset.num_documents:,} documents"
    raise UserError(
        f"{share} are longer than a row of sequence_length + 1 = {capacity:,} tokens: {listed}{more}; raise "
        f"batch.sequence_length to {longest[0][0] - 1:,}, or say what becomes of them: batch.overlong: drop | split"
    )
