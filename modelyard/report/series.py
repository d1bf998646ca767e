"""A run's columns as what the page draws: thinned where they are long, each point with its place on every axis."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np

from modelyard.report.run import MAY_BE_NOT_FINITE, OF_ANSWERS, PHASES, Event, Floats, Run

BUCKETS = 1000
"""A longer series than 4 × this keeps of each of so many stretches its lowest, its highest and its first bad point."""
PHASE_BARS = 400
MARKS = 1000
"""Events of one run that the plots show at most."""

PLOTTED = (
    "loss",
    "loss_mean",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "planned_tokens_per_second",
    "mfu_causal",
    "mfu_full",
    "model_flops_per_second",
    "memory_bytes",
    "planned_memory_bytes",
    "data_wait_share",
)


class Places:
    """Where an iteration or a moment of a run lies on the page's three axes: iterations, tokens, seconds at work.

    Seconds at work leave out the pauses between an end (or a kill) and the next start, as far as the events tell them.
    """

    def __init__(self, run: Run):
        self._iteration, self._tokens = run.training["iteration"], run.column("tokens")
        evaluations = (*run.evaluators.values(), *run.answers.values())
        known = [run.column("time"), *(columns["time"] for columns in evaluations)]
        events = run.events or []
        moments = np.concatenate([*known, [event.time for event in events]])
        self._moments = np.unique(moments[np.isfinite(moments)])
        starts = {event.time for event in events if event.kind in ("started", "resumed")}
        # Each session ends with the last thing known before the next one starts.
        self._starts = np.array(sorted({*self._moments[:1].tolist(), *starts}))
        following = np.searchsorted(self._moments, self._starts[1:])
        ends = self._moments[np.concatenate([following - 1, [-1] * bool(len(self._starts))]).astype(int)]
        self._lengths = ends - self._starts
        self._before = np.cumsum(self._lengths) - self._lengths

    @property
    def seconds_at_work(self) -> float:
        return float(self._lengths.sum())

    @property
    def sessions(self) -> int:
        return len(self._starts)

    def tokens(self, iteration: Floats) -> Floats:
        """Tokens consumed by the end of each iteration: read from the training records, in a line between them."""
        known = np.isfinite(self._tokens)
        if not known.any():
            return np.full(len(iteration), np.nan)
        # Before the first record as well: no iteration, no tokens.
        return np.interp(
            iteration,
            np.concatenate([[0.0], self._iteration[known]]),
            np.concatenate([[0.0], self._tokens[known]]),
        )

    def seconds(self, moment: Floats) -> Floats:
        """Seconds at work before each moment [seconds since 1970]."""
        if not len(self._starts):
            return np.full(len(moment), np.nan)
        session = np.clip(np.searchsorted(self._starts, moment, side="right") - 1, 0, None)
        inside = np.clip(moment - self._starts[session], 0, self._lengths[session])
        return np.where(np.isfinite(moment), self._before[session] + inside, np.nan)

    def axes(self, iteration: Floats, moment: Floats) -> dict[str, list[float | None]]:
        """Columns `i` [iterations], `t` [tokens], `s` [seconds at work] for the page."""
        return {
            "i": _plain(iteration),
            "t": _plain(self.tokens(iteration), digits=0),
            "s": _plain(self.seconds(moment), digits=2),
        }


def keep_extremes(values: Floats, buckets: int = BUCKETS) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Indices of the values to draw, ascending: all, or of each bucket of consecutive ones the extremes.

    Kept are the first and the last value, and of each bucket the lowest, the highest and the first that is not finite.
    So a spike of a single value survives any thinning, and none is ever averaged with its neighbours.
    """
    count = len(values)
    if count <= 4 * buckets:
        return np.arange(count)
    kept = {0, count - 1}
    edges = np.linspace(0, count, buckets + 1).astype(int)
    for begin, end in pairwise(edges):
        part = values[begin:end]
        finite = np.isfinite(part)
        if not finite.all():
            kept.add(int(begin + np.argmin(finite)))
        if finite.any():
            kept.add(int(begin + np.nanargmin(part)))
            kept.add(int(begin + np.nanargmax(part)))
    return np.array(sorted(kept))


def bucket_means(values: Floats, buckets: int = BUCKETS) -> tuple[np.ndarray[Any, Any], Floats]:
    """(last index, mean of the finite values) of each bucket that `keep_extremes` makes; what smoothing starts from."""
    edges = np.linspace(0, len(values), buckets + 1).astype(int)
    finite = np.isfinite(values)
    sums = np.add.reduceat(np.where(finite, values, 0.0), edges[:-1])
    counts = np.add.reduceat(finite.astype(float), edges[:-1])
    with np.errstate(invalid="ignore", divide="ignore"):
        return edges[1:] - 1, sums / counts


def page_data(run: Run) -> dict[str, Any]:
    """What the page's script draws of `run`.

    `series`: key → {i, t, s: places; v: values, null where not finite; smooth: the same of means, where thinned};
    `evaluators` (loss), `kind_losses`, `accuracies`, and `answers` of conversations: name → the same; `phases`: spans and seconds of each phase; `marks`: events with their places;
    `thinned`: whether anything was.
    """
    places = Places(run)
    series = {key: _series(run.training, run.column(key), places, key) for key in PLOTTED if _worth(run, key)}
    return {
        "series": series,
        "evaluators": {
            name: _series(columns, columns["loss"], places, "loss")
            for name, columns in sorted(run.evaluators.items())
        },
        "kind_losses": _of_evaluators(run, places, "loss.", ()),
        "accuracies": _of_evaluators(run, places, "accuracy.", ("accuracy",)),
        "answers": {
            f"{name}: {key.replace('_', ' ')}": _series(columns, columns[key], places, key)
            for name, columns in sorted(run.answers.items())
            for key in OF_ANSWERS
            if np.isfinite(columns[key]).any()
        },
        "phases": _phases(run, places),
        "marks": _marks(run, places),
        "thinned": any("smooth" in one for one in series.values()),
    }


def _of_evaluators(run: Run, places: Places, prefix: str, whole: tuple[str, ...]) -> dict[str, Any]:
    """The columns of each evaluator that `prefix` begins, under its name and the kind, and those of `whole`, under its name."""
    return {
        name if key in whole else f"{name}: {key.removeprefix(prefix).replace('_', ' ')}": _series(
            columns, values, places, key
        )
        for name, columns in sorted(run.evaluators.items())
        for key, values in columns.items()
        if (key in whole or key.startswith(prefix)) and np.isfinite(values).any()
    }


def _worth(run: Run, key: str) -> bool:
    return run.has(key) or (key in MAY_BE_NOT_FINITE and key in run.training)


def _series(rows: dict[str, Floats], values: Floats, places: Places, key: str) -> dict[str, Any]:
    iteration = rows["iteration"]
    moment = rows.get("time", np.full(len(iteration), np.nan))
    if key not in MAY_BE_NOT_FINITE:
        there = np.isfinite(values)
        iteration, moment, values = iteration[there], moment[there], values[there]
    kept = keep_extremes(values)
    found: dict[str, Any] = {**places.axes(iteration[kept], moment[kept]), "v": _plain(values[kept])}
    if len(kept) < len(values):
        last, means = bucket_means(values)
        found["smooth"] = {**places.axes(iteration[last], moment[last]), "v": _plain(means)}
    return found


def _phases(run: Run, places: Places) -> dict[str, Any] | None:
    """Seconds of each phase between `from` and `to`, consecutive intervals summed where there are many."""
    columns = [run.column(f"seconds.{phase}") for phase in PHASES]
    known = np.isfinite(columns).any(axis=0) if len(run.training["iteration"]) else np.empty(0, bool)
    if not known.any():
        return None
    iteration, moment = run.training["iteration"], run.column("time")
    begins = np.concatenate([[0.0], iteration[:-1]])[known]
    moments = np.concatenate([moment[:1], moment[:-1]])[known]
    iteration, moment = iteration[known], moment[known]
    edges = np.linspace(0, len(begins), min(PHASE_BARS, len(begins)) + 1).astype(int)
    first, last = edges[:-1], edges[1:] - 1
    seconds = [np.add.reduceat(np.nan_to_num(column[known]), first) for column in columns]
    return {
        "from": places.axes(begins[first], moments[first]),
        "to": places.axes(iteration[last], moment[last]),
        "seconds": {phase: _plain(values) for phase, values in zip(PHASES, seconds)},
        "intervals": len(begins),
    }


def skips_between_records(run: Run) -> list[Event]:
    """For a run that kept no events: one for each record before which steps were skipped."""
    skipped, iteration = np.nan_to_num(run.column("skipped_steps")), run.training["iteration"]
    more = np.diff(skipped, prepend=0.0)
    return [
        Event(
            int(iteration[at]),
            float(run.column("time")[at]),
            "skipped",
            f"{more[at]:.0f} step{'s' if more[at] > 1 else ''} skipped by iteration {iteration[at]:.0f}",
        )
        for at in np.flatnonzero(more > 0)
    ]


def all_events(run: Run) -> list[Event]:
    """The run's events by time, as it kept them or as far as its records tell them."""
    return sorted(
        run.events if run.events is not None else skips_between_records(run), key=lambda event: event.time
    )


def _marks(run: Run, places: Places) -> list[dict[str, Any]]:
    events = [event for event in all_events(run) if event.kind not in ("started", "finished")]
    # Saves are the many and the dull: the newest of them are left when all would be too much.
    rare = [event for event in events if event.kind not in ("saved", "exported")][-MARKS:]
    common = [event for event in events if event.kind in ("saved", "exported")]
    chosen = rare + common[len(common) - min(len(common), MARKS - len(rare)) :]
    axes = places.axes(
        np.array([float(event.iteration) for event in chosen]), np.array([event.time for event in chosen])
    )
    return [
        {"i": i, "t": t, "s": s, "kind": event.kind, "text": event.text}
        for event, i, t, s in zip(chosen, axes["i"], axes["t"], axes["s"])
    ]


def _plain(values: Floats, digits: int | None = None) -> list[float | None]:
    """Numbers for JSON: six significant digits, or so many decimals; whole ones as integers; None for NaN."""
    return [None if math.isnan(value) else _short(value, digits) for value in values.tolist()]


def _short(value: float, digits: int | None) -> float:
    if abs(value) < 1e15 and value == int(value):
        return int(value)
    return round(value, digits) if digits else int(value) if digits == 0 else float(f"{value:.6g}")
