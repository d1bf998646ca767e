"""Rows of Parquet and Arrow files, a few columns at a time, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from modelyard.data.fields import Fields
from modelyard.errors import UserError, did_you_mean

Row = tuple[Any, ...]


def wanted_columns(schema: pa.Schema, place: str, fields: Fields) -> list[str]:
    """The columns to read of a table. Raises UserError where one is missing, or holds what it must not."""
    for name in fields.required():
        if name not in schema.names:
            columns = ", ".join(f"'{column}'" for column in schema.names)
            raise UserError(
                f"{place}: no column '{name}'; it has {columns}{did_you_mean(name, schema.names)}"
            )
    if fields.is_conversation:
        _check_conversations(schema, place, fields)
        return fields.among(schema.names)
    kind = schema.field(fields.text).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise UserError(f"{place}: column '{fields.text}' holds {kind}, not text")
    return fields.required()


_FREE_FORM = ("tools", "arguments", "parameters")
"""Where any key may stand: a table gives every row the keys of all rows there, with nulls in them."""


def _check_conversations(schema: pa.Schema, place: str, fields: Fields) -> None:
    """Raise UserError where the table has changed tools or calls already."""
    known = {own: name for name, own in (fields.renamed or {}).items()}
    for name in fields.among(schema.names):
        if name not in fields.columns and (
            found := _filled_in(schema.field(name).type, known.get(name, name))
        ):
            what = "is a structure" if found == name else f"holds {found} as a structure"
            raise UserError(
                f"{place}: column '{name}' {what}, where the table has given every call and tool the keys "
                "of all the others, with nulls; write them as JSON text, or the data as .jsonl"
            )


def _filled_in(kind: pa.DataType, name: str) -> str | None:
    """The free-form thing somewhere in a type that is a structure of fixed keys."""
    while pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    if not pa.types.is_struct(kind):
        return None
    if name in _FREE_FORM and kind.num_fields:
        return name
    return next(filter(None, (_filled_in(field.type, field.name) for field in kind)), None)


def rows_of(table: pa.Table | pa.RecordBatch, names: Sequence[str]) -> list[Row]:
    """The rows of a table as tuples of Python values, in the order of `names`."""
    return list(zip(*(table.column(name).to_pylist() for name in names), strict=True))


class ParquetReader:
    """One Parquet file. Row ranges asked for in rising order are read in one pass over each row group."""

    def __init__(self, path: Path, fields: Fields):
        self.path = path
        try:
            # Buffered: otherwise a whole column of a row group is loaded at once, compressed.
            self._file = pq.ParquetFile(path, buffer_size=1 << 20)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path} is not a Parquet file, or a damaged one ({error})") from None
        self.names = wanted_columns(self._file.schema_arrow, str(path), fields)
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._batch: pa.RecordBatch | None = None
        self._group, self._position = -1, 0  # where the batch, or the next one, begins

    def groups(self) -> list[tuple[int, int]]:
        """Rows and uncompressed bytes (of the wanted columns) of each row group."""
        facts = []
        for group in range(self._file.metadata.num_row_groups):
            metadata = self._file.metadata.row_group(group)
            columns = [metadata.column(i) for i in range(metadata.num_columns)]
            wanted = [column for column in columns if column.path_in_schema.split(".")[0] in self.names]
            facts.append((metadata.num_rows, sum(column.total_uncompressed_size for column in wanted)))
        return facts

    def rows(self, group: int, begin: int, end: int) -> list[Row]:
        """Rows `begin:end` of row group `group`."""
        if group != self._group or begin < self._position:
            columns = list(dict.fromkeys(self.names))
            self._batches = self._file.iter_batches(max(1, end - begin), row_groups=[group], columns=columns)
            self._group, self._position, self._batch = group, 0, None
        rows: list[Row] = []
        while self._position < end:
            batch = self._batch if self._batch is not None else self._next_batch()
            first, stop = max(begin - self._position, 0), min(end - self._position, len(batch))
            if first < stop:
                rows += rows_of(batch.slice(first, stop - first), self.names)
            # What is left of the batch may be asked for next.
            self._batch = batch.slice(stop) if stop < len(batch) else None
            self._position += stop
        return rows

    def _next_batch(self) -> pa.RecordBatch:
        try:
            return next(self._batches)
        except (pa.ArrowException, OSError, StopIteration) as error:
            raise UserError(f"{self.path} is damaged ({error or 'rows are missing'})") from None


class ArrowReader:
    """One Arrow file, stream or random-access format, memory-mapped."""

    def __init__(self, path: Path, fields: Fields):
        self._bytes = path.stat().st_size
        try:
            self._table = _arrow_table(path)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path} is not an Arrow file, or a damaged one ({error})") from None
        self.names = wanted_columns(self._table.schema, str(path), fields)

    def groups(self) -> list[tuple[int, int]]:
        """Rows and bytes: one group, the file."""
        return [(self._table.num_rows, self._bytes)]

    def rows(self, group: int, begin: int, end: int) -> list[Row]:
        """Rows `begin:end`; `group` is 0."""
        return rows_of(self._table.slice(begin, end - begin), self.names)


def _arrow_table(path: Path) -> pa.Table:
    # Only the batches' headers are read here: their columns stay in the mapping.
    source = pa.memory_map(str(path))
    if source.read(6) == b"ARROW1":
        return pa.ipc.open_file(source).read_all()
    source.seek(0)
    return pa.ipc.open_stream(source).read_all()
