"""Batches as the model takes them, made from pieces of documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from modelyard.data.store import MASK_LANE
from modelyard.errors import UserError

if TYPE_CHECKING:  # The train step imports this module where there is no pydantic.
    from modelyard.data.datasets import IndexedDataset
    from modelyard.data.rows import Piece

IGNORED = -100
"""Label of a position that has no target."""
PADDING_TOKEN = 0
"""Input where a row has no document; never a target, and a segment of its own, so its value changes nothing."""


@dataclass(frozen=True)
class Batch:
    """Rows of tokens with everything that is needed to train on them. Made on the CPU."""

    input_ids: Tensor
    """Int64 [rows, sequence]."""
    labels: Tensor
    """Int64 [rows, sequence]: the token to predict at each position (already shifted), -100 where there is none."""
    positions: Tensor
    """Int64 [rows, sequence]: from 0 in each row, or in each segment where documents are isolated."""
    cu_seqlens: Tensor
    """Int32 [rows, most segments + 1]: where attention segments begin, then `sequence`, repeated to the width."""

    def rows(self, begin: int, end: int) -> Batch:
        """Some of the rows, as `DataStream.rows` would make them alone."""
        cu_seqlens = self.cu_seqlens[begin:end]
        sequence = self.input_ids.shape[1]
        width = int((cu_seqlens < sequence).sum(dim=1).max()) + 1
        return Batch(
            self.input_ids[begin:end],
            self.labels[begin:end],
            self.positions[begin:end],
            cu_seqlens[:, :width],
        )

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device; `cu_seqlens` stays on the host, where its numbers are needed."""
        return Batch(
            self.input_ids.to(device), self.labels.to(device), self.positions.to(device), self.cu_seqlens
        )

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def num_targets(self) -> int:
        """Positions that have a target."""
        return int((self.labels != IGNORED).sum())


def assemble(
    rows: Sequence[tuple[IndexedDataset, Sequence[Piece]]],
    *,
    sequence_length: int,
    vocab_size: int,
    isolate: bool,
    mask: bool,
) -> Batch:
    """Read the pieces of each row and lay out inputs, labels, positions and segments.

    A row is up to `sequence_length + 1` tokens; what is missing is padding. A position has a target when the next token
    belongs to the row, is not masked (`mask`), and, with `isolate`, belongs to the same document.

    Segments: with `isolate` one for each piece, else one for all documents; padding is always its own.

    Raises:
        UserError: a token is not in the vocabulary; names its document.
    """
    count = len(rows)
    tokens = np.full((count, sequence_length + 1), PADDING_TOKEN, dtype=np.int64)
    # untrained[r, p]: token p of row r is no target. The first token of a row is none in any case.
    untrained = np.zeros((count, sequence_length + 1), dtype=bool)
    segments = []
    for number, (dataset, pieces) in enumerate(rows):
        starts = []
        at = 0
        for document, begin, end in pieces:
            after = at + end - begin
            tokens[number, at:after] = dataset.document(document, begin, end)
            if mask:
                untrained[number, at:after] = dataset.lane(MASK_LANE, document, begin, end)
            starts.append(at)
            at = after
        untrained[number, at:] = True
        if isolate:
            untrained[number, starts] = True
        boundaries = starts if isolate else starts[:1]
        if at <= sequence_length:
            boundaries.append(at)
        segments.append([start for start in boundaries if start < sequence_length])
    largest = int(tokens.max(initial=0))
    if largest >= vocab_size:
        raise UserError(_outside_vocabulary(rows, vocab_size))

    positions = np.broadcast_to(np.arange(sequence_length), (count, sequence_length)).copy()
    width = max(map(len, segments), default=0) + 1
    cu_seqlens = np.full((count, width), sequence_length, dtype=np.int32)
    for number, boundaries in enumerate(segments):
        cu_seqlens[number, : len(boundaries)] = boundaries
        if isolate:
            sizes = np.diff([*boundaries, sequence_length])
            positions[number] -= np.repeat(boundaries, sizes)
    labels = np.where(untrained[:, 1:], IGNORED, tokens[:, 1:])
    inputs = np.ascontiguousarray(tokens[:, :-1])
    return Batch(*(torch.from_numpy(array) for array in (inputs, labels, positions, cu_seqlens)))


def _outside_vocabulary(rows: Sequence[tuple[IndexedDataset, Sequence[Piece]]], vocab_size: int) -> str:
    for dataset, pieces in rows:
        for document, begin, end in pieces:
            found = int(dataset.document(document, begin, end).max(initial=0))
            if found >= vocab_size:
                return (
                    f"token {found} in {dataset.where(document)} is outside the model's vocabulary of {vocab_size:,}: "
                    "was the data prepared with another tokenizer?"
                )
    raise AssertionError("some row has a token outside the vocabulary")
