"""How a kernel's results are held to what they must be. No pytest: machines with a GPU may have torch alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

Case = Callable[[torch.device], None]
CASES: dict[str, Case] = {}
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
CLOSE = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 7e-4}
"""Greatest ‖ours − exact‖ / ‖exact‖: a few roundings of the dtype."""


def case(function: Case) -> Case:
    CASES[function.__name__.replace("_", " ")] = function
    return function


def in_each_dtype(function: Callable[[torch.device, torch.dtype], None]) -> None:
    for dtype, name in NAMES.items():
        CASES[f"{function.__name__.replace('_', ' ')} {name}"] = partial(function, dtype=dtype)


def random(*shape: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(device, dtype)


def assert_close(ours: Tensor, exact: Tensor, what: str, tolerance: float | None = None) -> None:
    assert ours.shape == exact.shape, f"{what}: {list(ours.shape)}, not {list(exact.shape)}"
    wide = ours.detach().double()
    error = ((wide - exact.detach()).norm() / exact.detach().norm()).item()
    limit = tolerance or CLOSE[ours.dtype]
    assert error <= limit, f"{what}: off by {error:.1e}, at most {limit:.1e} is right"  # so NaN is not


def assert_same(a: Tensor, b: Tensor, what: str) -> None:
    assert a.dtype == b.dtype, f"{what}: {a.dtype}, not {b.dtype}"
    assert torch.equal(a, b), f"{what}: not the same bits, up to {(a - b).abs().max().item():.1e} apart"


def hold(
    ours: Callable[..., tuple[Tensor, ...]],
    exact: Callable[..., tuple[Tensor, ...]],
    inputs: list[Tensor],
    name: str,
) -> None:
    """Outputs and gradients against those of `exact` on the same numbers in fp64; and the same bits when run again."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    out, reference = ours(*inputs), exact(*doubles)
    weights = [random(*y.shape, seed=90 + i, dtype=y.dtype, device=y.device) for i, y in enumerate(out)]
    gradients = torch.autograd.grad(out, inputs, weights)
    expected = torch.autograd.grad(reference, doubles, [w.double() for w in weights])
    for i, (y, z) in enumerate(zip(out, reference, strict=True)):
        assert_close(y, z, f"output {i} of {name}")
    for i, (y, z) in enumerate(zip(gradients, expected, strict=True)):
        assert y.dtype == inputs[i].dtype
        assert_close(y, z, f"gradient {i} of {name}")
    again = ours(*inputs)
    for y, z in zip([*out, *gradients], [*again, *torch.autograd.grad(again, inputs, weights)], strict=True):
        assert_same(y, z, f"{name}, run twice")
