"""The figures of a run that stand at the top of its page, and how the configurations of several differ."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from modelyard.report import units
from modelyard.report.run import PHASES, Floats, Run
from modelyard.report.series import Places, all_events


@dataclass(frozen=True)
class Losses:
    """Of one evaluator, or of training."""

    final: float | None
    """None where it was not finite."""
    best: float | None
    best_at: int | None
    """Iteration of the best."""


@dataclass(frozen=True)
class Figures:
    """What a run came to. None where its folder does not tell; units: tokens, seconds, bytes, FLOP/s, shares of 1."""

    parameters: int | None
    trained: str | None
    """What is trained, where that is an adapter."""
    processes: str | None
    """How many there were the last time it was started, and what they shared."""
    iterations: int
    planned_iterations: int | None
    tokens: int | None
    train_loss: Losses | None
    evaluators: dict[str, Losses]
    tokens_per_second: float | None
    """Over the steps alone, evaluations and saves not counted."""
    mfu: float | None
    model_flops_per_second: float | None
    peak_memory: int | None
    seconds: float | None
    """At work: pauses between a stop and the next start are left out where the events tell them."""
    data_wait_share: float | None
    resumes: int | None
    skipped_steps: int
    state: str
    """Whether it has ended, and how; for a person."""
    last_time: float | None
    """Seconds since 1970 of the last thing known of it."""


def figures(run: Run) -> Figures:
    """The figures of `run`."""
    places = Places(run)
    iteration, tokens = run.training["iteration"], run.column("tokens")
    planned = _planned(run)
    last = [int(iteration[-1])] if len(iteration) else []
    last += [int(columns["iteration"][-1]) for columns in run.evaluators.values()]
    events = run.events
    times = [event.time for event in events or []]
    times += [float(t) for t in run.column("time")[-1:] if np.isfinite(t)]
    iterations = max(last, default=0)
    parameters, layout = run.facts.get("parameters"), run.facts.get("layout")
    skipped = run.column("skipped_steps")
    return Figures(
        parameters=parameters if isinstance(parameters, int) else None,
        trained=trained if isinstance(trained := run.facts.get("trained"), str) else None,
        processes=layout if isinstance(layout, str) else None,
        iterations=iterations,
        planned_iterations=planned,
        tokens=int(np.nanmax(tokens)) if run.has("tokens") else None,
        train_loss=losses(iteration, run.column("loss_mean" if run.has("loss_mean") else "loss")),
        evaluators={
            name: found
            for name, columns in sorted(run.evaluators.items())
            if (found := losses(columns["iteration"], columns["loss"]))
        },
        tokens_per_second=_mean(run, run.column("tokens_per_second")),
        mfu=_mean(run, run.column("mfu_causal")),
        model_flops_per_second=_mean(run, run.column("model_flops_per_second")),
        peak_memory=int(np.nanmax(run.column("memory_bytes"))) if run.has("memory_bytes") else None,
        seconds=places.seconds_at_work if places.sessions else None,
        data_wait_share=_mean(run, run.column("data_wait_share")),
        resumes=None if events is None else sum(event.kind == "resumed" for event in events),
        skipped_steps=int(np.nanmax(skipped)) if run.has("skipped_steps") else 0,
        state=_state(run, iterations, planned),
        last_time=max(times, default=None),
    )


def losses(iteration: Floats, loss: Floats) -> Losses | None:
    """Last and lowest of a loss; None where there is no record of it."""
    if not len(loss):
        return None
    final = float(loss[-1]) if np.isfinite(loss[-1]) else None
    if not np.isfinite(loss).any():
        return Losses(final, None, None)
    best = int(np.nanargmin(loss))
    return Losses(final, float(loss[best]), int(iteration[best]))


def _mean(run: Run, values: Floats) -> float | None:
    """Mean over the steps' time: a record counts by the seconds that its tokens took."""
    speed = run.column("tokens_per_second")
    tokens = np.diff(run.column("tokens"), prepend=0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        seconds = tokens / speed
    usable = np.isfinite(values) & np.isfinite(seconds) & (seconds > 0)
    if usable.any():
        return float((values[usable] * seconds[usable]).sum() / seconds[usable].sum())
    return float(np.nanmean(values)) if np.isfinite(values).any() else None


def phase_seconds(run: Run) -> dict[str, float] | None:
    """Total seconds of each phase over the run's records; None where they do not have them."""
    totals = {phase: run.column(f"seconds.{phase}") for phase in PHASES}
    if not any(np.isfinite(column).any() for column in totals.values()):
        return None
    return {phase: float(np.nansum(column)) for phase, column in totals.items()}


def _planned(run: Run) -> int | None:
    training = (run.config or {}).get("training")
    planned = training.get("train_iters") if isinstance(training, dict) else None
    return planned if isinstance(planned, int) else None


ENDS = ("finished", "failed", "stopped", "shutdown")


def _state(run: Run, iterations: int, planned: int | None) -> str:
    last = next(
        (event for event in reversed(all_events(run)) if event.kind in (*ENDS, "started", "resumed")), None
    )
    if run.events is not None and last is not None and last.kind in ENDS:
        where = "" if last.kind == "finished" else f" at iteration {last.iteration:,}"
        return f"{last.kind}{where}"
    if planned is not None and 0 < planned <= iterations:
        return "finished"
    return "no end recorded: running, or killed"


def rows(found: list[Figures]) -> list[tuple[str, list[str]]]:
    """(label, the runs' values) as the table at the top shows them; a row that no run can fill is left out."""
    table = [
        ("State", [one.state for one in found]),
        ("Last record", [_moment(one.last_time) for one in found]),
        ("Parameters", [units.quantity(one.parameters) for one in found]),
        *(
            [("Trained", [one.trained or "all" for one in found])]
            if any(one.trained for one in found)
            else []
        ),
        ("Processes", [one.processes or units.UNKNOWN for one in found]),
        ("Iterations", [_iterations(one) for one in found]),
        ("Tokens", [units.quantity(one.tokens) for one in found]),
        ("Train loss, final", [_final(one.train_loss) for one in found]),
        ("Train loss, best", [_best(one.train_loss) for one in found]),
    ]
    for name in sorted({name for one in found for name in one.evaluators}):
        table += [
            (f"{name} loss, final", [_final(one.evaluators.get(name)) for one in found]),
            (f"{name} loss, best", [_best(one.evaluators.get(name)) for one in found]),
        ]
    table += [
        ("Mean speed", [units.quantity(one.tokens_per_second, "tokens/s") for one in found]),
        ("MFU (causal)", [units.share(one.mfu) for one in found]),
        ("Model FLOP/s", [units.flops(one.model_flops_per_second) for one in found]),
        ("Peak memory", [units.size(one.peak_memory) for one in found]),
        ("Time at work", [units.duration(one.seconds) for one in found]),
        ("Waiting for data", [units.share(one.data_wait_share) for one in found]),
        ("Resumes", [units.UNKNOWN if one.resumes is None else f"{one.resumes:,}" for one in found]),
        ("Skipped steps", [f"{one.skipped_steps:,}" for one in found]),
    ]
    return [row for row in table if any(value != units.UNKNOWN for value in row[1])]


def _iterations(one: Figures) -> str:
    planned = one.planned_iterations
    return f"{one.iterations:,}" + (f" of {planned:,}" if planned and planned > one.iterations else "")


def _final(loss: Losses | None) -> str:
    if loss is None:
        return units.UNKNOWN
    return "not finite" if loss.final is None else f"{loss.final:.4f}"


def _best(loss: Losses | None) -> str:
    if loss is None or loss.best is None:
        return units.UNKNOWN
    return f"{loss.best:.4f} at {loss.best_at:,}"


def _moment(seconds: float | None) -> str:
    if seconds is None:
        return units.UNKNOWN
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"
    except (OverflowError, OSError, ValueError):
        return units.UNKNOWN


# Configurations


def flat(value: Any, prefix: str = "") -> dict[str, str]:
    """A nested configuration as dotted keys and values written as JSON would; lists are values."""
    if not isinstance(value, dict) or not value:
        return {prefix: json.dumps(value, ensure_ascii=False, default=str)} if prefix else {}
    found: dict[str, str] = {}
    for key, item in value.items():
        found |= flat(item, f"{prefix}.{key}" if prefix else str(key))
    return found


def differences(configs: list[dict[str, Any] | None]) -> list[tuple[str, list[str | None]]]:
    """(dotted key, each run's value) for every key on which the known configurations differ; None: not set there.

    Keys that all have come first: one that some lack is as a rule one that an older version did not know.
    """
    flattened = [None if config is None else flat(config) for config in configs]
    known = [one for one in flattened if one is not None]
    keys = dict.fromkeys(key for one in known for key in one)
    found = [
        (key, [None if one is None else one.get(key) for one in flattened])
        for key in keys
        if len({one.get(key) for one in known}) > 1
    ]
    return sorted(found, key=lambda row: any(row[0] not in one for one in known))
