"""torch.compile where it pays: the stretches of a block between two attentions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from modelyard.model.decoder import Decoder


def compile_blocks(model: Decoder, *, backend: Any = "inductor") -> None:
    """Compile what each block does before and after its attention, for training; all blocks share the code.

    Fuses norms, rotations, activations and residual sums with each other. What the backward keeps stays the same, unless
    `recompute_blocks` was there before. Whatever runs without gradients (evaluation, generation: other shapes at every call)
    stays eager, as does attention. The results agree with the eager ones to rounding, not to the bit. `backend` is
    torch.compile's.
    """
    for block in model.layers.values():
        for stretch in ("before_attention", "after_attention"):
            setattr(block, stretch, _in_training(getattr(block, stretch), backend))


def _in_training(eager: Callable[..., Any], backend: Any) -> Callable[..., Any]:
    compiled = torch.compile(eager, fullgraph=True, dynamic=False, backend=backend)

    def call(*arguments: Any) -> Any:
        return compiled(*arguments) if torch.is_grad_enabled() else eager(*arguments)

    return call
