"""Parts of a source: stretches that several processes tokenise, each into a file of its own.

The division depends on the source alone, so a part is the same whoever makes it and however many there are. Parts lie beside
the output, in `<output>.parts/<digest of what they are made from>`:

    00012.<token>.part    tokenised chunks one after another, each with its checksum: what a killed process leaves of it counts
    00012.json            the part is complete: names that file, its bytes and checksum

Nobody writes into another's file: going on with one is copying what is whole in it. So two processes that make the same
part, which needs a mistake or a machine taken for dead, waste time and nothing else; no lock is needed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import uuid
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zstandard

from modelyard.data.documents import COUNTED, Tokenized
from modelyard.data.manifest import TOKEN_TYPES
from modelyard.data.sources import Chunk, Source
from modelyard.files import sync

MOST_PARTS = 4096
"""Of a source, so that a folder of them stays a folder that file systems like."""
_FRAME = struct.Struct("<Q32s")
"""What stands before each chunk: bytes, and their sha256."""
_FACTS = struct.Struct("<I")


class Damaged(Exception):
    """A part's file is not what it was when it was completed; the message says how."""


@dataclass(frozen=True)
class Division:
    """A source cut into parts of equal weight: a chunk belongs to the part that it begins in."""

    total: int
    size: int

    @property
    def count(self) -> int:
        return max(1, -(-self.total // self.size))

    def part(self, position: int) -> int:
        """Number of the part that `position` of the source's `total` lies in."""
        return min(position // self.size, self.count - 1)


def divide(source: Source) -> Division:
    """The division of a source: parts of `PART_CHUNKS` chunks, larger ones where there would be too many."""
    return Division(source.total, max(source.part_weight, -(-source.total // MOST_PARTS), 1))


def part_chunks(
    source: Source, division: Division, parts: dict[int, int]
) -> Iterator[tuple[int, Chunk | None]]:
    """Every chunk of the parts `parts`, in one pass over the source, as `(part, chunk)`; `(part, None)` ends each of them.

    Args:
        parts: part → how many of its chunks to leave out at its beginning.
    """
    waiting = sorted(parts, reverse=True)
    seen = 0

    def needed(first: int, last: int) -> bool:
        return any(number in parts for number in range(division.part(first), division.part(last) + 1))

    for chunk in source.chunks(needed) if parts else ():
        part = division.part(chunk.position)
        while waiting and waiting[-1] < part:
            yield waiting.pop(), None
            seen = 0
        if not waiting:
            return
        if part == waiting[-1]:
            if seen >= parts[part]:
                yield part, chunk
            seen += 1
    while waiting:
        yield waiting.pop(), None


class Frame(NamedTuple):
    """A tokenised chunk of a part."""

    file: int
    """Number of the source's file that the chunk is of."""
    weight: int
    result: Tokenized


@dataclass(frozen=True)
class Part:
    """A complete part, as its manifest has it."""

    file: str
    bytes: int
    frames: int
    weight: int
    documents: int
    tokens: int
    sha256: str
    """Of the checksums of its frames, one after another."""


@dataclass(frozen=True)
class Begun:
    """What is whole of a part that nobody completed."""

    path: Path
    bytes: int
    frames: int
    weight: int
    documents: int
    tokens: int


class PartFolder:
    """The parts of one source, made with one config."""

    def __init__(self, path: Path, dtype: str):
        self.path = path
        self._dtype = TOKEN_TYPES[dtype]

    def made(self, number: int) -> Part | None:
        """The part, if it is complete."""
        try:
            text = (self.path / f"{number:05d}.json").read_text(encoding="utf-8")
            return Part(**json.loads(text))
        except (OSError, ValueError, TypeError):
            return None

    def complete(self) -> set[int]:
        """Numbers of the parts that are complete."""
        try:
            names = [name.removesuffix(".json") for name in os.listdir(self.path) if name.endswith(".json")]
        except FileNotFoundError:
            return set()
        return {int(name) for name in names if name.isdecimal()}

    def begun(self, numbers: Collection[int]) -> dict[int, Begun]:
        """The furthest that anybody has come with each of some incomplete parts; reads all that is there of them."""
        found: dict[int, Begun] = {}
        for path in sorted(self.path.glob("*.part")):
            number = int(path.name.split(".")[0])
            if number not in numbers:
                continue
            begun = self._whole_frames(path)
            if begun.frames > (found[number].frames if number in found else 0):
                found[number] = begun
        return found

    def frames(self, part: Part, skip: int) -> Iterator[Frame]:
        """The chunks of a part from number `skip` on.

        Raises:
            Damaged: at once for a file that is not the one of the manifest, later for a chunk that is not as it was.
        """
        path = self.path / part.file
        try:
            file = path.open("rb")
        except OSError as error:
            raise Damaged(f"{path} cannot be read ({error.strerror})") from None
        with file:
            size = os.fstat(file.fileno()).st_size
            if size != part.bytes:
                raise Damaged(f"{path} has {size:,} bytes where its manifest says {part.bytes:,}")
            heads, position, begin = hashlib.sha256(), 0, 0
            for number in range(part.frames):
                begin = position if number == skip else begin
                file.seek(position)
                length, checksum = _FRAME.unpack(file.read(_FRAME.size).ljust(_FRAME.size, b"\0"))
                heads.update(checksum)
                position += _FRAME.size + length
            if position != size or heads.hexdigest() != part.sha256:
                raise Damaged(f"{path} differs from its checksum")
            file.seek(begin)
            for number in range(skip, part.frames):
                body = _body(file)
                if body is None:
                    raise Damaged(f"{path}: chunk {number} differs from its checksum")
                yield _unpacked(body, self._dtype)

    def discard(self, number: int) -> None:
        """Remove a complete part."""
        if (part := self.made(number)) is not None:
            (self.path / f"{number:05d}.json").unlink(missing_ok=True)
            (self.path / part.file).unlink(missing_ok=True)

    def writer(self, number: int, begun: Begun | None = None) -> PartWriter:
        """Begins a file for a part with what is there of it."""
        return PartWriter(self.path, number, begun)

    @staticmethod
    def _whole_frames(path: Path) -> Begun:
        frames = weight = documents = tokens = end = 0
        with path.open("rb") as file:
            while (body := _body(file)) is not None:
                facts = _facts(body)[0]
                frames, weight = frames + 1, weight + facts["weight"]
                documents, tokens = documents + facts["documents"], tokens + facts["tokens"]
                end = file.tell()
        return Begun(path, end, frames, weight, documents, tokens)


class PartWriter:
    """Writes one part. What is there when it is closed without `finish` can be gone on with."""

    def __init__(self, folder: Path, number: int, begun: Begun | None):
        self.folder = folder
        self.number = number
        self.frames = self.weight = self.documents = self.tokens = 0
        # Unbuffered: a chunk is one write, and a kill loses at most the one that is under way.
        self._path = folder / f"{number:05d}.{uuid.uuid4().hex[:12]}.part"
        self._file = self._path.open("xb", buffering=0)
        self._checksums = hashlib.sha256()
        if begun is not None:
            with begun.path.open("rb") as old:
                for _ in range(begun.frames):
                    body = _body(old)
                    if body is None:
                        raise OSError(5, f"{begun.path} has changed", str(begun.path))
                    self._append(body)

    def close(self) -> None:
        self._file.close()

    def add(self, chunk: Chunk, result: Tokenized) -> None:
        """Add the next chunk."""
        self._append(_packed(chunk, result))

    def sync(self) -> None:
        """Wait until all that was added is on the disk."""
        os.fsync(self._file.fileno())

    def finish(self) -> Part:
        """Make the part complete."""
        self.sync()
        size = self._file.tell()
        self._file.close()
        part = Part(
            self._path.name,
            size,
            self.frames,
            self.weight,
            self.documents,
            self.tokens,
            self._checksums.hexdigest(),
        )
        replace_json(self.folder / f"{self.number:05d}.json", asdict(part), durable=True)
        return part

    def _append(self, body: bytes) -> None:
        checksum = hashlib.sha256(body).digest()
        data = memoryview(_FRAME.pack(len(body), checksum) + body)
        while data:
            data = data[self._file.write(data) :]
        facts = _facts(body)[0]
        self._checksums.update(checksum)
        self.frames += 1
        self.weight += facts["weight"]
        self.documents += facts["documents"]
        self.tokens += facts["tokens"]


def replace_json(path: Path, value: Any, *, durable: bool = False) -> None:
    """Write `path` anew, whole or not at all, also where another process does the same at the same moment.

    `durable` waits until it is on the disk.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(value, file)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def remove(path: Path) -> None:
    """Remove a folder of parts, for others from one moment to the next: somebody may be writing into it still."""
    old = path.with_name(path.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    with suppress(OSError):
        os.rename(path, old)
    for folder in (old, path):
        shutil.rmtree(folder, ignore_errors=True)


def _packed(chunk: Chunk, result: Tokenized) -> bytes:
    columns: Sequence[Any] = result.columns if any(result.columns[:1]) else ()
    rows = zstandard.compress(json.dumps(columns).encode(), 1) if columns else b""
    facts = {
        "file": chunk.file,
        "weight": chunk.weight,
        "records": result.records,
        "documents": len(result.lengths),
        "tokens": len(result.tokens),
        **{name: getattr(result, name) for name in COUNTED},
        "lane": result.lane is not None,
        "rows": bool(rows),
    }
    head = json.dumps(facts).encode()
    lane = b"" if result.lane is None else result.lane.tobytes()
    lengths = result.lengths.astype("<i8").tobytes()
    return b"".join([_FACTS.pack(len(head)), head, lengths, result.tokens.tobytes(), lane, rows])


def _facts(body: bytes) -> tuple[dict[str, Any], int]:
    """What a chunk's beginning says, and where that ends."""
    (size,) = _FACTS.unpack_from(body)
    end = _FACTS.size + size
    return json.loads(body[_FACTS.size : end]), end


def _unpacked(body: bytes, dtype: np.dtype) -> Frame:
    facts, position = _facts(body)
    lengths = np.frombuffer(body, "<i8", facts["documents"], position).astype(np.int64, copy=False)
    position += lengths.nbytes
    tokens = np.frombuffer(body, dtype, facts["tokens"], position)
    position += tokens.nbytes
    lane = np.frombuffer(body, np.uint8, facts["tokens"], position) if facts["lane"] else None
    position += 0 if lane is None else lane.nbytes
    columns: list[tuple[str | None, ...]] = [()] * facts["documents"]
    if facts["rows"]:
        columns = [tuple(row) for row in json.loads(zstandard.decompress(body[position:]))]
    counted = {name: facts[name] for name in COUNTED}
    return Frame(
        facts["file"], facts["weight"], Tokenized(facts["records"], lengths, tokens, lane, columns, **counted)
    )


def _body(file: Any) -> bytes | None:
    """The next chunk of a part's file; None where there is no whole one."""
    head = file.read(_FRAME.size)
    if len(head) < _FRAME.size:
        return None
    size, checksum = _FRAME.unpack(head)
    if size > os.fstat(file.fileno()).st_size - file.tell():
        return None
    body = file.read(size)
    return body if hashlib.sha256(body).digest() == checksum else None
