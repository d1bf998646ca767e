"""Attention inside documents: the one entry point, and its backends.

Training on packed rows, chunks of a sequence and decoding with a cache are the same call: queries of each segment are
the last tokens of that segment's keys, and attend causally ("lower-right").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from modelyard.device import on_gpu
from modelyard.dtypes import wide
from modelyard.model.torch_private import varlen_attention

Backend = Literal["auto", "dense", "loop", "varlen"]


class Boundaries(NamedTuple):
    """Where documents begin and end in a flat stretch of tokens."""

    cu_seqlens: Tensor
    """int32 [documents + 1], from 0 to the number of tokens."""
    longest: int
    """Tokens of the longest document."""


def flatten_boundaries(cu_seqlens: Tensor, sequence_length: int, device: torch.device) -> Boundaries:
    """The boundaries of the rows' documents once the rows are laid end to end.

    cu_seqlens int32 [rows, max_documents + 1]: each row from 0 to `sequence_length`, padded by repeating it.
    Raises ValueError where a row does not cover its sequence.
    """
    rows = cu_seqlens.to("cpu", torch.int64)
    if not (bool((rows[:, 0] == 0).all()) and bool((rows[:, -1] == sequence_length).all())):
        raise ValueError(f"cu_seqlens must run from 0 to {sequence_length} in each row, got {rows.tolist()}")
    ends = rows[:, 1:] + torch.arange(rows.shape[0])[:, None] * sequence_length
    flat = torch.cat([rows.new_zeros(1), ends.flatten()]).unique_consecutive()
    longest = int(flat.diff().max())
    return Boundaries(flat.to(device, torch.int32, non_blocking=True), longest)


def one_document(tokens: int, device: torch.device) -> Boundaries:
    """The boundaries of a stretch that is one document."""
    return Boundaries(torch.tensor([0, tokens], dtype=torch.int32, device=device), tokens)


class Attention(Protocol):
    """Attention of one forward: it knows where that forward's documents lie."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, window: int | None) -> Tensor:
        """q [query tokens, heads, head_size]; k, v [key tokens, groups, head_size] -> the shape of q; `window` as `attend`."""
        ...


@dataclass(frozen=True)
class Segments:
    """Attention of queries to keys that are all here."""

    queries: Boundaries
    keys: Boundaries
    backend: Backend

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, window: int | None) -> Tensor:
        cu_q, max_q = self.queries
        cu_k, max_k = self.keys
        return attend(q, k, v, cu_q, cu_k, max_q, max_k, window=window, backend=self.backend)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    window: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Causal attention of each segment's queries to that segment's keys.

    q [query tokens, heads, head_size]; k, v [key tokens, groups, head_size] with heads a multiple of groups;
    cu_q, cu_k int32 [segments + 1] on the device of q; max_q, max_k the longest segments in tokens. The last query of
    a segment sees all its keys, the one before it all but the last, and so on; `window` limits each to that many keys,
    its own included. Returns [query tokens, heads, head_size].

    Backends: `dense` (one masked score matrix: the slow reference), `loop` (one SDPA call a segment; any device and
    dtype), `varlen` (flash attention; CUDA, bf16 or fp16), `auto`. Raises ValueError where a backend cannot honour the
    request; none drops the boundaries.
    """
    if q.shape[1] % k.shape[1] or k.shape != v.shape or cu_q.shape != cu_k.shape:
        raise ValueError(f"shapes do not fit: q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}")
    if window is not None and window < 1:
        raise ValueError(f"a window has at least one token, got {window}")
    if backend == "auto":
        backend = "varlen" if _varlen_obstacle(q) is None else "loop"
    if backend == "varlen":
        if obstacle := _varlen_obstacle(q):
            raise ValueError(f"the varlen backend {obstacle}")
        return varlen_attention(q, k, v, cu_q, cu_k, max_q, max_k, window=window)
    lengths = _segment_lengths(cu_q, cu_k, q.shape[0], k.shape[0])
    if backend == "dense":
        return _dense(q, k, v, lengths, window)
    if backend == "loop":
        return _loop(q, k, v, lengths, window)
    raise ValueError(f"unknown attention backend {backend!r}")


def _varlen_obstacle(q: Tensor) -> str | None:
    if not on_gpu(q):
        return "needs CUDA"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"needs bf16 or fp16, not {q.dtype}"
    if q.is_cuda and (capability := torch.cuda.get_device_capability(q.device)) < (8, 0):
        return f"needs a GPU of compute capability 8.0 or newer, not {capability[0]}.{capability[1]}"
    if q.shape[2] % 8 or q.shape[2] > 256:
        return f"needs a head size that is a multiple of 8 and at most 256, not {q.shape[2]}"
    return None


def _segment_lengths(cu_q: Tensor, cu_k: Tensor, query_tokens: int, key_tokens: int) -> list[tuple[int, int]]:
    ends_q, ends_k = cu_q.tolist(), cu_k.tolist()
    lengths = [
        (q_end - q_begin, k_end - k_begin)
        for q_begin, q_end, k_begin, k_end in zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False)
    ]
    covered = (ends_q[0], ends_k[0], ends_q[-1], ends_k[-1]) == (0, 0, query_tokens, key_tokens)
    if not covered or any(not 0 <= q <= k for q, k in lengths):
        raise ValueError(
            f"segments {ends_q} of {query_tokens} queries and {ends_k} of {key_tokens} keys: they must cover all "
            "tokens in order, with no more queries than keys in any"
        )
    return lengths


# --- dense ------------------------------------------------------------------------------------------------------


def _visible(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys each query of a segment sees: bool [queries, keys]."""
    query = torch.arange(keys - queries, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)
    visible = key <= query
    return visible if window is None else visible & (key > query - window)


def _dense(q: Tensor, k: Tensor, v: Tensor, lengths: list[tuple[int, int]], window: int | None) -> Tensor:
    blocks = [_visible(queries, keys, window, q.device) for queries, keys in lengths]
    mask = torch.block_diag(*blocks).bool()
    repeats = q.shape[1] // k.shape[1]
    dtype = wide(q.dtype)
    keys, values = (t.to(dtype).repeat_interleave(repeats, 1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.to(dtype), keys) * q.shape[2] ** -0.5
    probabilities = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", probabilities, values).to(q.dtype)


# --- one SDPA call a segment ------------------------------------------------------------------------------------


def _loop(q: Tensor, k: Tensor, v: Tensor, lengths: list[tuple[int, int]], window: int | None) -> Tensor:
    if len(set(lengths)) == 1:  # unpacked rows: one call for all of them
        q, k, v = (t.unflatten(0, (len(lengths), -1)) for t in (q, k, v))
        return _segment(q, k, v, window).flatten(0, 1)
    # `split`, not slices: its backward is one concatenation, a slice's is a zero tensor of full size each.
    q_lengths, k_lengths = ([length[i] for length in lengths] for i in (0, 1))
    segments = zip(q.split(q_lengths), k.split(k_lengths), v.split(k_lengths), strict=True)
    parts = [_segment(q[None], k[None], v[None], window)[0] for q, k, v in segments if q.shape[0]]
    return torch.cat(parts)


def _segment(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """q [segments, queries, heads, head_size], k and v [segments, keys, groups, head_size], all of one length."""
    queries, keys = q.shape[1], k.shape[1]
    if window is not None and keys > window:
        return _windowed_segment(q, k, v, window)
    if queries == 1:
        return _sdpa(q, k, v)  # the newest token sees everything
    if queries == keys:
        return _sdpa(q, k, v, is_causal=True)
    # A mask, not `torch.nn.attention.bias.causal_lower_right`: as fast, and importing that costs two seconds.
    return _sdpa(q, k, v, attn_mask=_visible(queries, keys, None, q.device))


def _windowed_segment(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Blocks of queries against the keys in reach, so that the cost grows with the window and not with the length."""
    queries, keys = q.shape[1], k.shape[1]
    offset, block = keys - queries, max(window, 64)
    parts = []
    for begin in range(0, queries, block):
        end = min(begin + block, queries)
        first, last = max(0, begin + offset - window + 1), end + offset
        mask = _visible(end - begin, last - first, window, q.device)
        parts.append(_sdpa(q[:, begin:end], k[:, first:last], v[:, first:last], attn_mask=mask))
    return torch.cat(parts, 1)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=attn_mask, is_causal=is_causal, enable_gqa=grouped
    )
    return out.transpose(1, 2)
