"""Batches as the model takes them, made from pieces of documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from modelyard.chat.segments import LossLane
from modelyard.data.layout import IGNORED, lay_out

if TYPE_CHECKING:  # The train step imports this module where there is no pydantic.
    from modelyard.data.datasets import IndexedDataset
    from modelyard.data.rows import Piece


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
    kinds: Tensor | None = None
    """Uint8 [rows, sequence]: what each position's next token is in its conversation (`modelyard.chat.segments.lane_value`); None
    where no row is of conversations."""
    numbers: Tensor | None = None
    """Int64 [rows, sequence]: which tokens of the run these are, to a dropout (`modelyard.model.dropout`); None: none."""

    @classmethod
    def empty(cls, rows: int, sequence_length: int) -> Batch:
        """Rows that hold nothing, and have no target."""
        nothing = torch.zeros(rows, sequence_length, dtype=torch.int64)
        return cls(
            nothing,
            torch.full_like(nothing, IGNORED),
            torch.arange(sequence_length).repeat(rows, 1),
            torch.tensor([[0, sequence_length]] * rows, dtype=torch.int32),
        )

    def rows(self, begin: int, end: int) -> Batch:
        """Some of the rows, as `DataStream.rows` would make them alone."""
        cu_seqlens = self.cu_seqlens[begin:end]
        width = int((cu_seqlens < cu_seqlens[:, -1:]).sum(dim=1).max()) + 1
        return Batch(
            self.input_ids[begin:end],
            self.labels[begin:end],
            self.positions[begin:end],
            cu_seqlens[:, :width],
            None if self.kinds is None else self.kinds[begin:end],
            None if self.numbers is None else self.numbers[begin:end],
        )

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device; `cu_seqlens` stays on the host, where its numbers are needed."""
        return Batch(
            self.input_ids.to(device),
            self.labels.to(device),
            self.positions.to(device),
            self.cu_seqlens,
            None if self.kinds is None else self.kinds.to(device),
            None if self.numbers is None else self.numbers.to(device),
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
    loss_lane: LossLane = "sft",
) -> Batch:
    """The batch of these rows: see `modelyard.data.layout.lay_out`. Raises UserError for a token outside the vocabulary."""
    arrays = lay_out(
        rows,
        sequence_length=sequence_length,
        vocab_size=vocab_size,
        isolate=isolate,
        mask=mask,
        loss_lane=loss_lane,
    )
    return Batch(*(None if array is None else torch.from_numpy(array) for array in arrays))  # type: ignore[arg-type]
