"""The matrix products of the blocks in fp8, each with scales of its own that are found when it is computed.

Of a linear layer y = x W^T there are three products: y, x's gradient g W, and W's gradient g^T x. The operands of each are
divided by scales so that the largest magnitude that shares a scale becomes the largest number of the format, rounded to
fp8, multiplied with sums in fp32, and the scales are multiplied back:

    tensorwise    one scale a tensor, amax / 448 (x and W, e4m3) or amax / 57344 (g, e5m2)
    rowwise       one scale for each row of the first and each column of the second operand, amax / 448 rounded up to a power
                  of two, so that dividing by it rounds nothing; e4m3 throughout

These are the recipes `tensorwise` and `rowwise` of torchao (torchao.float8.Float8LinearRecipeName; formats: arXiv 2209.05433).
No scale outlives its product, so that nothing is in checkpoints, and a step depends on no step before. What is kept for the
backward are x and W as they came: recomputation and resharding know them. A number that is not finite makes all NaN that
shares its scale.

Without gradients (evaluation, samples) the products are the usual ones: whoever takes the exported model has those.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelyard.config.adapter import MODULES
from modelyard.model.decoder import Decoder, local
from modelyard.model.torch_private import scaled_mm

Scaling = Literal["tensorwise", "rowwise"]

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SMALLEST = 2.0**-126
"""No scale is smaller: the smallest number of fp32 by which dividing is safe. So zeros stay zeros."""


def obstacle(device: torch.device) -> str | None:
    """What products in fp8 need and this device is not; None where they can be computed, if only by the twin."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and (major, minor) >= (8, 9):
        return None
    return f"a GPU of compute capability 8.9 or more (Ada, Hopper), and this is {torch.cuda.get_device_name(device)}"


def is_emulated(tensor: Tensor) -> bool:
    """Whether products of this tensor are computed by the twin; the one place that decides it.

    torch multiplies fp8 on CPUs too, but without instructions for it, one element after the other: 20 s for
    512 x 256 x 1024, which takes the twin milliseconds.
    """
    return not tensor.is_cuda


# --- fp8 ----------------------------------------------------------------------------------------------------------


def quantize(x: Tensor, dtype: torch.dtype, along: int | None) -> tuple[Tensor, Tensor]:
    """x [rows, columns] -> x / scale in fp8, and the scale in fp32.

    `along` None: one scale []; 0 or 1: one for all numbers along that dimension, which has length 1 in it, a power of two.
    """
    largest = x.abs().amax() if along is None else x.abs().amax(along, keepdim=True)
    # In fp32 no quotient is beyond the largest number of the format by so much that it would not be rounded to it.
    scale = (largest.float() / torch.finfo(dtype).max).clamp_min(SMALLEST)
    if along is not None:
        scale = _power_of_two(scale)
    return (x.float() / scale).to(dtype), scale


def _power_of_two(scale: Tensor) -> Tensor:
    """The next power of two, exactly; what is not finite stays."""
    fraction = (1 << 23) - 1
    up = ((scale.view(torch.int32) + fraction) & ~fraction).view(torch.float32)
    return torch.where(scale.isfinite(), up, scale)


def product(
    a: Tensor,
    b: Tensor,
    scaling: Scaling,
    formats: tuple[torch.dtype, torch.dtype],
    *,
    fast: bool = False,
    emulated: bool | None = None,
) -> Tensor:
    """a [m, k] times b^T, b [n, k], in fp8 -> [m, n] in the dtype of a. Where it is not emulated k and n are multiples of 16.

    `fast`: the GPU may sum more roughly (14 bits of a sum are kept); torchao does so in the forward. `emulated`: by the twin
    or not; None: as `is_emulated` says.
    """
    along = None if scaling == "tensorwise" else 1
    (a8, a_scale), (b8, b_scale) = quantize(a, formats[0], along), quantize(b, formats[1], along)
    if along is not None:
        b_scale = b_scale.t()
    if is_emulated(a) if emulated is None else emulated:
        return ((a8.float() @ b8.float().t()) * a_scale * b_scale).to(a.dtype)
    # Both row by row: what was transposed before is written so by the conversion.
    return scaled_mm(a8.contiguous(), b8.contiguous().t(), a_scale, b_scale.contiguous(), a.dtype, fast=fast)


class _Fp8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scaling: Scaling) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.scaling = scaling
        return product(x, weight, scaling, (E4M3, E4M3), fast=True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient, scaling = gradients[0], ctx.scaling
        formats = (E5M2 if scaling == "tensorwise" else E4M3, E4M3)
        need_x, need_weight, _ = ctx.needs_input_grad
        return (
            product(gradient, weight.t(), scaling, formats) if need_x else None,
            product(gradient.t(), x.t(), scaling, formats) if need_weight else None,
            None,
        )


# --- modules ------------------------------------------------------------------------------------------------------


class Fp8Linear(nn.Linear):
    """A matrix of a block whose products are computed in fp8 where there are gradients."""

    scaling: Scaling

    def forward(self, x: Tensor) -> Tensor:
        """x [tokens, in] -> [tokens, out]; of a part of the rows of the matrix, those."""
        return self.product(x, None if self.bias is None else local(self.bias))

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [tokens, in] times what is here of the matrix, the bias added where one is given."""
        weight = local(self.weight)
        if not torch.is_grad_enabled():
            return F.linear(x, weight, bias)
        y: Tensor = _Fp8Product.apply(x, weight, self.scaling)
        return y if bias is None else y + bias


def use_fp8(model: Decoder, scaling: Scaling) -> None:
    """Turn the linear layers of the blocks, before anything splits them, into `Fp8Linear`."""
    for name, module in model.layers.named_modules():
        if name.rpartition(".")[2] in MODULES:
            assert type(module) is nn.Linear
            # By class, not by instance: to a compiler the modules of all blocks are then the same.
            module.__class__ = Fp8Linear
            module.scaling = scaling  # type: ignore[assignment]
