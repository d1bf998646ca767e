"""The factor on the gradients of a run in fp16: as high as they can bear (mixed-precision training, arXiv 1710.03740)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from modelyard.train.progress import Progress
from modelyard.train.step import StepResult

if TYPE_CHECKING:
    from modelyard.config.optimizer import GradientScalerConfig

_FACTOR = 2.0
"""Between one scale and the next: a power of two, which rounds nothing."""


class GradientScaler:
    """Lowers the scale when a gradient overflows, and raises it after a long stretch without.

    What it remembers is in `progress`, and so in checkpoints. All processes see the same loss and gradient norm, and so keep
    the same scale without a word.
    """

    def __init__(self, settings: GradientScalerConfig, progress: Progress):
        self._settings, self._progress = settings, progress

    @property
    def scale(self) -> float:
        """The factor for the next step."""
        if self._settings.constant is not None:
            return self._settings.constant
        scale = self._progress.loss_scale
        return self._settings.initial if scale is None else scale

    def after(self, result: StepResult) -> str | None:
        """Take in how a step went. Where its gradient overflowed and a lower scale can help: what is done about it, in words.

        A loss that is not finite itself overflowed on the way there, and no scale on the gradients can help.
        """
        settings, progress, scale = self._settings, self._progress, self.scale
        if settings.constant is not None or not result.targets or not math.isfinite(result.loss):
            return None
        if math.isfinite(result.grad_norm):
            progress.steps_at_scale += 1
            if progress.steps_at_scale >= settings.window:
                progress.loss_scale, progress.steps_at_scale, progress.overflows = scale * _FACTOR, 0, 0
            return None
        if scale <= settings.minimum:
            return None
        progress.steps_at_scale, progress.overflows = 0, progress.overflows + 1
        if progress.overflows < settings.hysteresis:
            return f"overflow {progress.overflows} of {settings.hysteresis} that make it lower"
        progress.loss_scale = max(scale / _FACTOR, settings.minimum)
        return f"the scale is now {progress.loss_scale:g}"
