"""Older spellings: one table, applied to plain dictionaries before anything is validated.

Eras (months in which a spelling was right in the program whose guides are read here): A 2024-12, C1 2025-01 to 03,
C2 2025-03 to 06, B 2025-06 to 09. The canonical spelling is B's, except where Modelyard's sections say otherwise.
Each repair leaves one notice. A newer dialect joins by adding rows to `REPAIRS` and dropping its rows of `NEWEST`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from modelyard.config.document import Document, KeyPath, dotted


class Conflict(Exception):
    """Both spellings of one key are there; the message is the whole line."""


@dataclass(frozen=True)
class Repair:
    """One row: `apply` rewrites a document and yields notices (without a row to act on it yields none)."""

    name: str
    apply: Callable[[Document], Iterator[str]]


def _path(key: str) -> KeyPath:
    return tuple(key.split("."))


def _notice(document: Document, old: KeyPath, new: str) -> str:
    return f"{document.origin(old)}: {dotted(old)} is now {new}"


def _move(document: Document, old: KeyPath, new: KeyPath) -> str:
    notice = _notice(document, old, dotted(new))
    if document.has(new):
        raise Conflict(
            f"{document.origin(old)}: {dotted(old)} is an older spelling of {dotted(new)}, which is also given "
            f"({document.origin(new)}); keep one"
        )
    document.move(old, new)
    return notice


def renamed(old: str, new: str) -> Repair:
    """A key or section that moved, value untouched."""

    def apply(document: Document) -> Iterator[str]:
        if document.has(_path(old)):
            yield _move(document, _path(old), _path(new))

    return Repair(f"{old} -> {new}", apply)


def converted(old: str, new: str, convert: Callable[[Any], Any]) -> Repair:
    """A key that moved and whose value is written differently."""

    def apply(document: Document) -> Iterator[str]:
        if document.has(_path(old)):
            notice = _move(document, _path(old), _path(new))
            value, origin = document.get(_path(new)), document.origin(_path(new))
            document.put(_path(new), convert(value), origin)
            yield f"{notice}: {convert(value)}"

    return Repair(f"{old} -> {new}", apply)


EVALUATORS: KeyPath = ("training", "evaluators")
_EVALUATOR_KEYS = {"interval", "offset", "evaluator"}


def _validation(document: Document) -> Iterator[str]:
    """A and C1: `training.validation: {iterations, interval, offset}`."""
    old = ("training", "validation")
    if document.has(old):
        yield _move(document, old, (*EVALUATORS, "validation"))
        _flat_keys_into_evaluator(document, (*EVALUATORS, "validation"))


def _evaluations(document: Document) -> Iterator[str]:
    """C2: `training.evaluations: {NAME: {iterations, interval, offset}}`."""
    old = ("training", "evaluations")
    if isinstance(document.get(old), dict):
        for name in list(document.get(old)):
            yield _move(document, (*old, name), (*EVALUATORS, name))
            _flat_keys_into_evaluator(document, (*EVALUATORS, name))


def _unnamed_evaluator(document: Document) -> Iterator[str]:
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
    yield f"{origin}: the unnamed evaluator in {dotted(EVALUATORS)} is now {dotted((*EVALUATORS, name))}"


def _flat_evaluators(document: Document) -> Iterator[str]:
    """B's own shorthand, and the newest dialect's form: the evaluator's keys beside its interval."""
    section = document.get(EVALUATORS)
    for name in list(section) if isinstance(section, dict) else []:
        path = (*EVALUATORS, name)
        if moved := _flat_keys_into_evaluator(document, path):
            origin = document.origin((*path, "evaluator", moved[0]))
            yield f"{origin}: {dotted(path)}: {', '.join(moved)} now belongs in {dotted((*path, 'evaluator'))}"


_FLAT_KEYS = (
    "type",
    "iterations",
    "dataset_name",
    "prompts",
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
        _move(document, (*path, key), (*path, "evaluator", key))
    return moved


def _capitalised_datasets(document: Document) -> Iterator[str]:
    for name in ("Training", "Validation", "Test"):
        if document.has(("data", "datasets", name)):
            yield _move(document, ("data", "datasets", name), ("data", "datasets", name.lower()))


def _bare_learning_rate(document: Document) -> Iterator[str]:
    path = ("optimizer", "learning_rate")
    value = document.get(path)
    if isinstance(value, int | float) and not isinstance(value, bool):
        origin = document.origin(path)
        document.put((*path, "base"), value, origin)
        yield f"{origin}: optimizer.learning_rate is now optimizer.learning_rate.base"


def _theta(scale: Any) -> Any:
    """A's rotary_embedding_scale is -ln(theta); what is no such number is left for the validation to refuse."""
    number = isinstance(scale, int | float) and not isinstance(scale, bool)
    return round(math.exp(-scale), 6) if number and -50 < scale < 50 else scale


_TRANSFORMER = "model.base_model.transformer"

REPAIRS: tuple[Repair, ...] = (
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
)
"""Old to new, in order; each row acts on one file or override at a time."""


NEWEST: dict[str, str] = {
    "model.base_model.hidden_size": f"{_TRANSFORMER}.hidden_size",
    "model.base_model.tied_embedding_weight": "model.base_model.tie_word_embeddings",
    "model.base_model.embeddings": "model.base_model.vocab_size",
    "model.base_model.decoder": f"{_TRANSFORMER} (num_layers, num_attention_heads, ffn_hidden_size, ...)",
    "model.base_model.head": f"{_TRANSFORMER}.normalization",
    "model.base_model.peft": f"{_TRANSFORMER}, without peft (LoRA is not supported yet)",
    "model.distributed.compute_dtype": "model.distributed.training_dtype",
    "model.distributed.backend": "nothing (there is one process)",
    "model.distributed.use_cuda": "nothing (a GPU is used where there is one)",
    "data.micro_batch_size": "batch.micro_batch_size (in sequences) with batch.sequence_length",
    "data.maximum_document_length": "batch.sequence_length",
    "data.seed": "data.sampling.seed",
    "data.gpu": "data.sampling.gpu",
    "data.shuffle": "data.sampling.shuffle",
    "schedule.depth_first_micro_batches": "batch.sequential_micro_batches",
    "schedule.breadth_first_micro_batches": "batch.sequential_micro_batches",
    "schedule.micro_batch_splits": "batch.micro_batch_size",
}
"""Keys of the newest dialect (Fast-LLM >= 0.3), which is not read yet, and what to write."""


def repair(document: Document) -> tuple[list[str], list[str]]:
    """Rewrite older spellings in `document`; return (notices, problems), one line each."""
    notices: list[str] = []
    problems: list[str] = []
    for row in REPAIRS:
        try:
            notices.extend(row.apply(document))
        except Conflict as conflict:
            problems.append(str(conflict))
    for key, instead in NEWEST.items():
        if document.has(_path(key)):
            problems.append(
                f"{document.origin(_path(key))}: {key} is the newest dialect (Fast-LLM >= 0.3), not read yet; write {instead}"
            )
            document.take(_path(key))
            document.prune(_path(key)[:-1])
    return notices, problems
