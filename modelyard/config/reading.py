"""From YAML files and overrides to one document in today's spelling: read, rewrite, merge."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from modelyard.config.dialect import Notice, read_as_fused, repair
from modelyard.config.document import Document, dotted
from modelyard.config.legacy_data import rewrite_data
from modelyard.config.prepare import PrepareConfig
from modelyard.config.problems import known_keys
from modelyard.config.starting import known_start
from modelyard.config.train import TrainConfig
from modelyard.config.translation import Translation
from modelyard.config.yaml import parse_override, read_yaml
from modelyard.errors import UserError, did_you_mean

Kind = Literal["train", "prepare"]


@dataclass(frozen=True)
class Reading:
    """All files and overrides as one document, nothing of it validated."""

    kind: Kind
    document: Document
    """What the user wrote, merged and in today's spelling."""
    notices: list[Notice]
    """One for each spelling that was rewritten."""
    problems: list[str]
    """What could not be."""
    translation: Translation
    """What of the newest dialect there is: its defaults, and what of it was refused."""

    def as_written(self, problems: list[str]) -> list[str]:
        """Problems of keys that were written in another spelling name it too."""
        moved = [
            (dotted(notice.path), notice.was, re.sub(r":\d+$", "", notice.partition(": ")[0]))
            for notice in self.notices
            if notice.path and notice.was
        ]
        moved.sort(key=lambda item: -len(item[0]))
        return list(dict.fromkeys(_with_spelling(problem, moved) for problem in problems))


def _with_spelling(problem: str, moved: list[tuple[str, str, str]]) -> str:
    for today, was, file in moved:
        match = re.match(
            rf"{re.escape(file)}(:\d+)?: (unknown key '\w+' in )?{re.escape(today)}(?P<below>(\.\w+)*)(?=\W|$)",
            problem,
        )
        if match and re.fullmatch(r"[\w.]+", was):
            return f"{problem} (written as {was}{match['below']})"
    return problem


def read_documents(files: Sequence[Path | str], overrides: Sequence[str], kind: str | None = None) -> Reading:
    """Read files (left to right) and overrides. Raises UserError where one is no YAML, or where nothing can be made of the keys.

    `kind` ("train" or "prepare") is what the caller can use; None takes what the keys say.
    """
    if not files and not overrides:
        raise UserError("no configuration given; name a YAML file")
    readers: list[Callable[[], Document]] = [partial(read_yaml, Path(file)) for file in files]
    readers += [partial(parse_override, text, number) for number, text in enumerate(overrides, start=1)]
    documents: list[Document] = []
    problems: list[str] = []
    for read in readers:
        try:
            documents.append(read())
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    return merge_documents(documents, kind)


def merge_documents(documents: Sequence[Document], kind: str | None = None) -> Reading:
    """Rewrite each document in today's spelling and merge them left to right; `read_documents` from there on."""
    merged = Document({}, {}, documents[0].name)
    notices: list[Notice] = []
    problems: list[str] = []
    translation = Translation()
    for document in documents:
        translation.observe(document)
        more_notices, more_problems = repair(document)
        notices, problems = notices + more_notices, problems + more_problems
        translation.take(document)
        merged.merge(document)
    found = _kind(merged, kind)
    if found == "train":
        translation.finish(merged, known_start(merged))
        translation.notices += read_as_fused(merged)
        more_lines, more_problems = rewrite_data(merged)
        notices, problems = notices + more_lines, problems + more_problems
    else:
        translation.give_back(merged)
    notices, problems = notices + translation.notices, problems + translation.problems
    return Reading(found, merged, notices, problems, translation)


def _kind(document: Document, wanted: str | None) -> Kind:
    """Whether the keys are those of a training or of a preparation config."""
    keys = [str(key) for key in document.values]
    train = sum(key in known_keys(TrainConfig, (), document) for key in keys)
    prepare = sum(key in PrepareConfig.model_fields for key in keys)
    if wanted not in ("train", "prepare", None):
        raise ValueError(f"unknown kind of configuration {wanted!r}")
    if not train and not prepare:
        if wanted is not None:
            return "train" if wanted == "train" else "prepare"
        sections = [*TrainConfig.model_fields, *PrepareConfig.model_fields]
        hint = did_you_mean(keys[0], sections) if keys else ""
        raise UserError(
            f"{document.name}: neither a training nor a preparation configuration (found {', '.join(keys[:5])}{hint}); "
            f"training has {', '.join(TrainConfig.model_fields)}"
        )
    found: Kind = "prepare" if prepare > train else "train"
    if wanted not in (found, None):
        what = {"train": "training", "prepare": "data preparation"}
        raise UserError(f"{document.name} is a configuration for {what[found]}; use `modelyard {found}`")
    return found
