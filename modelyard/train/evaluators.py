"""The loss on held-out data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from modelyard.data.stream import DataStream
from modelyard.model.decoder import Decoder
from modelyard.train.step import LossOptions, loss_sum, micro_batches


@dataclass(frozen=True)
class Evaluation:
    loss: float
    """Mean over the targets, in nats."""
    targets: int


def evaluate_loss(
    model: Decoder,
    stream: DataStream,
    *,
    iterations: int,
    micro_batch_size: int,
    loss_options: LossOptions,
    device: torch.device,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Loss over the first `iterations` batches of `stream`, the same ones each time; None when `stop` cut it short."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    targets = 0
    with torch.no_grad():
        for index in range(iterations):
            if stop():
                return None
            batch = stream.batch(index)
            targets += batch.num_targets
            for micro_batch in micro_batches(batch, micro_batch_size, device):
                total += loss_sum(model, micro_batch, loss_options)
    return Evaluation(total.item() / max(targets, 1), targets)
