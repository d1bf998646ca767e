"""One optimizer step, as the algorithm reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from modelyard.data.batch import Batch
from modelyard.loss.cross_entropy import linear_cross_entropy
from modelyard.model.decoder import Decoder
from modelyard.parallel.mesh import Mesh, alone
from modelyard.train.optimizer import Optimizer
from modelyard.train.phases import untimed
from modelyard.train.weights import Weights, wide_gradient_taker

if TYPE_CHECKING:
    from modelyard.parallel.data import ShardedWeights


@dataclass(frozen=True)
class LossOptions:
    """How the loss is computed; one of these for training and evaluation alike."""

    implementation: str = "auto"
    z_loss: float = 0.0
    gradient_scale: float = 1.0
    """Factor on all gradients from their beginning on, so that they fit fp16's range; the step takes it out again."""


@dataclass(frozen=True)
class StepResult:
    loss: float
    """Mean over the trained tokens of the whole batch, in nats."""
    grad_norm: float
    """L2 norm of the whole gradient before clipping."""
    targets: int
    """Trained tokens."""
    skipped: str | None = None
    """Why the weights were left untouched; None when they were updated."""
    notice: bool = False
    """Whether any process has something to say to all."""
    abandoned: bool = False
    """Whether a process came without its batch: nothing was done, and the same batch is to come again."""


def micro_batches(batch: Batch, rows: int, device: torch.device) -> Iterator[Batch]:
    for begin in range(0, batch.input_ids.shape[0], rows):
        yield batch.rows(begin, begin + rows).to(device)


def head_loss(
    model: Decoder,
    hidden: Tensor,
    labels: Tensor,
    options: LossOptions,
    *,
    weight_gradient_to: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Sum of the loss over the trained tokens, a scalar in fp32 or wider, from what the decoder, or the part of it that has
    the head, makes: hidden [rows, sequence, hidden], labels [rows, sequence].

    `weight_gradient_to` as in `linear_cross_entropy`.
    """
    return linear_cross_entropy(
        hidden.flatten(0, 1),
        model.output_weight,
        labels.flatten(),
        implementation=options.implementation,
        z_loss=options.z_loss,
        logits_scale=model.architecture.logits_scale,
        gradient_scale=options.gradient_scale,
        vocabulary=model.vocabulary,
        weight_gradient_to=weight_gradient_to,
    )


def accumulate(
    model: Decoder,
    weights: Weights | ShardedWeights,
    parts: Sequence[Batch],
    options: LossOptions,
    phase: Callable[[str], object],
) -> Tensor:
    """Forward and backward of each micro-batch in turn; the gradients, scaled as the options say, add up. Returns the summed
    loss."""
    total = torch.zeros((), dtype=torch.float64, device=parts[0].input_ids.device)
    taker = wide_gradient_taker(weights, model.output_weight)
    for index, micro_batch in enumerate(parts, 1):
        weights.before_backward(last=index == len(parts))
        phase("forward")
        hidden = model(
            micro_batch.input_ids,
            micro_batch.positions,
            micro_batch.cu_seqlens,
            numbers=micro_batch.numbers,
        )
        loss = head_loss(model, hidden, micro_batch.labels, options, weight_gradient_to=taker)
        phase("backward")
        loss.backward()
        if not hidden.requires_grad:  # the head alone is trained
            weights.finish_backward(model)
        total += loss.detach()
    return total


class Pipeline(Protocol):
    """Stages of a decoder that process micro-batches together: `modelyard.parallel.pipeline`."""

    def accumulate(
        self,
        weights: Weights | ShardedWeights,
        parts: Sequence[Batch],
        options: LossOptions,
        phase: Callable[[str], object],
    ) -> Tensor:
        """As `accumulate`; a process without the last stage returns 0."""
        ...

    def score_sums(self, parts: Sequence[Batch], options: LossOptions) -> Tensor:
        """The sum over micro-batches of `modelyard.train.scores.score_sums`; 0 on a process without the last stage."""
        ...

    def last_logits(self, token_ids: Sequence[int]) -> Tensor:
        """Logits [vocabulary] after a text, on every process."""
        ...


def train_step(
    model: Decoder | Pipeline,
    weights: Weights | ShardedWeights,
    optimizer: Optimizer,
    batch: Batch,
    *,
    learning_rate: float,
    micro_batch_size: int,
    max_norm: float,
    loss_options: LossOptions,
    device: torch.device,
    mesh: Mesh | None = None,
    phase: Callable[[str], object] = untimed,
    notice: Callable[[], bool] = lambda: False,
    judge: Callable[[float, float], str | None] = lambda loss, grad_norm: None,
    abandon: bool = False,
) -> StepResult:
    """Train on one global batch; `batch` is this process's share of it, `mesh` where the others are (None: none).

    The loss is the sum over the trained tokens of all micro-batches and processes, divided once by their number;
    gradients are summed in fp32 and divided once, by that number and the options' `gradient_scale`. A loss or gradient that is
    not finite leaves weights, moments and the step count as they were. `max_norm` 0 turns clipping off. `phase` is called with `forward`, `backward` or `optimizer` where
    each begins; the gradients that the fused cross-entropy makes on its way belong to `forward`. `notice` is asked whether this
    process has something to say to all (that it was asked to stop); the step is done all the same. `judge` is shown the loss
    and the gradient's norm, the same in all processes, and may give a reason to leave the weights as they are. `abandon`:
    this process comes with an empty batch, because it was asked to stop while it waited for one; no process does the step.
    """
    mesh = mesh or alone(device)
    parts = list(micro_batches(batch, micro_batch_size, device))
    if isinstance(model, Decoder):
        loss = accumulate(model, weights, parts, loss_options, phase)
    else:
        loss = model.accumulate(weights, parts, loss_options, phase)

    phase("optimizer")
    weights.finish_gradients()
    totals = mesh.total(loss, weights.square_norm(), batch.num_targets, notice=notice(), abandon=abandon)
    mean_loss = totals.loss / max(totals.targets, 1)
    divisor = max(totals.targets, 1) * loss_options.gradient_scale
    grad_norm = math.sqrt(totals.square) / divisor

    skipped = None
    if totals.targets == 0 or totals.abandon:
        skipped = "no trained token in the batch"
    elif not math.isfinite(mean_loss):
        skipped = f"the loss is {mean_loss}"
    elif not math.isfinite(grad_norm):
        skipped = f"the gradient norm is {grad_norm}"
    else:
        skipped = judge(mean_loss, grad_norm)
    if skipped is None:
        clip = min(1.0, max_norm / (grad_norm + 1e-6)) if max_norm > 0 else 1.0
        optimizer.step(learning_rate, factor=clip / divisor, copies=weights.copies_of_masters())
        weights.publish(but=optimizer.published)
    weights.zero_gradients()
    return StepResult(mean_loss, grad_norm, totals.targets, skipped, totals.notice, totals.abandon)
