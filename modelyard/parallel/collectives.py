"""What tensor-parallel processes say to each other, as functions with a gradient; all of it along the first dimension, tokens.

Each is the sum, the cut or the copy that its gradient's partner undoes:

    function           forward            backward
    gather_tokens      all-gather         reduce-scatter
    scatter_sum        reduce-scatter     all-gather
    copy_to_all        nothing            all-reduce
    sum_of_all         all-reduce         nothing

`modelyard.parallel.tensor` says where in the decoder each one stands. Sums are made in the dtype of the tensor; processes
that ask for the same sum get the same bits, run after run. A gradient of a gradient is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from modelyard.parallel.torch_private import gather_into, reduce_scatter_into

# --- the collectives themselves ---------------------------------------------------------------------------------

_groups: dict[str, dist.ProcessGroup] = {}
"""By name: operators take strings, not groups."""


class Group(NamedTuple):
    """Processes that share matrices, as the functions below want them; made by `group_of`."""

    name: str
    size: int


def group_of(group: dist.ProcessGroup) -> Group:
    _groups[group.group_name] = group
    return Group(group.group_name, group.size())


def _all_gather(part: Tensor, group: str, size: int) -> Tensor:
    whole = part.new_empty(size * part.shape[0], *part.shape[1:])
    gather_into(whole, part.contiguous(), _groups[group])
    return whole


def _reduce_scatter(whole: Tensor, group: str, size: int) -> Tensor:
    part = whole.new_empty(whole.shape[0] // size, *whole.shape[1:])
    reduce_scatter_into(part, whole.contiguous(), _groups[group])
    return part


def _all_reduce(summand: Tensor, group: str, size: int) -> Tensor:
    total = summand.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=_groups[group])
    return total


# A compiler takes an operator as it is. torch.distributed's calls it would write anew, and with those inside an autograd
# function torch 2.11 computes wrong gradients without a word.
_Collective = Callable[[Tensor, str, int], Tensor]
_OPERATORS: dict[_Collective, Any] = {
    collective: torch.library.custom_op(f"modelyard::{collective.__name__[1:]}", collective, mutates_args=())
    for collective in (_all_gather, _reduce_scatter, _all_reduce)
}
_SHAPES: dict[_Collective, _Collective] = {
    _all_gather: lambda part, group, size: part.new_empty(size * part.shape[0], *part.shape[1:]),
    _reduce_scatter: lambda whole, group, size: whole.new_empty(whole.shape[0] // size, *whole.shape[1:]),
    _all_reduce: lambda summand, group, size: torch.empty_like(
        summand, memory_format=torch.contiguous_format
    ),
}
for _collective, _shape in _SHAPES.items():
    _OPERATORS[_collective].register_fake(_shape)


def _run(collective: _Collective, tensor: Tensor, group: Group) -> Tensor:
    # Eagerly without the operator, whose call takes longer than a small message.
    if torch.compiler.is_compiling():
        collective = _OPERATORS[collective]
    return collective(tensor, *group)


# --- with their gradients ---------------------------------------------------------------------------------------


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _run(_all_gather, part, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _run(_reduce_scatter, gradients[0], ctx.group), None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, summand: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _run(_reduce_scatter, summand, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _run(_all_gather, gradients[0], ctx.group), None


class _CopyToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _run(_all_reduce, gradients[0], ctx.group), None


class _SumOfAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, summand: Tensor, group: Group) -> Tensor:
        return _run(_all_reduce, summand, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None


def gather_tokens(part: Tensor, group: Group) -> Tensor:
    """Each process's [tokens / P, ...] -> all of them in order, [tokens, ...], on each of the P processes.

    Forward: an all-gather. Backward: each process has a gradient of all tokens, from its own part of the matrices; a
    reduce-scatter sums them and gives each process those of its own tokens.
    """
    return _GatherTokens.apply(part, group)


def scatter_sum(summand: Tensor, group: Group) -> Tensor:
    """Each process's summand [tokens, ...] -> this process's tokens of the sum, [tokens / P, ...].

    Forward: a reduce-scatter. Backward: the summand of every process has the gradient of all tokens; an all-gather.
    Raises ValueError where the tokens cannot be shared evenly.
    """
    if summand.shape[0] % group.size:
        raise ValueError(f"{summand.shape[0]} tokens cannot be shared evenly by {group.size} processes")
    return _ScatterSum.apply(summand, group)


def copy_to_all(x: Tensor, group: Group) -> Tensor:
    """What all processes have alike, [...] -> the same, to be used by each with its own part of the matrices.

    Forward: nothing is sent. Backward: an all-reduce sums what the parts of all processes give.
    """
    return _CopyToAll.apply(x, group)


def sum_of_all(summand: Tensor, group: Group) -> Tensor:
    """Each process's summand [...] -> the sum, on each.

    Forward: an all-reduce. Backward: nothing is sent; what follows is computed alike by all, so that each has the whole
    gradient already.
    """
    return _SumOfAll.apply(summand, group)
