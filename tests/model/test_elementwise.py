from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from modelyard.model import elementwise


def tensors(name: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    if name == "rms_norm":
        return random(3, 5, 8).requires_grad_(), random(8).requires_grad_()
    if name == "rotate":
        angle = random(6, 1, 4).to(torch.promote_types(dtype, torch.float32))
        return random(6, 3, 8).requires_grad_(), angle.cos(), angle.sin()
    return random(4, 7).requires_grad_(), random(4, 7).requires_grad_()


PAIRS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "rms_norm": (
        lambda *t: elementwise.rms_norm(*t, 1e-5),
        lambda *t: elementwise.rms_norm_plain(*t, 1e-5),
    ),
    "rotate": (elementwise.rotate, elementwise.rotate_plain),
    "swiglu": (elementwise.swiglu, elementwise.swiglu_plain),
}


@pytest.mark.parametrize("name", PAIRS)
def test_gradients_are_the_derivatives(name: str) -> None:
    assert torch.autograd.gradcheck(PAIRS[name][0], tensors(name, torch.float64))


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_fast_equals_plain(name: str, dtype: torch.dtype) -> None:
    fast, plain = PAIRS[name]
    inputs = tensors(name, dtype)
    out, expected = fast(*inputs), plain(*inputs)
    assert out.dtype == expected.dtype == dtype
    assert torch.equal(out, expected)
    differentiable = [t for t in inputs if t.requires_grad]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradients = torch.autograd.grad(out, differentiable, weights)
    for ours, reference in zip(
        gradients, torch.autograd.grad(expected, differentiable, weights), strict=True
    ):
        assert ours.dtype == dtype
        tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(ours, reference, atol=tolerance, rtol=tolerance)


def test_rms_norm_by_hand() -> None:
    x = torch.tensor([[3.0, 4.0]])  # mean square 12.5
    out = elementwise.rms_norm(x, torch.tensor([1.0, 2.0]), 0.0)
    torch.testing.assert_close(out, torch.tensor([[3.0, 8.0]]) / 12.5**0.5)


def test_rotate_by_hand() -> None:
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])  # pairs (1, 3) and (2, 4)
    cos, sin = torch.tensor([[[0.0, 1.0]]]), torch.tensor([[[1.0, 0.0]]])  # a quarter turn, none
    assert elementwise.rotate(x, cos, sin).tolist() == [[[-3.0, 2.0, 1.0, 4.0]]]
