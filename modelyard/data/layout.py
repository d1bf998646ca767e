"""Pieces of documents laid out as the model takes them, in numpy: what `modelyard.data.batch` makes tensors of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from modelyard.chat.segments import LossLane
from modelyard.data.lanes import KIND_LANE, NO_KIND, has_kinds, not_targets
from modelyard.errors import UserError

if TYPE_CHECKING:  # The train step imports this module where there is no pydantic.
    from modelyard.data.datasets import IndexedDataset
    from modelyard.data.rows import Piece

IGNORED = -100
"""Label of a position that has no target."""
PADDING_TOKEN = 0
"""Input where a row has no document; never a target, and a segment of its own, so its value changes nothing."""


class Layout(NamedTuple):
    """The arrays of a batch; `modelyard.data.batch.Batch` says what each means."""

    input_ids: np.ndarray
    """Int64 [rows, sequence]."""
    labels: np.ndarray
    """Int64 [rows, sequence]."""
    positions: np.ndarray
    """Int64 [rows, sequence]."""
    cu_seqlens: np.ndarray
    """Int32 [rows, most segments + 1]."""
    kinds: np.ndarray | None
    """Uint8 [rows, sequence]; None where no row is of conversations."""


def lay_out(
    rows: Sequence[tuple[IndexedDataset, Sequence[Piece]]],
    *,
    sequence_length: int,
    vocab_size: int,
    isolate: bool,
    mask: bool,
    loss_lane: LossLane = "sft",
) -> Layout:
    """Read the pieces of each row and lay out inputs, labels, positions and segments.

    A row is up to `sequence_length + 1` tokens; what is missing is padding. A position has a target when the next token
    belongs to the row, is trained on (a conversation's by `loss_lane`, other documents' by their spans with `mask`), and, with
    `isolate`, belongs to the same document.

    Segments: with `isolate` one for each piece, else one for all documents; padding is always its own.

    Raises:
        UserError: a token is not in the vocabulary; names its document.
    """
    count = len(rows)
    tokens = np.full((count, sequence_length + 1), PADDING_TOKEN, dtype=np.int64)
    # untrained[r, p]: token p of row r is no target. The first token of a row is none in any case.
    untrained = np.zeros((count, sequence_length + 1), dtype=bool)
    segments = []
    kinds = None
    if any(has_kinds(dataset) for dataset, _ in rows):
        kinds = np.full((count, sequence_length + 1), NO_KIND, dtype=np.uint8)
    for number, (dataset, pieces) in enumerate(rows):
        starts = []
        at = 0
        for document, begin, end in pieces:
            after = at + end - begin
            tokens[number, at:after] = dataset.document(document, begin, end)
            # A document of a dataset without a mask is trained on whole (use_loss_masking_spans: auto).
            masked = not_targets(dataset, document, begin, end, spans=mask, lane=loss_lane)
            if masked is not None:
                untrained[number, at:after] = masked
            if kinds is not None and (lane := dataset.lane(KIND_LANE, document, begin, end)) is not None:
                kinds[number, at:after] = lane
            if begin:  # The row with what stands before it has had it as a target.
                untrained[number, at] = True
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
    of_targets = None if kinds is None else np.ascontiguousarray(kinds[:, 1:])
    return Layout(inputs, labels, positions, cu_seqlens, of_targets)


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
