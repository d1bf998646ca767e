"""The oldest form of `data`: `{format, path, split}`, one source cut into training, validation and test by document."""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path
from typing import Any

from modelyard.config.dialect import Notice
from modelyard.config.document import Document
from modelyard.config.problems import shown
from modelyard.errors import UserError, did_you_mean

_KEYS = ("format", "path", "split")
_FORMATS = ("file", "list", "random")
_NAMES = ("training", "validation", "test")
_DEFAULT_SPLIT = [969, 30, 1]


def rewrite_data(document: Document) -> tuple[list[Notice], list[str]]:
    """Turn `data.format/path/split` into `data.datasets`; return (notices, problems)."""
    data = document.get(("data",))
    given = [key for key in _KEYS if isinstance(data, dict) and key in data]
    if not given:
        return [], []
    origin = document.origin(("data", given[0]))
    problems: list[str] = []
    datasets: dict[str, Any] = {}
    if document.has(("data", "datasets")):
        other = document.origin(("data", "datasets"))
        problems = [
            f"{origin}: data.{given[0]} is the older form of data.datasets, which is also given ({other}); keep one"
        ]
    else:
        try:
            datasets = _datasets(document)
        except UserError as error:
            problems = error.problems
    for key in given:
        document.take(("data", key))
    if not problems:
        document.put(("data", "datasets"), datasets, origin)
    if problems:
        return [], problems
    words = "/".join(given)
    line = f"{origin}: data.{words} is now data.datasets: {', '.join(datasets)}"
    return [Notice(line, ("data", "datasets"), f"data.{words}")], []


def _datasets(document: Document) -> dict[str, Any]:
    kind, path = document.get(("data", "format"), "list"), document.get(("data", "path"))
    if kind not in _FORMATS:
        raise UserError(
            f"{document.origin(('data', 'format'))}: data.format = {shown(kind)}: expected one of {', '.join(_FORMATS)}"
            f"{did_you_mean(str(kind), _FORMATS)}"
        )
    shares = _shares(document)
    if kind == "random":
        return {name: {"type": "random", "name": name} for name, begin, end in shares if end > begin}
    where = document.origin(("data", "path"))
    sources = _listed(path, where) if kind == "list" else _in_file(path, where)
    return {name: _cut(sources, begin, end) for name, begin, end in shares if end > begin}


def _shares(document: Document) -> list[tuple[str, float, float]]:
    """(name, begin, end) of each split, as fractions of the documents."""
    split = document.get(("data", "split"), _DEFAULT_SPLIT)
    numbers = isinstance(split, list) and all(isinstance(part, int | float) and part >= 0 for part in split)
    if not numbers or not 1 <= len(split) <= 3 or not sum(split):
        raise UserError(
            f"{document.origin(('data', 'split'))}: data.split = {shown(split)}: expected [training, validation, test] "
            "as numbers, such as [99, 1, 0]"
        )
    edges = [0.0, *(part / sum(split) for part in accumulate(split))]
    return list(zip(_NAMES, edges, edges[1:]))


def _listed(path: Any, where: str) -> list[tuple[float, dict[str, Any]]]:
    """`[prefix]`, or `[weight, prefix, weight, prefix, ...]`."""
    path = [path] if isinstance(path, str) else path
    if isinstance(path, list) and len(path) == 1 and isinstance(path[0], str):
        return [(1.0, {"type": "memmap", "path": path[0]})]
    weights, prefixes = (path[0::2], path[1::2]) if isinstance(path, list) else ([], [])
    fits = len(weights) == len(prefixes) and all(isinstance(prefix, str) for prefix in prefixes)
    if not prefixes or not fits or not all(isinstance(weight, int | float) for weight in weights):
        raise UserError(
            f"{where}: data.path = {shown(path)}: expected [PATH] or [WEIGHT, PATH, WEIGHT, PATH, ...]"
        )
    return [(float(weight), {"type": "memmap", "path": prefix}) for weight, prefix in zip(weights, prefixes)]


def _in_file(path: Any, where: str) -> list[tuple[float, dict[str, Any]]]:
    """`{"datasets": [{"prefix", "weight"}, ...]}`, prefixes relative to the file.

    A file that is not there (yet), or that holds one dataset as YAML, stays a dataset of type `file`.
    """
    if not isinstance(path, str):
        raise UserError(
            f"{where}: data.path = {shown(path)}: expected the path of a file that lists datasets"
        )
    file = Path(path).expanduser()
    if file.suffix != ".json" or not file.is_file():
        return [(1.0, {"type": "file", "path": path})]
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))["datasets"]
        sources = [(float(entry.get("weight", 1.0)), str(file.parent / entry["prefix"])) for entry in entries]
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{file} is not valid JSON: {error}") from None
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UserError(
            f'{file} is not of the form {{"datasets": [{{"prefix": PATH, "weight": NUMBER}}, ...]}}'
        ) from None
    if not sources:
        raise UserError(f"{file} lists no datasets")
    return [(weight, {"type": "memmap", "path": prefix}) for weight, prefix in sources]


def _cut(sources: list[tuple[float, dict[str, Any]]], begin: float, end: float) -> dict[str, Any]:
    """One stretch of every source, blended by weight."""
    parts = [
        source
        if (begin, end) == (0.0, 1.0)
        else {"type": "slice", "dataset": source, "begin": begin, "end": end}
        for _, source in sources
    ]
    if len(parts) == 1:
        return parts[0]
    return {"type": "blended", "datasets": parts, "weights": [weight for weight, _ in sources]}
