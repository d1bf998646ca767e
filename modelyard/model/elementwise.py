"""The parts of a block between its matrix products: normalisation, rotation, gated activation.

Each is an autograd function with a hand-written backward beside the plain formula that it must equal. On a CPU these
operations are bound by memory: writing into one output and keeping only the inputs for the backward takes a third to
a sixth of the time of the same formula left to autograd, and less memory. Where `modelyard.kernels.available` says so, a
kernel in Triton takes the place of both.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from modelyard import kernels
from modelyard.dtypes import wide

# --- RMSNorm ----------------------------------------------------------------------------------------------------


def rms_norm_plain(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Root-mean-square normalisation of the last dimension (arXiv 1910.07467), in fp32 or wider."""
    x_wide = x.to(wide(x.dtype))
    inverse = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + epsilon)
    return (x_wide * inverse).to(x.dtype) * weight


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        x_wide = x.to(wide(x.dtype))
        inverse = x_wide.square().mean(-1, keepdim=True).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x_wide * inverse).to(x.dtype).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        x_wide, gradient, weight_wide = (t.to(inverse.dtype) for t in (x, gradients[0], weight))
        product = gradient * x_wide
        # Both reductions read the one product: over features for x, over tokens for the weight.
        along = torch.mv(product.flatten(0, -2), weight_wide).view_as(inverse)
        weight_gradient = None
        if ctx.needs_input_grad[1]:  # not where the weight is frozen
            weight_gradient = torch.mv(product.flatten(0, -2).t(), inverse.flatten()).to(weight.dtype)
        scale = inverse.pow(3).mul_(along).div_(x.shape[-1])
        x_gradient = torch.mul(gradient, weight_wide, out=product).mul_(inverse)
        x_gradient.addcmul_(x_wide, scale, value=-1)
        return x_gradient.to(x.dtype), weight_gradient, None


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`rms_norm_plain` with a backward of fewer passes. x [..., hidden], weight [hidden] -> [..., hidden].

    The result has the wider dtype of the two, of a kernel the weight's.
    """
    if kernels.available(x, weight):
        from modelyard.kernels.rms_norm import rms_norm as fast

        return fast(x, weight, epsilon)
    if torch.compiler.is_compiling():
        return rms_norm_plain(x, weight, epsilon)
    return _RMSNorm.apply(x, weight, epsilon)


def rms_norm_of_sum(x: Tensor, added: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x + added and its `rms_norm`, in one pass where there is a kernel for it. x and `added` [..., hidden], weight [hidden]."""
    if kernels.available(x, added, weight):
        from modelyard.kernels.rms_norm import rms_norm_of_sum as fast

        return fast(x, added, weight, epsilon)
    total = x + added
    return total, rms_norm(total, weight, epsilon)


# --- rotary -----------------------------------------------------------------------------------------------------


def rotate_plain(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pair (i, i + head_size / 2) of each head by its angle (Hugging Face's half-split convention)."""
    first, second = x.to(cos.dtype).chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def _rotate_into(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    out = torch.empty_like(x)
    out_first, out_second = out.chunk(2, -1)
    torch.mul(first, cos, out=out_first).sub_(second * sin)
    torch.mul(second, cos, out=out_second).add_(first * sin)
    return out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate_into(x.to(cos.dtype), cos, sin).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors  # a rotation's transpose is the rotation back
        return _rotate_into(gradients[0].to(cos.dtype), cos, -sin).to(gradients[0].dtype), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate_plain` without copies. x [tokens, heads, head_size], cos and sin [tokens, 1, head_size / 2].

    Computed in the dtype of `cos`; the result has that of x.
    """
    if torch.compiler.is_compiling():
        return rotate_plain(x, cos, sin)
    return _Rotate.apply(x, cos, sin)


def rotate_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`rotate` of queries [tokens, heads, head_size] and keys [tokens, groups, head_size]."""
    if kernels.available(q, k) and cos.dtype == torch.float32:
        from modelyard.kernels.rotary import rotate as fast

        return fast(q, k, cos, sin)
    return rotate(q, cos, sin), rotate(k, cos, sin)


# --- SwiGLU -----------------------------------------------------------------------------------------------------


def swiglu_plain(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202)."""
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)  # silu(gate) is cheaper to compute again than to keep
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        up_gradient = F.silu(gate).mul_(gradients[0])
        gate_gradient = torch.ops.aten.silu_backward(gradients[0] * up, gate)
        return gate_gradient, up_gradient


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu_plain` that keeps only its inputs. gate and up [..., ffn_hidden] -> [..., ffn_hidden]."""
    if kernels.available(gate, up):
        from modelyard.kernels.swiglu import swiglu as fast

        return fast(gate, up)
    if torch.compiler.is_compiling():
        return swiglu_plain(gate, up)
    return _SwiGLU.apply(gate, up)
