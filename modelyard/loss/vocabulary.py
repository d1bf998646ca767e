"""The loss where several processes each have some rows of the head's matrix, and nobody has all logits of a token.

Of each token the processes exchange three numbers: the highest logit, the sum of the exponentials, the label's logit.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Vocabulary(Protocol):
    """The words that this process has the head's rows of, and how it asks the processes that have the others.

    All of them have the same hidden states and labels, and ask for the same things in the same order.
    """

    begin: int
    """The first of its words; it has as many as its matrix has rows."""

    def sum_(self, tensor: Tensor) -> None:
        """Replace the tensor by its sum over the processes; outside of autograd."""
        ...

    def max_(self, tensor: Tensor) -> None:
        """Replace each element by the largest of any process; outside of autograd."""
        ...

    def gather(self, logits: Tensor) -> Tensor:
        """The logits [..., words] of this process -> those of all, [..., vocabulary], on each; without a gradient."""
        ...


def find(targets: Tensor, words: int, begin: int) -> tuple[Tensor, Tensor]:
    """Where the target words are among the `words` from `begin` on (0 for those that are not), and whether they are."""
    places = targets - begin
    own = (places >= 0) & (places < words)
    return places.where(own, 0), own


def log_sum_and_target(logits: Tensor, targets: Tensor, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    """The logarithm of the sum of the exponentials of all logits, and the target's logit: [tokens] each, with gradients.

    logits [tokens, words of this process] in fp32 or wider, targets [tokens]: words that one of the processes has.
    """
    highest = logits.detach().amax(-1)
    vocabulary.max_(highest)
    places, own = find(targets, logits.shape[-1], vocabulary.begin)
    target = logits.gather(-1, places[:, None])[:, 0].where(own, 0.0)
    exponentials = (logits - highest[:, None]).exp().sum(-1)
    total, target = _Sum.apply(torch.stack([exponentials, target]), vocabulary).unbind()
    return total.log() + highest, target


class _Sum(torch.autograd.Function):
    """The sum over the processes. Each computes the same loss from it and has the loss's whole gradient: nothing is sent
    in the backward."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, vocabulary: Vocabulary) -> Tensor:
        total = tensor.clone()
        vocabulary.sum_(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None
