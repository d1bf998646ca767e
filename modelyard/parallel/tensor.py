"""Tensor parallelism: each process has a part of every matrix, and all of them see the same tokens.

As in Megatron-LM (arXiv 1909.08053): the matrices of a pair are cut so that nothing is exchanged between them. q, k, v,
gate and up are cut by rows of the weight, which are whole heads, or features of the inner width; o and down by columns,
so that each process has a summand of the result. Embedding and head are cut by words. Norms, the biases of o and down,
and learned positions are the same on all processes.

With `sequence_parallel` (arXiv 2205.05198) each process has 1/P of the tokens, too, wherever a token is on its own: in the
residual stream and in the norms.

What is communicated, over `mesh["tensor"]`, for each micro-batch; always [tokens, hidden] of the compute dtype:

    where                                  forward         backward         with sequence_parallel
    after the embedding                    all-reduce      nothing          reduce-scatter, all-gather
    after o, after down (each block)       all-reduce      nothing          reduce-scatter, all-gather
    after each norm (two a block, last)    nothing         all-reduce       all-gather, reduce-scatter

The loss exchanges three numbers a token instead of logits (`modelyard.loss.vocabulary`). With `sequence_parallel` the
gradients of what is the same on all processes come from each one's own tokens: one all-reduce of them all a step
(`ShardedWeights.finish_gradients`); without, they are complete.

Of an adapter B is cut where its matrix is cut by rows, A where that is cut by columns, and the other one is the same on all
processes; what B gives is part of the summand of o or down. Nothing is added to the table, but for DoRA's lengths of rows
of o and down, [out] an all-reduce each. The gradient of what is the same comes from each one's own part of the matrix: it
is in the all-reduce of the step, with `sequence_parallel` or without.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from modelyard.loss.vocabulary import find
from modelyard.model.adapter import AdaptedLinear
from modelyard.model.cache import KeyValueCache
from modelyard.model.decoder import Decoder, LayerNorm, RMSNorm, local
from modelyard.model.fp8 import Fp8Linear
from modelyard.parallel.collectives import copy_to_all, gather_tokens, group_of, scatter_sum, sum_of_all
from modelyard.parallel.cuts import BY_COLUMNS, BY_ROWS, cut_along
from modelyard.parallel.mesh import Mesh
from modelyard.parallel.torch_private import gather_into


def apply_tensor(model: Decoder, mesh: Mesh) -> None:
    """Give this process its part of every parameter of `model`, on the meta device still, and have modules use it.

    Parameters become DTensors on `mesh["tensor"]` and keep their names and full shapes; modules get the classes below.
    Nothing happens where there is one process along `tensor`. Raises ValueError where something cannot be cut evenly.
    """
    if mesh.size("tensor") == 1:
        return
    range_of(model.architecture.head_groups, mesh)  # rows of q, k and v are cut between heads, not within
    words = range_of(model.architecture.vocab_size, mesh)
    stream = _Stream(mesh, words.start)
    for name, module in model.named_modules():
        _split_parameters(name, module, mesh["tensor"])
        if kind := _kind_of(name, module):
            # By class, not by instance: to a compiler the modules of all blocks are then the same, and it compiles one.
            module.__class__ = kind
            module.stream = stream
    if model.is_last:
        model.vocabulary = Words(words.start, mesh)
    model.forward = partial(_forward, model.forward, stream)  # type: ignore[method-assign]


def range_of(length: int, mesh: Mesh) -> range:
    """Which of so many words or heads this process has. Raises ValueError where they cannot be shared evenly."""
    size, place = mesh.size("tensor"), mesh.place("tensor")
    if length % size:
        raise ValueError(f"{length} cannot be shared evenly by {size} tensor-parallel processes")
    return range(place * length // size, (place + 1) * length // size)


# --- parameters -------------------------------------------------------------------------------------------------


def placement_of(module: str, parameter: str) -> Placement:
    """How the parameter of a module (by its name) lies on the tensor-parallel processes."""
    dimension = cut_along(module, parameter)
    return Replicate() if dimension is None else Shard(dimension)


def _split_parameters(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
    for key, whole in list(module.named_parameters(recurse=False)):
        placement = placement_of(name, key)
        shape = list(whole.shape)
        if isinstance(placement, Shard):
            if shape[placement.dim] % mesh.size():
                raise ValueError(f"{name}.{key} {shape} cannot be shared evenly by {mesh.size()} processes")
            shape[placement.dim] //= mesh.size()
        part = DTensor.from_local(
            torch.empty(shape, dtype=whole.dtype, device="meta"),
            mesh,
            [placement],
            run_check=False,
            shape=whole.shape,
            stride=whole.stride(),
        )
        module.register_parameter(key, nn.Parameter(part, requires_grad=whole.requires_grad))


# --- modules ----------------------------------------------------------------------------------------------------


class _Stream:
    """How the residual stream lies on the processes, in the forward that runs."""

    def __init__(self, mesh: Mesh, first_word: int):
        self.group = group_of(mesh.group("tensor"))
        self.place = mesh.place("tensor")
        self.first_word = first_word
        """Of those whose rows this process has."""
        self._sequence_parallel = mesh.layout.sequence_parallel
        self.is_split = False
        """Whether each process has its own tokens of it."""

    def begin(self, tokens: int) -> None:
        """A forward of so many tokens begins: all of one micro-batch on this pipeline stage and context rank."""
        self.is_split = self._sequence_parallel and tokens % self.group.size == 0
        # A sample's few tokens may lie whole on each process. In training the gradients rely on the split.
        if self._sequence_parallel and not self.is_split and torch.is_grad_enabled():
            raise ValueError(f"{tokens} tokens cannot be shared evenly by {self.group.size} processes")

    def whole(self, x: Tensor) -> Tensor:
        """What a norm gives of the stream, for the matrices that follow: all tokens."""
        return gather_tokens(x, self.group) if self.is_split else copy_to_all(x, self.group)

    def summed(self, summand: Tensor) -> Tensor:
        """What each process's part of a matrix gives for all tokens, summed into the stream."""
        return scatter_sum(summand, self.group) if self.is_split else sum_of_all(summand, self.group)

    def total(self, summand: Tensor) -> Tensor:
        """What each process has a summand of, whatever it is; no gradient goes through."""
        return sum_of_all(summand, self.group)

    def own(self, tokens: Tensor) -> Tensor:
        """The tokens of the stream that are here, of what all processes have alike."""
        return tokens.chunk(self.group.size)[self.place] if self.is_split else tokens


class _ByRows(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        """x [tokens, in] -> this process's features, [tokens, out / P]."""
        return F.linear(x, local(self.weight), None if self.bias is None else local(self.bias))


class _ByColumns(nn.Linear):
    stream: _Stream

    def forward(self, x: Tensor) -> Tensor:
        """This process's features x [tokens, in / P] -> [tokens of the stream, out]."""
        total = self.stream.summed(F.linear(x, local(self.weight)))
        return total if self.bias is None else total + local(self.bias)  # once, not with each summand


class _AdaptedByColumns(AdaptedLinear):
    stream: _Stream

    def forward(self, x: Tensor) -> Tensor:
        """This process's features x [tokens, in / P] -> [tokens of the stream, out]."""
        total = self.stream.summed(self.product(x))
        return total if self.bias is None else total + local(self.bias)

    def summed_squares(self, squares: Tensor) -> Tensor:
        return self.stream.total(squares)

    def first_feature(self, features: int) -> int:
        return self.stream.place * features


class _Fp8ByColumns(Fp8Linear):
    stream: _Stream

    def forward(self, x: Tensor) -> Tensor:
        """This process's features x [tokens, in / P] -> [tokens of the stream, out]. Scales are those of what is here."""
        total = self.stream.summed(self.product(x))
        return total if self.bias is None else total + local(self.bias)


class _WordEmbedding(nn.Embedding):
    stream: _Stream

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 [tokens] -> [tokens of the stream, hidden]: one process has the row of a word, the others add zeros."""
        weight = local(self.weight)
        places, own = find(ids, weight.shape[0], self.stream.first_word)
        return self.stream.summed(F.embedding(places, weight).where(own[:, None], 0.0))


class _PositionEmbedding(nn.Embedding):
    stream: _Stream

    def forward(self, positions: Tensor) -> Tensor:
        """positions int64 [tokens] -> [tokens of the stream, hidden]."""
        return F.embedding(self.stream.own(positions), local(self.weight))


# Within `normalize`, which recomputation may run again: what is forgotten is then the gathered tensor too.


class _GatheredRMSNorm(RMSNorm):
    stream: _Stream

    def normalize(self, x: Tensor) -> Tensor:
        """x [tokens of the stream, hidden] -> [tokens, hidden]."""
        return self.stream.whole(super().normalize(x))


class _GatheredLayerNorm(LayerNorm):
    stream: _Stream

    def normalize(self, x: Tensor) -> Tensor:
        """x [tokens of the stream, hidden] -> [tokens, hidden]."""
        return self.stream.whole(super().normalize(x))


def _kind_of(name: str, module: nn.Module) -> type[nn.Module] | None:
    """What a module becomes; None where it stays."""
    if isinstance(
        module, AdaptedLinear
    ):  # by rows nothing is exchanged, and it takes its parameters as they are here
        return _AdaptedByColumns if name.rpartition(".")[2] in BY_COLUMNS else AdaptedLinear
    if isinstance(module, Fp8Linear):
        return _Fp8ByColumns if name.rpartition(".")[2] in BY_COLUMNS else Fp8Linear
    kinds: dict[str, type[nn.Module]] = {
        **dict.fromkeys(BY_ROWS, _ByRows),
        **dict.fromkeys(BY_COLUMNS, _ByColumns),
        "embed_tokens": _WordEmbedding,
        "embed_positions": _PositionEmbedding,
    }
    if isinstance(module, RMSNorm):
        return _GatheredRMSNorm
    return _GatheredLayerNorm if isinstance(module, LayerNorm) else kinds.get(name.rpartition(".")[2])


def _forward(
    forward: Callable[..., Tensor],
    stream: _Stream,
    inputs: Tensor,
    positions: Tensor,
    cu_seqlens: Tensor,
    cache: KeyValueCache | None = None,
    numbers: Tensor | None = None,
) -> Tensor:
    stream.begin(positions.numel())
    return forward(inputs, positions, cu_seqlens, cache, numbers)


# --- vocabulary -------------------------------------------------------------------------------------------------


class Words:
    """This process's words: `modelyard.loss.vocabulary.Vocabulary` over the tensor-parallel processes."""

    def __init__(self, begin: int, mesh: Mesh):
        self.begin = begin
        self._group = mesh.group("tensor")

    def sum_(self, tensor: Tensor) -> None:
        """One all-reduce, in the loss's forward: the sum of exponentials and the label's logit of each token."""
        dist.all_reduce(tensor, group=self._group)

    def max_(self, tensor: Tensor) -> None:
        """One all-reduce, in the loss's forward before `sum_`: the highest logit of each token."""
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group)

    @torch.no_grad()
    def gather(self, logits: Tensor) -> Tensor:
        """One all-gather, of logits that somebody wants to see: samples, evaluation by choice."""
        size, words = self._group.size(), logits.shape[-1]
        own = logits.reshape(-1, words)
        parts = own.new_empty(size * own.shape[0], words)
        gather_into(parts, own.contiguous(), self._group)
        return parts.unflatten(0, (size, -1)).transpose(0, 1).reshape(*logits.shape[:-1], size * words)
