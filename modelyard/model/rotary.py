"""Rotary position embedding: the angle of each position and frequency.

`llama3` scaling divides the low frequencies by a factor so that a model trained on 8,192 tokens reaches 131,072:
with wavelength w = 2 pi / frequency, w < original / high_frequency_factor is kept, w > original / low_frequency_factor
is divided by the factor, and what lies between is blended linearly in original / w.
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
    if rotary.type != "llama3":
        return frequency
    original = rotary.original_context_length
    low, high = rotary.low_frequency_factor, rotary.high_frequency_factor
    wavelength = 2 * math.pi / frequency
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * frequency / rotary.scale_factor + smooth * frequency
    scaled = torch.where(wavelength > original / low, frequency / rotary.scale_factor, blended)
    return torch.where(wavelength < original / high, frequency, scaled)


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
    return angles.cos().to(dtype), angles.sin().to(dtype)
