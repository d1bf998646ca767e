"""Cross-entropy of the output layer, straight from hidden states, as a sum over the trained tokens.

For a token with scaled logits s and label y: logsumexp(s) - s[y] + z_loss * logsumexp(s)^2.

`torch` is the formula as written, with all logits in fp32. `fused` takes chunks of tokens and makes each chunk's
gradients while its logits are there, so that [tokens, vocabulary] never exists; its backward only scales.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100
Implementation = Literal["auto", "fused", "torch"]

# Logits alive at once. Larger chunks write the weight's gradient less often, smaller ones stay in the cache.
_CHUNK_ELEMENTS = 1 << 24


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    implementation: Implementation = "auto",
    z_loss: float = 0.0,
    logits_scale: float = 1.0,
) -> Tensor:
    """The loss summed over tokens whose label is not -100: a scalar in fp32 (fp64 for fp64 inputs).

    hidden [tokens, hidden], weight [vocabulary, hidden], labels int64 [tokens]. Gradients with respect to hidden and
    weight have their dtypes; that of the weight is summed in fp32 or wider first. `auto` is `fused`: it is the faster
    one on every size measured, and the smaller.
    """
    if implementation == "torch":
        losses = token_losses(hidden, weight, labels, z_loss=z_loss, logits_scale=logits_scale)
        return losses.sum()
    if implementation not in ("auto", "fused"):
        raise ValueError(f"unknown cross-entropy implementation {implementation!r}")
    return _Fused.apply(hidden, weight, labels, z_loss, logits_scale, torch.is_grad_enabled())
