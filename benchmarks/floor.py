"""What a training step cannot do without, each part measured alone: matrix products, attention, optimizer.

The products are those of the step, at its shapes, into memory that is there already, with nothing between them: no
program that computes this network with this library's products takes less. Attention is torch's own, forward and
backward, the optimizer torch's fused AdamW.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks.contenders import Case
from modelyard.model.attention import attend, flatten_boundaries
from modelyard.train.weights import DTYPES


def best(function: Callable[[], object], repeats: int = 5) -> float:
    """Seconds of the fastest of several calls, after one that warms up."""
    function()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times)


def matmul_peak(dtype: torch.dtype, size: int = 2048, device: torch.device | None = None) -> float:
    """FLOP/s of the device's own square matrix product."""
    a, b, out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
    return 2 * size**3 / best(lambda: torch.mm(a, b, out=out))


def linear_seconds(tokens: int, inputs: int, outputs: int, dtype: torch.dtype) -> float:
    """One linear layer's three products: output, gradient of the input, gradient of the weight."""
    x, g = torch.randn(tokens, inputs).to(dtype), torch.randn(tokens, outputs).to(dtype)
    w, dw = (torch.randn(outputs, inputs).to(dtype) for _ in range(2))
    return (
        best(lambda: torch.mm(x, w.t(), out=g))
        + best(lambda: torch.mm(g, w, out=x))
        + best(lambda: torch.mm(g.t(), x, out=dw))
    )


def attention_seconds(case: Case) -> float:
    """One layer's attention over the case's documents, forward and backward."""
    shape, dtype = case.architecture(), DTYPES[case.dtype]
    boundaries = flatten_boundaries(case.batch().cu_seqlens, case.sequence, torch.device("cpu"))
    q, k, v = (
        torch.randn(case.tokens, heads, shape.head_size).to(dtype).requires_grad_()
        for heads in (shape.num_attention_heads, shape.head_groups, shape.head_groups)
    )
    direction = torch.randn(case.tokens, shape.num_attention_heads, shape.head_size).to(dtype)

    def both() -> None:
        cu, longest = boundaries
        attend(q, k, v, cu, cu, longest, longest).backward(direction)
        q.grad = k.grad = v.grad = None

    return best(both)


def optimizer_seconds(parameters: int) -> float:
    weight = torch.nn.Parameter(torch.randn(parameters))
    weight.grad = torch.randn(parameters)
    adamw = torch.optim.AdamW([weight], fused=True)
    return best(adamw.step)


def floor(case: Case) -> dict[str, float]:
    """Seconds of each part of a step that nothing can spare, and `matmul_peak` in FLOP/s."""
    torch.set_num_threads(case.threads)
    shape, dtype = case.architecture(), DTYPES[case.dtype]
    query = shape.num_attention_heads * shape.head_size
    key_value = shape.head_groups * shape.head_size
    hidden, inner = shape.hidden_size, shape.ffn_hidden_size
    layer = [(hidden, query), (hidden, key_value), (hidden, key_value), (query, hidden)]
    layer += [(hidden, inner), (hidden, inner), (inner, hidden)]
    seconds = {sizes: linear_seconds(case.tokens, *sizes, dtype) for sizes in set(layer)}
    return {
        "matmul_peak": matmul_peak(dtype),
        "blocks' products": shape.num_layers * sum(seconds[sizes] for sizes in layer),
        "head's products": linear_seconds(case.tokens, hidden, shape.vocab_size, dtype),
        "attention": shape.num_layers * attention_seconds(case),
        "optimizer": optimizer_seconds(shape.parameter_count()),
    }
