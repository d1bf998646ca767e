"""Reads an experiment folder: its records as columns, its events, its configuration, and what of these is missing."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from modelyard.config.architecture import Architecture, Rotary
from modelyard.errors import UserError, missing_path
from modelyard.files import numbered_folders

Floats = npt.NDArray[np.float64]

PHASES = ("data", "forward", "backward", "optimizer", "checkpoint", "evaluation", "export", "other")
"""Where the seconds between two training records went, in the order of a step."""

NUMBERS = (
    "iteration",
    "time",
    "tokens",
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
    "skipped_steps",
)
"""Keys of a training record that are read; `seconds` becomes a column `seconds.<phase>` each."""

OF_ANSWERS = ("stopped", "valid_calls")
"""Shares that an evaluator of conversations measures: answers that ended by themselves, calls as they are defined."""

MAY_BE_NOT_FINITE = ("loss", "loss_mean", "grad_norm")
"""Where null (or NaN) says that the number was not finite; elsewhere it says that there is none."""


@dataclass(frozen=True)
class Samples:
    """What one evaluator wrote at one iteration."""

    iteration: int
    evaluator: str
    texts: list[tuple[str, str]]
    """Prompt and continuation, in the evaluator's order."""


@dataclass(frozen=True)
class Event:
    iteration: int
    time: float
    """Seconds since 1970."""
    kind: str
    text: str
    seconds: dict[str, float] = field(default_factory=dict)
    """Of each phase since the last training record, where it is the end of the run or of a part of it."""


@dataclass
class Run:
    """One experiment as far as its folder tells."""

    folder: Path
    training: dict[str, Floats]
    """Columns of the training records, ordered by iteration; NaN where a record has no such number."""
    evaluators: dict[str, dict[str, Floats]] = field(default_factory=dict)
    """Columns `iteration`, `time`, `loss`, `targets` of each evaluator; where its records have them, `accuracy` and for each
    kind of what an assistant says `loss.<kind>` and `accuracy.<kind>`."""
    samples: list[Samples] = field(default_factory=list)
    answers: dict[str, dict[str, Floats]] = field(default_factory=dict)
    """Columns `iteration`, `time`, `stopped`, `valid_calls` of each evaluator of conversations."""
    events: list[Event] | None = None
    """None where the run kept none."""
    config: dict[str, Any] | None = None
    """The resolved configuration."""
    facts: dict[str, Any] = field(default_factory=dict)
    """`parameters`, `modelyard_version`, `torch_version`, `device`, `layout`, as far as they are known."""
    remarks: list[str] = field(default_factory=list)
    """What is missing or damaged, each for a person to read."""

    def column(self, key: str) -> Floats:
        """The training records' `key`; all NaN where no record has it."""
        found = self.training.get(key)
        return np.full(len(self.training["iteration"]), np.nan) if found is None else found

    def has(self, key: str) -> bool:
        """Whether any training record has a finite `key`."""
        return bool(np.isfinite(self.column(key)).any())


def read_run(folder: Path) -> Run:
    """Read the experiment in `folder`, finished or not. Raises UserError where there is none."""
    _refuse_what_is_no_run(folder)
    remarks: list[str] = []
    training, evaluators, samples, answers = _metrics(folder / "metrics.jsonl", remarks)
    run = Run(folder, training, evaluators, samples, answers, remarks=remarks)
    run.events = _events(folder / "events.jsonl", remarks)
    _add_last_seconds(run)
    _configuration(run)
    if len(training["iteration"]) and not any(f"seconds.{phase}" in training for phase in PHASES):
        remarks.append(
            "The records do not say where the time went (an older version wrote them): time per phase is left out."
        )
    return run


def is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("metrics.jsonl", "events.jsonl"))


def _refuse_what_is_no_run(folder: Path) -> None:
    if not folder.exists():
        raise UserError(missing_path(folder))
    if not folder.is_dir():
        hint = f"; name its folder, {folder.parent}" if is_run(folder.parent) else ""
        raise UserError(f"{folder} is a file, not the folder of a run{hint}")
    if is_run(folder):
        return
    try:
        inside = sorted(child for child in folder.iterdir() if child.is_dir() and is_run(child))
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from None
    above = next((parent for parent in folder.resolve().parents if is_run(parent)), None)
    if inside:
        hint = f"; runs in it: {' '.join(map(str, inside[:5]))}{' …' if len(inside) > 5 else ''}"
    elif above:
        hint = f"; it lies in the run {above}"
    else:
        hint = " (a run's folder is its config's run.experiment_dir)"
    raise UserError(f"{folder} is not the folder of a run: it has no metrics.jsonl{hint}")


# metrics.jsonl


def json_lines(path: Path, remarks: list[str]) -> Iterator[dict[str, Any]]:
    """The records of a file of JSON lines; what cannot be read is counted in `remarks`, and so is a torn last line."""
    damaged: list[int] = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    if line.strip() and not line.endswith(b"\n"):
                        remarks.append(
                            f"The last line of {path.name} is not whole (the run was writing it, or was killed while it "
                            "did); it is left out."
                        )
                    elif line.strip():
                        damaged.append(number)
                    continue
                if isinstance(record, dict):
                    yield record
                else:
                    damaged.append(number)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if damaged:
        lines = ", ".join(map(str, damaged[:5])) + (" …" if len(damaged) > 5 else "")
        remarks.append(
            f"{len(damaged):,} line{'s' if len(damaged) > 1 else ''} of {path.name} cannot be read and are left out: "
            f"line {lines}."
        )


class _Columns:
    """Rows of numbers, kept by column: 8 bytes a number, for runs of millions of records."""

    def __init__(self) -> None:
        self._columns: dict[str, array[float]] = {}
        self._rows = 0

    def add(self, row: dict[str, Any]) -> None:
        for key, value in row.items():
            if key not in self._columns:
                self._columns[key] = array("d", [math.nan]) * self._rows
            self._columns[key].append(_number(value))
        self._rows += 1
        for column in self._columns.values():
            if len(column) < self._rows:
                column.append(math.nan)

    def arrays(self) -> dict[str, Floats]:
        """The columns, their rows in the order of `iteration`."""
        arrays = {key: np.array(column) for key, column in self._columns.items()}
        iteration = arrays.setdefault("iteration", np.empty(0))
        if (np.diff(iteration) < 0).any():
            order = np.argsort(iteration, kind="stable")
            arrays = {key: column[order] for key, column in arrays.items()}
        return arrays


def _number(value: Any) -> float:
    """A finite number as a float, NaN for all else."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            return math.nan
        return number if math.isfinite(number) else math.nan
    return math.nan


def _metrics(
    path: Path, remarks: list[str]
) -> tuple[dict[str, Floats], dict[str, dict[str, Floats]], list[Samples], dict[str, dict[str, Floats]]]:
    training, evaluators, samples = _Columns(), dict[str, _Columns](), list[Samples]()
    answers = dict[str, _Columns]()
    strange = 0
    if not path.is_file():
        remarks.append(
            "metrics.jsonl is not there: the run has not logged anything, or the file was removed."
        )
        return training.arrays(), {}, [], {}
    for record in json_lines(path, remarks):
        iteration, name = _number(record.get("iteration")), record.get("evaluator")
        if math.isnan(iteration):
            strange += 1
        elif name is None:
            row = {key: record[key] for key in NUMBERS if key in record}
            seconds = record.get("seconds")
            if isinstance(seconds, dict):
                row |= {f"seconds.{phase}": seconds.get(phase) for phase in PHASES}
            training.add(row)
        elif isinstance(record.get("samples"), list):
            samples.append(Samples(int(iteration), str(name), _texts(record["samples"])))
            if "stopped" in record:
                row = {key: record.get(key) for key in ("iteration", "time", *OF_ANSWERS)}
                answers.setdefault(str(name), _Columns()).add(row)
        elif "loss" in record:
            row = {key: record.get(key) for key in ("iteration", "time", "loss", "targets")}
            if "accuracy" in record:
                row["accuracy"] = record["accuracy"]
            kinds = record.get("kinds")
            for kind, score in kinds.items() if isinstance(kinds, dict) else ():
                if isinstance(score, dict):
                    row |= {f"{key}.{kind}": score.get(key) for key in ("loss", "accuracy")}
            evaluators.setdefault(str(name), _Columns()).add(row)
    if strange:
        plural = strange > 1
        remarks.append(
            f"{strange:,} record{'s' if plural else ''} of {path.name} {'have' if plural else 'has'} no iteration and "
            f"{'are' if plural else 'is'} left out."
        )
    columns = training.arrays()
    if not len(columns["iteration"]):
        remarks.append("metrics.jsonl has no training records yet.")
    found = [{name: rows.arrays() for name, rows in of.items()} for of in (evaluators, answers)]
    return columns, found[0], samples, found[1]


def _texts(samples: list[Any]) -> list[tuple[str, str]]:
    return [(str(s.get("prompt", "")), str(s.get("text", ""))) for s in samples if isinstance(s, dict)]


# events.jsonl


def _events(path: Path, remarks: list[str]) -> list[Event] | None:
    if not path.is_file():
        remarks.append(
            "events.jsonl is not there (an older version wrote this run): resumes, saves and the end are not known, and "
            "pauses count as time."
        )
        return None
    events = []
    layout: str | None = None
    for record in json_lines(path, remarks):
        iteration, when = _number(record.get("iteration")), _number(record.get("time"))
        if "event" in record and not math.isnan(when):
            iteration = 0 if math.isnan(iteration) else int(iteration)
            kind = str(record["event"])
            spent = record.get("seconds")
            seconds = (
                {phase: _number(spent.get(phase)) for phase in PHASES} if isinstance(spent, dict) else {}
            )
            text = str(record.get("text") or kind)
            before, layout = layout, record.get("layout", layout)  # older versions kept none
            if before is not None and layout != before:
                text += f"; on {layout}, before on {before}"
            events.append(Event(iteration, when, kind, text, seconds))
    return events


def _add_last_seconds(run: Run) -> None:
    """Count what came after the last record (its save, its evaluation) with that record.

    What a session spent that ended before the run's first record counts with that one, which a later session wrote.
    """
    iterations = run.training["iteration"]
    if not len(iterations):
        return
    for event in run.events or []:
        record = max(0, int(np.searchsorted(iterations, event.iteration, side="right")) - 1)
        for phase, seconds in event.seconds.items():
            column = run.training.get(f"seconds.{phase}")
            if column is not None and math.isfinite(seconds):
                column[record] = np.nan_to_num(column[record]) + seconds


# config.json, or else the newest checkpoint


def _configuration(run: Run) -> None:
    path = run.folder / "config.json"
    try:
        written = json.loads(path.read_bytes())
        run.config = written["config"] if isinstance(written["config"], dict) else None
        run.facts = {key: value for key, value in written.items() if key != "config"}
        return
    except FileNotFoundError:
        reason = "config.json is not there (an older version wrote this run)"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"config.json cannot be read ({type(error).__name__}: {error})"
    for folder in reversed(numbered_folders(run.folder / "checkpoint")):
        try:
            config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
            state = json.loads((folder / "state.json").read_bytes())
            shape = dict(state["architecture"])
            architecture = Architecture(rotary=Rotary(**shape.pop("rotary")), **shape)
            run.facts = {
                "parameters": architecture.parameter_count(),
                "modelyard_version": state.get("modelyard_version"),
                "torch_version": state.get("torch_version"),
                "device": state.get("initialized_on"),
            }
            run.config = config if isinstance(config, dict) else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
            continue
        run.remarks.append(f"{reason}: the configuration is that of checkpoint {folder.name}.")
        return
    run.remarks.append(
        f"{reason}, and there is no checkpoint to take it from: the configuration is not known."
    )


def names(folders: list[Path]) -> list[str]:
    """A name for each folder: its last part, and as many parts before it as it takes to tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    taken = [1] * len(parts)
    while True:
        found = ["/".join(p[-n:]) for p, n in zip(parts, taken)]
        again = [i for i, name in enumerate(found) if found.count(name) > 1 and taken[i] < len(parts[i])]
        if not again:
            return found
        for i in again:
            taken[i] += 1
