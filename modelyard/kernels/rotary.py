"""Queries and keys of all heads turned by their positions' angles, in one launch.

Bytes for each token: 2 b (q + k) values of b bytes (each read and written once) and 4 head_size of angles (cos and sin in
fp32, read once for all heads), forward and backward alike: the fewest possible.

The result is a new tensor. Writing into the inputs would move as many bytes, and the inputs, which nobody keeps, are freed
as soon as this returns.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from modelyard.kernels import operator, warps


@triton.jit
def rotate_kernel(
    q,
    k,
    q_out,
    k_out,
    cos,
    sin,
    q_row,
    k_row,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BACK: tl.constexpr,
    Q_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, HALF_BLOCK)[None, :]
    c = tl.load(cos + token * HALF + pair, mask=pair < HALF, other=0.0)
    s = tl.load(sin + token * HALF + pair, mask=pair < HALF, other=0.0)
    if BACK:  # a rotation's transpose is the rotation back
        s = -s

    head = tl.arange(0, Q_BLOCK)[:, None]
    inside = (head < Q_HEADS) & (pair < HALF)
    at = head * (2 * HALF) + pair
    first = tl.load(q + token * q_row + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(q + token * q_row + at + HALF, mask=inside, other=0.0).to(tl.float32)
    out = q_out + token * (Q_HEADS * 2 * HALF) + at
    tl.store(out, first * c - second * s, mask=inside)
    tl.store(out + HALF, second * c + first * s, mask=inside)

    head = tl.arange(0, K_BLOCK)[:, None]
    inside = (head < K_HEADS) & (pair < HALF)
    at = head * (2 * HALF) + pair
    first = tl.load(k + token * k_row + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(k + token * k_row + at + HALF, mask=inside, other=0.0).to(tl.float32)
    out = k_out + token * (K_HEADS * 2 * HALF) + at
    tl.store(out, first * c - second * s, mask=inside)
    tl.store(out + HALF, second * c + first * s, mask=inside)


def _heads(x: Tensor) -> Tensor:
    """[tokens, heads, head_size] with nothing between the heads of a token; only copied where there is."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


@operator(
    lambda q, k, cos, sin, back: (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        torch.empty_like(k, memory_format=torch.contiguous_format),
    )
)
def rotate_heads(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    """Both, turned by the angles, or `back` by them."""
    q_out = torch.empty_like(q, memory_format=torch.contiguous_format)
    k_out = torch.empty_like(k, memory_format=torch.contiguous_format)
    q, k, cos, sin = _heads(q), _heads(k), cos.contiguous(), sin.contiguous()
    tokens, half = q.shape[0], cos.shape[-1]
    blocks = [triton.next_power_of_2(n) for n in (q.shape[1], k.shape[1], half)]
    if tokens:
        rotate_kernel[(tokens,)](
            q,
            k,
            q_out,
            k_out,
            cos,
            sin,
            q.stride(0),
            k.stride(0),
            Q_HEADS=q.shape[1],
            K_HEADS=k.shape[1],
            HALF=half,
            BACK=back,
            Q_BLOCK=blocks[0],
            K_BLOCK=blocks[1],
            HALF_BLOCK=blocks[2],
            num_warps=warps(blocks[0] * blocks[2]),
        )
    return q_out, k_out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return rotate_heads(q, k, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return *rotate_heads(gradients[0], gradients[1], cos, sin, True), None, None


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q [tokens, heads, head_size] and k [tokens, groups, head_size] turned; cos and sin fp32 [tokens, 1, head_size / 2]."""
    both: tuple[Tensor, Tensor] = _Rotate.apply(q, k, cos, sin)
    return both
