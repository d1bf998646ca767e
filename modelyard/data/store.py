"""The token store: tokens on disk, memory-mapped, with its tokenizer and named per-token lanes.

A store is a folder; docs/token-store.md has the format and shows how to read it with numpy alone. `manifest.json` is
written last, into `<path>.tmp`, which is renamed when everything is synced: a store is complete or it is not there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from bisect import bisect_right
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from modelyard.errors import UserError, missing_path
from modelyard.files import sha256, sync

MASK_LANE = "loss_mask"
"""Lane of uint8: 1 where a token must not be a target."""

FORMAT = "modelyard-tokens"
VERSION = 1
OFFSET_INTERVAL = 256
"""Documents per entry of `offsets.bin`: a look-up adds up at most this many lengths."""

TOKENS_PER_SHARD = 1_000_000_000
LANE_TYPES: dict[str, np.dtype[Any]] = {"uint8": np.dtype("<u1"), "float32": np.dtype("<f4")}
TOKEN_TYPES: dict[str, np.dtype[Any]] = {
    "uint8": np.dtype("<u1"),
    "uint16": np.dtype("<u2"),
    "uint32": np.dtype("<u4"),
}
LENGTH_TYPE = np.dtype("<u4")
OFFSET_TYPE = np.dtype("<i8")


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
        self._maps: dict[str, np.ndarray] = {}
        self._lengths = _map_file(self.path / "lengths.bin", LENGTH_TYPE)
        self._offsets = _map_file(self.path / "offsets.bin", OFFSET_TYPE)

    def __reduce__(self) -> tuple[type[TokenStore], tuple[Path]]:
        return TokenStore, (self.path,)

    def __len__(self) -> int:
        return self.num_documents

    def lengths(self, begin: int, end: int) -> np.ndarray:
        """Tokens of each document in `begin:end`, uint32 [end - begin]."""
        if not 0 <= begin <= end <= self.num_documents:
            raise IndexError(f"documents {begin}:{end} of {self.num_documents}")
        return self._lengths[begin:end]

    def offset(self, index: int) -> int:
        """Position of document `index`'s first token in the store's token stream; `num_documents` gives the end."""
        if not 0 <= index <= self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents}")
        if index == self.num_documents:
            return self.num_tokens
        block = index // OFFSET_INTERVAL
        before = self._lengths[block * OFFSET_INTERVAL : index]
        return int(self._offsets[block]) + int(before.sum(dtype=np.int64))

    def tokens(self, begin: int, end: int) -> np.ndarray:
        """Tokens `begin:end` of the stream, [end - begin] in the store's dtype; a view unless shards are crossed."""
        return self._stretch("tokens", self.dtype, begin, end)

    def document(self, index: int, begin: int = 0, end: int | None = None) -> np.ndarray:
        """Tokens `begin:end` of document `index`, [end - begin] in the store's dtype; a view of the file."""
        return self._stretch("tokens", self.dtype, *self._bounds(index, begin, end))

    def lane(self, name: str, index: int, begin: int = 0, end: int | None = None) -> np.ndarray | None:
        """Lane `name` of document `index`, [end - begin]; None when the store has no such lane."""
        if name not in self._lane_types:
            return None
        return self._stretch(name, self._lane_types[name], *self._bounds(index, begin, end))

    def verify(self) -> list[str]:
        """Read everything; return what is wrong, one line each (checksums, counts, ids outside the vocabulary)."""
        problems = []
        for name, facts in self.manifest["files"].items():
            if sha256(self.path / name) != facts["sha256"]:
                problems.append(
                    f"{self.path / name} does not have the checksum that manifest.json has for it"
                )
        total, step = 0, OFFSET_INTERVAL * 4096
        for begin in range(0, self.num_documents, step):
            lengths = self._lengths[begin : begin + step].astype(np.int64)
            ends = total + np.cumsum(lengths)
            starts = np.concatenate(([total], ends[:-1]))[::OFFSET_INTERVAL]
            stored = self._offsets[begin // OFFSET_INTERVAL :][: len(starts)]
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
        length = int(self._lengths[index])
        end = length if end is None else end
        if not 0 <= begin <= end <= length:
            raise IndexError(f"tokens {begin}:{end} of document {index}, which has {length}")
        first = self.offset(index)
        return first + begin, first + end

    def _stretch(self, name: str, dtype: np.dtype, begin: int, end: int) -> np.ndarray:
        if not 0 <= begin <= end <= self.num_tokens:
            raise IndexError(f"tokens {begin}:{end} of {self.num_tokens}")
        shard = min(bisect_right(self._starts, begin), len(self._starts) - 1) - 1
        pieces = []
        while True:
            start, stop = self._starts[shard], self._starts[shard + 1]
            pieces.append(self._map(name, shard, dtype)[begin - start : min(end, stop) - start])
            if end <= stop:
                return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
            begin, shard = stop, shard + 1

    def _map(self, name: str, shard: int, dtype: np.dtype) -> np.ndarray:
        file = shard_file(name, shard)
        if file not in self._maps:
            self._maps[file] = _map_file(self.path / file, dtype)
        return self._maps[file]


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

    def __enter__(self) -> StoreWriter:
        if self.path.exists():
            raise UserError(f"{self.path} already exists; a store is never written over")
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(parents=True)
        self._lengths = (self.temporary / "lengths.bin").open("wb")
        self._offsets = (self.temporary / "offsets.bin").open("wb")
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
        shutil.rmtree(self.temporary, ignore_errors=True)


def _map_file(path: Path, dtype: np.dtype) -> np.ndarray:
    # A plain array over the mapping: slices of np.memmap itself cost microseconds each.
    return np.asarray(np.memmap(path, dtype, "r"))


def shard_file(name: str, shard: int) -> str:
    """File of the tokens (`name` "tokens") or of a lane, for one shard."""
    return f"{name}_{shard:05d}.bin"


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the store at `path`, after checking every file's size against it.

    Raises:
        UserError: not a store, an unfinished one, or a file is missing or torn; one line per file.
    """
    file = path / "manifest.json"
    if not path.exists():
        candidates = [folder.with_name(folder.name + ".tmp") for folder in (path, path.parent) if folder.name]
        unfinished = [str(candidate) for candidate in candidates if candidate.exists()]
        hint = f" ({unfinished[0]} is an unfinished one; run prepare again)" if unfinished else ""
        raise UserError(missing_path(path) + hint)
    if not file.is_file():
        raise UserError(f"{path} is not a token store: it has no manifest.json")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{file} cannot be read ({error}); prepare the data again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{file} is not the manifest of a token store")
    if manifest.get("version") != VERSION:
        raise UserError(
            f"{path} has store version {manifest.get('version')}; this program reads version {VERSION}"
        )
    try:
        problems = _problems(path, manifest)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} is incomplete or damaged ({type(error).__name__}: {error})") from None
    if problems:
        raise UserError(*problems)
    return manifest


def _problems(path: Path, manifest: dict[str, Any]) -> list[str]:
    if not manifest["documents"] or not manifest["tokens"]:
        return [f"{path} holds no tokens"]
    widths = {"tokens": TOKEN_TYPES[manifest["dtype"]].itemsize}
    widths |= {name: LANE_TYPES[kind].itemsize for name, kind in manifest["lanes"].items()}
    blocks = -(-manifest["documents"] // manifest["offset_interval"])
    sizes = {name: facts["bytes"] for name, facts in manifest["files"].items()}
    expected = {"lengths.bin": 4 * manifest["documents"], "offsets.bin": 8 * blocks}
    for number, shard in enumerate(manifest["shards"]):
        expected |= {shard_file(name, number): width * shard["tokens"] for name, width in widths.items()}
    problems = [
        f"{path / 'manifest.json'}: {name} should have {size} bytes, but the manifest says {sizes.get(name)}"
        for name, size in expected.items()
        if sizes.get(name) != size
    ]
    if sum(shard["tokens"] for shard in manifest["shards"]) != manifest["tokens"]:
        problems.append(f"{path / 'manifest.json'}: the shards do not add up to {manifest['tokens']} tokens")
    for name, size in sizes.items():
        try:
            actual = (path / name).stat().st_size
        except OSError:
            problems.append(f"{path / name} is missing; prepare the data again")
            continue
        if actual != size:
            problems.append(
                f"{path / name} has {actual} bytes, not the {size} of manifest.json: torn or changed"
            )
    return problems


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
