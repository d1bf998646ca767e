"""One optimizer step, as the algorithm reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from modelyard.data.batch import Batch
from modelyard.loss.cross_entropy import linear_cross_entropy
from modelyard.model.decoder import Decoder
from modelyard.train.optimizer import Optimizer
from modelyard.train.phases import untimed
from modelyard.train.weights import Weights


@dataclass(frozen=True)
class LossOptions:
    """How the loss is computed; one of these for training and evaluation alike."""

    implementation: str = "auto"
    z_loss: float = 0.0


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


def micro_batches(batch: Batch, rows: int, device: torch.device) -> Iterator[Batch]:
    for begin in range(0, batch.input_ids.shape[0], rows):
        yield batch.rows(begin, begin + rows).to(device)


def loss_sum(model: Decoder, batch: Batch, options: LossOptions) -> torch.Tensor:
    """Sum of the loss over the trained tokens of `batch`: a scalar in fp32 or wider."""
    hidden = model(batch.input_ids, batch.positions, batch.cu_seqlens)
    return linear_cross_entropy(
        hidden.flatten(0, 1),
        model.output_weight,
        batch.labels.flatten(),
        implementation=options.implementation,
        z_loss=options.z_loss,
        logits_scale=model.architecture.logits_scale,
    )


def train_step(
    model: Decoder,
    weights: Weights,
    optimizer: Optimizer,
    batch: Batch,
    *,
    learning_rate: float,
    micro_batch_size: int,
    max_norm: float,
    loss_options: LossOptions,
    device: torch.device,
    phase: Callable[[str], object] = untimed,
) -> StepResult:
    """Train on one global batch.

    The loss is the sum over the trained tokens of all micro-batches, divided once by their number; gradients are
    summed in fp32 and divided once. A loss or gradient that is not finite leaves weights, moments and the step
    count as they were. `max_norm` 0 turns clipping off. `phase` is called with `forward`, `backward` or `optimizer` where
    each begins; the gradients that the fused cross-entropy makes on its way belong to `forward`.
    """
    targets = batch.num_targets
    if targets == 0:
        return StepResult(0.0, 0.0, 0, skipped="no trained token in the batch")

    total = torch.zeros((), dtype=torch.float64, device=device)
    for micro_batch in micro_batches(batch, micro_batch_size, device):
        phase("forward")
        loss = loss_sum(model, micro_batch, loss_options)
        phase("backward")
        loss.backward()
        total += loss.detach()

    phase("optimizer")
    gradients = weights.gradients()
    grad_norm = torch.nn.utils.get_total_norm(gradients).item() / targets
    mean_loss = total.item() / targets

    skipped = None
    if not math.isfinite(mean_loss):
        skipped = f"the loss is {mean_loss}"
    elif not math.isfinite(grad_norm):
        skipped = f"the gradient norm is {grad_norm}"
    else:
        clip = min(1.0, max_norm / (grad_norm + 1e-6)) if max_norm > 0 else 1.0
        torch._foreach_mul_(gradients, clip / targets)
        optimizer.step(learning_rate)
        weights.publish()
    weights.zero_gradients()
    return StepResult(mean_loss, grad_norm, targets, skipped)
