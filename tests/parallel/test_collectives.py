"""The collectives with a gradient, by hand: two processes, numbers that tell whose they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from modelyard.parallel.collectives import (
    Group,
    copy_to_all,
    gather_tokens,
    group_of,
    scatter_sum,
    sum_of_all,
)
from tests.parallel.processes import run_distributed

Collective = Callable[[Tensor, Group], Tensor]

VALUES: dict[
    str, tuple[Collective, list[list[float]], list[list[float]], list[list[float]], list[list[float]]]
] = {
    # inputs of each rank; outputs of each; gradients of these outputs; gradients of the inputs
    "gather": (
        gather_tokens,
        [[1, 2], [3, 4]],
        [[1, 2, 3, 4], [1, 2, 3, 4]],
        [[1, 2, 3, 4], [10, 20, 30, 40]],
        [[11, 22], [33, 44]],
    ),
    "scatter": (
        scatter_sum,
        [[1, 2, 3, 4], [10, 20, 30, 40]],
        [[11, 22], [33, 44]],
        [[1, 2], [3, 4]],
        [[1, 2, 3, 4], [1, 2, 3, 4]],
    ),
    "copy": (copy_to_all, [[5, 6], [5, 6]], [[5, 6], [5, 6]], [[1, 2], [10, 20]], [[11, 22], [11, 22]]),
    "sum": (sum_of_all, [[1, 2], [10, 20]], [[11, 22], [11, 22]], [[3, 4], [3, 4]], [[3, 4], [3, 4]]),
}


def _by_hand(name: str, dtype: torch.dtype) -> None:
    rank, group = dist.get_rank(), group_of(dist.group.WORLD)
    function, *rows = VALUES[name]
    # The second column is twice the first; every other one of three is taken, so that nothing is contiguous.
    inputs, outputs, upstream, gradients = (
        torch.tensor(row[rank], dtype=dtype)[:, None] * torch.tensor([1, 0, 2], dtype=dtype) for row in rows
    )
    whole = inputs.clone().requires_grad_()
    kept = inputs.clone()

    result = function(whole[:, ::2], group)
    assert result.dtype == dtype
    assert torch.equal(result, outputs[:, ::2])
    given = upstream[:, ::2]
    (gradient,) = torch.autograd.grad(result, whole, given)
    assert gradient.dtype == dtype
    assert torch.equal(gradient, gradients)
    assert torch.equal(whole, kept)  # nothing was written to
    assert torch.equal(given, upstream[:, ::2])


def _all_by_hand() -> None:
    for name in VALUES:
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            _by_hand(name, dtype)


def test_values_and_gradients_by_hand() -> None:
    run_distributed(_all_by_hand, 2)


def _compiled() -> None:
    group = group_of(dist.group.WORLD)
    generator = torch.Generator().manual_seed(dist.get_rank())

    def chain(x: Tensor) -> Tensor:
        x = scatter_sum(gather_tokens(x.sin(), group).exp(), group)
        return sum_of_all(copy_to_all(x.cos(), group).tanh(), group) ** 2

    x = torch.randn(3, 2, dtype=torch.float64, generator=generator).requires_grad_()
    upstream = torch.randn(3, 2, dtype=torch.float64, generator=generator)
    eager = chain(x)
    (wanted,) = torch.autograd.grad(eager, x, upstream)
    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")(x)
    (gradient,) = torch.autograd.grad(compiled, x, upstream)
    torch.testing.assert_close(compiled, eager, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-12)


def test_compiled_code_sends_the_same() -> None:
    run_distributed(_compiled, 2)


def _refused() -> None:
    group = group_of(dist.group.WORLD)
    with pytest.raises(ValueError, match="3 tokens cannot be shared evenly by 2 processes"):
        scatter_sum(torch.ones(3, 2), group)
    x = torch.ones(2, 2, requires_grad=True)
    for function, *_ in VALUES.values():
        first = torch.autograd.grad((function(x, group) ** 2).sum(), x, create_graph=True)[0]
        with pytest.raises(RuntimeError, match="differentiate twice"):
            first.sum().backward()


def test_uneven_tokens_and_second_gradients_are_refused() -> None:
    run_distributed(_refused, 2)
