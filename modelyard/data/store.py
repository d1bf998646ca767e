"""The token store: tokens on disk, read by position, with its tokenizer and named per-token lanes.

A store is a folder; docs/token-store.md has the format and shows how to read it with numpy alone. `manifest.json` is
written last, into `<path>.tmp`, which is renamed when everything is synced: a store is complete or it is not there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from modelyard.data.manifest import (
    FORMAT,
    LANE_TYPES,
    LENGTH_TYPE,
    OFFSET_INTERVAL,
    OFFSET_TYPE,
    TOKEN_TYPES,
    VERSION,
    manifest_checksum,
    read_manifest,
    shard_file,
    token_range,
)
from modelyard.data.reading import FileArray
from modelyard.errors import UserError
from modelyard.files import sha256, sync

_CACHED_BLOCKS = 640
"""Stretches of the index kept by a store, 2 KB each: those of two blocks of the shuffled order."""

TOKENS_PER_SHARD = 1_000_000_000


def token_type(vocab_size: int) -> str:
    """Name of the narrowest unsigned integer that holds every id below `vocab_size`."""
    for name, dtype in TOKEN_TYPES.items():
        if vocab_size <= 1 << (8 * dtype.itemsize):
            return name
    raise UserError(f"a vocabulary of {vocab_size:,} tokens does not fit in 32 bits")


class TokenStore:
    """A store opened for reading. Opening costs the manifest and one `stat` a file, whatever the number of documents.

    Cheap to pickle: the other process opens it again.

    Raises:
        UserError: nothing there, or a file is missing or has another size than the manifest says.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.manifest = manifest = read_manifest(self.path)
        self.num_documents: int = manifest["documents"]
        self.num_tokens: int = manifest["tokens"]
        self.vocab_size: int = manifest["vocab_size"]
        self.fingerprint: str = manifest["fingerprint"]
        self.lanes: tuple[str, ...] = tuple(manifest["lanes"])
        self.dtype = TOKEN_TYPES[manifest["dtype"]]
        self._lane_types = {name: LANE_TYPES[kind] for name, kind in manifest["lanes"].items()}
        # First token of each shard, and one past the last: a handful of numbers (one per 10^9 tokens).
        self._starts = [0]
        for shard in manifest["shards"]:
            self._starts.append(self._starts[-1] + shard["tokens"])
        self._files = {
            name: [
                FileArray(self.path / shard_file(name, number), dtype, shard["tokens"])
                for number, shard in enumerate(manifest["shards"])
            ]
            for name, dtype in {"tokens": self.dtype, **self._lane_types}.items()
        }
        blocks = -(-self.num_documents // OFFSET_INTERVAL)
        self._lengths = FileArray(self.path / "lengths.bin", LENGTH_TYPE, self.num_documents)
        self._offsets = FileArray(self.path / "offsets.bin", OFFSET_TYPE, blocks)
        self._starts_of_block = lru_cache(maxsize=_CACHED_BLOCKS)(self._read_starts)

    def __reduce__(self) -> tuple[type[TokenStore], tuple[Path]]:
        return TokenStore, (self.path,)

    def __len__(self) -> int:
        return self.num_documents

    def lengths(self, begin: int, end: int) -> np.ndarray:
        """Tokens of each document in `begin:end`, uint32 [end - begin]."""
        if not 0 <= begin <= end <= self.num_documents:
            raise IndexError(f"documents {begin}:{end} of {self.num_documents}")
        return self._lengths.read(begin, end)

    def offset(self, index: int) -> int:
        """Position of document `index`'s first token in the store's token stream; `num_documents` gives the end."""
        if not 0 <= index <= self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents}")
        if index == self.num_documents:
            return self.num_tokens
        block, place = divmod(index, OFFSET_INTERVAL)
        return int(self._starts_of_block(block)[place])

    def tokens(self, begin: int, end: int) -> np.ndarray:
        """Tokens `begin:end` of the stream, [end - begin] in the store's dtype."""
        return self._stretch("tokens", begin, end)

    def document(self, index: int, begin: int = 0, end: int | None = None) -> np.ndarray:
        """Tokens `begin:end` of document `index`, [end - begin] in the store's dtype."""
        return self._stretch("tokens", *self._bounds(index, begin, end))

    def lane(self, name: str, index: int, begin: int = 0, end: int | None = None) -> np.ndarray | None:
        """Lane `name` of document `index`, [end - begin]; None when the store has no such lane."""
        return self.lane_values(name, *self._bounds(index, begin, end))

    def lane_values(self, name: str, begin: int, end: int) -> np.ndarray | None:
        """Lane `name` of tokens `begin:end` of the stream, [end - begin]; None when the store has no such lane."""
        if name not in self._lane_types:
            return None
        return self._stretch(name, begin, end)

    def will_need(self, ranges: Sequence[tuple[int, int]]) -> None:
        """A hint that the tokens of documents `begin:end` of each range are read soon; changes nothing but speed."""
        spans = sorted((self.offset(begin), self.offset(end)) for begin, end in ranges)
        for file, first, after in zip(self._files["tokens"], self._starts, self._starts[1:]):
            inside = [
                (max(begin, first) - first, min(end, after) - first)
                for begin, end in spans
                if begin < after and end > first
            ]
            if inside:
                file.will_need(inside)

    def damaged_files(self) -> list[str]:
        """One line for each file whose content is not what manifest.json has the checksum of."""
        problems = []
        for name, facts in self.manifest["files"].items():
            try:
                if sha256(self.path / name) != facts["sha256"]:
                    problems.append(
                        f"{self.path / name} does not have the checksum that manifest.json has for it"
                    )
            except OSError as error:
                problems.append(f"{self.path / name} cannot be read ({error.strerror})")
        return problems

    def verify(self) -> list[str]:
        """Read everything; return what is wrong, one line each (checksums, counts, ids outside the vocabulary)."""
        problems = self.damaged_files()
        total, step = 0, OFFSET_INTERVAL * 4096
        for begin in range(0, self.num_documents, step):
            lengths = self._lengths.read(begin, min(begin + step, self.num_documents)).astype(np.int64)
            ends = total + np.cumsum(lengths)
            starts = np.concatenate(([total], ends[:-1]))[::OFFSET_INTERVAL]
            block = begin // OFFSET_INTERVAL
            stored = self._offsets.read(block, block + len(starts))
            if not np.array_equal(starts, stored):
                problems.append(
                    f"{self.path / 'offsets.bin'} disagrees with lengths.bin after document {begin}"
                )
                break
            total = int(ends[-1])
        if not problems and total != self.num_tokens:
            problems.append(f"{self.path / 'lengths.bin'} adds up to {total} tokens, not {self.num_tokens}")
        for begin in range(0, self.num_tokens, 1 << 24):
            largest = int(self.tokens(begin, min(begin + (1 << 24), self.num_tokens)).max())
            if largest >= self.vocab_size:
                problems.append(f"{self.path} has token {largest}; its vocabulary ends at {self.vocab_size}")
                break
        return problems

    def _bounds(self, index: int, begin: int, end: int | None) -> tuple[int, int]:
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents}")
        starts = self._starts_of_block(index // OFFSET_INTERVAL)
        return token_range(starts, index, begin, end)

    def _read_starts(self, block: int) -> np.ndarray:
        """First token of each document of an offset block, and one past the last: int64 [documents + 1]."""
        begin = block * OFFSET_INTERVAL
        lengths = self._lengths.read(begin, min(begin + OFFSET_INTERVAL, self.num_documents))
        starts = np.empty(len(lengths) + 1, np.int64)
        starts[0] = self._offsets.read(block, block + 1)[0]
        np.cumsum(lengths, dtype=np.int64, out=starts[1:])
        starts[1:] += starts[0]
        return starts

    def _stretch(self, name: str, begin: int, end: int) -> np.ndarray:
        if not 0 <= begin <= end <= self.num_tokens:
            raise IndexError(f"tokens {begin}:{end} of {self.num_tokens}")
        shard = min(bisect_right(self._starts, begin), len(self._starts) - 1) - 1
        pieces = []
        while True:
            start, stop = self._starts[shard], self._starts[shard + 1]
            pieces.append(self._files[name][shard].read(begin - start, min(end, stop) - start))
            if end <= stop:
                return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
            begin, shard = stop, shard + 1


class StoreWriter:
    """Writes one store; a context manager. Nothing is at `path` until the block ends without an error.

    Documents do not straddle shards: a shard is closed before the document that would take it over
    `tokens_per_shard`, so only a document longer than that makes a larger one.

    Args:
        path: the folder to make; must not exist.
        vocab_size: one past the largest token id; decides the token width unless `dtype` names a wider one.
        lanes: name → "uint8" or "float32" of each per-token lane; every `append` must bring all of them.
        tokenizer_files: name → content of what goes into `tokenizer/`.
        description: goes into the manifest under these keys (tokenizer fingerprint, separator, …).
        saving_workers: threads that sync and checksum full shards while the next one is written.
        saved: what `save` gave to a writer of the same store that was stopped: its documents are there already.
        keep: leave what was written in `temporary` when the block ends with an error, for `saved`.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        vocab_size: int,
        lanes: Mapping[str, str] | None = None,
        dtype: str | None = None,
        tokens_per_shard: int = TOKENS_PER_SHARD,
        tokenizer_files: Mapping[str, bytes] | None = None,
        description: Mapping[str, Any] | None = None,
        saving_workers: int = 1,
        saved: Mapping[str, Any] | None = None,
        keep: bool = False,
    ):
        self.path = Path(path)
        self.temporary = self.path.with_name(self.path.name + ".tmp")
        self.vocab_size = vocab_size
        self.dtype_name = dtype or token_type(vocab_size)
        if TOKEN_TYPES[self.dtype_name].itemsize < TOKEN_TYPES[token_type(vocab_size)].itemsize:
            raise UserError(f"{self.dtype_name} cannot hold a vocabulary of {vocab_size:,} tokens")
        self.lanes = dict(lanes or {})
        self.tokens_per_shard = tokens_per_shard
        self.num_documents = 0
        self.num_tokens = 0
        self._tokenizer_files = dict(tokenizer_files or {})
        self._description = dict(description or {})
        self._types = {"tokens": TOKEN_TYPES[self.dtype_name]}
        self._types |= {name: LANE_TYPES[kind] for name, kind in self.lanes.items()}
        self._shards: list[dict[str, int]] = []
        self._open: dict[str, BinaryIO] = {}
        self._finished: dict[str, Future[dict[str, Any]]] = {}
        self._savers = ThreadPoolExecutor(max(1, saving_workers))
        self._saved = saved
        self._keep = keep

    def __enter__(self) -> StoreWriter:
        if self._saved is not None:
            self._go_on(self._saved)
            return self
        if self.path.exists():
            raise UserError(f"{self.path} already exists; a store is never written over")
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(parents=True)
        self._lengths: BinaryIO = (self.temporary / "lengths.bin").open("wb")
        self._offsets: BinaryIO = (self.temporary / "offsets.bin").open("wb")
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                self._complete()
        except BaseException:
            self._abandon()
            raise
        if kind is not None:
            self._abandon()
        self._savers.shutdown()

    def append(self, tokens: np.ndarray, lanes: Mapping[str, np.ndarray] | None = None) -> None:
        """Add one document: its tokens, and for each lane as many values."""
        self.extend(np.array([len(tokens)]), tokens, lanes)

    def extend(
        self, lengths: np.ndarray, tokens: np.ndarray, lanes: Mapping[str, np.ndarray] | None = None
    ) -> None:
        """Add many documents at once.

        Args:
            lengths: tokens of each document, [documents].
            tokens: the documents one after another, [sum of lengths].
            lanes: for each lane, [sum of lengths].
        """
        columns = {"tokens": np.asarray(tokens)} | {name: np.asarray(v) for name, v in (lanes or {}).items()}
        if set(columns) != set(self._types):
            raise ValueError(
                f"lanes {sorted(set(columns) - {'tokens'})}, but the store has {sorted(self.lanes)}"
            )
        lengths = np.asarray(lengths, np.int64)
        for name, values in columns.items():
            if values.shape != (lengths.sum(),):
                raise ValueError(f"{name}: {values.shape} values for {lengths.sum()} tokens")
        if (
            len(tokens)
            and not 0 <= int(columns["tokens"].min()) <= int(columns["tokens"].max()) < self.vocab_size
        ):
            raise ValueError(f"a token outside the vocabulary of {self.vocab_size}")
        if len(lengths) and lengths.max() > np.iinfo(LENGTH_TYPE).max:
            raise UserError(f"a document of {lengths.max():,} tokens is longer than a store can hold")
        ends = np.cumsum(lengths)
        self._write_index(lengths, ends)
        begin = taken = 0  # first document and first token not yet written
        while begin < len(lengths):
            if not self._open:
                self._open_shard()
            room = self.tokens_per_shard - self._shards[-1]["tokens"]
            stop = int(np.searchsorted(ends, taken + room, side="right"))
            if stop == begin:
                if self._shards[-1]["documents"]:
                    self._close_shard()
                    continue
                stop = begin + 1  # one document longer than a shard
            until = int(ends[stop - 1])
            for name, values in columns.items():
                self._open[name].write(values[taken:until].astype(self._types[name], copy=False).data)
            self._shards[-1]["documents"] += stop - begin
            self._shards[-1]["tokens"] += until - taken
            begin, taken = stop, until

    def save(self) -> dict[str, Any]:
        """Wait until all that was appended so far is on the disk; returns what `saved` needs to go on from there."""
        for name, finished in self._finished.items():
            if not finished.done():
                sync(self.temporary / name)
        for file in (*self._open.values(), self._lengths, self._offsets):
            file.flush()
            os.fsync(file.fileno())
        sync(self.temporary)
        return {
            "documents": self.num_documents,
            "tokens": self.num_tokens,
            "shards": [dict(shard) for shard in self._shards],
            "open": bool(self._open),
            "widths": {name: dtype.itemsize for name, dtype in self._types.items()},
            "files": {name: future.result() for name, future in self._finished.items() if future.done()},
        }

    def _go_on(self, saved: Mapping[str, Any]) -> None:
        """Open the files of a writer that was stopped as they were when it saved; what came later is dropped."""
        if self.path.exists():  # this store was complete, but not all that belongs with it
            shutil.rmtree(self.temporary, ignore_errors=True)
            self.path.rename(self.temporary)
        sizes = saved_sizes(saved)
        for entry in self.temporary.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name not in sizes:
                entry.unlink()
        self.num_documents, self.num_tokens = saved["documents"], saved["tokens"]
        self._shards = [dict(shard) for shard in saved["shards"]]
        self._lengths = self._reopen("lengths.bin", sizes)
        self._offsets = self._reopen("offsets.bin", sizes)
        for number in range(len(self._shards)):
            for name in self._types:
                file = shard_file(name, number)
                if saved["open"] and number == len(self._shards) - 1:
                    self._open[name] = self._reopen(file, sizes)
                elif facts := saved["files"].get(file):
                    self._finished[file] = Future()
                    self._finished[file].set_result(facts)
                else:
                    self._finish((self.temporary / file).open("rb"))

    def _reopen(self, name: str, sizes: Mapping[str, int]) -> BinaryIO:
        file = (self.temporary / name).open("r+b", buffering=1 << 20)
        file.truncate(sizes[name])
        file.seek(sizes[name])
        return file

    def include(self, name: str) -> None:
        """Make `name`, which the caller has written into `temporary`, part of the store."""
        self._finish((self.temporary / name).open("rb"))

    def _write_index(self, lengths: np.ndarray, ends: np.ndarray) -> None:
        first = (
            -self.num_documents % OFFSET_INTERVAL
        )  # the first of these documents that has an entry of its own
        starts = self.num_tokens + ends - lengths
        self._offsets.write(starts[first::OFFSET_INTERVAL].astype(OFFSET_TYPE).tobytes())
        self._lengths.write(lengths.astype(LENGTH_TYPE).tobytes())
        self.num_documents += len(lengths)
        self.num_tokens += int(lengths.sum())

    def _open_shard(self) -> None:
        number = len(self._shards)
        self._shards.append({"documents": 0, "tokens": 0})
        self._open = {
            name: (self.temporary / shard_file(name, number)).open("wb", buffering=1 << 20)
            for name in self._types
        }

    def _close_shard(self) -> None:
        for file in self._open.values():
            self._finish(file)
        self._open = {}

    def _finish(self, file: BinaryIO) -> None:
        file.flush()
        name = Path(file.name).relative_to(self.temporary).as_posix()
        self._finished[name] = self._savers.submit(_sync_and_check, file)

    def _complete(self) -> None:
        if not self.num_tokens:
            raise UserError(f"{self.path}: no tokens were written, so there is no store")
        for file in (*self._open.values(), self._lengths, self._offsets):
            self._finish(file)
        self._open = {}
        if self._tokenizer_files:
            (self.temporary / "tokenizer").mkdir()
        for name, content in self._tokenizer_files.items():
            copy = (self.temporary / "tokenizer" / name).open("wb")
            copy.write(content)
            self._finish(copy)
        files = {name: self._finished[name].result() for name in sorted(self._finished)}
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "documents": self.num_documents,
            "tokens": self.num_tokens,
            "vocab_size": self.vocab_size,
            "dtype": self.dtype_name,
            "offset_interval": OFFSET_INTERVAL,
            "lanes": self.lanes,
            "shards": self._shards,
            **self._description,
            "fingerprint": _fingerprint(files),
            "files": files,
        }
        manifest["checksum"] = manifest_checksum(manifest)
        write_synced(self.temporary / "manifest.json", json.dumps(manifest, indent=1) + "\n")
        if self._tokenizer_files:
            sync(self.temporary / "tokenizer")
        sync(self.temporary)
        self.temporary.rename(self.path)
        sync(self.path.parent)

    def _abandon(self) -> None:
        self._savers.shutdown()
        for file in (*self._open.values(), self._lengths, self._offsets):
            try:
                file.close()
            except OSError:  # closing flushes, which fails again on a full disk
                pass
        if not self._keep:
            shutil.rmtree(self.temporary, ignore_errors=True)


def saved_sizes(saved: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of each data file of a store whose writer's `save` gave `saved`."""
    blocks = -(-saved["documents"] // OFFSET_INTERVAL)
    sizes = {
        "lengths.bin": LENGTH_TYPE.itemsize * saved["documents"],
        "offsets.bin": OFFSET_TYPE.itemsize * blocks,
    }
    for number, shard in enumerate(saved["shards"]):
        sizes |= {
            shard_file(name, number): width * shard["tokens"] for name, width in saved["widths"].items()
        }
    return sizes


def _fingerprint(files: Mapping[str, Mapping[str, Any]]) -> str:
    """sha256 over the names and checksums of tokens, lanes and index: what the data is, not how it was described."""
    data = {name: facts["sha256"] for name, facts in files.items() if name.endswith(".bin")}
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _sync_and_check(file: BinaryIO) -> dict[str, Any]:
    with file:
        os.fsync(file.fileno())
    return {"bytes": Path(file.name).stat().st_size, "sha256": sha256(Path(file.name))}


def write_synced(path: Path, text: str) -> None:
    """Write a small text file and wait until it is on the disk."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
