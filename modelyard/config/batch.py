"""`batch`: how many tokens make one optimizer step, and how documents lie in them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from modelyard.config.base import Section


class BatchConfig(Section):
    """The batch of one optimizer step. Its size is global and explicit; it never depends on the number of processes."""

    # What is left out is filled in before validation, so that a micro-batch always has a size.
    model_config = ConfigDict(json_schema_extra={"required": ["batch_size"]})

    sequence_length: int = Field(default=2048, gt=0)
    """Length of one row, in tokens."""
    batch_size: int = Field(gt=0)
    """Rows in one optimizer step, over all micro-batches and processes, in sequences."""
    micro_batch_size: int = Field(gt=0)
    """Rows in one forward and backward pass, in sequences; it changes memory and speed, not the result. Default: the whole batch."""
    sequential_micro_batches: int | None = Field(default=None, gt=0)
    """Micro-batches in one optimizer step, as another way to say micro_batch_size; null: batch_size / micro_batch_size."""
    cross_document_attention: bool = True
    """Whether tokens see the other documents of their row; `no` isolates attention, positions and labels."""
    truncate_documents: bool = True
    """Whether documents are cut where a row ends; `no` packs whole documents and pads."""
    use_loss_masking_spans: bool | Literal["auto"] = False
    """Whether the spans stored by `prepare` (dataset.loss_masking_spans) are left out of the loss; `yes` needs them in every
    dataset, `auto` takes them where there are some."""

    @model_validator(mode="before")
    @classmethod
    def _whole_batch_at_once(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("micro_batch_size") is not None:
            return values
        batch_size, micro_batches = values.get("batch_size", 1), values.get("sequential_micro_batches") or 1
        if isinstance(batch_size, int) and isinstance(micro_batches, int) and 0 < micro_batches <= batch_size:
            batch_size //= micro_batches
        return {**values, "micro_batch_size": batch_size}

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
        if self.batch_size % (self.sequential_micro_batches or 1):
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of sequential_micro_batches {self.sequential_micro_batches}"
            )
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}; "
                f"nearest that are: {_nearest_multiples(self.batch_size, self.micro_batch_size)}"
            )
        if self.sequential_micro_batches not in (None, self.micro_batches):
            raise ValueError(
                f"sequential_micro_batches {self.sequential_micro_batches} does not fit: batch_size {self.batch_size} / "
                f"micro_batch_size {self.micro_batch_size} makes {self.micro_batches}"
            )
        return self


def _nearest_multiples(size: int, divisor: int) -> str:
    below = size // divisor * divisor
    return f"{below} and {below + divisor}" if below else str(divisor)
