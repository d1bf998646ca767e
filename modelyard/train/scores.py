"""How well a model foresees held-out tokens: loss and accuracy, of all targets and of each kind of what an assistant says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modelyard.chat.segments import TRAINED_KINDS, Segment, lane_value
from modelyard.data.batch import Batch
from modelyard.loss.cross_entropy import IGNORED, token_scores
from modelyard.model.decoder import Decoder
from modelyard.train.step import LossOptions

KINDS = {kind.name.lower(): lane_value(Segment("", kind, "assistant")) for kind in TRAINED_KINDS}
"""Name of each kind of what an assistant says, and the byte of its targets in `Batch.kinds`. Whichever loss lane a batch has,
its other targets (a user's words, headers, text outside of conversations, messages that are left out) are of none."""


@dataclass(frozen=True)
class Score:
    loss: float
    """Mean over the targets, in nats."""
    accuracy: float
    """Share of the targets that are the likeliest word, from 0 to 1."""
    targets: int

    @classmethod
    def of(cls, sums: Sequence[float]) -> Score:
        """From sums over targets: of their losses, of those foreseen, of all."""
        loss, hits, targets = sums
        return cls(loss / max(targets, 1), hits / max(targets, 1), round(targets))

    def record(self) -> dict[str, Any]:
        """As the metrics have it; the loss is None where it is not finite."""
        loss = self.loss if math.isfinite(self.loss) else None
        return {"loss": loss, "accuracy": self.accuracy, "targets": self.targets}


@dataclass(frozen=True)
class Evaluation:
    whole: Score
    kinds: dict[str, Score]
    """Of each of `KINDS` that has a target."""

    @classmethod
    def of(cls, sums: Tensor) -> Evaluation:
        """From the `score_sums` of all the data."""
        whole, *kinds = map(Score.of, sums.tolist())
        return cls(whole, {name: score for name, score in zip(KINDS, kinds, strict=True) if score.targets})

    def record(self) -> dict[str, Any]:
        """`Score.record` of the whole; of conversations with `kinds`, each kind's own."""
        kinds = {name: score.record() for name, score in self.kinds.items()}
        return self.whole.record() | ({"kinds": kinds} if kinds else {})

    def __str__(self) -> str:
        kinds = ", ".join(
            f"{name.replace('_', ' ')} {score.loss:.4f} / {score.accuracy:.1%}"
            for name, score in self.kinds.items()
        )
        whole = self.whole
        return f"loss {whole.loss:.4f} over {whole.targets:,} tokens, accuracy {whole.accuracy:.1%}" + (
            f" ({kinds})" if kinds else ""
        )


def no_scores(device: torch.device) -> Tensor:
    """What `score_sums` gives where there is no target."""
    return torch.zeros(1 + len(KINDS), 3, dtype=torch.float64, device=device)


def score_sums(model: Decoder, batch: Batch, options: LossOptions) -> Tensor:
    """Sums over the targets of `batch`, of all and then of each of `KINDS`: their losses, those that are the likeliest word,
    their number. Fp64 [1 + kinds, 3], on the device, which the host does not wait for."""
    hidden = model(batch.input_ids, batch.positions, batch.cu_seqlens)
    return head_score_sums(model, hidden, batch, options)


def head_score_sums(model: Decoder, hidden: Tensor, batch: Batch, options: LossOptions) -> Tensor:
    """`score_sums` from what the decoder, or the part of it that has the head, makes: hidden [rows, sequence, hidden]."""
    labels = batch.labels.flatten()
    scores = token_scores(
        hidden.flatten(0, 1),
        model.output_weight,
        labels,
        implementation=options.implementation,
        z_loss=options.z_loss,
        logits_scale=model.architecture.logits_scale,
        vocabulary=model.vocabulary,
    )
    columns = torch.stack([scores.losses.double(), scores.hits, labels != IGNORED])
    sums = no_scores(hidden.device)
    sums[0] = columns.sum(1)
    if batch.kinds is not None:
        kinds = batch.kinds.flatten()
        for row, byte in zip(sums[1:], KINDS.values(), strict=True):
            row.copy_(columns.where(kinds == byte, 0.0).sum(1))
    return sums
