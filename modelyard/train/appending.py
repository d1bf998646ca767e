"""Files that grow record by record, which a full disk can hold up but not break."""

from __future__ import annotations

import os
from collections.abc import Callable
from io import FileIO
from pathlib import Path


class AppendedFile:
    """Appends whole records. Where they cannot be written they wait here, and what was written by halves is taken back.

    The first failure is told to `complain` in one line; every later write tries again with all that waits.
    """

    def __init__(self, path: Path, complain: Callable[[str], None]):
        self.path = path
        self._complain = complain
        self._waiting: list[bytes] = []
        self._failing = False
        self._file: FileIO | None = None

    def write(self, record: str | bytes) -> None:
        """Append a record: some lines with their newlines, or bytes."""
        self._waiting.append(record.encode("utf-8") if isinstance(record, str) else record)
        problem = self._try()
        if problem and not self._failing:
            self._failing = True  # before the complaint, which may be written to this very file
            self._complain(
                f"warning: {self.path} cannot be written ({problem}); what belongs there waits for room"
            )
        elif not problem and self._failing:
            self._failing = False
            self._complain(f"{self.path} is written again, nothing of it is lost")

    def _try(self) -> str | None:
        """Write what waits, and say why where that fails."""
        data = b"".join(self._waiting)
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = FileIO(self.path, "ab")
            end = self._file.seek(0, os.SEEK_END)
            written = 0
            try:
                while written < len(data):  # a nearly full disk takes a part
                    written += self._file.write(data[written:]) or 0
            except OSError:
                self._file.truncate(end)
                raise
        except OSError as error:
            return error.strerror or str(error)
        self._waiting.clear()
        return None

    def close(self) -> None:
        if self._waiting and (problem := self._try()):
            self._complain(
                f"warning: the last {len(self._waiting)} records of {self.path} are lost ({problem})"
            )
        if self._file is not None:
            self._file.close()
