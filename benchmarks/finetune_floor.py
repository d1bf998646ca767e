"""What a step of fine-tuning cannot do without, each part measured alone: see floor.py, whose way this is.

Over weights that keep their values there are no products for their gradients, none that carry the gradient into the first
block's input, and no optimizer but the adapter's. The head's products are those of the trained tokens. What it takes to make
numbers of NF4 is not in here: the floor of `qlora` is that of `lora`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.floor import best, matmul_peak, optimizer_seconds
from modelyard.config.adapter import MODULES, Adapter
from modelyard.config.architecture import Architecture
from modelyard.model.attention import attend


@dataclass(frozen=True)
class Step:
    """One step, as far as its floor asks."""

    architecture: Architecture
    documents: tuple[int, ...]
    """Tokens of each document of the step."""
    trained: int
    """Tokens with a loss."""
    rank: int | None = None
    """Of the adapter on every matrix of the blocks; None: every weight is trained."""
    dtype: str = "float32"
    threads: int = 2

    @property
    def tokens(self) -> int:
        return sum(self.documents)


def floor(step: Step) -> dict[str, float]:
    """Seconds of each part of a step that nothing can spare, and `matmul_peak` in FLOP/s."""
    torch.set_num_threads(step.threads)
    shape, dtype, full = step.architecture, getattr(torch, step.dtype), step.rank is None
    query, key_value = shape.num_attention_heads * shape.head_size, shape.head_groups * shape.head_size
    hidden, inner, layers = shape.hidden_size, shape.ffn_hidden_size, shape.num_layers
    first = [(query, hidden), (key_value, hidden), (key_value, hidden)]
    rest = [(hidden, query), (inner, hidden), (inner, hidden), (hidden, inner)]
    forward, to_input, to_weight = (
        {sizes: product(step.tokens, *sizes, dtype) for sizes in {*first, *rest}} for product in PRODUCTS
    )
    blocks = sum(forward[sizes] + to_input[sizes] for sizes in [*first, *rest]) * layers
    if full:
        blocks += sum(to_weight[sizes] for sizes in [*first, *rest]) * layers
    else:
        blocks -= sum(to_input[sizes] for sizes in first)
    head = [product(step.trained, shape.vocab_size, hidden, dtype) for product in PRODUCTS]
    found = {
        "matmul_peak": matmul_peak(dtype),
        "blocks' products": blocks,
        "adapter's products": 0.0,
        "head's products": sum(head if full else head[:2]),
        "attention": layers * attention_seconds(shape, step.documents, dtype),
    }
    parameters = shape.parameter_count()
    if step.rank is not None:
        small = {sizes: adapter_seconds(step.tokens, *sizes, step.rank, dtype) for sizes in {*first, *rest}}
        found["adapter's products"] = layers * sum(small[sizes] for sizes in [*first, *rest])
        parameters = Adapter(step.rank, 1.0, MODULES).parameter_count(shape)
    return {**found, "optimizer": optimizer_seconds(parameters)}


def _forward(tokens: int, outputs: int, inputs: int, dtype: torch.dtype) -> float:
    x, w, y = (
        torch.randn(size).to(dtype) for size in ((tokens, inputs), (outputs, inputs), (tokens, outputs))
    )
    return best(lambda: torch.mm(x, w.t(), out=y))


def _to_input(tokens: int, outputs: int, inputs: int, dtype: torch.dtype) -> float:
    x, w, y = (
        torch.randn(size).to(dtype) for size in ((tokens, inputs), (outputs, inputs), (tokens, outputs))
    )
    return best(lambda: torch.mm(y, w, out=x))


def _to_weight(tokens: int, outputs: int, inputs: int, dtype: torch.dtype) -> float:
    x, w, y = (
        torch.randn(size).to(dtype) for size in ((tokens, inputs), (outputs, inputs), (tokens, outputs))
    )
    return best(lambda: torch.mm(y.t(), x, out=w))


PRODUCTS = (_forward, _to_input, _to_weight)
"""Seconds of a linear layer's output, of the gradient of its input, and of that of its weight."""


def adapter_seconds(tokens: int, outputs: int, inputs: int, rank: int, dtype: torch.dtype) -> float:
    """The six products of an adapter; those that end where a product of the base does are added to it as they are made."""
    x, y = torch.randn(tokens, inputs).to(dtype), torch.randn(tokens, outputs).to(dtype)
    a, b = torch.randn(rank, inputs).to(dtype), torch.randn(outputs, rank).to(dtype)
    low = torch.randn(tokens, rank).to(dtype)
    return (
        best(lambda: torch.mm(x, a.t(), out=low))
        + best(lambda: torch.addmm(y, low, b.t(), out=y))
        + best(lambda: torch.mm(y, b, out=low))
        + best(lambda: torch.addmm(x, low, a, out=x))
        + best(lambda: torch.mm(low.t(), x, out=a))
        + best(lambda: torch.mm(y.t(), low, out=b))
    )


def attention_seconds(shape: Architecture, documents: Sequence[int], dtype: torch.dtype) -> float:
    """One layer's attention, forward and backward."""
    ends = torch.tensor([0, *documents], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    tokens, longest = sum(documents), max(documents)
    q, k, v = (
        torch.randn(tokens, heads, shape.head_size).to(dtype).requires_grad_()
        for heads in (shape.num_attention_heads, shape.head_groups, shape.head_groups)
    )
    direction = torch.randn(tokens, shape.num_attention_heads, shape.head_size).to(dtype)

    def both() -> None:
        attend(q, k, v, ends, ends, longest, longest).backward(direction)
        q.grad = k.grad = v.grad = None

    return best(both)
