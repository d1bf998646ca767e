from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from modelyard.config.architecture import Rotary
from modelyard.model.rotary import attention_factor, inverse_frequencies, rotary_table

LLAMA_31 = Rotary("llama3", theta=500_000.0)


def test_default_frequencies() -> None:
    frequencies = inverse_frequencies(Rotary(theta=10_000.0), 8, dtype=torch.float64)
    assert frequencies.tolist() == pytest.approx([1, 0.1, 0.01, 0.001], rel=1e-12)


def test_llama3_scaling_keeps_high_divides_low_and_blends_between() -> None:
    plain = inverse_frequencies(Rotary(theta=500_000.0), 128, dtype=torch.float64)
    scaled = inverse_frequencies(LLAMA_31, 128, dtype=torch.float64)
    wavelengths = 2 * math.pi / plain
    for before, after, wavelength in zip(plain.tolist(), scaled.tolist(), wavelengths.tolist(), strict=True):
        if wavelength < 8192 / 4:
            assert after == before
        elif wavelength > 8192:
            assert after == before / 8
        else:
            smooth = (8192 / wavelength - 1) / 3
            assert after == pytest.approx((1 - smooth) * before / 8 + smooth * before)
    assert 0 < int((scaled == plain).sum()) < 64


def test_llama3_frequencies_are_transformers_to_the_bit() -> None:
    config = LlamaConfig(
        hidden_size=512,
        num_attention_heads=4,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    assert torch.equal(inverse_frequencies(LLAMA_31, 128, dtype=torch.float32), expected)


@pytest.mark.parametrize("head_size", [16, 64, 128])
@pytest.mark.parametrize("theta", [500.0, 10_000.0, 1_000_000.0])
@pytest.mark.parametrize(
    ("factor", "original", "more"),
    [
        (4.0, 32_768, {}),
        (40.0, 4096, {"beta_fast": 24.0, "beta_slow": 3.0}),
        (8.0, 8192, {"attention_factor": 1.25}),
        (0.5, 16, {}),
        (2.0, 2, {"beta_fast": 1.0, "beta_slow": 1.0}),
        (4.0, 1_000_000, {"beta_fast": 2000.0}),
    ],
)
def test_yarn_is_transformers_to_the_bit(
    head_size: int, theta: float, factor: float, original: int, more: dict[str, float]
) -> None:
    config = LlamaConfig(
        hidden_size=4 * head_size,
        num_attention_heads=4,
        max_position_embeddings=131_072,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": theta,
            "factor": factor,
            "original_max_position_embeddings": original,
            **more,
        },
    )
    expected, expected_factor = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    rotary = Rotary("yarn", theta=theta, scale_factor=factor, original_context_length=original, **more)
    assert torch.equal(inverse_frequencies(rotary, head_size, dtype=torch.float32), expected)
    assert attention_factor(rotary) == expected_factor
    table = rotary_table(rotary, head_size, torch.tensor([0, 77]), dtype=torch.float32)
    assert table is not None
    assert table[0][0].eq(torch.tensor(expected_factor)).all()
    torch.testing.assert_close(table[1][1, 0], (77 * expected).sin() * expected_factor)


def test_table_is_as_wide_as_the_model_at_least() -> None:
    positions = torch.tensor([0, 3, 100_000])
    table = rotary_table(LLAMA_31, 16, positions, dtype=torch.float64)
    assert table is not None
    cos, sin = table
    assert cos.shape == sin.shape == (3, 1, 8)
    assert cos.dtype == torch.float64
    assert cos[0].eq(1).all()
    assert sin[1, 0, 0].item() == pytest.approx(math.sin(3), rel=1e-12)
    narrow = rotary_table(LLAMA_31, 16, positions, dtype=torch.bfloat16)
    assert narrow is not None
    # the angle itself is never narrow: bf16 has no 100,000 + 1
    torch.testing.assert_close(narrow[0].double(), cos, atol=0.02, rtol=0)


def test_no_rotation_has_no_table() -> None:
    assert rotary_table(Rotary("none"), 16, torch.arange(4), dtype=torch.float32) is None
