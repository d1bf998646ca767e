"""`batch`: how many tokens make one optimizer step, and how documents lie in them."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from modelyard.config.base import Section


class BatchConfig(Section):
    """The batch of one optimizer step. Its size is global and explicit; it never depends on the number of processes."""

    sequence_length: int = Field(default=2048, gt=0)
    """Length of one row, in tokens."""
    batch_size: int = Field(gt=0)
    """Rows in one optimizer step, over all micro-batches and processes, in sequences."""
    micro_batch_size: int = Field(gt=0)
    """Rows in one forward and backward pass, in sequences; it changes memory and speed, not the result. Default: the whole batch."""
    cross_document_attention: bool = True
    """Whether tokens see the other documents of their row; `no` isolates attention, positions and labels."""
    truncate_documents: bool = True
    """Whether documents are cut where a row ends; `no` packs whole documents and pads."""
    use_loss_masking_spans: bool = False
    """Whether the spans stored by `prepare` (dataset.loss_masking_spans) are left out of the loss."""

    @model_validator(mode="before")
    @classmethod
    def _whole_batch_at_once(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("micro_batch_size") is None:
            return {**values, "micro_batch_size": values.get("batch_size", 1)}
        return values

    @property
    def micro_batches(self) -> int:
        """Forward and backward passes in one optimizer step."""
        return self.batch_size // self.micro_batch_size

    @property
    def tokens(self) -> int:
        """Tokens in one optimizer step, padding included."""
        return self.batch_size * self.sequence_length

    @model_validator(mode="after")
    def _divides(self) -> BatchConfig:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}; "
                f"nearest that are: {_nearest_multiples(self.batch_size, self.micro_batch_size)}"
            )
        return self


def _nearest_multiples(size: int, divisor: int) -> str:
    below = size // divisor * divisor
    return f"{below} and {below + divisor}" if below else str(divisor)
