"""Pipeline parallelism: processes have other layers of the decoder, and micro-batches go through them one behind the other.

The schedules are torch's (`torch.distributed.pipelining`): `gpipe` (arXiv 1811.06965), `1f1b` and `interleaved`
(arXiv 2104.04473), `zero_bubble` and `zbv` (arXiv 2401.10241). They say what a process does next; this file says how.

What is communicated, over the pipeline group, for each micro-batch and boundary between stages on different processes:
the hidden states forward, their gradients backward, [tokens, hidden] each. Nothing else: micro-batches are looked up by
their number, as every process of a pipeline reads the same rows.

With tied embeddings the first and the last stage both have the matrix. Once a step, before the norm is computed, they
exchange their shards of its gradient, one message each way, and both go on with the sum (`ShardedWeights.sum_copies`).

The data-parallel communication inside a stage is steered here and hidden from torch's schedules, which would gather a
stage whole and reduce once at the end whatever the ZeRO stage:
stage 1: one all-gather of the weights in the first micro-batch's forward, which stay until the last backward is
through; one reduce-scatter of the summed gradients in, or with a split backward after, that last backward;
stage 2: the same, and a reduce-scatter for every micro-batch, so that only shards are kept in between;
stage 3: an all-gather for the forward and one for the backward of each micro-batch, and a reduce-scatter. What is left
of a stage outside of its blocks and embedding (norm and head) stays for the whole step. `zero_bubble` and `zbv` run the
backward of the inputs and of the weights apart: each gathers, and the stage as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from modelyard.config.layout import Schedule
from modelyard.data.batch import Batch
from modelyard.dtypes import wide
from modelyard.model.decoder import Decoder
from modelyard.parallel.context import whole_rows
from modelyard.parallel.data import ShardedWeights, units_of
from modelyard.parallel.mesh import Mesh
from modelyard.parallel.stages import process_of, stages_of
from modelyard.parallel.torch_private import finish_backward, held_graph, without_first_messages
from modelyard.train.phases import untimed
from modelyard.train.scores import head_score_sums, no_scores
from modelyard.train.step import LossOptions, head_loss
from modelyard.train.weights import Weights

_ONE_STAGE: dict[Schedule, Any] = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
_SEVERAL_STAGES: dict[Schedule, Any] = {
    "interleaved": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}


@dataclass
class _Run:
    """What the stages of a process need to know of the step that they are in."""

    parts: Sequence[Batch]
    options: LossOptions
    phase: Callable[[str], object]
    loss: Tensor
    """Sum over the micro-batches whose backward has begun, fp64."""


class Pipeline:
    """The stages of a decoder that this process has, and how micro-batches go through all of them."""

    def __init__(self, models: Sequence[Decoder], mesh: Mesh, compute_dtype: torch.dtype):
        """`models` are the parts of `stages_of` this process, sharded and filled."""
        self.layout, self._mesh = mesh.layout, mesh
        self._group = mesh.group("pipeline")
        self._models = dict(zip(stages_of(mesh.place("pipeline"), mesh.layout), models, strict=True))
        self.architecture = models[0].architecture
        self._compute_dtype = compute_dtype
        self._stream_dtype = (
            wide(compute_dtype) if self.architecture.full_precision_residual else compute_dtype
        )
        nothing = torch.zeros((), dtype=torch.float64, device=mesh.device)
        self.run = _Run((), LossOptions(), untimed, nothing)
        """The step that is being taken."""
        self._schedule = lru_cache(maxsize=1)(self._build)
        # A group's communicator is made when it is first used, by all of its processes; a schedule's messages have two.
        dist.all_reduce(nothing, group=self._group)

    def accumulate(
        self,
        weights: Weights | ShardedWeights,
        parts: Sequence[Batch],
        options: LossOptions,
        phase: Callable[[str], object],
    ) -> Tensor:
        """Forward and backward of all micro-batches, which have one shape; the gradients add up.

        Returns the summed loss, fp64; 0 where the last stage is not.
        """
        assert isinstance(weights, ShardedWeights)
        total = torch.zeros((), dtype=torch.float64, device=self._mesh.device)
        self.run = _Run(parts, options, phase, total)
        shapes = {part.input_ids.shape for part in parts}
        if len(shapes) > 1:
            raise ValueError(f"the micro-batches of a pipeline must have one shape, got {sorted(shapes)}")
        schedule = self._schedule(len(parts), self._tokens(parts[0]))
        numbers = torch.arange(len(parts))
        is_first = any(model.is_first for model in self._models.values())
        is_last = any(model.is_last for model in self._models.values())
        schedule.step(
            *((numbers,) if is_first else ()),
            target=numbers if is_last else None,
            return_outputs=False,
            number=numbers,
        )
        self.run = _Run((), options, untimed, total)
        weights.sum_copies()
        return total

    def _build(self, micro_batches: int, tokens: int) -> Any:
        """The schedule for so many micro-batches of `tokens` hidden states each, with its stages and their buffers."""
        number = torch.empty(1, dtype=torch.int64, device="meta")
        hidden = torch.empty(
            tokens, self.architecture.hidden_size, dtype=self._stream_dtype, device="meta", requires_grad=True
        )
        loss = torch.empty((), dtype=self._compute_dtype, device="meta", requires_grad=True)
        stages = []
        for index, model in self._models.items():
            # With both shapes given nothing is inferred by running the model.
            stage = _Stage(
                _Part(model, self),
                index,
                self.layout.stages,
                self._mesh.device,
                input_args=number if model.is_first else hidden,
                output_args=loss if model.is_last else hidden,
                group=self._group,
            )
            without_first_messages(stage)
            stages.append(stage)
        schedule = self.layout.schedule
        # The stage with the loss gives the loss itself. A sum over tokens, not a mean over micro-batches: not scaled.
        options = {
            "n_microbatches": micro_batches,
            "loss_fn": lambda output, _number: output,
            "scale_grads": False,
        }
        if schedule in _ONE_STAGE:
            return _ONE_STAGE[schedule](stages[0], **options)
        return _SEVERAL_STAGES[schedule](stages, **options)

    def _tokens(self, part: Batch) -> int:
        """Hidden states of a micro-batch that go from stage to stage."""
        processes = self.layout.tensor if self.layout.sequence_parallel else 1
        return part.input_ids.numel() // processes

    # --- without gradients --------------------------------------------------------------------------------------

    def score_sums(self, parts: Sequence[Batch], options: LossOptions) -> Tensor:
        """The sum over micro-batches, of any shapes, of `modelyard.train.scores.score_sums`; 0 where the last stage is not.

        Every process of the pipeline calls it with the same rows, and `Parallel.release` at the end of an evaluation.
        """
        total = no_scores(self._mesh.device)

        def add(model: Decoder, hidden: Tensor, part: Batch) -> None:
            total.add_(head_score_sums(model, hidden, part, options))

        self._forward(parts, add)
        return total

    @torch.no_grad()
    def last_logits(self, token_ids: Sequence[int]) -> Tensor:
        """Logits [vocabulary] after a text, on every process: all of it is read, there is no cache.

        Every process of the pipeline calls it with the same tokens. Processes along `context` all read the whole text.
        """
        device, length = self._mesh.device, len(token_ids)
        # Sequence-parallel processes take equal parts; what stands behind a token does not change what it sees.
        padded = length + -length % self.layout.tensor
        ids = torch.tensor([[*token_ids, *[0] * (padded - length)]], device=device)
        positions = torch.arange(padded, device=device)[None]
        part = Batch(ids, ids, positions, torch.tensor([[0, padded]], dtype=torch.int32))
        logits = torch.empty(self.architecture.vocab_size, dtype=self._compute_dtype, device=device)

        def keep(model: Decoder, hidden: Tensor, _part: Batch) -> None:
            logits.copy_(model.logits(hidden[0, length - 1 : length])[0])

        with whole_rows(*self._models.values()):
            self._forward([part], keep)
        dist.broadcast(logits, group=self._group, group_src=process_of(self.layout.stages - 1, self.layout))
        return logits

    @torch.no_grad()
    def _forward(self, parts: Sequence[Batch], finish: Callable[[Decoder, Tensor, Batch], object]) -> None:
        """All micro-batches through all stages; `finish` is called with what the last stage makes, where that is.

        A wave: in turn t stage s has micro-batch t - s, and then everyone passes on what it made, in one exchange.
        """
        arrived: dict[int, Tensor] = {}
        for turn in range(len(parts) + self.layout.stages - 1):
            made: dict[int, Tensor] = {}
            for stage, model in self._models.items():
                number = turn - stage
                if not 0 <= number < len(parts):
                    continue
                part = parts[number]
                inputs = part.input_ids if model.is_first else arrived[stage]
                output = model(inputs, part.positions, part.cu_seqlens)
                if model.is_last:
                    finish(model, output, part)
                else:
                    made[stage + 1] = output.contiguous()
            arrived = self._exchange(made, turn, parts)

    def _exchange(self, made: dict[int, Tensor], turn: int, parts: Sequence[Batch]) -> dict[int, Tensor]:
        """Hand what was made in a turn to the processes with the stages that it is for; what this one needs next."""
        here, arrived, messages = self._mesh.place("pipeline"), {}, []
        for stage in range(1, self.layout.stages):
            number = turn - (stage - 1)
            if not 0 <= number < len(parts):
                continue
            sender, receiver = process_of(stage - 1, self.layout), process_of(stage, self.layout)
            if sender == receiver == here:
                arrived[stage] = made[stage]
            elif sender == here:
                messages.append(dist.P2POp(dist.isend, made[stage], group=self._group, group_peer=receiver))
            elif receiver == here:
                shape = (self._tokens(parts[number]), self.architecture.hidden_size)
                arrived[stage] = torch.empty(shape, dtype=self._stream_dtype, device=self._mesh.device)
                messages.append(dist.P2POp(dist.irecv, arrived[stage], group=self._group, group_peer=sender))
        for work in dist.batch_isend_irecv(messages) if messages else ():
            work.wait()
        return arrived


class _Part(nn.Module):
    """A stage's layers, as torch's schedules call them: with the number of a micro-batch, and hidden states or nothing.

    A module that hides FSDP's, so that the schedules leave it alone (see above).
    """

    def __init__(self, decoder: Decoder, pipeline: Pipeline):
        super().__init__()
        self.decoder = decoder
        self.pipeline = pipeline

    def forward(self, inputs: Tensor, number: Tensor) -> Tensor:
        """Hidden states of the stage before (a first stage looks up its token ids) -> this one's, or the loss."""
        run, decoder = self.pipeline.run, self.decoder
        part = run.parts[int(number)]
        run.phase("forward")
        inputs = part.input_ids if decoder.is_first else inputs
        output = decoder(inputs, part.positions, part.cu_seqlens, numbers=part.numbers)
        if not decoder.is_last:
            return output.contiguous()
        return _LossInBackward.apply(output, partial(_loss, decoder, part, run))


def _loss(decoder: Decoder, part: Batch, run: _Run, hidden: Tensor) -> Tensor:
    loss = head_loss(decoder, hidden, part.labels, run.options)
    run.loss += loss.detach()
    return loss


class _LossInBackward(torch.autograd.Function):
    """Stands for the loss in the forward and computes it, and its gradients, when the backward begins.

    The head's gradient is as large as the head: made in the forward, as the fused loss makes it, there would be one for
    each micro-batch on its way. And made once: a schedule that splits the backward runs some of it twice, but nothing
    that comes before the gradient of the hidden states.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.hidden, ctx.loss = hidden.detach(), loss
        return hidden.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        hidden, compute = ctx.hidden.requires_grad_(), ctx.loss
        ctx.hidden = ctx.loss = None  # the node may live on for a while
        with torch.enable_grad():
            loss = compute(hidden)
        loss.backward(gradient.to(loss.dtype))
        return hidden.grad, None


class _Stage(PipelineStage):
    """torch's stage, with the data-parallel communication of each backward as the layout has it."""

    def backward_maybe_with_nosync(
        self, backward_type: str, bwd_kwargs: dict[str, Any], last_backward: bool = False
    ) -> Any:
        """`backward_type` is `full`, or `input` and later `weight`; `last_backward`: no other follows in this stage."""
        part = self.submod
        assert isinstance(part, _Part)
        part.pipeline.run.phase("backward")
        zero_stage = part.pipeline.layout.zero_stage
        root, *_ = units = units_of(part.decoder)
        run = partial(super().backward_maybe_with_nosync, backward_type, bwd_kwargs, last_backward)
        reduce, reshard = last_backward or zero_stage >= 2, last_backward or zero_stage == 3
        if backward_type == "full":
            _expect(root, reduce=reduce, reshard=reshard, last=last_backward)
            outputs = bwd_kwargs["stage_output"]
            is_frozen = self.is_first and not any(output.requires_grad for output in outputs)
            result = run()
            if is_frozen:  # no backward ran that FSDP could see the end of
                finish_backward(root)
            return result
        if zero_stage == 3:
            for unit in units:
                unit.unshard()
        if backward_type == "input":
            _expect(root, reduce=False, reshard=zero_stage == 3, last=False)
            graph = held_graph(bwd_kwargs["stage_output"])
            gradients, groups = run()
            if groups:
                groups[-1]["graph"] = graph  # goes with the groups, and with them it is gone after `weight`
            return gradients, groups
        # Autograd runs for one group of parameters after the other: only afterwards anything is complete.
        _expect(root, reduce=False, reshard=False, last=False)
        result = run()
        if reduce:
            # Some of a unit's gradients may be added up already, in the reduced dtype, and others just made, in the
            # computation's: it reduces them together, and so all have to be of the first kind.
            finish_backward(root)
        _expect(root, reduce=reduce, reshard=reshard, last=last_backward)
        finish_backward(root)  # and what was expected
        return result


def _expect(root: FSDPModule, *, reduce: bool, reshard: bool, last: bool) -> None:
    """Tell FSDP what a backward is to end with."""
    root.set_is_last_backward(last)
    root.set_requires_gradient_sync(reduce)
    root.set_reshard_after_backward(reshard)
    # The loss reads the head's matrix before any of FSDP's hooks would gather it again.
    root.set_reshard_after_backward(last, recurse=False)
