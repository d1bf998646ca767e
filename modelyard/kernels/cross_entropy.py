"""A block of logits turned into its gradient, in place: softmax, loss and gradient of each token in one launch.

A program has a token. It goes through its logits once for their maximum and the sum of exponentials (kept together, as in
arXiv 1805.02867), then back from the end: what was read last is then still in the cache. Bytes for each logit of b bytes:
2 b where all of the second reading is found in the cache, which is the fewest possible (read once, written once), 3 b where
none is. The formula written in torch has 56 bytes a logit of bf16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 8192, 32
"""Of a program: 16 bytes of bf16 for each of as many threads as a program may have. So few programs are at work at once that
their rows fit in the cache; that enough is on its way nonetheless, the next blocks are fetched ahead (`num_stages`)."""


@triton.jit
def gradient_kernel(
    logits,
    targets,
    losses,
    words,
    row_stride,
    logits_scale,
    gradient_scale,
    z_loss,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    own = logits + row * row_stride
    target = tl.load(targets + row)
    label = tl.load(own + target).to(tl.float32) * logits_scale
    at = tl.arange(0, BLOCK)
    # Each lane has a maximum and a sum of its own, which spares the programs' threads from waiting for each other at every
    # block; one exponential a logit, of the difference to whichever of the two is larger. Finite, lest two of them differ
    # by a NaN: what a lane without logits sums counts nothing beside the real maximum.
    highest = tl.full([BLOCK], -1e38, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    blocks = tl.cdiv(words, BLOCK)
    for block in tl.range(0, blocks, num_stages=3):
        place = block * BLOCK + at
        value = tl.load(own + place, mask=place < words, other=0.0, eviction_policy="evict_last")
        value = tl.where(place < words, value.to(tl.float32) * logits_scale, -1e38)
        smaller = tl.exp(-tl.abs(value - highest))
        total = tl.where(value > highest, total * smaller + 1.0, total + smaller)
        highest = tl.maximum(highest, value)
    peak = tl.max(highest, 0)
    logsum = peak + tl.log(tl.sum(total * tl.exp(highest - peak), 0))
    tl.store(losses + row, logsum - label + z_loss * logsum * logsum)
    coefficient = gradient_scale * (1.0 + 2.0 * z_loss * logsum)
    for back in tl.range(0, blocks, num_stages=3):
        place = (blocks - 1 - back) * BLOCK + at
        value = tl.load(own + place, mask=place < words, other=0.0, eviction_policy="evict_first")
        gradient = tl.exp(value.to(tl.float32) * logits_scale - logsum) * coefficient
        gradient = tl.where(place == target, gradient - gradient_scale, gradient)
        tl.store(own + place, gradient, mask=place < words)


def softmax_gradient_(
    logits: Tensor,
    targets: Tensor,
    *,
    logits_scale: float,
    gradient_scale: float,
    z_loss: float,
) -> Tensor:
    """Turn logits [rows, vocabulary] into the gradient of `gradient_scale` times the loss by the scaled logits, in place.

    targets int64 [rows], each a word of this vocabulary. Returns each row's loss, fp32 [rows].
    """
    rows, words = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if not logits.numel():
        return losses
    block = min(BLOCK, triton.next_power_of_2(words))
    gradient_kernel[(rows,)](
        logits,
        targets,
        losses,
        words,
        logits.stride(0),
        logits_scale,
        gradient_scale,
        z_loss,
        BLOCK=block,
        num_warps=min(max(block // (BLOCK // WARPS), 4), WARPS),
    )
    return losses
