"""Where texts come from: local files and Hub datasets, cut into chunks that worker processes read.

A source lists its chunks in order; the list depends on the source alone, never on the number of workers. A chunk is
small (about a mebibyte of text, more only for a longer document) and `read` turns it into records in any process.
Plain files are read by the workers themselves; compressed ones are streamed by the main process, which sends on the
bytes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from modelyard.config.prepare import PrepareDatasetConfig
from modelyard.data.bytestream import ByteStream
from modelyard.data.columnar import ArrowReader, ParquetReader, rows_of, wanted_columns
from modelyard.data.fields import Fields, without_filled_in
from modelyard.data.files import SourceFile, find_files
from modelyard.data.licenses import header_license
from modelyard.data.tokenizer import first_line, looks_like_path
from modelyard.errors import UserError, did_you_mean

CHUNK_BYTES = 1 << 20
"""Text in a chunk: large enough that handing it over costs nothing, small enough that many fit in memory."""
BOM = b"\xef\xbb\xbf"
PART_CHUNKS = 8
"""Chunks' worth of a part, the piece of a source that one of several processes does; more of a large source."""
CUT_COMPRESSED = 64
"""A compressed file is divided where it is more than this share of the source: to reach its end, a process must read it
all, so that of many files each is better left to one."""
PARAGRAPH_ENDS = (b"\n\n", b"\n\r\n")
SOURCE_COLUMNS = ("path", "license")


class Record(NamedTuple):
    """One document as it was found."""

    text: str
    spans: Any = None
    columns: tuple[str | None, ...] = ()
    conversation: dict[str, Any] | None = None
    """Instead of a text: the record's values, under the names that `modelyard.chat.formats` knows."""


class RecordError(Exception):
    """A record that cannot be used.

    Args:
        index: its number within the chunk, from 0.
        reason: what is wrong.
    """

    def __init__(self, index: int, reason: str):
        super().__init__(index, reason)
        self.index = index
        self.reason = reason


@dataclass(frozen=True)
class Chunk:
    """A piece of a source.

    `file` numbers the source's files; `begin` and `end` are bytes, rows or files, as the kind of file has it; `data` is
    there when the main process has read the bytes already; `group` is the row group of a Parquet file.
    """

    file: int
    begin: int
    end: int
    weight: int
    """Share of the source's `total`, for the progress display."""
    position: int = 0
    """Where in the source's `total` it begins; never falls from one chunk to the next."""
    data: bytes | None = None
    group: int = 0


Needed = Callable[[int, int], bool]
"""Whether anything that begins between two positions of a source, both inclusive, is wanted."""


def everything(first: int, last: int) -> bool:
    return True


class Source(Protocol):
    """Texts in order."""

    total: int
    """Sum of the chunks' weights."""
    part_weight: int
    """Weight of `PART_CHUNKS` chunks, about."""
    fields: Fields

    def chunks(self, needed: Needed = everything) -> Iterator[Chunk]:
        """All chunks in order; a file that has nothing that is `needed` is not opened, and may be left out."""

    def count(self, chunk: Chunk) -> int:
        """Records in a chunk, counted without understanding them where that is quicker."""

    def read(self, chunk: Chunk) -> Sequence[Record | None]:
        """The chunk's records in order; None for a source file that is not text. Raises RecordError."""

    def place(self, chunk: Chunk) -> str:
        """Name of the file (or dataset) for messages."""

    def identity(self) -> dict[str, Any]:
        """What tells this source from another, without absolute paths."""

    def cutting(self) -> dict[str, str]:
        """Versions of what decides where parts begin and end, beside the source itself."""


def open_source(config: PrepareDatasetConfig, notices: list[str]) -> Source:
    """The source that a dataset section means.

    Args:
        config: the `dataset` section.
        notices: gets a line for each thing the user may not expect.

    Raises:
        UserError: not there, unreadable, or a column is missing.
    """
    if config.trust_remote_code:
        notices.append("dataset.trust_remote_code: has no effect; `datasets` no longer runs dataset scripts")
    is_folder_of_sources = config.extensions is not None
    columns = tuple(
        config.columns if config.columns is not None else SOURCE_COLUMNS if is_folder_of_sources else ()
    )
    renamed = (
        None if config.conversations is None else {str(k): v for k, v in config.conversations.columns.items()}
    )
    fields = Fields(config.text_column, config.spans_column, columns, renamed)
    if is_folder_of_sources and (unknown := set(columns) - set(SOURCE_COLUMNS)):
        raise UserError(f"dataset.columns {sorted(unknown)}: source files have {', '.join(SOURCE_COLUMNS)}")
    if Path(config.path).expanduser().exists() or looks_like_path(config.path):
        return LocalSource(find_files(config, notices), fields, config)
    return HubSource(config, fields)


class LocalSource:
    """Files on this machine."""

    def __init__(self, files: Sequence[SourceFile], fields: Fields, config: PrepareDatasetConfig):
        self.files = list(files)
        self.fields = fields
        self.sample_by = config.sample_by
        *self._starts, self.total = itertools.accumulate((file.size for file in files), initial=0)
        self.part_weight = PART_CHUNKS * CHUNK_BYTES
        if any(file.kind == "text" for file in files):
            if fields.is_conversation:
                raise UserError(f"{config.path}: .txt files have no columns, so no conversations")
            if fields.spans or fields.columns:
                raise UserError(f"{config.path}: .txt files have no columns, so no {fields.required()[1]}")
        self._open: tuple[int, ArrowReader | ParquetReader] | None = None  # the file this process read last

    def chunks(self, needed: Needed = everything) -> Iterator[Chunk]:
        position = 0
        while position < len(self.files):
            file, start = self.files[position], self._starts[position]
            if self._is_whole(file):
                end = self._small_files_together(position)
                weight = sum(self.files[i].size for i in range(position, end))
                yield Chunk(position, position, end, weight, start)
                position = end
                continue
            if not needed(start, start + self._extent(file)):
                pass
            elif file.kind in ("parquet", "arrow"):
                yield from self._row_chunks(position)
            elif self._is_streamed(file):
                yield from self._streamed_chunks(position)
            else:
                for begin in range(0, file.size, CHUNK_BYTES):
                    end = min(begin + CHUNK_BYTES, file.size)
                    yield Chunk(position, begin, end, end - begin, start + begin)
            position += 1

    def count(self, chunk: Chunk) -> int:
        file = self.files[chunk.file]
        if self._is_whole(file) or file.kind in ("parquet", "arrow"):
            return chunk.end - chunk.begin
        data = self._data(chunk)
        if self._is_paragraphs(file):
            return sum(1 for _ in _paragraphs(data.split(b"\n")))
        return data.count(b"\n") + (not data.endswith(b"\n") if data else 0)

    def read(self, chunk: Chunk) -> Sequence[Record | None]:
        file = self.files[chunk.file]
        if self._is_whole(file):
            return [self._whole(self.files[i]) for i in range(chunk.begin, chunk.end)]
        if file.kind in ("parquet", "arrow"):
            reader = self._reader(chunk.file)
            rows = reader.rows(chunk.group, chunk.begin, chunk.end)
            return [_columnar_record(reader.names, row, index, self.fields) for index, row in enumerate(rows)]
        data = self._data(chunk)
        if file.kind == "jsonl":
            return _json_records(data, self.fields)
        return _text_records(data, self.sample_by)

    def _data(self, chunk: Chunk) -> bytes:
        path = self.files[chunk.file].path
        data = chunk.data if chunk.data is not None else _lines_between(path, chunk.begin, chunk.end)
        return data.removeprefix(BOM) if chunk.begin == 0 else data

    def place(self, chunk: Chunk) -> str:
        return str(self.files[chunk.file].path)

    def identity(self) -> dict[str, Any]:
        listing = json.dumps([[file.name, file.size, file.modified] for file in self.files])
        return {
            "files": len(self.files),
            "bytes": self.total,
            "sha256": hashlib.sha256(listing.encode()).hexdigest(),
        }

    def cutting(self) -> dict[str, str]:
        # How far gzip has read when it gives out a stretch of text is its own affair.
        if any(
            file.compression == "gz" and self._is_streamed(file) and self._extent(file) for file in self.files
        ):
            return {
                "gzip": f"Python {sys.version_info[0]}.{sys.version_info[1]}, zlib {zlib.ZLIB_RUNTIME_VERSION}"
            }
        return {}

    def _is_whole(self, file: SourceFile) -> bool:
        return file.kind == "source" or (file.kind == "text" and self.sample_by == "document")

    def _is_streamed(self, file: SourceFile) -> bool:
        """Whether its chunks are only found by reading it from the beginning."""
        if self._is_whole(file) or file.kind in ("parquet", "arrow"):
            return False
        return bool(file.compression) or self._is_paragraphs(file)

    def _extent(self, file: SourceFile) -> int:
        """How far beyond its file's start a chunk can begin."""
        if file.compression and file.size * CUT_COMPRESSED <= self.total:
            return 0
        return max(file.size - 1, 0)

    def _is_paragraphs(self, file: SourceFile) -> bool:
        return file.kind == "text" and self.sample_by == "paragraph"

    def _small_files_together(self, begin: int) -> int:
        """One past the last of the whole-file documents from `begin` on that make one chunk together."""
        end, size = begin, 0
        while end < len(self.files) and self._is_whole(self.files[end]):
            size += self.files[end].size
            if end > begin and size > CHUNK_BYTES:
                break
            end += 1
        return end

    def _whole(self, file: SourceFile) -> Record | None:
        """The file as one document; None for a source file that is not UTF-8 (binary, or an old encoding)."""
        with ByteStream(file.path, file.compression) as stream:
            data = stream.read().removeprefix(BOM)
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            if file.kind == "source":
                return None
            raise UserError(f"{file.path}: not UTF-8 ({error.reason} at byte {error.start})") from None
        available = {"path": file.name, "license": None}
        if file.kind == "source" and "license" in self.fields.columns:
            available["license"] = header_license(text) or file.license
        return Record(text, None, tuple(available[name] for name in self.fields.columns))

    def _row_chunks(self, position: int) -> Iterator[Chunk]:
        file, start = self.files[position], self._starts[position]
        groups = self._reader(position).groups()
        total_rows = sum(rows for rows, _ in groups)
        before = 0
        for group, (rows, size) in enumerate(groups):
            step = max(1, min(rows, rows * CHUNK_BYTES // max(size, 1)))
            for begin in range(0, rows, step):
                end = min(begin + step, rows)
                weight = file.size * (end - begin) // total_rows
                place = start + file.size * (before + begin) // total_rows
                yield Chunk(position, begin, end, weight, place, group=group)
            before += rows

    def _reader(self, position: int) -> ArrowReader | ParquetReader:
        if self._open is None or self._open[0] != position:
            file = self.files[position]
            reader = ParquetReader if file.kind == "parquet" else ArrowReader
            self._open = (position, reader(file.path, self.fields))
        return self._open[1]

    def _streamed_chunks(self, position: int) -> Iterator[Chunk]:
        """Bytes of one file in order, cut where a record ends."""
        file, start = self.files[position], self._starts[position]
        extent = self._extent(file)
        endings = PARAGRAPH_ENDS if self._is_paragraphs(file) else (b"\n",)
        pending: list[bytes] = []  # pieces of a record whose end has not been seen
        begin = weighed = 0
        with ByteStream(file.path, file.compression) as stream:
            while block := stream.read(CHUNK_BYTES):
                cut = max(found + len(end) if (found := block.rfind(end)) >= 0 else 0 for end in endings)
                if not cut:
                    pending.append(block)
                    continue
                data = b"".join([*pending, block[:cut]])
                pending = [block[cut:]]
                consumed = min(stream.consumed(), file.size)
                place = start + min(weighed, extent)
                yield Chunk(position, begin, begin + len(data), consumed - weighed, place, data)
                begin, weighed = begin + len(data), consumed
        rest = b"".join(pending)
        place = start + min(weighed, extent)
        yield Chunk(position, begin, begin + len(rest), file.size - weighed, place, rest)


class HubSource:
    """A dataset of the Hugging Face Hub, fetched (or found in the cache) by `datasets`."""

    def __init__(self, config: PrepareDatasetConfig, fields: Fields):
        self.name = config.path
        self.fields = fields
        self._data = _load_hub_dataset(config)
        self._names = wanted_columns(self._data.features.arrow_schema, config.path, fields)
        self._data = self._data.select_columns(list(dict.fromkeys(self._names))).with_format("arrow")
        self.total = len(self._data)
        self._step = max(1, min(10_000, self.total * CHUNK_BYTES // max(self._data.data.nbytes, 1)))
        self.part_weight = PART_CHUNKS * self._step

    def chunks(self, needed: Needed = everything) -> Iterator[Chunk]:
        for begin in range(0, self.total, self._step):
            end = min(begin + self._step, self.total)
            yield Chunk(0, begin, end, end - begin, begin)

    def count(self, chunk: Chunk) -> int:
        return chunk.end - chunk.begin

    def read(self, chunk: Chunk) -> Sequence[Record | None]:
        rows = rows_of(self._data[chunk.begin : chunk.end], self._names)
        return [_columnar_record(self._names, row, index, self.fields) for index, row in enumerate(rows)]

    def place(self, chunk: Chunk) -> str:
        return f"dataset {self.name}"

    def identity(self) -> dict[str, Any]:
        return {"hub": self.name, "rows": self.total, "fingerprint": self._data._fingerprint}

    def cutting(self) -> dict[str, str]:
        return {}


def _load_hub_dataset(config: PrepareDatasetConfig) -> Any:
    if config.extensions is not None or config.exclude:
        key = "exclude" if config.exclude else "extensions"
        raise UserError(f"dataset.{key} is for a local folder; {config.path} is not here")
    import datasets

    try:
        return datasets.load_dataset(
            config.path,
            config.config_name,
            data_dir=config.data_directory,
            data_files=config.data_files,
            split=config.split,
        )
    except Exception as error:  # whatever the Hub client, its file systems and the builders raise
        reason = first_line(error)
        if "scripts are no longer supported" in reason:
            raise UserError(
                f"dataset {config.path} exists only as a script, which `datasets` no longer runs: use a copy of it "
                "converted to Parquet"
            ) from None
        raise UserError(
            f"dataset '{config.path}' is not a path here and could not be loaded from the Hub: {reason}"
        ) from None


def _columnar_record(names: Sequence[str], row: tuple[Any, ...], index: int, fields: Fields) -> Record:
    values = dict(zip(names, row, strict=True))
    if fields.is_conversation:
        values = {name: without_filled_in(value) for name, value in values.items() if value is not None}
    return _record(values, index, fields)


def _record(values: dict[str, Any], index: int, fields: Fields) -> Record:
    if fields.is_conversation:
        for name in fields.named():
            if name not in values:
                available = ", ".join(f"'{key}'" for key in list(values)[:20]) or "nothing"
                raise RecordError(
                    index, f"no field '{name}'; the record has {available}{did_you_mean(name, values)}"
                )
        kept = tuple(_as_text(values.get(name)) for name in fields.columns)
        return Record("", None, kept, fields.as_known(values))
    for name in fields.required():
        if name not in values:
            available = ", ".join(f"'{key}'" for key in list(values)[:20]) or "nothing"
            hint = did_you_mean(name, values)
            raise RecordError(index, f"no field '{name}'; the record has {available}{hint}")
    text = values[fields.text]
    if not isinstance(text, str):
        found = "null" if text is None else f"{type(text).__name__}, not text"
        available = ", ".join(f"'{key}'" for key in list(values)[:20])
        raise RecordError(index, f"field '{fields.text}' is {found}; the record has {available}")
    return Record(
        text,
        values[fields.spans] if fields.spans else None,
        tuple(_as_text(values[name]) for name in fields.columns),
    )


def _as_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def _json_records(data: bytes, fields: Fields) -> list[Record]:
    """A record a line; an empty line is an empty one, so that a record's number is its line's."""
    records = []
    for index, line in enumerate(data.removesuffix(b"\n").split(b"\n") if data else ()):
        if not line.strip():
            records.append(Record(""))
            continue
        try:
            values = json.loads(_decode(line, index))
        except ValueError as error:
            hint = (
                "; the file is one JSON array? write one record a line" if line.lstrip()[:1] == b"[" else ""
            )
            raise RecordError(index, f"not JSON ({error}){hint}") from None
        if not isinstance(values, dict):
            raise RecordError(index, f"a JSON {type(values).__name__}, not an object with fields")
        records.append(_record(values, index, fields))
    return records


def _text_records(data: bytes, sample_by: str) -> list[Record]:
    lines = data.removesuffix(b"\n").split(b"\n") if data else []
    if sample_by == "line":
        return [Record(_decode(line.removesuffix(b"\r"), index)) for index, line in enumerate(lines)]
    return [Record(_decode(b"\n".join(run), index)) for index, run in enumerate(_paragraphs(lines))]


def _paragraphs(lines: list[bytes]) -> Iterator[list[bytes]]:
    return (list(run) for blank, run in itertools.groupby(lines, lambda line: not line.strip()) if not blank)


def _decode(data: bytes, index: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecordError(index, f"not UTF-8 ({error.reason} at byte {error.start} of the record)") from None


def _lines_between(path: Path, begin: int, end: int) -> bytes:
    """The lines of a file that start in `[begin, end)`, whole; the last may run beyond `end`."""
    with path.open("rb") as file:
        if begin:
            # A line starts at `begin` when the byte before ends one. Only this stretch is searched: a line of a
            # gigabyte covers many stretches, and each but the first must be cheap.
            file.seek(begin - 1)
            data = file.read(end - begin + 1).partition(b"\n")[2]
            if not data:
                return b""
        else:
            data = file.read(end)
        return data if data.endswith(b"\n") else data + file.readline()
