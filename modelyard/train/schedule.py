"""The learning rate as a function of the optimizer step. No torch."""

from __future__ import annotations

import math

from modelyard.config.optimizer import LearningRateConfig, Stage


def learning_rate(config: LearningRateConfig, step: int) -> float:
    """The learning rate of optimizer step `step`, counted from 1 over the steps that were not skipped.

    The warm-up is a line from 0 to `base` over steps [0, warmup_iterations], so step 1 has `base / warmup_iterations`
    and never 0. Then, with c the fraction of the way from the start of the decay to `decay_iterations`, an absolute
    step, and p = c ** decay_power:

        linear, power, wsd   base + (minimum - base) * p
        cosine               base + (minimum - base) * (1 - cos(pi * p)) / 2

    The decay starts where the warm-up ends (`wsd`: at `decay_start_iteration`). From `decay_iterations` on the rate is
    `minimum`; `constant` stays at `base`. A `schedule` replaces all of it, stage by stage; after its last stage the
    rate stays where it ended.
    """
    if config.schedule is not None:
        return _staged(config.stages(), step)
    if step < config.warmup_iterations:
        return config.base * step / config.warmup_iterations
    if config.decay_style == "constant":
        return config.base
    assert config.decay_iterations is not None, "checked where the configuration is read"
    start = config.warmup_iterations
    if config.decay_style == "wsd":
        assert config.decay_start_iteration is not None, "checked where the configuration is read"
        start = config.decay_start_iteration
    fraction = (step - start) / (config.decay_iterations - start)
    shape = "cosine" if config.decay_style == "cosine" else "linear"
    return _between(shape, config.base, config.minimum, fraction, config.decay_power)


def _staged(stages: list[Stage], step: int) -> float:
    begin = 0
    for stage in stages:
        if stage.steps is None:
            return stage.begin_rate
        if step <= begin + stage.steps:
            return _between(
                stage.shape, stage.begin_rate, stage.end_rate, (step - begin) / stage.steps, stage.power
            )
        begin += stage.steps
    return stages[-1].end_rate


def _between(shape: str, begin: float, end: float, fraction: float, power: float) -> float:
    """The rate at `fraction` of the way from `begin` to `end`."""
    if fraction <= 0:
        return begin
    if fraction >= 1:
        return end
    progress = fraction**power
    if shape == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return begin + (end - begin) * progress
