"""RMSNorm, alone or of a sum: the residual stream takes what a matrix gave, and its norm goes on to the next one.

Bytes for each value of the stream, in b bytes each, of a sum: 4 b forward (stream and what is added read, sum and norm
written) and 4 b backward (the gradients of both, and the sum, read; the one gradient that both inputs have, written). Of a
norm alone 2 b and 3 b. One fp32 number a token and the weight's partial sums come on top. The fewest possible.

The weight's gradient is a sum over tokens. Each of `PROGRAMS` programs sums a stretch of them, and those sums are added up
in their order: the same bits on any device.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from modelyard.kernels import operator, warps

PROGRAMS = 264
"""Of the backward: two for each of an H200's 132 multiprocessors. The same on every device, as sums depend on it."""


@triton.jit
def forward_kernel(
    x,
    added,
    weight,
    total,
    out,
    inverse,
    epsilon,
    SIZE: tl.constexpr,
    IS_SUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < SIZE
    value = tl.load(x + row * SIZE + at, mask=inside, other=0.0)
    if IS_SUM:
        summand = tl.load(added + row * SIZE + at, mask=inside, other=0.0).to(tl.float32)
        # Rounded as it is kept: whoever makes the norm again from the sum gets the same bits.
        value = (value.to(tl.float32) + summand).to(total.dtype.element_ty)
        tl.store(total + row * SIZE + at, value, mask=inside)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / SIZE + epsilon)
    tl.store(inverse + row, scale)
    # The twin's roundings: to the stream's dtype before the weight.
    normal = (wide * scale).to(value.dtype).to(tl.float32)
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * SIZE + at, normal * w, mask=inside)


@triton.jit
def backward_kernel(
    x,
    weight,
    inverse,
    gradient,
    sum_gradient,
    x_gradient,
    partial,
    rows,
    stretch,
    SIZE: tl.constexpr,
    IS_SUM: tl.constexpr,
    OF_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    inside = at < SIZE
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    own = tl.zeros([BLOCK], tl.float32)
    first = program * stretch
    # The next token is fetched while this one is summed over: few programs are at work at once.
    for row in tl.range(first, tl.minimum(first + stretch, rows), num_stages=2):
        begin = tl.cast(row, tl.int64) * SIZE
        value = tl.load(x + begin + at, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(gradient + begin + at, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(inverse + row)
        product = d * value
        along = tl.sum(product * w, 0) * scale * scale * scale / SIZE
        result = d * w * scale - value * along
        if IS_SUM:
            result += tl.load(sum_gradient + begin + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(x_gradient + begin + at, result, mask=inside)
        if OF_WEIGHT:
            own += product * scale
    if OF_WEIGHT:
        tl.store(partial + program * SIZE + at, own, mask=inside)


def _empty_norm(
    x: Tensor, added: Tensor | None, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Where the sum, the norm and the inverse go; without a sum an empty tensor in its place."""
    dtype = x.dtype if added is None else torch.promote_types(x.dtype, added.dtype)
    out = torch.empty_like(x, dtype=weight.dtype, memory_format=torch.contiguous_format)
    total = x.new_empty(0) if added is None else torch.empty_like(out, dtype=dtype)
    return total, out, x.new_empty(x.shape[:-1], dtype=torch.float32)


@operator(_empty_norm)
def norm_forward(
    x: Tensor, added: Tensor | None, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(x + added in the wider dtype of both, its norm in the weight's dtype, one over the root mean square in fp32)."""
    total, out, inverse = _empty_norm(x, added, weight, epsilon)
    size = x.shape[-1]
    x, weight = x.contiguous(), weight.contiguous()
    if rows := inverse.numel():
        block = triton.next_power_of_2(size)
        forward_kernel[(rows,)](
            x,
            x if added is None else added.contiguous(),
            weight,
            total,
            out,
            inverse,
            epsilon,
            SIZE=size,
            IS_SUM=added is not None,
            BLOCK=block,
            num_warps=warps(block),
        )
    return total, out, inverse


def _empty_gradients(
    x: Tensor,
    weight: Tensor,
    inverse: Tensor,
    gradient: Tensor,
    sum_gradient: Tensor | None,
    of_weight: bool,
) -> tuple[Tensor, Tensor]:
    x_gradient = torch.empty_like(x, memory_format=torch.contiguous_format)
    return x_gradient, torch.empty_like(weight) if of_weight else weight.new_empty(0)


@operator(_empty_gradients)
def norm_backward(
    x: Tensor,
    weight: Tensor,
    inverse: Tensor,
    gradient: Tensor,
    sum_gradient: Tensor | None,
    of_weight: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of what was normalised, x, and of the weight (where not asked for: an empty tensor).

    `gradient` is the norm's; `sum_gradient`, of x itself where it is a sum that others use too, is added.
    """
    x_gradient, weight_gradient = _empty_gradients(x, weight, inverse, gradient, sum_gradient, of_weight)
    rows, size = inverse.numel(), x.shape[-1]
    if not rows:
        return x_gradient, weight_gradient.zero_()
    x, weight, gradient = x.contiguous(), weight.contiguous(), gradient.contiguous()
    stretch = triton.cdiv(rows, PROGRAMS)
    programs = triton.cdiv(rows, stretch)
    partial = torch.empty((programs, size) if of_weight else (0,), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(size)
    backward_kernel[(programs,)](
        x,
        weight,
        inverse,
        gradient,
        gradient if sum_gradient is None else sum_gradient.contiguous(),
        x_gradient,
        partial,
        rows,
        stretch,
        SIZE=size,
        IS_SUM=sum_gradient is not None,
        OF_WEIGHT=of_weight,
        BLOCK=block,
        num_warps=warps(block),
    )
    return x_gradient, partial.sum(0).to(weight.dtype) if of_weight else weight_gradient


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        _, out, inverse = norm_forward(x, None, weight, epsilon)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        of_weight = ctx.needs_input_grad[1]
        x_gradient, weight_gradient = norm_backward(x, weight, inverse, gradients[0], None, of_weight)
        return x_gradient, weight_gradient if of_weight else None, None


class _RMSNormOfSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, added: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        total, out, inverse = norm_forward(x, added, weight, epsilon)
        ctx.save_for_backward(total, weight, inverse)
        ctx.dtypes = x.dtype, added.dtype
        return total, out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        total, weight, inverse = ctx.saved_tensors
        of_weight = ctx.needs_input_grad[2]
        both, weight_gradient = norm_backward(total, weight, inverse, gradients[1], gradients[0], of_weight)
        x_dtype, added_dtype = ctx.dtypes
        return both.to(x_dtype), both.to(added_dtype), weight_gradient if of_weight else None, None


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x [..., hidden], weight [hidden] -> the norm [..., hidden] in the weight's dtype."""
    out: Tensor = _RMSNorm.apply(x, weight, epsilon)
    return out


def rms_norm_of_sum(x: Tensor, added: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x and `added` [..., hidden] -> (their sum in the wider of their dtypes, its norm in the weight's dtype)."""
    both: tuple[Tensor, Tensor] = _RMSNormOfSum.apply(x, added, weight, epsilon)
    return both
