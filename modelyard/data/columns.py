"""A store's columns.parquet: the record columns that are kept beside the tokens.

A Parquet file cannot be gone on with once its writer is gone. So rows are collected in a plain journal, which can be cut
back to where it was, and turned into the file when they are all there.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from modelyard.data.store import StoreWriter

FILE = "columns.parquet"
ROWS = 8192
"""Documents in a row group: fixed, so that the file does not depend on how the documents came."""
_SIZE = struct.Struct("<Q")


class ColumnWriter:
    """Text columns, one row per document: collected in a journal, then written in row groups of fixed size."""

    def __init__(self, journal: BinaryIO, schema: pa.Schema):
        self._journal = journal
        self._schema = schema

    def add(self, rows: list[tuple[str | None, ...]]) -> None:
        """Collect the rows of the next documents."""
        if rows:
            columns = [pa.array(values, pa.string()) for values in zip(*rows, strict=True)]
            batch = pa.RecordBatch.from_arrays(columns, schema=self._schema)
            data = zstandard.compress(batch.serialize().to_pybytes(), 1)
            self._journal.write(_SIZE.pack(len(data)) + data)

    def save(self) -> int:
        """Wait until the journal is on the disk; returns its bytes, for `column_writer` to go on from."""
        self._journal.flush()
        os.fsync(self._journal.fileno())
        return self._journal.tell()

    def write(self, path: Path) -> None:
        """Write all collected rows as a Parquet file."""
        with path.open("wb") as file, pq.ParquetWriter(file, self._schema, compression="zstd") as parquet:
            waiting = self._schema.empty_table()
            for batch in self._batches():
                waiting = pa.concat_tables([waiting, pa.Table.from_batches([batch])])
                while len(waiting) >= ROWS:
                    parquet.write_table(waiting.slice(0, ROWS).combine_chunks(), row_group_size=ROWS)
                    waiting = waiting.slice(ROWS)
            if len(waiting):
                parquet.write_table(waiting.combine_chunks(), row_group_size=ROWS)

    def _batches(self) -> Iterator[pa.RecordBatch]:
        self._journal.flush()
        with open(self._journal.name, "rb") as journal:
            while size := journal.read(_SIZE.size):
                data = zstandard.decompress(journal.read(*_SIZE.unpack(size)))
                yield pa.ipc.read_record_batch(pa.py_buffer(data), self._schema)


@contextmanager
def column_writer(
    names: Sequence[str], writer: StoreWriter, journal: Path, saved: int | None = None
) -> Iterator[ColumnWriter | None]:
    """A writer of the columns `names` of the store that `writer` is making; None when there are no columns.

    `journal` is the file to collect them in, of which the first `saved` bytes are to be gone on with. It stays: the caller
    removes it when nothing can be gone on with any more.
    """
    if not names:
        yield None
        return
    with journal.open("wb" if saved is None else "r+b") as file:
        if saved is not None:
            file.truncate(saved)
            file.seek(saved)
        columns = ColumnWriter(file, pa.schema([(name, pa.string()) for name in names]))
        yield columns
        columns.write(writer.temporary / FILE)
    writer.include(FILE)
