"""A store's columns.parquet: the record columns that are kept beside the tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq

from modelyard.data.store import StoreWriter

FILE = "columns.parquet"
ROWS = 8192
"""Documents in a row group: fixed, so that the file does not depend on how the documents came."""


@dataclass
class ColumnWriter:
    """A store's columns.parquet: text columns, one row per document, in row groups of fixed size."""

    parquet: pq.ParquetWriter
    schema: pa.Schema
    rows: list[tuple[str | None, ...]] = field(default_factory=list)

    def add(self, rows: list[tuple[str | None, ...]]) -> None:
        self.rows += rows
        while len(self.rows) >= ROWS:
            self._write(self.rows[:ROWS])
            del self.rows[:ROWS]

    def finish(self) -> None:
        if self.rows:
            self._write(self.rows)

    def _write(self, rows: list[tuple[str | None, ...]]) -> None:
        columns = [pa.array(values, pa.string()) for values in zip(*rows, strict=True)]
        self.parquet.write_table(pa.Table.from_arrays(columns, schema=self.schema), row_group_size=ROWS)


@contextmanager
def column_writer(names: Sequence[str], writer: StoreWriter) -> Iterator[ColumnWriter | None]:
    """A writer of the columns `names` of the store that `writer` is making; None when there are no columns."""
    if not names:
        yield None
        return
    schema = pa.schema([(name, pa.string()) for name in names])
    with (writer.temporary / FILE).open("wb") as file:
        columns = ColumnWriter(pq.ParquetWriter(file, schema, compression="zstd"), schema)
        try:
            yield columns
            columns.finish()
        finally:
            columns.parquet.close()  # Also where something failed: its destructor would write to a closed file.
    writer.include(FILE)
