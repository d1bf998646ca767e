"""Numbers in files, read by position.

Not mapped into memory: a mapping counts every page that was ever touched as this process's memory, faults them in one by
one, and kills the process (SIGBUS) where a file has become shorter than it was. A read by position costs a microsecond and
can be checked.
"""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from modelyard.errors import UserError

MOST_OPEN = 128
"""Files kept open by the whole process: a blend of a hundred stores of many shards has more than a process may open."""
_LARGEST_READ = 1 << 30
"""Bytes in one call; Linux reads at most 2 GiB less a page."""


class FileArray:
    """An array of numbers in a file. Opens the file when it is first read; safe to use from several threads.

    Args:
        path: the file.
        dtype: of the numbers, as they lie in the file.
        count: how many there are.
        at: position of the first one, in bytes.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any], count: int, at: int = 0):
        self.path = path
        self.dtype = dtype
        self.count = count
        self.at = at
        self._file: _OpenFile | None = None

    def __len__(self) -> int:
        return self.count

    def read(self, begin: int, end: int) -> np.ndarray:
        """Numbers `begin:end`, [end - begin], read-only.

        Raises:
            IndexError: not within the array.
            UserError: the file ends before them, or cannot be read.
        """
        if not 0 <= begin <= end <= self.count:
            raise IndexError(f"{begin}:{end} of the {self.count} numbers in {self.path}")
        width = self.dtype.itemsize
        size, position = (end - begin) * width, self.at + begin * width
        try:
            file = self._opened()
            data = os.pread(file.descriptor, min(size, _LARGEST_READ), position)
            if len(data) < size:
                data = _rest(file.descriptor, data, size, position)
            if len(data) < size:
                raise UserError(
                    f"{self.path} has {os.fstat(file.descriptor).st_size:,} bytes, and those up to {position + size:,} are "
                    "needed: it was cut short while in use"
                )
        except OSError as error:
            raise UserError(f"{self.path} cannot be read ({error.strerror})") from None
        return np.frombuffer(data, self.dtype)

    def will_need(self, ranges: Sequence[tuple[int, int]]) -> None:
        """A hint that numbers `begin:end` of each range are read soon: the system starts reading them from the disk."""
        if not hasattr(os, "posix_fadvise"):
            return
        width = self.dtype.itemsize
        try:
            file = self._opened()
            for begin, end in ranges:
                position, size = self.at + begin * width, (end - begin) * width
                os.posix_fadvise(file.descriptor, position, size, os.POSIX_FADV_WILLNEED)
        except OSError:
            pass  # Reading them will say what is wrong.

    def _opened(self) -> _OpenFile:
        file = self._file
        if file is None:
            file = self._file = _OpenFile(self.path)
            _keep_open(self)
        return file


def _rest(descriptor: int, data: bytes, size: int, position: int) -> bytes:
    """`data` and what follows it up to `size` bytes; less only where the file ends."""
    pieces = [data]
    have = len(data)
    while pieces[-1] and have < size:
        pieces.append(os.pread(descriptor, min(size - have, _LARGEST_READ), position + have))
        have += len(pieces[-1])
    return b"".join(pieces)


class _OpenFile:
    """A descriptor that is closed when nobody holds it any more: also while another thread reads, it stays this file's."""

    def __init__(self, path: Path):
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


_with_open_file: deque[weakref.ref[FileArray]] = deque()
"""The arrays whose files are open, oldest first."""
_lock = Lock()


def _keep_open(array: FileArray) -> None:
    """Note that `array` has its file open, and close the one that was opened longest ago where there are too many."""
    with _lock:
        _with_open_file.append(weakref.ref(array))
        while len(_with_open_file) > MOST_OPEN:
            oldest = _with_open_file.popleft()()
            if oldest is not None:
                oldest._file = None
