"""Plain, gzip and zstd files read as one stream of bytes that knows how far it has come in the file."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import zstandard

from modelyard.errors import UserError

BLOCK = 1 << 18


class ByteStream:
    """The decompressed bytes of a file; a context manager.

    Raises:
        UserError: from `read`, when the compressed data is damaged or ends too early.
    """

    def __init__(self, path: Path, compression: str):
        self.path = path
        self._file = path.open("rb")
        self._gzip = gzip.GzipFile(fileobj=self._file) if compression == "gz" else None
        self._is_zstd = compression == "zst"
        self._zstd = zstandard.ZstdDecompressor().decompressobj()
        self._started = False  # inside a zstd frame

    def __enter__(self) -> ByteStream:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def consumed(self) -> int:
        """Bytes of the file that have been read."""
        return self._file.tell()

    def read(self, size: int = -1) -> bytes:
        """About `size` bytes, everything when negative; nothing at the end only."""
        try:
            if self._gzip is not None:
                return self._gzip.read(size)
            if self._is_zstd:
                return self._read_zstd(size)
            return self._file.read(size)
        except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
            raise UserError(f"{self.path} is damaged or cut short ({error})") from None

    def _read_zstd(self, size: int) -> bytes:
        # A stream reader would take a file that ends within a frame for a whole one.
        pieces, length = [], 0
        while size < 0 or length < size:
            if self._zstd.eof:
                rest = self._zstd.unused_data
                self._zstd, self._started = zstandard.ZstdDecompressor().decompressobj(), False
            else:
                rest = b""
            compressed = rest or self._file.read(BLOCK)
            if not compressed:
                if self._started:
                    raise EOFError("it ends within a frame")
                break
            self._started = True
            pieces.append(self._zstd.decompress(compressed))
            length += len(pieces[-1])
        return b"".join(pieces)
