"""What `model/` uses of torch that has changed between 2.11 and 2.13, in one place."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor


@functools.cache
def _varlen_parameters() -> frozenset[str]:
    from torch.nn.attention.varlen import varlen_attn

    names = frozenset(inspect.signature(varlen_attn).parameters)
    if "window_size" not in names:  # before 2.11 there was `is_causal`
        raise RuntimeError(
            f"torch {torch.__version__} has another varlen_attn; torch >= 2.11 is needed on CUDA"
        )
    return names


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *, window: int | None
) -> Tensor:
    """`torch.nn.attention.varlen.varlen_attn`, causal and aligned to the end of the keys (lower-right).

    2.13 takes grouped keys and values as they are (`enable_gqa`); 2.11 wants as many heads as the queries have.
    """
    from torch.nn.attention.varlen import varlen_attn

    takes_groups = "enable_gqa" in _varlen_parameters()
    options: dict[str, Any] = {}
    if q.shape[1] != k.shape[1]:
        if takes_groups:
            options["enable_gqa"] = True
        else:
            repeats = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    # Their window counts the tokens to the left of the present one, ours includes it.
    window_size = (-1 if window is None else window - 1, 0)
    out: Any = varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, window_size=window_size, **options)
    return out


def scaled_mm(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype, *, fast: bool
) -> Tensor:
    """`torch._scaled_mm`: a [m, k] (row by row) times b [k, n] (column by column), both in fp8, times the scales -> [m, n].

    `fast` allows sums of fewer bits on a GPU. The public torch.nn.functional.scaled_mm takes more than this to say the same.
    """
    return torch._scaled_mm(a, b, scale_a=a_scale, scale_b=b_scale, out_dtype=dtype, use_fast_accum=fast)
