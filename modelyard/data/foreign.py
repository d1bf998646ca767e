"""Tokens that another program prepared, read where they lie: Megatron-LM's `.bin`/`.idx` pair and its descendants.

`PREFIX.bin` holds the token ids, `PREFIX.idx` where each sequence begins. Little endian: `MMIDIDX\\0\\0`, u64 version, from
version 2 on a flag byte for loss-masking spans, from 3 on one for preference spans, u8 dtype code, u64 sequences, u64
document entries; then int32 sizes [sequences], int64 byte positions [sequences], with the flags int32 span counts
[sequences] and int32 (first, last) of every span, and int64 document entries: the first sequence of each document, and the
number of sequences. Versions 2 and 3 have documents of one sequence each. The single-file format is in `foreign_file`.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from modelyard.data.lanes import MASK_LANE
from modelyard.data.manifest import OFFSET_INTERVAL, token_range
from modelyard.data.reading import FileArray
from modelyard.errors import UserError

MAGIC = b"MMIDIDX\0\0"
DTYPES: dict[int, np.dtype[Any]] = {
    code: np.dtype(name) for code, name in {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}.items()
}
FLOAT_CODES = (6, 7)
"""32 and 64 bits, in an order that differs between programs; no token ids in either."""

_I4, _I8 = np.dtype("<i4"), np.dtype("<i8")
_STEP = 1 << 20
"""Entries of an index checked at a time."""
_TOKENS_AT_ONCE = 1 << 22
_CACHED_BLOCKS = 640
_SAMPLES, _SAMPLE_BYTES = 64, 4096


class ForeignStore(ABC):
    """Documents, and their loss mask where they have spans, as `TokenStore` gives them.

    The index is read once when it is opened, in pieces: every entry is checked, and hashed for the fingerprint. The tokens
    go into the fingerprint by their number and by samples from all over the file. Nothing says which tokenizer they are
    of: `outside_vocabulary` looks at the ids themselves.
    """

    num_documents: int
    num_tokens: int
    fingerprint: str
    vocab_size: int | None = None
    lanes: tuple[str, ...] = ()

    def __init__(self, path: Path):
        self.path = path
        self._tokens: FileArray
        self._starts_of_block = lru_cache(maxsize=_CACHED_BLOCKS)(self._block)

    def __reduce__(self) -> tuple[type[ForeignStore], tuple[Path]]:
        return type(self), (self.path,)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the ids as they are stored; may be signed."""
        return self._tokens.dtype

    @abstractmethod
    def _starts(self, begin: int, end: int) -> np.ndarray:
        """First token of documents `begin:end` and one past the last one's last, int64 [end - begin + 1]."""

    @abstractmethod
    def _spans(self, index: int) -> np.ndarray:
        """Masked stretches of a document, half-open, in tokens: int64 [spans, 2]."""

    def lengths(self, begin: int, end: int) -> np.ndarray:
        """Tokens of each document in `begin:end`, int64 [end - begin]."""
        if not 0 <= begin <= end <= self.num_documents:
            raise IndexError(f"documents {begin}:{end} of {self.num_documents}")
        return np.diff(self._starts(begin, end))

    def offset(self, index: int) -> int:
        """Tokens before document `index`, which may be `num_documents`."""
        if not 0 <= index <= self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents}")
        if index == self.num_documents:
            return self.num_tokens
        block, place = divmod(index, OFFSET_INTERVAL)
        return int(self._starts_of_block(block)[place])

    def document(self, index: int, begin: int = 0, end: int | None = None) -> np.ndarray:
        """Tokens `begin:end` of a document, none of them negative, [end - begin].

        Raises:
            UserError: an id is negative.
        """
        return self.tokens(*self._bounds(index, begin, end))

    def tokens(self, begin: int, end: int) -> np.ndarray:
        """Tokens `begin:end` of all documents one after the other, none of them negative, [end - begin].

        Raises:
            UserError: an id is negative.
        """
        tokens = self._tokens.read(begin, end)
        if tokens.dtype.kind == "i" and len(tokens) and tokens.min() < 0:
            raise UserError(self._negative(begin, tokens))
        return tokens

    def _negative(self, first: int, tokens: np.ndarray) -> str:
        place = int(np.argmax(tokens < 0))
        return (
            f"token {tokens[place]} in document {self._document_of(first + place)} of {self.path} is negative: the file is "
            "damaged, or its index is of another one"
        )

    def outside_vocabulary(self, vocab_size: int, begin: int, end: int) -> str | None:
        """What there is to say of the first id in documents `begin:end` that is no token; reads them all, in pieces."""
        if self.dtype.kind == "u" and np.iinfo(self.dtype).max < vocab_size:
            return None
        first, after = self.offset(begin), self.offset(end)
        for start in range(first, after, _TOKENS_AT_ONCE):
            tokens = self._tokens.read(start, min(start + _TOKENS_AT_ONCE, after))
            if tokens.min() >= 0 and tokens.max() < vocab_size:
                continue
            place = int(np.argmax((tokens < 0) | (tokens >= vocab_size)))
            if tokens[place] < 0:
                return self._negative(start, tokens)
            return (
                f"token {tokens[place]} in document {self._document_of(start + place)} of {self.path} is outside the model's "
                f"vocabulary of {vocab_size:,}: was the data prepared with another tokenizer?"
            )
        return None

    def _document_of(self, token: int) -> int:
        """The document that has the token at this place of all."""
        return bisect_right(range(self.num_documents), token, key=self.offset) - 1

    @property
    def files(self) -> tuple[Path, ...]:
        """What it is read from."""
        return (self._tokens.path,)

    def lane(self, name: str, index: int, begin: int = 0, end: int | None = None) -> np.ndarray | None:
        """The loss mask from the document's spans, uint8 [end - begin]; None for other lanes, or without spans."""
        if name not in self.lanes:
            return None
        first, after = self._bounds(index, begin, end)
        mask = np.zeros(after - first, np.uint8)
        for start, stop in (self._spans(index) - begin).tolist():
            mask[max(start, 0) : max(stop, 0)] = 1
        return mask

    def will_need(self, ranges: Sequence[tuple[int, int]]) -> None:
        """A hint that the tokens of documents `begin:end` of each range are read soon."""
        self._tokens.will_need([(self.offset(begin), self.offset(end)) for begin, end in ranges])

    def _block(self, block: int) -> np.ndarray:
        begin = block * OFFSET_INTERVAL
        return self._starts(begin, min(begin + OFFSET_INTERVAL, self.num_documents))

    def _bounds(self, index: int, begin: int, end: int | None) -> tuple[int, int]:
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents}")
        starts = self._starts_of_block(index // OFFSET_INTERVAL)
        return token_range(starts, index, begin, end)

    def _check_spans(self, first: int, sizes: np.ndarray, counts: np.ndarray, spans: np.ndarray) -> None:
        """Raise unless the half-open `spans` of the documents from `first` on lie in them."""
        limits = np.repeat(sizes, counts)
        wrong = np.flatnonzero((spans[:, 0] < 0) | (spans[:, 1] < spans[:, 0]) | (spans[:, 1] > limits))
        if wrong.size:
            document = first + int(np.searchsorted(np.cumsum(counts), wrong[0], side="right"))
            begin, end = spans[wrong[0]].tolist()
            raise UserError(
                f"{self.path}: document {document} has a masked span of tokens {begin} to {end - 1}, but "
                f"{limits[wrong[0]]} tokens: the index is damaged"
            )

    def _sample(self, digest: Any) -> None:
        """Hash the number of tokens and samples of them: all of a small file."""
        count, piece = self.num_tokens, max(1, _SAMPLE_BYTES // self.dtype.itemsize)
        digest.update(f"{self.dtype.str} {count}".encode())
        if count <= _SAMPLES * piece:
            digest.update(self._tokens.read(0, count))
            return
        for begin in np.linspace(0, count - piece, _SAMPLES, dtype=np.int64).tolist():
            digest.update(self._tokens.read(begin, begin + piece))


class IndexedPair(ForeignStore):
    """A `.bin`/`.idx` pair, of Megatron-LM or of one of the three versions of its descendants.

    Args:
        path: the common part of both names, or either of them.

    Raises:
        UserError: something is missing, torn, contradicts itself, or is not supported (one line, with what was found).
    """

    def __init__(self, path: Path):
        super().__init__(path)
        self._index, data = pair_of(path)
        sequences, entries, at = self._read_header()
        size = self._index.stat().st_size
        needed = at + 12 * sequences + 4 * sequences * self._has_spans + 8 * entries
        if size < needed:
            raise self._wrong(
                f"has {size:,} bytes, and needs {needed:,} for {sequences:,} sequences: cut short, or not whole"
            )
        self._sizes = FileArray(self._index, _I4, sequences, at)
        at += 4 * sequences
        self._positions = FileArray(self._index, _I8, sequences, at)
        at += 8 * sequences
        spans = 0
        if self._has_spans:
            self._span_counts = FileArray(self._index, _I4, sequences, at)
            at += 4 * sequences
            spans = self._count_spans()
            self._span_edges = FileArray(self._index, _I4, 2 * spans, at)
            at += 8 * spans
            self.lanes = (MASK_LANE,)
        self._documents = FileArray(self._index, _I8, entries, at)
        at += 8 * entries
        if size != at:
            modes = (
                "; one byte more for each sequence: a multimodal data set" if size == at + sequences else ""
            )
            raise self._wrong(
                f"has {size:,} bytes, not the {at:,} of {sequences:,} sequences and {spans:,} spans{modes}"
            )
        self.num_documents = entries - 1
        self._one_each = True
        digest = hashlib.sha256(b"bin/idx")
        self.num_tokens = self._check_sequences(digest)
        self._check_documents(digest)
        width = self.dtype.itemsize
        found = data.stat().st_size
        if found != self.num_tokens * width:
            raise UserError(
                f"{data} has {found:,} bytes, not the {self.num_tokens * width:,} that its index says "
                f"({self.num_tokens:,} tokens of {width} bytes): cut short, or of another index"
            )
        self._tokens = FileArray(data, self.dtype, self.num_tokens)
        self._sample(digest)
        self.fingerprint = digest.hexdigest()

    @property
    def files(self) -> tuple[Path, ...]:
        """The index, and the tokens."""
        return self._index, self._tokens.path

    def _wrong(self, what: str) -> UserError:
        return UserError(f"{self._index} {what}")

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the ids as they are stored; may be signed."""
        return self._dtype

    def _read_header(self) -> tuple[int, int, int]:
        """Sequences, document entries, and where the arrays begin; sets the dtype and whether there are spans."""
        with self._index.open("rb") as file:
            head = file.read(64)
        if len(head) < 34 and MAGIC.startswith(head[:9]):
            raise self._wrong(f"has {len(head)} bytes: its header alone has 34")
        if not head.startswith(MAGIC):
            raise self._wrong(f"begins with {head[:9]!r}, not with {MAGIC!r}: no index of prepared tokens")
        version = int.from_bytes(head[9:17], "little")
        if version not in (1, 2, 3):
            raise self._wrong(f"is of version {version}; versions 1, 2 and 3 are known")
        flags, code = head[17 : 16 + version], head[16 + version : 17 + version]
        if len(head) < 33 + version:
            raise self._wrong(f"has {len(head)} bytes: its header alone has {33 + version}")
        if any(flag not in (0, 1) for flag in flags):
            raise self._wrong(f"says {list(flags)} where a yes or no (1 or 0) is expected: damaged")
        if len(flags) == 2 and flags[1]:
            raise self._wrong("has preference spans (chosen and rejected), which are not supported yet")
        if code[0] not in DTYPES:
            floats = " (floating-point numbers, not token ids)" if code[0] in FLOAT_CODES else ""
            known = ", ".join(f"{number} {dtype.name}" for number, dtype in DTYPES.items())
            raise self._wrong(f"has dtype code {code[0]}{floats}; known are {known}")
        self._dtype = DTYPES[code[0]]
        self._has_spans = bool(flags and flags[0])
        sequences = int.from_bytes(head[17 + version : 25 + version], "little")
        entries = int.from_bytes(head[25 + version : 33 + version], "little")
        if not sequences or entries < 2:
            raise self._wrong(f"holds no documents ({sequences} sequences, {entries} document entries)")
        if self._has_spans and entries != sequences + 1:
            raise self._wrong(
                f"has spans and {entries:,} document entries for {sequences:,} sequences, not one more: damaged"
            )
        return sequences, entries, 33 + version

    def _count_spans(self) -> int:
        """All spans; notes how many come before each block of documents."""
        count = len(self._span_counts)
        self._spans_before = np.zeros(-(-count // OFFSET_INTERVAL), np.int64)
        total = 0
        for begin in range(0, count, _STEP):
            counts = self._span_counts.read(begin, min(begin + _STEP, count)).astype(np.int64)
            if counts.min() < 0:
                raise self._wrong(
                    f"has {counts.min()} spans for document {begin + int(counts.argmin())}: damaged"
                )
            ends = total + np.cumsum(counts)
            block = begin // OFFSET_INTERVAL
            starts = (ends - counts)[::OFFSET_INTERVAL]
            self._spans_before[block : block + len(starts)] = starts
            total = int(ends[-1])
        return total

    def _check_sequences(self, digest: Any) -> int:
        """Check sizes, positions and spans against each other; returns the number of tokens."""
        width, total, spans_before = self._dtype.itemsize, 0, 0
        for begin in range(0, len(self._sizes), _STEP):
            end = min(begin + _STEP, len(self._sizes))
            sizes, positions = self._sizes.read(begin, end), self._positions.read(begin, end)
            digest.update(sizes)
            digest.update(positions)
            ends = total + np.cumsum(sizes, dtype=np.int64)
            if sizes.min() < 0:
                raise self._wrong(
                    f"says that sequence {begin + int(sizes.argmin())} has {sizes.min()} tokens: damaged"
                )
            expected = (ends - sizes) * width
            if (wrong := np.flatnonzero(positions != expected)).size:
                place = int(wrong[0])
                raise self._wrong(
                    f"says that sequence {begin + place} begins at byte {positions[place]:,}; by the sizes before it, it "
                    f"begins at {expected[place]:,}: damaged"
                )
            total = int(ends[-1])
            if self._has_spans:
                counts = self._span_counts.read(begin, end)
                after = spans_before + int(counts.sum(dtype=np.int64))
                edges = self._span_edges.read(2 * spans_before, 2 * after)
                digest.update(counts)
                digest.update(edges)
                self._check_spans(begin, sizes, counts, edges.reshape(-1, 2).astype(np.int64) + (0, 1))
                spans_before = after
        return total

    def _check_documents(self, digest: Any) -> None:
        sequences, before = len(self._sizes), 0
        for begin in range(0, len(self._documents), _STEP):
            entries = self._documents.read(begin, min(begin + _STEP, len(self._documents)))
            digest.update(entries)
            falls = np.flatnonzero(np.diff(entries, prepend=before) < 0)
            if falls.size or (begin == 0 and entries[0] != 0) or entries.max() > sequences:
                place = int(falls[0]) if falls.size else int(entries.argmax())
                place = 0 if begin == 0 and entries[0] != 0 else place
                raise self._wrong(
                    f"says that document {begin + place} begins with sequence {entries[place]:,}; expected are rising "
                    f"numbers from 0 to {sequences:,}: damaged"
                )
            self._one_each &= bool((entries == np.arange(begin, begin + len(entries))).all())
            before = int(entries[-1])
        if before != sequences:
            raise self._wrong(f"has {sequences:,} sequences, and its documents end after {before:,}: damaged")

    def _starts(self, begin: int, end: int) -> np.ndarray:
        first, last, chosen = begin, end, None
        if not self._one_each:
            chosen = self._documents.read(begin, end + 1)
            first, last = int(chosen[0]), int(chosen[-1])
        sequences = len(self._sizes)
        starts = np.empty(last - first + 1, np.int64)
        within = self._positions.read(first, min(last + 1, sequences))
        np.floor_divide(within, self._dtype.itemsize, out=starts[: len(within)])
        starts[len(within) :] = self.num_tokens
        return starts if chosen is None else starts[chosen - first]

    def _spans(self, index: int) -> np.ndarray:
        block = index // OFFSET_INTERVAL
        counts = self._span_counts.read(block * OFFSET_INTERVAL, index + 1)
        first = int(self._spans_before[block]) + int(counts[:-1].sum(dtype=np.int64))
        edges = self._span_edges.read(2 * first, 2 * (first + int(counts[-1])))
        return edges.reshape(-1, 2).astype(np.int64) + (0, 1)


def pair_of(path: Path) -> tuple[Path, Path]:
    """The index and the data file that `path`, their common part or one of them, means.

    Raises:
        UserError: one is there and the other is missing.
    """
    stem = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    index, data = (stem.with_name(stem.name + ending) for ending in (".idx", ".bin"))
    if not index.is_file() and not data.is_file() and stem.suffix:
        # The program that writes them cuts a prefix at its last dot.
        index, data = stem.with_suffix(".idx"), stem.with_suffix(".bin")
    for there, other in ((index, data), (data, index)):
        if there.is_file() and not other.is_file():
            raise UserError(f"{other} is missing, and {there} is of no use without it")
    return index, data


def is_pair(path: Path) -> bool:
    """Whether `path` means a `.bin`/`.idx` pair of which at least one file is there."""
    if path.is_dir():
        return False
    try:
        return pair_of(path)[0].is_file()
    except UserError:
        return True
