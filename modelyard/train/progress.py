"""How far a run is."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Progress:
    """How far the run is; everything that a checkpoint holds beside tensors and configuration."""

    iteration: int = 0
    tokens: int = 0
    """Positions consumed, padding included."""
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    failed_saves: int = 0
    """Checkpoints that could not be written, since the beginning."""
    rollbacks: int = 0
    """How often the run went back because of a spike."""
    left_out: list[int] = field(default_factory=list)
    """Numbers of the batches, from 0, that are left out because of that."""
    loss_sum: float = 0.0
    """Of the steps since the last training record that were not skipped; with `loss_count` the record's `loss_mean`."""
    loss_count: int = 0
    loss_scale: float | None = None
    """In fp16: the factor on the gradients, once it has changed (`modelyard.train.scaler`)."""
    steps_at_scale: int = 0
    """Steps since it changed, or since a gradient overflowed."""
    overflows: int = 0
    """Gradients that overflowed since it was raised."""


@dataclass
class Save:
    """A checkpoint on its way."""

    iteration: int
    seconds: float = 0.0
    """From the beginning until it was durable."""
    waited: float = 0.0
    """Of these training stood still."""
    bytes: int = 0
    left: str = ""
    """Why older ones could not be removed."""
