"""The two dtypes of a computation: the one that it runs in and the one that its sensitive parts need."""

from __future__ import annotations

import torch


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to normalise, rotate, take a softmax or a loss in: fp32, or fp64 where the model is fp64."""
    return torch.promote_types(dtype, torch.float32)
