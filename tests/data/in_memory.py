"""A dataset of given documents, for tests of everything above the store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from modelyard.data.store import StoreWriter


class InMemory:
    """Documents given as arrays (or as lengths: document `d` then holds distinct tokens, in order)."""

    tokenizer_folder = None

    def __init__(self, documents: Sequence[np.ndarray], masks: Sequence[np.ndarray] | None = None):
        self._documents = [np.asarray(document, dtype=np.uint32) for document in documents]
        self._masks = masks
        self._offsets = [0, *np.cumsum([len(document) for document in documents]).tolist()]
        self.name = "in memory"
        self.num_documents = len(documents)
        self.num_tokens = self._offsets[-1]
        self.lanes = frozenset(["loss_mask"]) if masks is not None else frozenset()
        self.vocab_size = max(int(document.max(initial=0)) for document in self._documents) + 1
        self.fingerprint = str(hash(tuple(map(bytes, self._documents))))

    @classmethod
    def of_lengths(cls, lengths: Sequence[int]) -> InMemory:
        """Every token of the dataset is another one: token `t` is the t-th of the stored order."""
        ends = np.cumsum(lengths)
        return cls([np.arange(end - length, end) for length, end in zip(lengths, ends)])

    def lengths(self, begin: int, end: int) -> np.ndarray:
        return np.diff(self._offsets[begin : end + 1]).astype(np.uint32)

    def offset(self, index: int) -> int:
        return self._offsets[index]

    def document(self, index: int, begin: int = 0, end: int | None = None) -> np.ndarray:
        return self._documents[index][begin:end]

    def lane(self, name: str, index: int, begin: int = 0, end: int | None = None) -> np.ndarray | None:
        return None if self._masks is None else self._masks[index][begin:end]

    def where(self, index: int) -> str:
        return f"document {index} of {self.name}"

    def will_need(self, ranges: Sequence[tuple[int, int]]) -> None:
        assert all(0 <= begin < end <= self.num_documents for begin, end in ranges)


def write_store(
    path: Path,
    documents: Sequence[np.ndarray],
    *,
    vocab_size: int = 1000,
    masks: Sequence[np.ndarray] | None = None,
) -> Path:
    """A token store of these documents."""
    lanes = {"loss_mask": "uint8"} if masks is not None else None
    with StoreWriter(path, vocab_size=vocab_size, lanes=lanes) as writer:
        for number, document in enumerate(documents):
            writer.append(
                np.asarray(document, dtype=np.int64),
                {"loss_mask": np.asarray(masks[number], dtype=np.uint8)} if masks is not None else None,
            )
    return path
