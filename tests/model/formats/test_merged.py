"""Merged matrices against numbers computed by hand, and against PEFT."""

from __future__ import annotations

import math

import pytest
import torch

from modelyard.config.adapter import Adapter, Quantization
from modelyard.config.architecture import Architecture
from modelyard.errors import UserError
from modelyard.model.formats.merged import DequantizedWeights, MergedWeights, TypedWeights
from modelyard.model.nf4 import dequantize, quantize
from tests.model.adapters import InMemory

NAME = "layers.0.self_attn.q_proj"
BASE = InMemory(
    {f"{NAME}.weight": torch.tensor([[3.0, 0.0], [0.0, 1.0]]), "norm.weight": torch.tensor([2.0])}
)
LORA = {f"{NAME}.lora_A": torch.tensor([[1.0, 2.0]]), f"{NAME}.lora_B": torch.tensor([[0.0], [1.0]])}


def merged(adapter: Adapter, tensors: dict[str, torch.Tensor], base: InMemory = BASE) -> MergedWeights:
    return MergedWeights(base, InMemory(tensors), adapter)


def test_lora_by_hand() -> None:
    """B A is [[0, 0], [1, 2]], and counts alpha / rank = 4 times."""
    weights = merged(Adapter(rank=1, alpha=4.0, modules=("q_proj",)), LORA)
    assert weights.load(f"{NAME}.weight").tolist() == [[3.0, 0.0], [4.0, 9.0]]
    assert weights.load("norm.weight").tolist() == [2.0]
    assert weights.names() == [f"{NAME}.weight", "norm.weight"]
    assert weights.shape(f"{NAME}.weight") == (2, 2)
    both = InMemory(BASE.tensors | LORA)  # as of a base that is trained too
    weights = MergedWeights(both, both, Adapter(rank=1, alpha=4.0, modules=("q_proj",)))
    assert weights.names() == [f"{NAME}.weight", "norm.weight"]
    assert weights.load(f"{NAME}.weight").tolist() == [[3.0, 0.0], [4.0, 9.0]]


def test_rslora_by_hand() -> None:
    """With rank 4 the factor is 4 / sqrt(4) = 2; the three further rows of A are zeros."""
    tensors = {
        f"{NAME}.lora_A": torch.tensor([[1.0, 2.0]] + 3 * [[0.0, 0.0]]),
        f"{NAME}.lora_B": torch.tensor([[0.0] * 4, [1.0] * 4]),
    }
    weights = merged(Adapter(rank=4, alpha=4.0, modules=("q_proj",), rank_stabilized=True), tensors)
    assert weights.load(f"{NAME}.weight").tolist() == [[3.0, 0.0], [2.0, 5.0]]


def test_dora_by_hand() -> None:
    """Rows of the sum are [3, 0] and [1, 1 + 2], of lengths 3 and sqrt(10); they get 6 and 1."""
    tensors = LORA | {f"{NAME}.lora_magnitude": torch.tensor([6.0, 1.0])}
    weights = merged(Adapter(rank=1, alpha=1.0, modules=("q_proj",), dora=True), tensors)
    root = math.sqrt(10)
    expected = torch.tensor([[6.0, 0.0], [1 / root, 3 / root]])
    torch.testing.assert_close(weights.load(f"{NAME}.weight"), expected, rtol=1e-6, atol=0)


def test_dtypes() -> None:
    """Narrow matrices are merged in fp32, fp64 ones in fp64, and nothing else changes its type."""
    adapter = Adapter(rank=1, alpha=1.0, modules=("q_proj",))
    for own, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        base = InMemory({name: tensor.to(own) for name, tensor in BASE.tensors.items()})
        half = {name: (tensor / 256).to(torch.float16) for name, tensor in LORA.items()}
        weights = merged(adapter, half, base)
        assert weights.dtype(f"{NAME}.weight") == weights.load(f"{NAME}.weight").dtype == wide
        assert weights.dtype("norm.weight") == weights.load("norm.weight").dtype == own
        # 1 / 256 squared would be lost in bf16 beside 1.
        assert weights.load(f"{NAME}.weight")[1, 1] == 1 + 2 / 256**2
        typed = TypedWeights(weights, base)
        assert typed.load(f"{NAME}.weight").dtype == typed.dtype(f"{NAME}.weight") == own


def test_an_adapter_that_is_not_finite() -> None:
    broken = LORA | {f"{NAME}.lora_B": torch.tensor([[0.0], [math.nan]])}
    weights = merged(Adapter(rank=1, alpha=1.0, modules=("q_proj",)), broken)
    with pytest.raises(UserError, match=r"the adapter's '.*q_proj.lora_B' has 1 of 2 values that are NaN or"):
        weights.load(f"{NAME}.weight")


def test_a_quantised_base_is_what_it_was_in_training() -> None:
    architecture = Architecture(32, 16, 1, 2, 1, 8, 32)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator, dtype=torch.float32).to(torch.bfloat16)
        for name, shape in architecture.parameter_shapes().items()
    }
    base = InMemory(tensors)
    weights = DequantizedWeights(base, Quantization(16, True), architecture)
    name = "layers.0.mlp.up_proj.weight"
    expected = dequantize(quantize(tensors[name].float(), 16, True), torch.float32)
    assert torch.equal(weights.load(name), expected)
    assert weights.dtype(name) == torch.float32
    assert 0 < (expected - tensors[name]).abs().max() < 1.0
    for plain in ("embed_tokens.weight", "norm.weight", "lm_head.weight"):
        assert weights.load(plain) is tensors[plain]
    tensors[name][0, 0] = math.inf
    base.tensors[name] = tensors[name]
    with pytest.raises(
        UserError, match=r"'layers.0.mlp.up_proj.weight' cannot be quantised: a value is not finite"
    ):
        weights.load(name)
