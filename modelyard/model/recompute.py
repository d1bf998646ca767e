"""Activation recomputation: what the backward needs of a block is computed again rather than kept.

Bytes a block keeps for each token, in elements of the compute dtype, with h hidden, q and k the widths of queries and
of keys, f the width of the feed-forward (Llama's block; some numbers of a token in fp32 come on top):

    none        4h + 2q + 2k + 3f    the residual stream twice, both norms, q, k, v, attention, gate, up, their product
    selective   2h + 2q + 2k + 2f    without the norms and the product: what matrix products and attention gave remains
    full        h                    the block's input; with an `Offload` nothing (`modelyard.model.offload`)

`full` runs each block's forward again in the backward, attention and the exchanges between processes included: a third
more work. `selective` only runs again what is bound by memory (`cheap`), and costs next to nothing; where processes share
tokens between their matrices (`sequence_parallel`), what a norm gives is gathered a second time, too. torch's own
selective checkpoint would go through every operation of the block again, stepping over the products it kept.

Results are the same to the bit: the same functions on the same inputs. Only where `selective` blocks are compiled by
fusing do they agree to rounding: what was fused with other neighbours is rounded elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from modelyard.model.offload import Away, Inputs, Offload

if TYPE_CHECKING:
    from modelyard.config.layout import Recompute
    from modelyard.model.cache import LayerCache
    from modelyard.model.decoder import Context, Decoder

BlockForward = Callable[..., Tensor]


def recompute_blocks(model: Decoder, mode: Recompute, offload: Offload | None = None) -> None:
    """Have each block of `model` keep as little for the backward as `mode` says; nothing changes without gradients.

    With `offload` the input that `full` keeps of a block is in the host's memory meanwhile. Blocks are changed by instance,
    under the hooks that others put on them, and parameters keep their names. Called before `compile_blocks`: a compiler that
    is told nothing keeps what eager blocks do. Raises ValueError for a mode there is not, or that has nothing to offload.
    """
    wrappers = {"none": None, "selective": _selective, "full": _full}
    if mode not in wrappers:
        raise ValueError(f"unknown recomputation {mode!r} (there are: {', '.join(wrappers)})")
    if offload is not None:
        if mode != "full":
            raise ValueError(
                f"with recomputation {mode!r} more than the inputs of blocks is kept: offload none"
            )
        _offload_inputs(model, offload)
        return
    if wrapper := wrappers[mode]:
        for block in model.layers.values():
            block.forward = wrapper(block.forward)
            if mode == "selective":
                for stretch in ("before_attention", "after_attention"):
                    setattr(block, stretch, _selective_once_compiled(getattr(block, stretch)))


def _full(forward: BlockForward) -> BlockForward:
    def again(x: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        if cache is not None or not torch.is_grad_enabled():
            return forward(x, context, cache)
        # No randomness in a block: there is no generator to put back.
        return checkpoint(forward, x, context, use_reentrant=False, preserve_rng_state=False)

    return again


def _offload_inputs(model: Decoder, offload: Offload) -> None:
    blocks, inputs = list(model.layers.values()), Inputs(offload)
    for block in blocks:
        if model.is_last and block is blocks[-1]:
            # The head comes next, and then this block's backward: its input would come back as soon as it had gone.
            block.forward = _full(block.forward)
        else:
            block.forward = _full_offloaded(block, block.forward, inputs, is_first=block is blocks[0])


def _full_offloaded(
    block: nn.Module, forward: BlockForward, inputs: Inputs, *, is_first: bool
) -> BlockForward:
    def from_away(away: Away, context: Context) -> Tensor:
        return forward(away.take(), context)

    def again(x: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        if cache is not None or not torch.is_grad_enabled():
            return forward(x, context, cache)
        if is_first:
            inputs.begin()
        if not (x.requires_grad or any(p.requires_grad for p in block.parameters())):
            return forward(x, context)  # there is no backward to come
        away = inputs.away(x)
        y: Tensor = checkpoint(from_away, away, context, use_reentrant=False, preserve_rng_state=False)
        away.leave()
        return y

    return again


def _selective(forward: BlockForward) -> BlockForward:
    def forget_cheap(x: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        if cache is not None or not torch.is_grad_enabled():
            return forward(x, context, cache)
        outputs = _CheapOutputs()
        token = _outputs.set(outputs)
        try:
            with torch.autograd.graph.saved_tensors_hooks(outputs.pack, _unpack):
                return forward(x, context, cache)
        finally:
            _outputs.reset(token)
            outputs.clear()

    return forget_cheap


def _selective_once_compiled(stretch: Callable[..., Any]) -> Callable[..., Any]:
    """A compiler sees no `cheap`: it is told what to keep of what it compiles. By itself it keeps what eager blocks do."""

    def call(*arguments: Any) -> Any:
        if not torch.compiler.is_compiling():
            return stretch(*arguments)
        return checkpoint(
            stretch,
            *arguments,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=partial(create_selective_checkpoint_contexts, _keep_products),
        )

    return call


def _keep_products(_: Any, operation: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    is_kept = operation in (
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten._scaled_mm.default,
    )
    # A layout that splits matrices sums what they give over processes, by operators of its own: not twice. What its norms
    # gathered is gathered again, as eagerly.
    is_kept |= operation.name() in ("modelyard::all_reduce", "modelyard::reduce_scatter")
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


# --- what is cheap ----------------------------------------------------------------------------------------------


def cheap(function: Callable[..., Tensor], *inputs: Tensor, keeps_more: bool = False) -> Tensor:
    """`function(*inputs)`, of which selective recomputation need not keep the result: it calls `function` again.

    For what takes little time beside a matrix product, and whose inputs are kept anyway. `keeps_more`: inside, autograd
    keeps more than the inputs; that is forgotten and made again, too.
    """
    # A compiler fuses what is cheap into its neighbours, and decides by itself what to keep.
    if torch.compiler.is_compiling() or (outputs := _outputs.get()) is None:
        return function(*inputs)
    if keeps_more:
        output: Tensor = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    else:
        output = function(*inputs)
    outputs.add(output, _Again(function, inputs))
    return output


def made_by(function: Callable[..., Tensor], *inputs: Tensor, output: Tensor) -> Tensor:
    """`output`, which is what `function(*inputs)` would give, `cheap` as that is; another way made it along with something
    else. `function` must give the same bits."""
    if not torch.compiler.is_compiling() and (outputs := _outputs.get()) is not None:
        outputs.add(output, _Again(function, inputs))
    return output


class _Again:
    """In the place of a tensor that several operations would keep: how to make it."""

    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]):
        self._function, self._inputs = function, inputs
        self._keepers = 0
        self._to_come = 0
        self._output: Tensor | None = None

    def keep(self) -> _Again:
        """Count one more operation that wants the tensor in the backward."""
        self._keepers += 1
        return self

    def make(self) -> Tensor:
        """The tensor; from the first operation of a backward that wants it to the last one it is there."""
        if self._output is None:
            with torch.no_grad():
                self._output = self._function(*self._inputs)
            self._to_come = self._keepers
        output = self._output
        self._to_come -= 1
        if self._to_come == 0:
            self._output = None
        return output


class _CheapOutputs:
    """What cheap functions gave in one block's forward."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[Tensor, int, _Again]] = {}

    def add(self, output: Tensor, again: _Again) -> None:
        # The tensor itself is held while the block runs, so that no other one gets its id.
        self._found[id(output)] = output, output._version, again

    def clear(self) -> None:
        """Let go of the tensors: whatever was packed keeps `pack`, and with it this object, until the backward."""
        self._found.clear()

    def pack(self, tensor: Tensor) -> _Kept | _Again:
        """What an operation keeps in place of `tensor`."""
        _, version, again = self._found.get(id(tensor), (None, None, None))
        # Written to since: it is no longer what the function gives.
        return _Kept(tensor) if again is None or tensor._version != version else again.keep()


class _Kept:
    """A tensor that an operation keeps as it is."""

    def __init__(self, tensor: Tensor):
        # An operation that keeps what it gave must not be kept alive by that: nobody would find this circle.
        self._tensor = tensor.detach()
        self._version = tensor._version

    def make(self) -> Tensor:
        if self._tensor._version != self._version:  # as autograd itself would have it
            raise RuntimeError(
                f"a tensor {list(self._tensor.shape)} kept for the backward was written to since"
            )
        return self._tensor


def _unpack(packed: _Kept | _Again) -> Tensor:
    return packed.make()


_outputs: ContextVar[_CheapOutputs | None] = ContextVar("_outputs", default=None)
"""Those of the block whose forward runs, where its recomputation is selective."""
