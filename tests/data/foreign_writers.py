"""Small writers of other programs' prepared data, from the description of the layouts in docs/token-store.md."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float32": 6, "float64": 7, "uint16": 8}

Spans = Sequence[Sequence[tuple[int, int]]]


def write_pair(
    prefix: Path,
    sequences: Sequence[Sequence[int]],
    *,
    version: int = 1,
    dtype: str = "int32",
    spans: Spans | None = None,
    preference: bool = False,
    documents: Sequence[int] | None = None,
) -> Path:
    """`PREFIX.bin` and `PREFIX.idx`; spans are (first, last), both inclusive; `documents` are the entries at the end."""
    sizes = [len(sequence) for sequence in sequences]
    width = np.dtype(dtype).itemsize
    entries = list(range(len(sizes) + 1)) if documents is None else list(documents)
    data = np.concatenate([np.asarray(sequence, np.int64) for sequence in sequences]).astype(dtype)
    prefix.with_name(prefix.name + ".bin").write_bytes(data.tobytes())
    index = b"MMIDIDX\0\0" + struct.pack("<Q", version)
    if version >= 2:
        index += struct.pack("<B", spans is not None)
    if version >= 3:
        index += struct.pack("<B", preference)
    index += struct.pack("<BQQ", CODES[dtype], len(sizes), len(entries))
    index += np.array(sizes, "<i4").tobytes()
    index += np.array([width * sum(sizes[:i]) for i in range(len(sizes))], "<i8").tobytes()
    if spans is not None:
        index += np.array([len(of_one) for of_one in spans], "<i4").tobytes()
        index += np.array([edge for of_one in spans for span in of_one for edge in span], "<i4").tobytes()
    if preference:
        index += bytes(16 * len(sizes))
    index += np.array(entries, "<i8").tobytes()
    prefix.with_name(prefix.name + ".idx").write_bytes(index)
    return prefix


def write_file(
    path: Path,
    documents: Sequence[Sequence[int]],
    *,
    dtype: str = "int32",
    spans: Spans | None = None,
    more: dict | None = None,
) -> Path:
    """A single file; spans are (first, one past the last)."""
    content = bytearray(b"fast_llm_prepared_dataset" + bytes(8))
    begin = len(content)
    content += b"lm begin"
    description: dict = {"type": "language_model", "begin": begin}

    def section(name: str, marker: str, data: bytes, **facts: object) -> None:
        first = len(content)
        content.extend(f"{marker} begin".encode() + data + f"{marker} end".encode())
        description[name] = {"type": marker, "begin": first, "end": len(content), **facts}

    def ends(counts: Sequence[int], kind: str) -> bytes:
        return np.concatenate(([0], np.cumsum(counts))).astype(kind).tobytes()

    sizes = [len(document) for document in documents]
    tokens = np.concatenate([np.asarray(document, np.int64) for document in documents]).astype(dtype)
    section(
        "tokens",
        "token",
        tokens.tobytes() + ends(sizes, "<i8"),
        num_documents=len(sizes),
        num_tokens=sum(sizes),
        data_type=dtype,
    )
    if spans is not None:
        edges = np.array([edge for of_one in spans for span in of_one for edge in span], "<i4")
        counts = [len(of_one) for of_one in spans]
        section(
            "loss_masking_spans",
            "range",
            edges.tobytes() + ends(counts, "<i4"),
            num_documents=len(counts),
            num_ranges=sum(counts),
        )
    else:
        description["loss_masking_spans"] = {"type": "none"}
    content += b"lm end"
    description |= {"end": len(content)} | (more or {})
    content[25:33] = len(content).to_bytes(8, "big")
    text = json.dumps(description).encode()
    content += len(text).to_bytes(4, "big") + text
    path.write_bytes(content)
    return path
