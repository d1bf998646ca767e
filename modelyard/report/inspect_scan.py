"""Passes over a dataset's lengths and tokens: what there is, and what is wrong with it. Memory for a few million tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from modelyard.chat.segments import LossLane
from modelyard.data.datasets import IndexedDataset, read_documents
from modelyard.data.lanes import KIND_LANE, MASK_LANE
from modelyard.data.order import derive_key, keyed_hash
from modelyard.report.inspect_lanes import Kinds, Seen, Spans, TurnTokens, lane_of, left_out

CHUNK_TOKENS = 1 << 20
"""Tokens in memory at a time; the intermediate results take about 100 bytes for each."""
_CHUNK_DOCUMENTS = 1 << 16
_LENGTHS_AT_ONCE = 1 << 22
_COUNTED_LENGTH = 1 << 20
"""Lengths below this are counted one by one; documents as long as this are few and are listed."""
_COMPARED_DOCUMENTS = 10_000_000
"""Documents whose hashes are kept to find copies: 80 MB."""


@dataclass
class Lengths:
    """How long the documents of a dataset are: exact, over all of them."""

    counts: np.ndarray
    """Documents of each length, int64 [_COUNTED_LENGTH]."""
    longer: np.ndarray
    """Lengths of the documents that are longer than that, sorted, int64 [documents]."""

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return int(self.counts.sum()) + len(self.longer)

    @property
    def empty(self) -> int:
        """Documents without a token."""
        return int(self.counts[0])

    def quantile(self, share: float) -> int:
        """The length that `share` of the documents do not exceed (the smallest such one). Unit: tokens."""
        wanted = max(1, int(np.ceil(share * self.documents)))
        below = np.cumsum(self.counts)
        if wanted <= below[-1]:
            return int(np.searchsorted(below, wanted))
        return int(self.longer[wanted - int(below[-1]) - 1])

    def longer_than(self, length: int) -> tuple[int, int]:
        """(documents longer than `length` tokens, the tokens in them)."""
        counts = self.counts[length + 1 :]
        far = self.longer[self.longer > length]
        tokens = int((counts * np.arange(length + 1, length + 1 + len(counts))).sum()) + int(far.sum())
        return int(counts.sum()) + len(far), tokens

    def buckets(self, edge: int | None = None) -> list[tuple[int, int, int]]:
        """(shortest, longest, documents) of powers of two, from the shortest document to the longest.

        The one that holds `edge` ends there, and what is longer has a bucket of its own.
        """
        found = []
        first, last = 0, 0
        total = self.documents
        seen = 0
        while seen < total:
            parts = [(first, last)]
            if edge is not None and first <= edge < last:
                parts = [(first, edge), (edge + 1, last)]
            for low, high in parts:
                count = self.longer_than(low - 1)[0] - self.longer_than(high)[0]
                if count or 0 < seen < total:
                    found.append((low, high, count))
                seen += count
            first, last = last + 1, max(1, 2 * last + 1)
        return found


def read_lengths(dataset: IndexedDataset) -> Lengths:
    """The lengths of all documents: four bytes of reading each."""
    counts = np.zeros(_COUNTED_LENGTH, dtype=np.int64)
    longer = []
    for begin in range(0, dataset.num_documents, _LENGTHS_AT_ONCE):
        lengths = dataset.lengths(begin, min(begin + _LENGTHS_AT_ONCE, dataset.num_documents))
        far = lengths >= _COUNTED_LENGTH
        longer.append(lengths[far].astype(np.int64))
        counts += np.bincount(lengths[~far].astype(np.int64), minlength=_COUNTED_LENGTH)
    return Lengths(counts, np.sort(np.concatenate(longer)))


@dataclass
class Scan:
    """What was met in the tokens that were read."""

    documents: int = 0
    tokens: int = 0
    whole: bool = True
    """Whether that is the whole dataset, or stretches from all over it."""
    largest: int = -1
    """Largest token id."""
    masked: int | None = None
    """Tokens that are not trained on, by the loss mask or by what they are in a conversation; None where nothing says so."""
    kinds: Kinds | None = None
    """Of conversations."""
    spans: Spans | None = None
    """Of texts with a loss mask, where the ends of turns are known."""
    outside: dict[str, Seen] = field(default_factory=dict)
    """For each vocabulary, documents with a token beyond it."""
    double_bos: Seen = field(default_factory=Seen)
    """Documents that begin with the begin token twice."""
    missing_bos: Seen = field(default_factory=Seen)
    inner_bos: Seen = field(default_factory=Seen)
    """Documents with a begin token elsewhere than at the beginning."""
    double_eos: Seen = field(default_factory=Seen)
    missing_eos: Seen = field(default_factory=Seen)
    untrained: Seen = field(default_factory=Seen)
    """Documents without a token, after their first, that is trained on."""
    copies: int = 0
    """Documents that are equal to an earlier one, among the `compared`."""
    most_copied: int = 0
    """How often the most frequent document is there."""
    compared: int = 0


def scan(
    dataset: IndexedDataset,
    *,
    vocabularies: Mapping[str, int],
    bos: int | None,
    eos: int | None,
    limit: int,
    loss_lane: LossLane = "sft",
    turns: TurnTokens | None = None,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Scan:
    """Read up to about `limit` tokens: all there are, or whole documents in stretches spread evenly over the dataset.

    Args:
        dataset: what to read; its kinds or its loss mask too where it has one.
        vocabularies: name → size in tokens; ids from `size` on are counted for each.
        bos: the begin token of documents, None where they have none.
        eos: the end token.
        limit: tokens.
        loss_lane: what of conversations is trained on.
        turns: by which the spans of rendered chats are judged.
        progress: is told how many tokens were read since it was last told.
    """
    found = Scan(outside={name: Seen() for name in vocabularies})
    lane = lane_of(dataset.lanes)
    found.masked = 0 if lane else None
    found.kinds = Kinds(loss_lane) if lane == KIND_LANE else None
    found.spans = Spans(turns) if lane == MASK_LANE and turns else None
    ranges = _ranges(dataset, limit)
    found.whole = ranges == [(0, dataset.num_documents)]
    hashes = []
    for begin, end in ranges:
        for first, lengths in _chunks(dataset, begin, end):
            numbers = first + np.flatnonzero(lengths)
            kept = lengths[lengths > 0]
            found.documents += len(lengths)
            if not len(kept):
                continue
            if len(kept) == 1 and kept[0] > CHUNK_TOKENS:
                pieces = list(_long_document(dataset, numbers, kept, lane, found))
            else:
                tokens = read_documents(dataset, first, first + len(lengths))
                mask = None
                if lane is not None:
                    values = read_documents(dataset, first, first + len(lengths), lane)
                    mask = left_out(values, kept, lane, loss_lane)
                    if found.kinds is not None:
                        found.kinds.add(values, mask, kept, numbers)
                    if found.spans is not None:
                        found.spans.add(tokens, mask, kept, numbers)
                pieces = [_measure(tokens, mask, kept, 0)]
            facts = pieces[0]
            for more in pieces[1:]:
                facts = facts.followed_by(more)
            _judge(found, facts, numbers, kept, vocabularies, bos, eos)
            if found.compared < _COMPARED_DOCUMENTS:
                hashes.append(facts.hashes)
                found.compared += len(facts.hashes)
            found.tokens += int(kept.sum())
            progress(int(kept.sum()))
    if hashes:
        times = np.unique(np.concatenate(hashes), return_counts=True)[1]
        found.copies = int((times - 1).sum())
        found.most_copied = int(times.max())
    return found


@dataclass
class _Facts:
    """Of each document of a chunk, in arrays [documents]."""

    largest: np.ndarray
    hashes: np.ndarray
    trained: np.ndarray
    """Tokens after the first that are in the loss."""
    masked: int
    first: np.ndarray
    second: np.ndarray
    last: np.ndarray
    before_last: np.ndarray
    counts_of: Callable[[int], np.ndarray]
    """Occurrences of a token in each document."""

    def followed_by(self, more: _Facts) -> _Facts:
        """Both parts of one long document."""
        return _Facts(
            np.maximum(self.largest, more.largest),
            self.hashes + more.hashes,
            self.trained + more.trained,
            self.masked + more.masked,
            self.first,
            self.second,
            more.last,
            np.where(more.before_last < 0, self.last, more.before_last),
            lambda token: self.counts_of(token) + more.counts_of(token),
        )


def _measure(tokens: np.ndarray, mask: np.ndarray | None, lengths: np.ndarray, position: int) -> _Facts:
    """Facts of documents of these lengths, none of them empty; `mask` says which tokens are no targets, `position` where in its
    document the first token is."""
    ends = np.cumsum(lengths)
    starts = ends - lengths
    # A sum of tokens times a pseudo-random odd number for each position: equal documents, equal sums.
    positions = np.arange(len(tokens), dtype=np.int64) - np.repeat(starts, lengths) + position
    longest = int(lengths.max())
    factors = keyed_hash(_HASH_KEY, np.arange(position, position + longest, dtype=np.uint64)) | np.uint64(1)
    hashes = np.add.reduceat(
        (tokens.astype(np.uint64) + np.uint64(1)) * factors[positions - position], starts
    )
    trained = lengths - (position == 0)
    masked = 0
    if mask is not None:
        masked = int(np.count_nonzero(mask))
        in_loss = ~mask
        if position == 0:
            in_loss[starts] = False
        trained = np.add.reduceat(in_loss.astype(np.int64), starts)
    nothing = np.full(len(lengths), -1, dtype=np.int64)

    def at(index: np.ndarray, there: np.ndarray) -> np.ndarray:
        values = nothing.copy()
        values[there] = tokens[index[there]]
        return values

    everywhere, two = lengths > 0, lengths > 1
    return _Facts(
        np.maximum.reduceat(tokens, starts).astype(np.int64),
        hashes,
        trained,
        masked,
        at(starts, everywhere),
        at(starts + 1, two),
        at(ends - 1, everywhere),
        at(ends - 2, two),
        lambda token: np.add.reduceat((tokens == token).astype(np.int64), starts),
    )


_HASH_KEY = derive_key("inspect", "equal documents")


def _long_document(
    dataset: IndexedDataset, numbers: np.ndarray, lengths: np.ndarray, lane: str | None, found: Scan
) -> Iterator[_Facts]:
    """A document that is longer than what is held at a time, piece by piece. The spans of so long a one are not judged."""
    number, length = int(numbers[0]), int(lengths[0])
    whole = None
    if found.kinds is not None:
        # A byte a token; what is trained on is known from the whole.
        values = dataset.lane(KIND_LANE, number)
        assert values is not None
        whole = left_out(values, lengths, KIND_LANE, found.kinds.loss_lane)
        found.kinds.add(values, whole, lengths, numbers)
    for begin in range(0, length, CHUNK_TOKENS):
        end = min(begin + CHUNK_TOKENS, length)
        mask = None
        if whole is not None:
            mask = whole[begin:end]
        elif lane is not None and (values := dataset.lane(lane, number, begin, end)) is not None:
            mask = values != 0
        yield _measure(dataset.document(number, begin, end), mask, np.array([end - begin]), begin)


def _judge(
    found: Scan,
    facts: _Facts,
    numbers: np.ndarray,
    lengths: np.ndarray,
    vocabularies: Mapping[str, int],
    bos: int | None,
    eos: int | None,
) -> None:
    """Add a chunk's documents, `numbers` [documents], to what they have in common with others."""
    found.largest = max(found.largest, int(facts.largest.max()))
    for name, size in vocabularies.items():
        found.outside[name].add(numbers[facts.largest >= size])
    if found.masked is not None:
        found.masked += facts.masked
        found.untrained.add(numbers[facts.trained == 0])
    # Where one token is both, a document of two is its begin and its end and nothing else.
    shortest = 3 if bos == eos else 2
    if bos is not None:
        begins = facts.first == bos
        found.missing_bos.add(numbers[~begins])
        found.double_bos.add(numbers[begins & (facts.second == bos) & (lengths >= shortest)])
        if bos != eos:
            at_the_beginning = begins.astype(np.int64) + (begins & (facts.second == bos))
            found.inner_bos.add(numbers[facts.counts_of(bos) > at_the_beginning])
    if eos is not None:
        ends = facts.last == eos
        found.missing_eos.add(numbers[~ends])
        found.double_eos.add(numbers[ends & (facts.before_last == eos) & (lengths >= shortest)])


def _ranges(dataset: IndexedDataset, limit: int) -> list[tuple[int, int]]:
    """Which documents to read: all, or stretches of about a chunk each, one in every equal part of the dataset."""
    documents, tokens = dataset.num_documents, dataset.num_tokens
    if limit <= 0:
        return []
    if tokens <= limit:
        return [(0, documents)]
    parts = min(max(1, limit // CHUNK_TOKENS), documents)
    mean = tokens / documents
    size = max(1, int(limit / parts / mean))
    draws = keyed_hash(derive_key("inspect", "scan"), np.arange(parts, dtype=np.uint64)) >> np.uint64(32)
    ranges = []
    for part, draw in enumerate(draws.tolist()):
        begin, end = part * documents // parts, (part + 1) * documents // parts
        first = begin + int(draw / 2**32 * max(0, end - begin - size + 1))
        ranges.append((first, min(first + size, end)))
    return ranges


def _chunks(dataset: IndexedDataset, begin: int, end: int) -> Iterator[tuple[int, np.ndarray]]:
    """Documents `begin:end` in stretches that fit in memory (or one document): the first one's number, their lengths."""
    while begin < end:
        lengths = dataset.lengths(begin, min(begin + _CHUNK_DOCUMENTS, end)).astype(np.int64)
        count = max(1, int(np.searchsorted(np.cumsum(lengths), CHUNK_TOKENS, side="right")))
        yield begin, lengths[:count]
        begin += count
