"""`optimizer`: AdamW and the learning-rate schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast, get_args

from pydantic import Field, model_validator

from modelyard.config.base import Section

DecayStyle = Literal["constant", "linear", "power", "cosine", "wsd"]
StageShape = Literal["constant", "linear", "power", "cosine"]


@dataclass(frozen=True)
class Stage:
    """One stretch of a `schedule`: from `begin_rate` to `end_rate` over `steps` optimizer steps (None: for ever)."""

    shape: StageShape
    steps: int | None
    begin_rate: float
    end_rate: float
    power: float


class LearningRateConfig(Section):
    """The learning rate as a function of the optimizer step, counted from 1 over steps that were not skipped.

    Warm-up is a line from 0 to `base` over steps [0, warmup_iterations]; the decay follows until step
    `decay_iterations`, an absolute step and not a duration; from there on the rate stays at `minimum`.
    """

    base: float = Field(default=1e-4, ge=0)
    """Learning rate after the warm-up."""
    minimum: float = Field(default=0.0, ge=0)
    """Learning rate at and after the end of the decay."""
    decay_style: DecayStyle = "constant"
    """Shape of the decay; `linear` and `power` are one shape (the power is decay_power), `wsd` is warm-up, stable, decay."""
    decay_iterations: int | None = Field(default=None, gt=0)
    """Step at which the decay ends, counted from the start of the run, warm-up included, in iterations."""
    decay_start_iteration: int | None = Field(default=None, ge=0)
    """`wsd` only: step until which the rate stays at `base`, in iterations; from there it decays to `minimum`."""
    decay_power: float = Field(default=1.0, gt=0)
    """Exponent on the decayed fraction, before its shape; 1 is a plain line, cosine or wsd; wsd with 0.5 is "1 - sqrt"."""
    warmup_iterations: int = Field(default=0, ge=0)
    """Length of the warm-up, in iterations."""
    schedule: str | None = None
    """All of the above in one line: `shape,steps,rate[,end_rate[,power]];...`, steps < 0 for ever; replaces the other keys."""

    @model_validator(mode="after")
    def _possible(self) -> LearningRateConfig:
        problems = self._schedule_problems() if self.schedule is not None else self._decay_problems()
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _decay_problems(self) -> list[str]:
        style, end, start = self.decay_style, self.decay_iterations, self.decay_start_iteration
        problems = []
        if style != "constant" and end is None:
            problems.append(f"decay_style {style} needs decay_iterations (the step at which the decay ends)")
        if style != "constant" and end is not None and end <= self.warmup_iterations:
            problems.append(
                f"decay_iterations {end} is not after warmup_iterations {self.warmup_iterations}; it is the absolute "
                "step at which the decay ends, warm-up included"
            )
        if style != "constant" and self.minimum > self.base:
            problems.append(f"minimum {self.minimum:g} is above base {self.base:g}")
        if style == "wsd" and start is None:
            problems.append(
                "decay_style wsd needs decay_start_iteration (the step until which the rate stays at base)"
            )
        if style != "wsd" and start is not None:
            problems.append(f"decay_start_iteration belongs to decay_style wsd, not {style}")
        if style == "wsd" and start is not None and start < self.warmup_iterations:
            problems.append(
                f"decay_start_iteration {start} lies inside the warm-up ({self.warmup_iterations} iterations)"
            )
        if style == "wsd" and start is not None and end is not None and start >= end:
            problems.append(f"decay_start_iteration {start} is not before decay_iterations {end}")
        return problems

    def _schedule_problems(self) -> list[str]:
        # A key at its default says nothing: a saved configuration has all of them.
        defaults = {
            name: field.default for name, field in type(self).model_fields.items() if name != "schedule"
        }
        others = sorted(name for name, default in defaults.items() if getattr(self, name) != default)
        if others:
            return [
                f"schedule describes the whole learning rate; remove {', '.join(others)}, or remove schedule"
            ]
        try:
            stages = self.stages()
        except ValueError as error:
            return [f"schedule '{self.schedule}': {error}"]
        if not stages:
            return [f"schedule '{self.schedule}': there is no stage in it"]
        if any(stage.steps is None for stage in stages[:-1]):
            return [f"schedule '{self.schedule}': only the last stage may go on for ever"]
        return []

    def stages(self) -> list[Stage]:
        """`schedule` taken apart; empty without one. Raises ValueError."""
        return [_stage(text) for text in (self.schedule or "").strip().strip(";").split(";") if text.strip()]


def _stage(text: str) -> Stage:
    parts = [part.strip() for part in text.split(",")]
    shapes = get_args(StageShape)
    if parts[0] not in shapes:
        raise ValueError(f"'{parts[0]}' is not a shape ({', '.join(shapes)})")
    if not 3 <= len(parts) <= 5:
        raise ValueError(f"'{text.strip()}' is not `shape,steps,rate[,end_rate[,power]]`")
    try:
        steps, rates = int(parts[1].replace("_", "")), [float(part) for part in parts[2:]]
    except ValueError:
        raise ValueError(f"'{text.strip()}' is not `shape,steps,rate[,end_rate[,power]]`") from None
    begin = rates[0]
    end = rates[1] if len(rates) > 1 else begin
    power = rates[2] if len(rates) > 2 else 1.0
    possible = all(math.isfinite(rate) for rate in rates) and min(begin, end) >= 0 and power > 0
    if steps == 0 or not possible:
        raise ValueError(
            f"'{text.strip()}': steps must not be 0, rates must be finite and >= 0, the power > 0"
        )
    if parts[0] == "constant" and end != begin:
        raise ValueError(f"'{text.strip()}': a constant stage has one rate")
    if parts[0] != "constant" and (steps < 0 or len(rates) < 2):
        raise ValueError(f"'{text.strip()}': a {parts[0]} stage needs an end_rate and a number of steps")
    return Stage(cast(StageShape, parts[0]), steps if steps > 0 else None, begin, end, power)


class GradientScalerConfig(Section):
    """The factor on the gradients while they are float16, whose range ends at 65504 and whose smallest numbers are coarse.

    It is a factor on the loss of a token, which is a sum here until the step divides it by all tokens (elsewhere it is on the
    mean over the batch, and so needs larger numbers). Only training_dtype float16 has one.
    """

    constant: float | None = Field(default=None, gt=0)
    """A factor that never changes; null: it follows the gradients."""
    initial: float = Field(default=64.0, gt=0)
    """The factor to begin with."""
    minimum: float = Field(default=1.0, gt=0)
    """It is not lowered below this; overflows there count as skipped steps (training.max_skipped_steps)."""
    window: int = Field(default=1000, gt=0)
    """Steps without an overflow after which the factor is doubled."""
    hysteresis: int = Field(default=2, gt=0)
    """Overflows, since the factor was last doubled, with which it begins to be halved; each further one halves it again."""

    @model_validator(mode="after")
    def _ordered(self) -> GradientScalerConfig:
        if self.minimum > self.initial:
            raise ValueError(f"minimum {self.minimum:g} is above initial {self.initial:g}")
        return self


class OptimizerConfig(Section):
    """AdamW with decoupled weight decay; biases and norms are not decayed."""

    learning_rate: LearningRateConfig = Field(default_factory=LearningRateConfig)
    """The learning rate and its schedule."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decay of the weight matrices per step, relative to the learning rate."""
    beta_1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the running mean of the gradient."""
    beta_2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the running mean of the squared gradient."""
    epsilon: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    gradient_norm_clipping: float = Field(default=1.0, ge=0)
    """Largest norm of the whole gradient; larger ones are scaled down to it; 0 switches clipping off."""
    default_learning_rate_scale: float | None = Field(default=None, ge=0)
    """Factor on the learning rate of parameters that have no *_lr_scale of their own; 0 freezes them; null: 1."""
    state: Literal["float32", "8bit"] = "float32"
    """How the two moments of each parameter are kept in memory: 8bit takes a quarter, see docs/memory.md. Checkpoints do not
    differ."""
    gradient_scaler: GradientScalerConfig = Field(default_factory=GradientScalerConfig)
    """For training_dtype float16: the factor that keeps gradients within its range."""
