"""Safetensors files, read and written a tensor at a time: memory for one tensor, whatever the file's size.

The format: 8 bytes little-endian header length, a JSON header (name -> dtype, shape, byte range), then the tensors'
bytes without gaps. `safetensors` itself writes only what is all in memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modelyard.errors import UserError, missing_path

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # bytes; the limit of the reference implementation


@dataclass(frozen=True)
class TensorEntry:
    """A tensor inside a file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """First byte, from the beginning of the file."""

    def load(self) -> Tensor:
        """The tensor, in memory of its own."""
        return self._read(torch.empty(self.shape, dtype=self.dtype))

    def beginning(self, count: int) -> Tensor:
        """Its first `count` values, or all where there are fewer, in one row."""
        return self._read(torch.empty(min(count, prod(self.shape)), dtype=self.dtype))

    def _read(self, tensor: Tensor) -> Tensor:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            if file.readinto(_bytes(tensor)) != tensor.nbytes:
                raise UserError(f"{self.path} ends inside a tensor: the file was cut short")
        return tensor


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def read_entries(path: Path) -> dict[str, TensorEntry]:
    """Every tensor of a file; reads the header alone. Raises UserError when the file is not whole."""
    if not path.is_file():
        raise UserError(missing_path(path))
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":  # of https://git-lfs.github.com/spec/v1
            raise UserError(f"{path} is a git-lfs pointer, not the weights; fetch them with `git lfs pull`")
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 2 <= length <= min(size - 8, _LONGEST_HEADER):
            raise UserError(f"{path} is not a whole safetensors file ({size:,} bytes)")
        header_bytes = file.read(length)
    entries = {}
    end = 0
    try:
        header: dict[str, Any] = json.loads(header_bytes)
        header.pop("__metadata__", None)
        for name, entry in header.items():
            dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
            begin, stop = entry["data_offsets"]
            if stop - begin != prod(shape) * dtype.itemsize:
                raise ValueError(f"'{name}' has {stop - begin} bytes for shape {list(shape)}")
            entries[name] = TensorEntry(path, dtype, shape, 8 + length + begin)
            end = max(end, stop)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} has a header that cannot be read: {error}") from None
    if 8 + length + end != size:
        raise UserError(
            f"{path} has {size:,} bytes where its header says {8 + length + end:,}: it was cut short"
        )
    return entries


class FileWriter:
    """Writes one file: all names, dtypes and shapes first, then the tensors in that order."""

    def __init__(self, path: Path, tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, dtype, shape in tensors:
            begin, end = end, end + prod(shape) * dtype.itemsize
            header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that the tensors are aligned
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, tensor: Tensor) -> None:
        self._file.write(_bytes(tensor.contiguous().cpu()))

    def close(self) -> None:
        """Make the file durable."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> FileWriter:
        return self

    def __exit__(self, failure: type[BaseException] | None, *details: object) -> None:
        if failure is None:
            self.close()
        else:
            self._file.close()
