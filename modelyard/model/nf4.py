"""NF4: a matrix in four bits a value (QLoRA, arXiv 2305.14314), for weights that are not trained.

Values that lie side by side in a row form a block, and a block has one scale: the largest magnitude in it. Each value is
kept as the nearest of 16 fixed numbers times the scale. `dequantize` gives that product, rounded once to the scale's dtype
and once to the result's; bitsandbytes gives the same bits.

Nothing here depends on how a matrix is cut: its rows, quantised by themselves, are the rows of the whole one quantised.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from modelyard.device import on_gpu
from modelyard.dtypes import wide

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The values of the codes 0 to 15, exact in fp32: appendix E of the paper. Quantiles of the normal distribution, scaled to
[-1, 1]: seven below 0, eight above, and 0 itself."""

_LEAST = 1e-38
"""A block whose largest magnitude is below this counts as one of zeros."""


class Quantized(NamedTuple):
    """A matrix [out, in] in blocks of `block` values, as `quantize` makes it."""

    codes: Tensor
    """uint8 [out, in / 2]: of the two codes in a byte the left value's is in the high four bits."""
    scales: Tensor
    """[out, in / block]: fp32 (fp64 for a matrix in fp64), or with `range` uint8."""
    range: Tensor | None = None
    """[out, 2] in fp32 or fp64: a row's `low` and `step`, where its scales are low + step * uint8."""


@torch.no_grad()
def quantize(weight: Tensor, block: int = 64, double: bool = False) -> Quantized:
    """Four bits a value, and a scale for each `block` of values of a row; with `double` eight bits a scale.

    weight [out, in], of any floating dtype. Codes are the same with and without `double`: they are chosen by the exact
    scales. Raises ValueError where rows are not whole blocks, a block not whole bytes, or a value not finite.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"NF4 takes a matrix of real numbers, not {weight.dtype} {list(weight.shape)}")
    if block < 2 or block % 2 or weight.shape[1] % block:
        raise ValueError(f"rows of {weight.shape[1]} values cannot be cut into blocks of {block}")
    dtype = wide(weight.dtype)
    table = torch.tensor(NF4, dtype=dtype, device=weight.device)
    # A value halfway between two goes to the lower one.
    halfway = (table[:-1] + table[1:]) / 2
    out_features, in_features = weight.shape
    codes = torch.empty(out_features, in_features // 2, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(out_features, in_features // block, dtype=dtype, device=weight.device)
    rows = _rows_at_once(weight)
    for begin in range(0, out_features, rows):
        part = slice(begin, begin + rows)
        values = weight[part].to(dtype, copy=True).unflatten(1, (-1, block))
        largest = values.abs().amax(-1, keepdim=True)
        scales[part] = largest[..., 0]
        # A product with the reciprocal and no quotient: bitsandbytes has it so, and some values lie between the two.
        values.mul_(largest.clamp(min=_LEAST).reciprocal_()).clamp_(-1, 1)
        found = torch.bucketize(values.flatten(1), halfway, out_int32=True).to(torch.uint8)
        torch.bitwise_or(found[:, ::2] << 4, found[:, 1::2], out=codes[part])
    if not scales.isfinite().all():
        raise ValueError("a value is not finite: NF4 has no code for it")
    return Quantized(codes, *_narrow_scales(scales)) if double else Quantized(codes, scales)


def _narrow_scales(scales: Tensor) -> tuple[Tensor, Tensor]:
    """The scales of a row in eight bits each, evenly spaced between its lowest and its highest, and those two [out, 2].

    Rows stand for themselves, so that any process can have some of them. A row of one scale gets it back as it was.
    """
    low, high = scales.aminmax(dim=1)
    step = (high - low) / 255
    # Eight bits of the mantissa are spare for the product with a uint8: it is exact, and no compiler that fuses it with the
    # sum can change the result. Rounded up, so that 255 steps still reach the highest.
    whole = torch.int64 if step.dtype == torch.float64 else torch.int32
    step = ((step.view(whole) + 0xFF) & ~0xFF).view(step.dtype)
    numbers = ((scales - low[:, None]) / step.clamp(min=_LEAST)[:, None]).round_().clamp_(0, 255)
    return numbers.to(torch.uint8), torch.stack([low, step], 1)


def wide_scales(quantized: Quantized) -> Tensor:
    """The scales [out, in / block] as numbers, in fp32 (fp64 where the matrix was fp64)."""
    if quantized.range is None:
        return quantized.scales
    low, step = quantized.range[:, :1], quantized.range[:, 1:]
    return quantized.scales.to(step.dtype).mul(step).add(low)


@torch.no_grad()
def dequantize(quantized: Quantized, dtype: torch.dtype) -> Tensor:
    """The matrix [out, in] that the codes stand for.

    On a CPU a few rows at a time, while what is looked up for them is in the cache; a GPU takes as many as fill it. So
    nothing much larger than the result is ever alive.
    """
    codes, scales = quantized.codes, wide_scales(quantized)
    if torch.compiler.is_compiling():
        # Written so that one kernel does it all: two looked up from a byte at once would be a tensor of their own.
        table = torch.tensor(NF4, dtype=scales.dtype, device=codes.device)
        pairs = torch.stack([table[(codes >> 4).int()], table[(codes & 15).int()]], -1)
        values = pairs.flatten(1).unflatten(1, (scales.shape[1], -1)) * scales[..., None]
        return values.flatten(1).to(dtype)
    result = torch.empty(codes.shape[0], codes.shape[1] * 2, dtype=dtype, device=codes.device)
    table, rows = _pairs(scales.dtype, codes.device), _rows_at_once(result)
    for part, part_codes, part_scales in zip(
        result.split(rows), codes.split(rows), scales.split(rows), strict=True
    ):
        pairs = torch.view_as_real(table.index_select(0, part_codes.flatten().int()))
        part = part.unflatten(1, (scales.shape[1], -1))
        part.copy_(pairs.view(part.shape).mul_(part_scales[..., None]))
    return result


def frozen_product(x: Tensor, quantized: Quantized) -> Tensor:
    """x @ W^T for the matrix W that `quantized` stands for, in x's dtype. x [..., in] -> [..., out].

    Only x has a gradient. The matrix is made again for the backward and not kept until then.
    """
    return _FrozenProduct.apply(x, *quantized)


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, range: Tensor | None) -> Tensor:
        ctx.save_for_backward(codes, scales, range)
        return F.linear(x, dequantize(Quantized(codes, scales, range), x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        return gradients[0] @ dequantize(Quantized(*ctx.saved_tensors), gradients[0].dtype), None, None, None


def _rows_at_once(matrix: Tensor) -> int:
    """Rows to work on at once: about 1 MiB of fp32 on a CPU (a quarter of the time of all at once), 64 MiB on a GPU."""
    return max(1, (1 << 24 if on_gpu(matrix) else 1 << 18) // max(matrix.shape[1], 1))


@lru_cache
def _pairs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The two values that each byte of codes stands for [256], as one complex number, which is looked up in one go."""
    table = torch.tensor(NF4, dtype=dtype, device=device)
    return torch.complex(table.repeat_interleave(16), table.repeat(16))
