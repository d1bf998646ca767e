"""silu(gate) * up, whose backward makes silu(gate) again: gate and up are all that is kept.

Bytes for each value of gate, in b bytes each: 3 b forward (gate, up, output) and 5 b backward (gate, up and the gradient;
two gradients), the fewest possible. Nothing is rounded between silu and the product, where torch rounds.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from modelyard.kernels import operator

BLOCK = 2048
"""Columns of a program: for each of its 128 threads two loads of 16 bytes of bf16."""


@triton.jit
def forward_kernel(gate, up, out, gate_row, up_row, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    g = tl.load(gate + row * gate_row + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_row + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * columns + at, g / (1.0 + tl.exp(-g)) * u, mask=inside)


@triton.jit
def backward_kernel(
    gate, up, gradient, gate_gradient, up_gradient, gate_row, up_row, columns, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    g = tl.load(gate + row * gate_row + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_row + at, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(gradient + row * columns + at, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-g))
    silu = g * sigmoid
    tl.store(up_gradient + row * columns + at, d * silu, mask=inside)
    slope = sigmoid + silu * (1.0 - sigmoid)
    tl.store(gate_gradient + row * columns + at, d * u * slope, mask=inside)


def _rows(x: Tensor) -> Tensor:
    """[..., columns] as rows that are each without gaps; only copied where they are not."""
    x = x.flatten(0, -2) if x.dim() > 1 else x[None]
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@operator(lambda gate, up: torch.empty_like(gate, memory_format=torch.contiguous_format))
def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """[..., columns] each -> silu(gate) * up."""
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    g, u = _rows(gate), _rows(up)
    rows, columns = g.shape
    if out.numel():
        grid = (rows, triton.cdiv(columns, BLOCK))
        forward_kernel[grid](g, u, out, g.stride(0), u.stride(0), columns, BLOCK=BLOCK, num_warps=4)
    return out


@operator(
    lambda gate, up, gradient: (
        torch.empty_like(gate, memory_format=torch.contiguous_format),
        torch.empty_like(up, memory_format=torch.contiguous_format),
    )
)
def swiglu_backward(gate: Tensor, up: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up from that of the output."""
    gate_gradient = torch.empty_like(gate, memory_format=torch.contiguous_format)
    up_gradient = torch.empty_like(up, memory_format=torch.contiguous_format)
    g, u, gradient = _rows(gate), _rows(up), gradient.contiguous()
    rows, columns = g.shape
    if gradient.numel():
        backward_kernel[(rows, triton.cdiv(columns, BLOCK))](
            g,
            u,
            gradient,
            gate_gradient,
            up_gradient,
            g.stride(0),
            u.stride(0),
            columns,
            BLOCK=BLOCK,
            num_warps=4,
        )
    return gate_gradient, up_gradient


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return swiglu_forward(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return swiglu_backward(gate, up, gradients[0])


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate and up [..., columns] of one dtype -> silu(gate) * up, in that dtype."""
    out: Tensor = _SwiGLU.apply(gate, up)
    return out
