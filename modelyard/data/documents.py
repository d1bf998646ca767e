"""One chunk of a source → the tokens of its documents. What a worker process of `prepare` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Encoding

from modelyard.data.sources import Chunk, RecordError, Source
from modelyard.data.spans import SpanError, character_mask, token_mask
from modelyard.data.store import TOKEN_TYPES
from modelyard.data.tokenizer import DocumentFrame, Tokenizer, replace_surrogates


@dataclass(frozen=True)
class Job:
    """What a worker needs to turn a chunk into tokens."""

    source: Source
    tokenizer: Tokenizer
    frame: DocumentFrame
    spans: bool
    parse_special: bool
    dtype: str


@dataclass
class Tokenized:
    """One chunk's documents. Empty documents are counted, not kept."""

    records: int
    """Records in the chunk, kept or not."""
    lengths: np.ndarray
    """Tokens of each kept document, [documents]."""
    tokens: np.ndarray
    """[sum of lengths]"""
    mask: np.ndarray | None
    """Loss mask, [sum of lengths]; None without spans."""
    columns: list[tuple[str | None, ...]]
    """Per kept document."""
    empty: int = 0
    repaired: int = 0
    """Documents with lone surrogates, which became U+FFFD."""
    unreadable: int = 0
    """Source files that are not UTF-8."""
    problem: tuple[int, str] | None = None
    """Number within the chunk, and reason, of the first record that cannot be used; then nothing else is filled."""


def tokenize_chunk(job: Job, chunk: Chunk) -> Tokenized:
    """Read one chunk and tokenise its documents; runs in a worker process."""
    try:
        records = job.source.read(chunk)
    except RecordError as error:
        return _failed(error.index, error.reason)
    kept = [(index, record) for index, record in enumerate(records) if record is not None]
    result = Tokenized(len(records), *_nothing(job), columns=[], unreadable=len(records) - len(kept))
    texts = []
    for _, record in kept:
        text = record.text
        if not text.isascii() and (clean := replace_surrogates(text)) != text:
            text = clean
            result.repaired += 1
        texts.append(text)
    encodings: Sequence[Encoding | None] = [None] * len(texts)
    if job.spans or job.parse_special:
        encodings = job.tokenizer.encode_batch(texts, parse_special=job.parse_special, offsets=job.spans)
        all_ids = [np.array(encoding.ids, np.uint32) for encoding in encodings]
    else:
        all_ids = job.tokenizer.encode_ids(texts)
    pieces: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    lengths = []
    for (index, record), ids, encoding in zip(kept, all_ids, encodings, strict=True):
        if not len(ids):
            result.empty += 1
            continue
        before, after = missing_ends(ids, job.frame)
        if job.spans and encoding is not None:
            try:
                characters = character_mask(record.spans, len(record.text))
            except SpanError as error:
                return _failed(index, str(error))
            # The begin token shares the fate of the first character, the end token that of the last.
            masks += [characters[:1]] * len(before)
            masks += [token_mask(characters, encoding.offsets)]
            masks += [characters[-1:]] * len(after)
        pieces += [np.array(before, np.uint32), ids, np.array(after, np.uint32)]
        lengths.append(len(before) + len(ids) + len(after))
        result.columns.append(record.columns)
    if pieces:
        result.lengths = np.array(lengths, np.int64)
        result.tokens = np.concatenate(pieces, dtype=TOKEN_TYPES[job.dtype], casting="unsafe")
        result.mask = np.concatenate(masks).astype(np.uint8) if job.spans else None
    return result


def missing_ends(ids: Sequence[int] | np.ndarray, frame: DocumentFrame) -> tuple[list[int], list[int]]:
    """The begin and end token that a document still needs, each as a list of at most one.

    One that the text brought itself is not doubled; a document of a single token is not both its begin and its end.
    """
    has_bos = frame.bos is not None and ids[0] == frame.bos.id
    begin = 1 if has_bos else 0
    has_eos = frame.eos is not None and len(ids) > begin and ids[-1] == frame.eos.id
    before = [frame.bos.id] if frame.bos and not has_bos else []
    after = [frame.eos.id] if frame.eos and not has_eos else []
    return before, after


def _nothing(job: Job) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    tokens = np.zeros(0, TOKEN_TYPES[job.dtype])
    return np.zeros(0, np.int64), tokens, np.zeros(0, np.uint8) if job.spans else None


def _failed(index: int, reason: str) -> Tokenized:
    empty = np.zeros(0, np.int64)
    return Tokenized(0, empty, empty, None, [], problem=(index, reason))
