"""Loss and gradient spikes: what is one, and which documents were in the batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from modelyard.config.training import SpikesConfig
from modelyard.data.stream import DataStream
from modelyard.files import numbered_folders, set_aside

LEAST_DEVIATION = {"loss": 0.01, "gradient norm": 0.1}
"""Standard deviations below this, of the loss relative to its mean and of the gradient norm's logarithm, are taken as this:
after a while without noise a step that stands out by a hair is no spike."""


class SpikeWatch:
    """Compares the loss and gradient norm of each step with those of the steps before.

    Both are judged by their distance from the mean of the last `window` steps in standard deviations; the gradient norm by
    its logarithm, because it is spread over orders of magnitude. Only what is too high is a spike. What was one is counted
    into the mean as if it had stood at the threshold: where the level has risen for good, that becomes the new level.
    """

    def __init__(self, settings: SpikesConfig):
        self._settings = settings
        self._seen: dict[str, list[float]] = {"loss": [], "gradient norm": []}

    def judge(self, loss: float, grad_norm: float) -> str | None:
        """Why this step is a spike; None where it is none. Remembers the step."""
        if self._settings.policy == "ignore":
            return None
        values = {"loss": loss, "gradient norm": math.log(max(grad_norm, 1e-30))}
        shown = {"loss": loss, "gradient norm": grad_norm}
        reasons = []
        for name, value in values.items():
            seen = self._seen[name]
            if len(seen) >= self._settings.window // 2:
                mean, deviation = fmean(seen), pstdev(seen)
                least = LEAST_DEVIATION[name] * (abs(mean) if name == "loss" else 1.0)
                distance = (value - mean) / max(deviation, least, 1e-30)
                if distance > self._settings.threshold:
                    usual = mean if name == "loss" else math.exp(mean)
                    reasons.append(
                        f"the {name} {shown[name]:.4g} stands {distance:.1f} standard deviations above "
                        f"{usual:.4g}, the mean of the last {len(seen)} steps"
                    )
                    value = mean + self._settings.threshold * max(deviation, least)
            seen.append(value)
            del seen[: -self._settings.window]
        return "; ".join(reasons) or None

    def state_dict(self) -> dict[str, list[float]]:
        return {name: list(values) for name, values in self._seen.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        for name in self._seen:
            self._seen[name] = list(state.get(name, []))[-self._settings.window :]


def batch_number(iteration: int, left_out: Sequence[int]) -> int:
    """Which batch of the data, from 0, iteration number `iteration` (from 0) trains on, where some are left out.

    >>> [batch_number(i, [2, 3]) for i in range(4)]
    [0, 1, 4, 5]
    """
    number = iteration
    for left in sorted(set(left_out)):
        if left > number:
            break
        number += 1
    return number


def set_newer_aside(directory: Path, iteration: int) -> list[Path]:
    """Leave no checkpoint or export newer than `iteration` under its name, so that none is taken for one of this run.
    Returns where they are now."""
    newer = [path for path in numbered_folders(directory) if int(path.name) > iteration]
    return [set_aside(path, "rolled-back") for path in newer]


def documents_of(stream: DataStream, batch: int, batch_size: int) -> dict[str, list[int]]:
    """The documents that a batch is made of: dataset → their numbers in it, from 0."""
    found: dict[str, set[int]] = {}
    for dataset, pieces in stream.pieces(batch * batch_size, (batch + 1) * batch_size):
        found.setdefault(dataset.name, set()).update(piece.document for piece in pieces)
    return {name: sorted(numbers) for name, numbers in found.items()}


def in_words(documents: Mapping[str, Any]) -> str:
    """A few of them, for a line."""
    parts = []
    for name, numbers in documents.items():
        shown = ", ".join(map(str, numbers[:5])) + (", …" if len(numbers) > 5 else "")
        parts.append(f"{name}: {shown}")
    return "; ".join(parts)
