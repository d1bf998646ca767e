"""Which traces a run will write, before it starts."""

from __future__ import annotations

from modelyard.config.train import TrainConfig


def traced_iterations(config: TrainConfig) -> int:
    """How many iterations the guides' schedule (`profiling`) traces, each into a folder of its own."""
    schedule = config.profiling
    left_out = schedule.wait + schedule.warmup
    if not schedule.due(schedule.skip + left_out + 1):
        return 0
    period = left_out + schedule.cycles
    cycles, rest = divmod(max(0, config.training.train_iters - schedule.skip), period)
    return cycles * schedule.cycles + max(0, rest - left_out)


def trace_warnings(config: TrainConfig) -> list[str]:
    """Traces that are asked for and never come, and those that come again and again."""
    warnings = []
    last = config.training.train_iters
    if beyond := sorted(i for i in config.training.profiling.iterations if i > last):
        warnings.append(
            f"training.profiling.iterations: {', '.join(map(str, beyond))}: never traced, training.train_iters is {last:,}"
        )
    count, once = traced_iterations(config), config.profiling.cycles
    if count > once:
        warnings.append(
            f"profiling traces {once} of every {config.profiling.wait + config.profiling.warmup + once} iterations to the "
            f"end: {count:,} folders in {config.run.experiment_dir / 'profile'}; training.profiling.iterations names single ones"
        )
    return warnings
