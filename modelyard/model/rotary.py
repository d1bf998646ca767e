"""Rotary position embedding: the angle of each position and frequency.

`llama3` scaling divides the low frequencies by a factor so that a model trained on 8,192 tokens reaches 131,072:
with wavelength w = 2 pi / frequency, w < original / high_frequency_factor is kept, w > original / low_frequency_factor
is divided by the factor, and what lies between is blended linearly in original / w.

`yarn` (arXiv 2309.00071) does the same by the number of turns within the original context: pairs that turn more than
beta_fast times are kept, fewer than beta_slow times divided, and between them the blend is linear in the pair's index.
It also multiplies cos and sin, and so the scores of rotated queries and keys by the square, by an attention factor.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from modelyard.config.architecture import Rotary


def inverse_frequencies(
    rotary: Rotary, head_size: int, *, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Tensor:
    """Radians per position of each pair, [head_size / 2], in `dtype` (fp32 or wider).

    Every operation is in `dtype`, in the order that Hugging Face has it: models were trained with these roundings.
    """
    exponent = torch.arange(0, head_size, 2, dtype=torch.int64, device=device).to(dtype) / head_size
    frequency = 1.0 / (rotary.theta**exponent)
    if rotary.type == "yarn":
        divided = 1.0 / (rotary.scale_factor * rotary.theta**exponent)
        kept = 1 - _ramp(rotary, head_size, dtype=dtype, device=device)
        return divided * (1 - kept) + frequency * kept
    if rotary.type != "llama3":
        return frequency
    original = rotary.original_context_length
    low, high = rotary.low_frequency_factor, rotary.high_frequency_factor
    wavelength = 2 * math.pi / frequency
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * frequency / rotary.scale_factor + smooth * frequency
    scaled = torch.where(wavelength > original / low, frequency / rotary.scale_factor, blended)
    return torch.where(wavelength < original / high, frequency, scaled)


def _ramp(rotary: Rotary, head_size: int, *, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """yarn: how far each pair's frequency is divided, from 0 (kept) to 1, [head_size / 2]."""

    def pair_that_turns(times: float) -> float:
        """The index, a fraction, of the pair that turns so many times within the original context."""
        wavelengths = rotary.original_context_length / (times * 2 * math.pi)
        return head_size * math.log(wavelengths) / (2 * math.log(rotary.theta))

    first = max(math.floor(pair_that_turns(rotary.beta_fast)), 0)
    last: float = min(math.ceil(pair_that_turns(rotary.beta_slow)), head_size - 1)
    if first == last:
        last += 0.001
    pairs = torch.arange(head_size // 2, dtype=dtype, device=device)
    return ((pairs - first) / (last - first)).clamp(0, 1)


def attention_factor(rotary: Rotary) -> float:
    """The factor on cos and sin: 1 but with `yarn`, whose default is 0.1 ln(scale_factor) + 1."""
    if rotary.type != "yarn":
        return 1.0
    if rotary.attention_factor is not None:
        return rotary.attention_factor
    return 0.1 * math.log(rotary.scale_factor) + 1.0 if rotary.scale_factor > 1 else 1.0


def rotary_table(
    rotary: Rotary, head_size: int, positions: Tensor, *, dtype: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    """cos and sin of every position's angles, each [tokens, 1, head_size / 2]; None where nothing rotates.

    positions [tokens] integers. Angles are computed in fp32 (fp64 when `dtype` is), the table returned in `dtype`.
    """
    if rotary.type == "none":
        return None
    wide = torch.promote_types(dtype, torch.float32)
    frequency = inverse_frequencies(rotary, head_size, dtype=wide, device=positions.device)
    angles = (positions.to(wide)[:, None] * frequency)[:, None]
    cos, sin = angles.cos(), angles.sin()
    if (factor := attention_factor(rotary)) != 1:
        cos, sin = cos * factor, sin * factor
    return cos.to(dtype), sin.to(dtype)
