"""Datasets that can be read document by document: token stores, slices and concatenations of them, random tokens.

None of them holds anything of the size of the data: opening a store of a billion documents costs a manifest.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby
from operator import itemgetter
from pathlib import Path
from typing import Protocol

import numpy as np

from modelyard.config.data import (
    ConcatenatedDataset,
    DatasetConfig,
    MemmapDataset,
    RandomDataset,
    SliceDataset,
)
from modelyard.data.foreign import ForeignStore
from modelyard.data.foreign_file import open_store
from modelyard.data.lanes import has_kinds
from modelyard.data.order import derive_key, keyed_hash
from modelyard.data.store import TokenStore
from modelyard.errors import UserError


class IndexedDataset(Protocol):
    """Documents by number."""

    name: str
    """How messages call it."""
    num_documents: int
    num_tokens: int
    lanes: frozenset[str]
    """Per-token lanes that every document has."""
    vocab_size: int | None
    """One past the largest token that may occur; None where nothing says so."""
    fingerprint: str
    """Changes with the content."""
    tokenizer_folder: Path | None
    """The tokenizer that came with the data."""

    def lengths(self, begin: int, end: int) -> np.ndarray:
        """Tokens of each document in `begin:end`, an integer array [end - begin]."""
        ...

    def offset(self, index: int) -> int:
        """Tokens before document `index`, which may be `num_documents`."""
        ...

    def document(self, index: int, begin: int = 0, end: int | None = None) -> np.ndarray:
        """Tokens `begin:end` of a document, unsigned integers [end - begin]."""
        ...

    def lane(self, name: str, index: int, begin: int = 0, end: int | None = None) -> np.ndarray | None:
        """The same stretch of a lane; None when the dataset has no such lane."""
        ...

    def where(self, index: int) -> str:
        """Where a document is stored, for messages: `document 17 of /data/train`."""
        ...

    def will_need(self, ranges: Sequence[tuple[int, int]]) -> None:
        """A hint that the tokens of documents `begin:end` of each range are read soon; changes nothing but speed."""
        ...


class StoredDataset:
    """Prepared tokens on disk (`memmap`): a token store, or what another program has prepared.

    Raises:
        UserError: no complete store there, or not of the size that the config says.
    """

    def __init__(self, path: Path, num_documents: int | None = None, num_tokens: int | None = None):
        self.store = open_store(path)
        self.name = str(path)
        self.num_documents = self.store.num_documents
        self.num_tokens = self.store.num_tokens
        self.lanes = frozenset(self.store.lanes)
        self.vocab_size = self.store.vocab_size
        self.fingerprint = self.store.fingerprint
        tokenizer = path / "tokenizer"
        self.tokenizer_folder = tokenizer if tokenizer.is_dir() else None
        self.lengths = self.store.lengths
        self.offset = self.store.offset
        self.document = self.store.document
        self.lane = self.store.lane
        problems = [
            f"{path} has {found:,} {what}, but the config says {said:,}: prepared again since, or the wrong folder?"
            for what, said, found in (
                ("documents", num_documents, self.num_documents),
                ("tokens", num_tokens, self.num_tokens),
            )
            if said is not None and said != found
        ]
        if problems:
            raise UserError(*problems)

    def where(self, index: int) -> str:
        """`document 17 of /data/train`."""
        return f"document {index} of {self.name}"

    def will_need(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Start reading them from disk: one by one they would be waited for one by one."""
        self.store.will_need(ranges)


class SlicedDataset:
    """A stretch of the documents of another dataset, by fractions of their number (`slice`)."""

    def __init__(self, dataset: IndexedDataset, begin: float, end: float):
        self._dataset = dataset
        self._first = round(begin * dataset.num_documents)
        last = round(end * dataset.num_documents)
        self.name = f"{dataset.name}[{begin:g}:{end:g}]"
        self.num_documents = last - self._first
        self._before = dataset.offset(self._first)
        self.num_tokens = dataset.offset(last) - self._before
        self.lanes = dataset.lanes
        self.vocab_size = dataset.vocab_size
        self.tokenizer_folder = dataset.tokenizer_folder
        self.fingerprint = _fingerprint("slice", dataset.fingerprint, self._first, last)

    def lengths(self, begin: int, end: int) -> np.ndarray:
        """Tokens of each document in `begin:end`."""
        return self._dataset.lengths(self._first + begin, self._first + end)

    def offset(self, index: int) -> int:
        """Tokens before document `index`."""
        return self._dataset.offset(self._first + index) - self._before

    def document(self, index: int, begin: int = 0, end: int | None = None) -> np.ndarray:
        """Tokens of a document."""
        return self._dataset.document(self._first + index, begin, end)

    def lane(self, name: str, index: int, begin: int = 0, end: int | None = None) -> np.ndarray | None:
        """A lane of a document."""
        return self._dataset.lane(name, self._first + index, begin, end)

    def where(self, index: int) -> str:
        """Where a document is stored."""
        return self._dataset.where(self._first + index)

    def will_need(self, ranges: Sequence[tuple[int, int]]) -> None:
        """A hint for the dataset below."""
        self._dataset.will_need([(self._first + begin, self._first + end) for begin, end in ranges])


class ConcatenatedDatasets:
    """The documents of several datasets, one after the other (`concatenated`).

    Raises:
        UserError: some are conversations and some are not.
    """

    def __init__(self, name: str, datasets: Sequence[IndexedDataset]):
        self.name = name
        if len({has_kinds(dataset) for dataset in datasets}) > 1:
            # Nothing would say which tokens are trained on, and all of them would be.
            named = next(dataset.name for dataset in datasets if has_kinds(dataset))
            raise UserError(
                f"'{name}' joins conversations ({named}) with other documents; blend them (type: blended), or prepare all of them "
                "as conversations"
            )
        self._datasets = datasets
        self._first = [0, *accumulate(dataset.num_documents for dataset in datasets)]
        self._before = [0, *accumulate(dataset.num_tokens for dataset in datasets)]
        self.num_documents = self._first[-1]
        self.num_tokens = self._before[-1]
        self.lanes = frozenset.intersection(*(dataset.lanes for dataset in datasets))
        self.vocab_size = max(
            (dataset.vocab_size for dataset in datasets if dataset.vocab_size is not None), default=None
        )
        self.tokenizer_folder = next(filter(None, (dataset.tokenizer_folder for dataset in datasets)), None)
        self.fingerprint = _fingerprint("concatenated", *(dataset.fingerprint for dataset in datasets))

    def _find(self, index: int) -> tuple[int, int]:
        part = bisect_right(self._first, index) - 1
        return part, index - self._first[part]

    def _cut(self, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        """A range of documents as (part, begin, end) in each part that it touches."""
        while begin < end:
            part, inside = self._find(begin)
            stop = min(end, self._first[part + 1])
            yield part, inside, inside + stop - begin
            begin = stop

    def lengths(self, begin: int, end: int) -> np.ndarray:
        """Tokens of each document in `begin:end`, which may span several parts."""
        pieces = [self._datasets[part].lengths(*inside) for part, *inside in self._cut(begin, end)]
        return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)

    def offset(self, index: int) -> int:
        """Tokens before document `index`."""
        if index == self.num_documents:
            return self.num_tokens
        part, inside = self._find(index)
        return self._before[part] + self._datasets[part].offset(inside)

    def document(self, index: int, begin: int = 0, end: int | None = None) -> np.ndarray:
        """Tokens of a document."""
        part, inside = self._find(index)
        return self._datasets[part].document(inside, begin, end)

    def lane(self, name: str, index: int, begin: int = 0, end: int | None = None) -> np.ndarray | None:
        """A lane of a document."""
        part, inside = self._find(index)
        return self._datasets[part].lane(name, inside, begin, end)

    def where(self, index: int) -> str:
        """Where a document is stored."""
        part, inside = self._find(index)
        return self._datasets[part].where(inside)

    def will_need(self, ranges: Sequence[tuple[int, int]]) -> None:
        """A hint for each part."""
        cut = sorted(piece for begin, end in ranges for piece in self._cut(begin, end))
        for part, pieces in groupby(cut, key=itemgetter(0)):
            self._datasets[part].will_need([(begin, end) for _, begin, end in pieces])


class RandomTokens:
    """Documents of random tokens, all of one length, computed when they are read (`random`)."""

    lanes: frozenset[str] = frozenset()
    tokenizer_folder: Path | None = None

    vocab_size: int | None

    def __init__(self, name: str, *, num_documents: int, document_length: int, vocab_size: int, seed: int):
        self.name = f"random '{name}'"
        self.num_documents = num_documents
        self.num_tokens = num_documents * document_length
        self.vocab_size = vocab_size
        self._length = document_length
        self._key = derive_key("random tokens", name, seed)
        self.fingerprint = _fingerprint("random", self._key, num_documents, document_length, vocab_size)

    def lengths(self, begin: int, end: int) -> np.ndarray:
        """The same for every document."""
        return np.full(end - begin, self._length, dtype=np.uint32)

    def offset(self, index: int) -> int:
        """Tokens before document `index`."""
        return index * self._length

    def document(self, index: int, begin: int = 0, end: int | None = None) -> np.ndarray:
        """Uniform over the vocabulary."""
        stop = self._length if end is None else end
        counters = np.arange(self.offset(index) + begin, self.offset(index) + stop, dtype=np.uint64)
        return (keyed_hash(self._key, counters) % np.uint64(self.vocab_size or 1)).astype(np.uint32)

    def lane(self, name: str, index: int, begin: int = 0, end: int | None = None) -> np.ndarray | None:
        """Random tokens have no lanes."""
        return None

    def where(self, index: int) -> str:
        """Not stored anywhere."""
        return f"document {index} of {self.name}"

    def will_need(self, ranges: Sequence[tuple[int, int]]) -> None:
        """There is nothing to read."""


def stores(dataset: IndexedDataset) -> list[TokenStore]:
    """The token stores that a dataset reads."""
    if isinstance(dataset, SlicedDataset):
        return stores(dataset._dataset)
    if isinstance(dataset, ConcatenatedDatasets):
        return [store for part in dataset._datasets for store in stores(part)]
    return (
        [dataset.store]
        if isinstance(dataset, StoredDataset) and isinstance(dataset.store, TokenStore)
        else []
    )


def two_chat_formats(read: Sequence[TokenStore]) -> str | None:
    """That conversations are written in different chat formats, where they are."""
    found: dict[str, Path] = {}
    for store in read:
        if (chat := store.manifest.get("chat")) is not None:
            found.setdefault(json.dumps(chat, sort_keys=True), store.path)
    if len(found) < 2:
        return None
    (one, first), (other, second), *_ = found.items()
    return f"{first} and {second} are conversations in different chat formats ({one} and {other}): prepare them in one"


def foreign_documents(dataset: IndexedDataset) -> list[tuple[ForeignStore, int, int]]:
    """What other programs prepared of a dataset: each store, and which of its documents, `begin:end`, are the dataset's."""
    return _foreign_documents(dataset, 0, dataset.num_documents)


def _foreign_documents(dataset: IndexedDataset, begin: int, end: int) -> list[tuple[ForeignStore, int, int]]:
    if isinstance(dataset, SlicedDataset):
        return _foreign_documents(dataset._dataset, dataset._first + begin, dataset._first + end)
    if isinstance(dataset, ConcatenatedDatasets):
        return [
            found
            for part, first, last in dataset._cut(begin, end)
            for found in _foreign_documents(dataset._datasets[part], first, last)
        ]
    if isinstance(dataset, StoredDataset) and isinstance(dataset.store, ForeignStore):
        return [(dataset.store, begin, end)]
    return []


def read_documents(dataset: IndexedDataset, begin: int, end: int, lane: str | None = None) -> np.ndarray:
    """Tokens of documents `begin:end` one after the other, or their values of a lane that the dataset has.

    One read where they lie together on disk; for passes over much data, where a call for each document would be slow.
    """
    if isinstance(dataset, SlicedDataset):
        return read_documents(dataset._dataset, dataset._first + begin, dataset._first + end, lane)
    if isinstance(dataset, ConcatenatedDatasets):
        cut = dataset._cut(begin, end)
        parts = [read_documents(dataset._datasets[part], first, last, lane) for part, first, last in cut]
    elif isinstance(dataset, StoredDataset) and lane is None:
        parts = [dataset.store.tokens(dataset.offset(begin), dataset.offset(end))]
    elif isinstance(dataset, StoredDataset) and isinstance(dataset.store, TokenStore):
        found = dataset.store.lane_values(lane or "", dataset.offset(begin), dataset.offset(end))
        parts = [found] if found is not None else []
    elif lane is None:
        parts = [dataset.document(index) for index in range(begin, end)]
    else:
        parts = [values for i in range(begin, end) if (values := dataset.lane(lane, i)) is not None]
    return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.zeros(0, np.uint32)])


def open_dataset(
    config: DatasetConfig, *, vocab_size: int, sequence_length: int, seed: int
) -> IndexedDataset:
    """Open a resolved dataset (see `modelyard.data.resolve`) whose documents are numbered.

    Args:
        config: any type but `blended` and `sampled`, without `file` inside.
        vocab_size: of the model, tokens; `random` draws from it.
        sequence_length: tokens; the default length of `random` documents.
        seed: key of `random` tokens.

    Raises:
        UserError: something is missing, torn or empty, or a blend stands where documents are needed.
    """

    def open_inside(inside: DatasetConfig) -> IndexedDataset:
        match inside:
            case MemmapDataset():
                return StoredDataset(inside.path, inside.num_documents, inside.num_tokens)
            case SliceDataset():
                return SlicedDataset(open_inside(inside.dataset), inside.begin, inside.end)
            case ConcatenatedDataset():
                return ConcatenatedDatasets(inside.name, [open_inside(part) for part in inside.datasets])
            case RandomDataset():
                length = inside.document_length or sequence_length
                return RandomTokens(
                    inside.name,
                    num_documents=inside.num_documents,
                    document_length=length,
                    vocab_size=vocab_size,
                    seed=seed,
                )
        raise UserError(
            f"a dataset of type '{inside.type}' cannot stand inside 'concatenated': it has rows, not documents; "
            "blend the concatenations instead"
        )

    dataset = open_inside(config)
    if not dataset.num_tokens:
        raise UserError(f"{dataset.name} has no tokens ({dataset.num_documents:,} documents)")
    return dataset


def _fingerprint(*parts: str | int) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()
