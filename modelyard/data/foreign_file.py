"""The single-file format of prepared tokens, `*.fast_llm_dataset`, read where it lies.

`fast_llm_prepared_dataset`, then a big-endian u64: the position of the description, a big-endian u32 length and that much
JSON, at the end of the file. It names sections with `begin` and `end` (bytes from the file's start), each between two
ASCII markers. `tokens`: the ids, then int64 ends [documents + 1]. `loss_masking_spans`: int32 (first, one past the last)
of every span, then int32 counts so far [documents + 1]. Sections may be absent or of type `none`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from modelyard.data.files import refuse_raw_data
from modelyard.data.foreign import _STEP, ForeignStore, IndexedPair, is_pair
from modelyard.data.lanes import MASK_LANE
from modelyard.data.reading import FileArray
from modelyard.data.store import TokenStore
from modelyard.errors import UserError

MAGIC = b"fast_llm_prepared_dataset"
DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(name).newbyteorder("<")
    for name in ("uint8", "int8", "int16", "uint16", "int32", "uint32", "int64")
}
MARKERS = {
    "language_model": (b"lm begin", b"lm end"),
    "token": (b"token begin", b"token end"),
    "range": (b"range begin", b"range end"),
}
REFUSED_SECTIONS = {
    "chosen_spans": "preference spans",
    "rejected_spans": "preference spans",
    "image_patches": "images",
    "audio": "audio",
    "advantages": "data for reinforcement learning",
    "old_log_probabilities": "data for reinforcement learning",
}


class SingleFile(ForeignStore):
    """One `.fast_llm_dataset` file.

    Raises:
        UserError: it is torn, contradicts itself, or holds what is not supported (one line, with what was found).
    """

    def __init__(self, path: Path):
        super().__init__(path)
        self._size = path.stat().st_size
        description = self._read_description()
        kind = description.get("type")
        tokens = description
        if kind == "language_model":
            self._bounds_of("language_model", description)
            tokens = self._section(description, "tokens")
        if tokens.get("type", "token") != "token":
            raise self._wrong(f"holds '{kind}', not tokens of documents")
        self._refuse(description)
        begin, end = self._bounds_of("token", tokens)
        self.num_documents, self.num_tokens = (
            self._number(tokens, "num_documents"),
            self._number(tokens, "num_tokens"),
        )
        name = str(tokens.get("data_type")).removeprefix("torch.")
        if name not in DTYPES:
            raise self._wrong(f"has tokens of type '{name}'; known are {', '.join(DTYPES)}")
        if not self.num_documents:
            raise self._wrong("holds no documents")
        width = DTYPES[name].itemsize
        self._needs("tokens", end - begin, width * self.num_tokens + 8 * (self.num_documents + 1))
        self._tokens = FileArray(path, DTYPES[name], self.num_tokens, begin)
        self._ends = FileArray(path, np.dtype("<i8"), self.num_documents + 1, begin + width * self.num_tokens)
        self._open_spans(description)
        digest = hashlib.sha256(MAGIC)
        self._check(digest)
        self._sample(digest)
        self.fingerprint = digest.hexdigest()

    def _wrong(self, what: str) -> UserError:
        return UserError(f"{self.path} {what}")

    def _read_description(self) -> dict[str, Any]:
        head = len(MAGIC) + 8
        with self.path.open("rb") as file:
            start = file.read(head)
            if not start.startswith(MAGIC):
                raise self._wrong(f"begins with {start[:9]!r}, not with {MAGIC!r}: no prepared tokens")
            at = int.from_bytes(start[len(MAGIC) :], "big")
            if len(start) < head or not head <= at <= self._size - 4:
                raise self._wrong(
                    f"has {self._size:,} bytes, and its description is to begin at byte {at:,}: cut short, or never finished"
                )
            file.seek(at)
            length = int.from_bytes(file.read(4), "big")
            if at + 4 + length != self._size:
                raise self._wrong(
                    f"has {self._size:,} bytes, not the {at + 4 + length:,} that it says itself: torn or changed"
                )
            try:
                description = json.loads(file.read(length).decode("utf-8"))
            except ValueError as error:
                raise self._wrong(f"has a description that is not JSON ({error}): damaged") from None
        if not isinstance(description, dict):
            raise self._wrong("has a description that is not a JSON object: damaged")
        return description

    def _section(self, description: dict[str, Any], name: str) -> dict[str, Any]:
        section = description.get(name)
        if not isinstance(section, dict):
            raise self._wrong(f"has no '{name}' in its description: damaged, or of another kind")
        return section

    def _number(self, section: dict[str, Any], key: str) -> int:
        value = section.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self._wrong(f"says {key} = {value!r} where a number of 0 or more is expected: damaged")
        return value

    def _bounds_of(self, kind: str, section: dict[str, Any]) -> tuple[int, int]:
        """Where the content of a section begins and ends, its markers checked."""
        begin, end = self._number(section, "begin"), self._number(section, "end")
        first, last = MARKERS[kind]
        if not begin + len(first) + len(last) <= end <= self._size:
            raise self._wrong(
                f"says that a section lies at bytes {begin:,} to {end:,} of {self._size:,}: damaged"
            )
        with self.path.open("rb") as file:
            for position, marker in ((begin, first), (end - len(last), last)):
                file.seek(position)
                if (found := file.read(len(marker))) != marker:
                    raise self._wrong(
                        f"has {found!r} at byte {position:,} where {marker!r} is expected: damaged"
                    )
        return begin + len(first), end - len(last)

    def _needs(self, name: str, size: int, expected: int) -> None:
        if size != expected:
            raise self._wrong(f"has {size:,} bytes of {name}, and its counts need {expected:,}: damaged")

    def _refuse(self, description: dict[str, Any]) -> None:
        for name, section in description.items():
            is_section = isinstance(section, dict) and "begin" in section and "end" in section
            if is_section and name not in ("tokens", "loss_masking_spans"):
                what = f" ({REFUSED_SECTIONS[name]})" if name in REFUSED_SECTIONS else ""
                raise self._wrong(f"has a section '{name}'{what}, which is not supported")

    def _open_spans(self, description: dict[str, Any]) -> None:
        section = description.get("loss_masking_spans")
        if not isinstance(section, dict) or section.get("type") != "range":
            return
        begin, end = self._bounds_of("range", section)
        documents, spans = self._number(section, "num_documents"), self._number(section, "num_ranges")
        if documents != self.num_documents:
            raise self._wrong(
                f"has spans of {documents:,} documents, and tokens of {self.num_documents:,}: damaged"
            )
        self._needs("loss_masking_spans", end - begin, 8 * spans + 4 * (documents + 1))
        self._span_edges = FileArray(self.path, np.dtype("<i4"), 2 * spans, begin)
        self._span_ends = FileArray(self.path, np.dtype("<i4"), documents + 1, begin + 8 * spans)
        self.lanes = (MASK_LANE,)

    def _check(self, digest: Any) -> None:
        """Check that documents and spans follow each other up to the ends that the description says."""
        for begin in range(0, self.num_documents, _STEP):
            end = min(begin + _STEP, self.num_documents)
            starts = self._ends.read(begin, end + 1)
            digest.update(starts)
            self._rises("document", begin, starts, end == self.num_documents, self.num_tokens)
            if self.lanes:
                spans = self._span_ends.read(begin, end + 1).astype(np.int64)
                self._rises(
                    "spans of document", begin, spans, end == self.num_documents, len(self._span_edges) // 2
                )
                edges = self._span_edges.read(2 * int(spans[0]), 2 * int(spans[-1])).astype(np.int64)
                digest.update(spans)
                digest.update(edges)
                self._check_spans(begin, np.diff(starts), np.diff(spans), edges.reshape(-1, 2))

    def _rises(self, what: str, begin: int, ends: np.ndarray, to_the_end: bool, total: int) -> None:
        steps = np.diff(ends)
        wrong = np.flatnonzero((steps < 0) | (ends[1:] > total))
        if (begin == 0 and ends[0] != 0) or wrong.size:
            place = int(wrong[0]) if wrong.size and ends[0] == 0 else 0
            raise self._wrong(
                f"says that {what} {begin + place} goes from {ends[place]:,} to {ends[place + 1]:,} of {total:,}: damaged"
            )
        if to_the_end and ends[-1] != total:
            raise self._wrong(f"says that the last {what} ends at {ends[-1]:,} of {total:,}: damaged")

    def _starts(self, begin: int, end: int) -> np.ndarray:
        return self._ends.read(begin, end + 1)

    def _spans(self, index: int) -> np.ndarray:
        first, after = self._span_ends.read(index, index + 2).tolist()
        return self._span_edges.read(2 * first, 2 * after).reshape(-1, 2).astype(np.int64)


def is_foreign(path: Path) -> bool:
    """Whether `path` means what another program prepared, judged by names and the first bytes; it may be damaged."""
    if path.is_file() and path.suffix not in (".bin", ".idx"):
        if path.suffix == ".fast_llm_dataset":
            return True
        try:
            with path.open("rb") as file:
                return file.read(len(MAGIC)) == MAGIC
        except OSError:
            return False
    return is_pair(path)


def open_store(path: Path) -> TokenStore | ForeignStore:
    """Open prepared tokens of whatever kind lies at `path`: a store's folder, a `.bin`/`.idx` pair, a single file.

    Raises:
        UserError: nothing there, or nothing that is known.
    """
    refuse_raw_data(path)
    if path.is_file() and path.suffix not in (".bin", ".idx"):
        return SingleFile(path)
    return IndexedPair(path) if is_pair(path) else TokenStore(path)
