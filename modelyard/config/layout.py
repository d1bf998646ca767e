"""How the processes of a run share its work; no torch here, so that a layout is judged when the config is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Schedule = Literal["gpipe", "1f1b", "interleaved", "zero_bubble", "zbv"]
Recompute = Literal["none", "selective", "full"]

DIMENSIONS = ("replicate", "shard", "pipeline", "context", "tensor")
"""Outermost first: neighbours in rank share what needs the most communication (the order of arXiv 2407.21783, 3.3.2)."""


@dataclass(frozen=True)
class Layout:
    """Processes along each dimension, and how the data-parallel ones share the model."""

    replicate: int = 1
    """Groups of data-parallel processes, each with a whole copy of the model."""
    shard: int = 1
    """Data-parallel processes that share one copy."""
    pipeline: int = 1
    """Processes that the layers are spread over."""
    context: int = 1
    """Processes that a row's tokens are spread over."""
    tensor: int = 1
    """Processes that each matrix is spread over."""
    sequence_parallel: bool = False
    """Whether tensor-parallel processes share the tokens between their matrices, too."""
    zero_stage: Literal[1, 2, 3] = 1
    """What the processes that share a copy keep only their part of: optimizer state and master weights (1), gradients
    between micro-batches too (2), weights between forward and backward too (3)."""
    offload: bool = False
    """Whether master weights, gradients and optimizer state live in the host's memory."""
    schedule: Schedule = "1f1b"
    stages_per_process: int = 1
    """Pipeline stages that each process has."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Processes along each of `DIMENSIONS`."""
        return tuple(getattr(self, name) for name in DIMENSIONS)

    @property
    def world(self) -> int:
        """Processes in all."""
        return self.replicate * self.shard * self.pipeline * self.context * self.tensor

    @property
    def data(self) -> int:
        """Shares that the rows of a batch are dealt into."""
        return self.replicate * self.shard

    @property
    def stages(self) -> int:
        """Pipeline stages in all."""
        return self.pipeline * self.stages_per_process
