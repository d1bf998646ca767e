"""`batch`: how many tokens make one optimizer step, and how documents lie in them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from modelyard.config.base import Section
from modelyard.config.layout import multiples


class BatchConfig(Section):
    """The batch of one optimizer step. Its size is global and explicit; it never depends on the number of processes."""

    sequence_length: int = Field(default=2048, gt=0)
    """Length of one row, in tokens."""
    batch_size: int = Field(gt=0)
    """Rows in one optimizer step, over all micro-batches and processes, in sequences."""
    micro_batch_size: int | None = Field(default=None, gt=0)
    """Rows in one forward and backward pass of each data-parallel process, in sequences; it changes memory and speed, not the
    result. Default: what sequential_micro_batches says, else all rows that a process has."""
    sequential_micro_batches: int | None = Field(default=None, gt=0)
    """Micro-batches of each process in one optimizer step, as another way to say micro_batch_size; null: as many as it takes."""
    cross_document_attention: bool = True
    """Whether tokens see the other documents of their row; `no` isolates attention, positions and labels."""
    truncate_documents: bool = True
    """Whether documents are cut where a row ends; `no` packs whole documents and pads. Conversations are always packed whole."""
    overlong: Literal["auto", "error", "drop", "split"] = "auto"
    """What becomes of a document that is packed whole and longer than a row (sequence_length + 1 tokens): `error` stops at the
    start and lists the longest, `drop` leaves it out and counts it, `split` spreads it over several rows, every token trained on
    once, none seeing an earlier row; auto: `error` for conversations, else `drop`."""
    use_loss_masking_spans: bool | Literal["auto"] = False
    """Whether the spans stored by `prepare` (dataset.loss_masking_spans) are left out of the loss; `yes` needs them in every
    dataset, `auto` takes them where there are some."""

    loss_lane: Literal["sft", "last_answer", "all"] = "sft"
    """Of conversations, which tokens are trained on: `sft` the assistant's content, tool calls and terminators; `last_answer` of
    these the last message alone; `all` every token."""

    def micro_rows(self, data: int = 1) -> int:
        """Rows in one forward and backward pass of each of `data` data-parallel processes, in sequences."""
        return self.micro_batch_size or self.batch_size // (data * (self.sequential_micro_batches or 1))

    def micro_batches(self, data: int = 1) -> int:
        """Forward and backward passes of each of `data` data-parallel processes in one optimizer step."""
        return self.batch_size // (data * self.micro_rows(data))

    @property
    def tokens(self) -> int:
        """Tokens in one optimizer step, padding included."""
        return self.batch_size * self.sequence_length

    @model_validator(mode="after")
    def _divides(self) -> BatchConfig:
        """What no number of processes makes right; `modelyard.config.layout` has the rest."""
        rows, passes = self.micro_batch_size, self.sequential_micro_batches
        if self.batch_size % (passes or 1):
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of sequential_micro_batches {passes}; "
                f"nearest that are: {multiples(self.batch_size, passes or 1)}"
            )
        if self.batch_size % (rows or 1):
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {rows}; "
                f"nearest that are: {multiples(self.batch_size, rows or 1)}"
            )
        if rows and passes and self.batch_size % (rows * passes):
            raise ValueError(
                f"sequential_micro_batches {passes} does not fit: batch_size {self.batch_size} / micro_batch_size {rows} "
                f"makes {self.batch_size // rows}"
            )
        return self
