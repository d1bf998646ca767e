"""Context parallelism: the tokens of a row are spread over processes, which exchange keys and values.

As Llama 3 was trained (arXiv 2407.21783, 3.3.2): each row of S tokens is cut into 2 * CP chunks, and process i of CP has
chunks i and 2 * CP - 1 - i. An early chunk sees few keys and its late partner many, so that all have the same work in a
row of one document. Everything but attention is a matter of single tokens; before each attention the keys and values of
all processes are gathered, and each process attends from its own queries, inside documents as on one process.

What is communicated, per block and micro-batch, over `mesh["context"]`: one all-gather of keys and values together in the
forward, one reduce-scatter of their gradients together in the backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from modelyard.data.batch import Batch
from modelyard.model.attention import Attention, Backend, Boundaries, attend
from modelyard.model.decoder import Decoder
from modelyard.parallel.mesh import Mesh
from modelyard.parallel.torch_private import gather_into, reduce_scatter_into

# --- who has which tokens ---------------------------------------------------------------------------------------


def chunks_of(place: int, size: int) -> tuple[int, int]:
    """Which two of a row's 2 * `size` chunks the process at `place` among `size` has, in its order."""
    return place, 2 * size - 1 - place


def chunk_length(sequence_length: int, size: int) -> int:
    """Tokens of each of a row's 2 * `size` chunks. Raises ValueError where the row cannot be cut evenly."""
    if sequence_length % (2 * size):
        raise ValueError(f"a row of {sequence_length} tokens cannot be cut into 2 x {size} equal chunks")
    return sequence_length // (2 * size)


def split(batch: Batch, mesh: Mesh) -> Batch:
    """This process's tokens of each row: inputs, labels and positions [rows, sequence / CP] of its two chunks.

    Labels and positions were made for the whole row, so they are right at the chunks' edges. `cu_seqlens` stays the whole
    row's, up to S: attention needs it so. Raises ValueError where S is not divisible by 2 * CP.
    """
    size = mesh.size("context")
    if size == 1:
        return batch
    length = chunk_length(batch.input_ids.shape[1], size)
    first, second = chunks_of(mesh.place("context"), size)

    def cut(rows: Tensor) -> Tensor:
        chunks = rows.split(length, 1)
        return torch.cat([chunks[first], chunks[second]], 1)

    return Batch(
        cut(batch.input_ids),
        cut(batch.labels),
        cut(batch.positions),
        batch.cu_seqlens,
        None if batch.kinds is None else cut(batch.kinds),
        None if batch.numbers is None else cut(batch.numbers),
    )


# --- which keys the queries of a process see --------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """The segments that attention of one process has: what each document has in each of its chunks, of each row.

    The queries of a segment are the document's tokens in the chunk; they lie in the order of the process's own tokens. Its
    keys are the document from its begin to the last of those queries: causal lower-right, as `attend` has it.
    """

    queries: Boundaries
    keys: Boundaries
    index: Tensor
    """Int64 [keys of all segments]: where each lies among the gathered tokens, [CP, rows, 2, chunk] laid flat. A document
    that reaches into both chunks has its first keys twice, no key comes more often."""


def find_parts(cu_seqlens: Tensor, sequence_length: int, place: int, size: int) -> Parts:
    """The segments of the process at `place` among `size`, on the host.

    cu_seqlens int32 [rows, max_documents + 1], each row from 0 to `sequence_length`, padded by repeating that. Raises
    ValueError where a row does not cover its sequence, or the sequence cannot be cut.
    """
    length = chunk_length(sequence_length, size)
    rows = cu_seqlens.to("cpu", torch.int64)
    if not (bool((rows[:, 0] == 0).all()) and bool((rows[:, -1] == sequence_length).all())):
        raise ValueError(f"cu_seqlens must run from 0 to {sequence_length} in each row, got {rows.tolist()}")

    # Everything below is [rows, 2 chunks, documents], in the order in which the queries lie.
    chunk = torch.tensor(chunks_of(place, size))[None, :, None] * length
    begins, ends = rows[:, None, :-1], rows[:, None, 1:]
    first, last = torch.maximum(begins, chunk), torch.minimum(ends, chunk + length)
    is_there = first < last  # else the document has no token in the chunk
    begins, row = begins.expand_as(first)[is_there], torch.arange(len(rows))[:, None, None].expand_as(first)
    first, last, row = first[is_there], last[is_there], row[is_there]

    lengths = last - begins
    before = lengths.cumsum(0) - lengths
    token = torch.arange(int(lengths.sum())) + (begins - before).repeat_interleave(lengths)
    index = _place_of(token, row.repeat_interleave(lengths), len(rows), length, size)
    return Parts(_boundaries(last - first), _boundaries(lengths), index)


def _place_of(token: Tensor, row: Tensor, rows: int, length: int, size: int) -> Tensor:
    """Where token `token` of row `row` lies among the tokens of all processes, one process after the other."""
    chunk = token // length
    is_second = chunk >= size
    owner = torch.where(is_second, 2 * size - 1 - chunk, chunk)
    return ((owner * rows + row) * 2 + is_second) * length + token % length


def _boundaries(lengths: Tensor) -> Boundaries:
    ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return Boundaries(ends.to(torch.int32), int(lengths.max()))


# --- attention over gathered keys -------------------------------------------------------------------------------


@dataclass(frozen=True)
class GatheredAttention:
    """Attention of this process's queries to the keys of all processes, one forward's.

    Memory: while it runs there are the gathered keys and values of all S tokens of each row; kept for the backward is what
    the segments see of them, between S / CP and S * (1 + 1 / (2 * CP)) tokens a row (the latter in a row of one document),
    in each layer.
    """

    parts: Parts
    group: dist.ProcessGroup
    backend: Backend

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, window: int | None) -> Tensor:
        cu_q, max_q = self.parts.queries
        cu_k, max_k = self.parts.keys
        keys, values = _GatherKeysAndValues.apply(k, v, self.parts.index, self.group)
        return attend(q, keys, values, cu_q, cu_k, max_q, max_k, window=window, backend=self.backend)


class _GatherKeysAndValues(torch.autograd.Function):
    """k, v [own tokens, groups, head_size] of every process -> the tokens of `index` among all of them, twice.

    Keys and values travel together: one all-gather, and one reduce-scatter back. In the backward each token is added to
    zero at most twice, and a sum of two has no order: the result does not depend on how `index_add_` goes about it.
    """

    @staticmethod
    def forward(
        ctx: Any, k: Tensor, v: Tensor, index: Tensor, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        own = torch.cat([k, v], 2)
        gathered = own.new_empty(dist.get_world_size(group) * own.shape[0], *own.shape[1:])
        # Everyone's keys and values, for attention. Same group, same order on all: all see the same rows.
        gather_into(gathered, own, group)
        ctx.save_for_backward(index)
        ctx.group, ctx.own_tokens = group, own.shape[0]
        keys, values = gathered.chunk(2, 2)
        return keys.index_select(0, index), values.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        tokens = dist.get_world_size(ctx.group) * ctx.own_tokens
        _, groups, head_size = gradients[0].shape
        gathered = gradients[0].new_zeros(tokens, groups, 2 * head_size)
        for part, gradient in zip(gathered.chunk(2, 2), gradients, strict=True):
            part.index_add_(0, index, gradient)
        own = gathered.new_empty(ctx.own_tokens, *gathered.shape[1:])
        # Each process has the gradients of its own keys and values that the queries of all others gave.
        reduce_scatter_into(own, gathered, ctx.group)
        k, v = own.chunk(2, 2)
        return k, v, None, None


# --- the model --------------------------------------------------------------------------------------------------


def apply_context(model: Decoder, mesh: Mesh) -> None:
    """Have `model` attend to the keys of all processes along `context`: from then on it takes rows that were `split`."""
    if mesh.size("context") > 1:
        model.boundaries = partial(_gathered, model, mesh)


def _gathered(
    model: Decoder, mesh: Mesh, cu_seqlens: Tensor, own_length: int, device: torch.device
) -> Attention:
    """What `Decoder.boundaries` gives: computed once a forward, whatever the number of layers."""
    size = mesh.size("context")
    parts = find_parts(cu_seqlens, own_length * size, mesh.place("context"), size)

    def there(boundaries: Boundaries) -> Boundaries:
        return Boundaries(boundaries.cu_seqlens.to(device, non_blocking=True), boundaries.longest)

    moved = Parts(there(parts.queries), there(parts.keys), parts.index.to(device, non_blocking=True))
    return GatheredAttention(moved, mesh.group("context"), model.backend)


@contextmanager
def whole_rows(*models: Decoder) -> Iterator[None]:
    """Within, the models take rows that were not split, and exchange no keys: samples, where rows are short.

    Every process then computes the same; FSDP gathers weights as ever, so all must run the same forwards.
    """
    before: list[Callable[..., Attention]] = [model.boundaries for model in models]
    for model in models:
        model.boundaries = model.whole_rows
    try:
        yield
    finally:
        for model, boundaries in zip(models, before, strict=True):
            model.boundaries = boundaries
