"""Older spellings: one table, applied to plain dictionaries before anything is validated.

Eras (months in which a spelling was right in the program whose guides are read here): A 2024-12, C1 2025-01 to 03,
C2 2025-03 to 06, B 2025-06 to 09. The canonical spelling is B's, except where Modelyard's sections say otherwise.
Each repair leaves one notice. What the newest dialect only renamed is here too; the rest of it is in `newest.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from modelyard.config.document import Document, KeyPath, dotted
from modelyard.config.newest import RENAMED
from modelyard.config.problems import shown


class Notice(str):
    """One line about what was rewritten, which knows the key that it is about."""

    path: KeyPath
    """Where the value is now; empty where nothing is left of it."""
    was: str
    """How it was written, short."""

    def __new__(cls, line: str, path: KeyPath = (), was: str = "") -> Notice:
        notice = super().__new__(cls, line)
        notice.path, notice.was = path, was
        return notice


class Conflict(Exception):
    """Both spellings of one key are there; the message is the whole line."""


@dataclass(frozen=True)
class Repair:
    """One row: `apply` rewrites a document and yields notices (without a row to act on it yields none)."""

    name: str
    apply: Callable[[Document], Iterator[Notice]]


def _path(key: str) -> KeyPath:
    return tuple(key.split("."))


def move(document: Document, old: KeyPath, new: KeyPath) -> Notice:
    """Move a key and say so. Raises Conflict where both spellings are given."""
    notice = Notice(f"{document.origin(old)}: {dotted(old)} is now {dotted(new)}", new, dotted(old))
    if document.has(new):
        raise Conflict(
            f"{document.origin(old)}: {dotted(old)} is an older spelling of {dotted(new)}, which is also given "
            f"({document.origin(new)}); keep one"
        )
    document.move(old, new)
    return notice


def renamed(old: str, new: str) -> Repair:
    """A key or section that moved, value untouched."""

    def apply(document: Document) -> Iterator[Notice]:
        if document.has(_path(old)):
            yield move(document, _path(old), _path(new))

    return Repair(f"{old} -> {new}", apply)


def converted(old: str, new: str, convert: Callable[[Any], Any]) -> Repair:
    """A key that moved and whose value is written differently."""

    def apply(document: Document) -> Iterator[Notice]:
        if document.has(_path(old)):
            notice = move(document, _path(old), _path(new))
            value, origin = document.get(_path(new)), document.origin(_path(new))
            document.put(_path(new), convert(value), origin)
            yield Notice(f"{notice}: {convert(value)}", notice.path, f"{notice.was}: {shown(value)}")

    return Repair(f"{old} -> {new}", apply)


EVALUATORS: KeyPath = ("training", "evaluators")
_EVALUATOR_KEYS = {"interval", "offset", "evaluator"}


def _validation(document: Document) -> Iterator[Notice]:
    """A and C1: `training.validation: {iterations, interval, offset}`."""
    old = ("training", "validation")
    if document.has(old):
        yield move(document, old, (*EVALUATORS, "validation"))
        _flat_keys_into_evaluator(document, (*EVALUATORS, "validation"))


def _evaluations(document: Document) -> Iterator[Notice]:
    """C2: `training.evaluations: {NAME: {iterations, interval, offset}}`."""
    old = ("training", "evaluations")
    if isinstance(document.get(old), dict):
        for name in list(document.get(old)):
            yield move(document, (*old, name), (*EVALUATORS, name))
            _flat_keys_into_evaluator(document, (*EVALUATORS, name))


def _unnamed_evaluator(document: Document) -> Iterator[Notice]:
    """One guide prints a single evaluator without its name: it is called after its dataset."""
    section = document.get(EVALUATORS)
    if not isinstance(section, dict) or not section or not set(section) & _EVALUATOR_KEYS:
        return
    evaluator = section.get("evaluator")
    if (
        not isinstance(evaluator, dict)
        or "dataset_name" not in evaluator
        or not set(section) <= _EVALUATOR_KEYS
    ):
        return
    origin = document.origin((*EVALUATORS, next(iter(section))))
    name = str(evaluator["dataset_name"])
    for key in list(section):
        document.move((*EVALUATORS, key), (*EVALUATORS, name, key))
    named = (*EVALUATORS, name)
    line = f"{origin}: the unnamed evaluator in {dotted(EVALUATORS)} is now {dotted(named)}"
    yield Notice(line, named, "without a name")


def _flat_evaluators(document: Document) -> Iterator[Notice]:
    """B's own shorthand, and the newest dialect's form: the evaluator's keys beside its interval."""
    section = document.get(EVALUATORS)
    for name in list(section) if isinstance(section, dict) else []:
        path = (*EVALUATORS, name)
        if moved := _flat_keys_into_evaluator(document, path):
            origin = document.origin((*path, "evaluator", moved[0]))
            line = (
                f"{origin}: {dotted(path)}: {', '.join(moved)} now belongs in {dotted((*path, 'evaluator'))}"
            )
            yield Notice(line, (*path, "evaluator"), "beside the interval")


_FLAT_KEYS = (
    "type",
    "iterations",
    "dataset_name",
    "prompts",
    "path",
    "conversations",
    "limit",
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "seed",
)


def _flat_keys_into_evaluator(document: Document, path: KeyPath) -> list[str]:
    entry = document.get(path)
    moved = [key for key in _FLAT_KEYS if isinstance(entry, dict) and key in entry]
    for key in moved:
        move(document, (*path, key), (*path, "evaluator", key))
    return moved


def _capitalised_datasets(document: Document) -> Iterator[Notice]:
    for name in ("Training", "Validation", "Test"):
        if document.has(("data", "datasets", name)):
            yield move(document, ("data", "datasets", name), ("data", "datasets", name.lower()))


def _bare_learning_rate(document: Document) -> Iterator[Notice]:
    path = ("optimizer", "learning_rate")
    value = document.get(path)
    if isinstance(value, int | float) and not isinstance(value, bool):
        origin = document.origin(path)
        document.put((*path, "base"), value, origin)
        new = (*path, "base")
        yield Notice(
            f"{origin}: optimizer.learning_rate is now {dotted(new)}", new, "optimizer.learning_rate"
        )


def _command(document: Document) -> Iterator[Notice]:
    """`type` of a whole file, newest dialect: the words of the command line once more, `train_gpt` for `train gpt`."""
    word = document.get(("type",))
    if not isinstance(word, str):
        return
    origin = document.origin(("type",))
    if re.fullmatch(r"train_\w+|prepare_gpt_memmap", word):
        document.take(("type",))
        was = f"type: {word}"
        yield Notice(f"{origin}: {was} is left out: the command says what is done", (), was)
    elif re.fullmatch(r"evaluate_\w+", word):
        document.take(("type",))
        raise Conflict(f"{origin}: type: {word}: leave it out and run `modelyard evaluate`")


def _one_worker_count(document: Document) -> Iterator[Notice]:
    """Preparation, newest dialect: one number for what has three."""
    old, new = ("num_workers",), ("loading_workers", "tokenize_workers", "saving_workers")
    if not document.has(old):
        return
    for name in new:
        if document.has((name,)):
            raise Conflict(
                f"{document.origin(old)}: num_workers is another spelling of {', '.join(new)}, and {name} is also given "
                f"({document.origin((name,))}); keep one"
            )
    value, origin = document.get(old), document.origin(old)
    document.take(old)
    for name in new:
        document.put((name,), value, origin)
    yield Notice(f"{origin}: num_workers is now {', '.join(new)}", (new[0],), "num_workers")


def left_out(key: str, why: str) -> Repair:
    """A key of preparation that nothing here depends on."""

    def apply(document: Document) -> Iterator[Notice]:
        if document.has(_path(key)):
            value, origin = document.get(_path(key)), document.origin(_path(key))
            document.take(_path(key))
            yield Notice(f"{origin}: {key}: {shown(value)} is left out: {why}", (), f"{key}: {shown(value)}")

    return Repair(f"{key} -> nothing", apply)


def _theta(scale: Any) -> Any:
    """A's rotary_embedding_scale is -ln(theta); what is no such number is left for the validation to refuse."""
    number = isinstance(scale, int | float) and not isinstance(scale, bool)
    return round(math.exp(-scale), 6) if number and -50 < scale < 50 else scale


def read_as_fused(document: Document) -> Iterator[Notice]:
    """`cross_entropy_impl: triton`, which every dialect has, on the merged document."""
    path = ("model", "base_model", "cross_entropy_impl")
    if document.get(path) == "triton":
        origin = document.origin(path)
        document.put(path, "fused", origin)
        line = f"{origin}: {dotted(path)}: triton is read as fused (the kernel follows the hardware)"
        yield Notice(line, path, "triton")


_TRANSFORMER = "model.base_model.transformer"

REPAIRS: tuple[Repair, ...] = (
    Repair("type: train_MODEL -> nothing", _command),
    Repair("training.validation -> training.evaluators.validation", _validation),
    Repair("training.evaluations -> training.evaluators", _evaluations),
    Repair("unnamed evaluator -> named after its dataset", _unnamed_evaluator),
    Repair("evaluator's keys beside its interval -> evaluator", _flat_evaluators),
    Repair("data.datasets.Training -> data.datasets.training", _capitalised_datasets),
    renamed("data.sampling.use_loss_masking_spans", "batch.use_loss_masking_spans"),
    renamed("data.truncate_documents", "batch.truncate_documents"),
    renamed("batch.depth_first_micro_batches", "batch.sequential_micro_batches"),
    Repair("optimizer.learning_rate: NUMBER -> optimizer.learning_rate.base", _bare_learning_rate),
    renamed("pretrained.load_weights", "pretrained.model_weights"),
    renamed("model.distributed.distributed_timeout", "model.distributed.timeout"),
    converted(
        f"{_TRANSFORMER}.use_rotary_embeddings",
        f"{_TRANSFORMER}.rotary.type",
        lambda on: "default" if on else "none",
    ),
    converted(
        f"{_TRANSFORMER}.rotary_embedding_scale",
        f"{_TRANSFORMER}.rotary.theta",
        _theta,
    ),
    renamed(f"{_TRANSFORMER}.normalization_type", f"{_TRANSFORMER}.normalization.type"),
    renamed(f"{_TRANSFORMER}.layer_norm_eps", f"{_TRANSFORMER}.normalization.epsilon"),
    renamed(f"{_TRANSFORMER}.normalization.layer_norm_eps", f"{_TRANSFORMER}.normalization.epsilon"),
    renamed("dataset.name_or_path", "dataset.path"),  # preparation, A
    Repair("num_workers -> loading_workers, tokenize_workers, saving_workers", _one_worker_count),
    left_out("documents_per_shard", "a shard is closed by its size, see tokens_per_shard"),
    left_out("dataset.load_from_disk", "a save_to_disk folder is recognised by its files"),
    renamed("add_bos", "tokenizer.add_bos"),
    renamed("add_eos", "tokenizer.add_eos"),
    *(renamed(old, new) for old, new in RENAMED.items()),
)
"""Old to new, in order; each row acts on one file or override at a time."""


def repair(document: Document) -> tuple[list[Notice], list[str]]:
    """Rewrite other spellings in `document`; return (notices, problems), one line each."""
    notices: list[Notice] = []
    problems: list[str] = []
    for row in REPAIRS:
        try:
            notices.extend(row.apply(document))
        except Conflict as conflict:
            problems.append(str(conflict))
    return notices, problems
