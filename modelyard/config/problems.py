"""What pydantic found wrong, said in one line a problem: file, line, key, value, and what is allowed instead."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError

from modelyard.config.base import Section
from modelyard.config.document import Document, KeyPath, dotted
from modelyard.config.neighbours import NO_EFFECT, NOT_BUILT, neighbour_keys
from modelyard.config.newest import newest_keys
from modelyard.errors import did_you_mean

_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "yes or no",
    "bool_parsing": "yes or no",
    "string_type": "text",
    "path_type": "a path",
    "is_instance_of": "a path",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a section (`key: value` lines)",
    "model_type": "a section (`key: value` lines)",
    "model_attributes_type": "a section (`key: value` lines)",
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "a number of at least {ge:g}",
    "less_than": "a number below {lt:g}",
    "less_than_equal": "a number of at most {le:g}",
    "too_short": "at least {min_length} of them",
    "string_too_short": "at least {min_length} character(s)",
    "literal_error": "one of {expected}",
    "union_tag_invalid": "a `type` that is one of {expected_tags}",
    "union_tag_not_found": "a section with a `type`",
}


def explain(
    error: ValidationError, document: Document, schema: type[Section], said: Collection[KeyPath] = ()
) -> list[str]:
    """Every problem in `error` as one line, but what is missing and `said` already. `document` is what was validated,
    against `schema`."""
    expected: dict[KeyPath, list[str]] = {}
    lines: dict[tuple[KeyPath, str], None] = {}
    for item in error.errors(include_url=False):
        path = _document_path(item["loc"], document, missing=item["type"] == "missing")
        here = f"{document.origin(path)}: "
        if item["type"] == "extra_forbidden":
            lines[path, here + _unknown_key(path, document, schema)] = None
        elif item["type"] == "missing" and path in said:
            continue
        elif item["type"] == "missing":
            lines[path, f"{here}{dotted(path)} is missing{_description(path, document, schema)}"] = None
        elif item["type"] in _EXPECTED:
            expected.setdefault(path, []).append(_expectation(item, document, path))
        else:
            message = str(item.get("ctx", {}).get("error", item["msg"]))
            section = f"{dotted(path)}: " if path else ""
            for line in message.splitlines():
                lines[path, f"{here}{section}{line}"] = None
    for path, allowed in expected.items():
        value = document.get(path)
        hint = _literal_hint(value, allowed)
        line = f"{dotted(path)} = {shown(value)}: expected {' or '.join(dict.fromkeys(allowed))}{hint}"
        lines[path, f"{document.origin(path)}: {line}"] = None
    return [line for _, line in lines]


def faulty_paths(error: ValidationError, document: Document) -> list[KeyPath]:
    """Where in `document` the problems of `error` are; nothing for what is missing."""
    items = [item for item in error.errors(include_url=False) if item["type"] != "missing"]
    return [path for item in items if (path := _document_path(item["loc"], document, missing=False))]


def shown(value: Any) -> str:
    """A value as it stands in YAML, short."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _document_path(location: tuple[int | str, ...], document: Document, *, missing: bool) -> KeyPath:
    """Pydantic's location without the names of union members that it puts between."""
    path: KeyPath = ()
    for index, part in enumerate(location):
        if document.has((*path, part)) or (missing and index == len(location) - 1):
            path = (*path, part)
    return path


def _expectation(item: Any, document: Document, path: KeyPath) -> str:
    text = _EXPECTED[item["type"]].format(**item.get("ctx", {}))
    if item["type"] == "dict_type" and document.get(path) is None:
        text += ", or {} for none"
    if item["type"] == "literal_error":
        return text.replace("'", "").replace(" or ", ", ")
    return text.replace("'", "")


def _literal_hint(value: Any, allowed: list[str]) -> str:
    words = [
        word.strip()
        for text in allowed
        if text.startswith("one of ")
        for word in text[len("one of ") :].split(",")
    ]
    return did_you_mean(value, words) if isinstance(value, str) else ""


def _unknown_key(path: KeyPath, document: Document, schema: type[Section]) -> str:
    section, key = path[:-1], str(path[-1])
    known = [name for name in known_keys(schema, section, document) if name != key]
    inside = f" in {dotted(section)}" if section else ""
    for names in (known, newest_keys(section)):
        if difflib.get_close_matches(key, names, n=1, cutoff=0.8):
            return f"unknown key '{key}'{inside}{did_you_mean(key, names)}"
    if elsewhere := [place for place in all_keys(schema) if place.rpartition(".")[2] == key][:2]:
        return f"unknown key '{key}'{inside}; it belongs to {' or '.join(elsewhere)}"
    fields = [name for name in known if name not in neighbour_keys(section)] or known
    return f"unknown key '{key}'{inside}{did_you_mean(key, known) or '; known keys: ' + ', '.join(fields)}"


def _description(path: KeyPath, document: Document, schema: type[Section]) -> str:
    for section in sections_at(schema, path[:-1], document):
        field = section.model_fields.get(str(path[-1]))
        if field is not None and field.description:
            return f" ({field.description.splitlines()[0].rstrip('.')})"
    return ""


def known_keys(schema: type[Section], section: KeyPath, document: Document) -> list[str]:
    """The keys that may stand in `section`."""
    names = {name: None for model in sections_at(schema, section, document) for name in model.model_fields}
    return list(names | dict.fromkeys(neighbour_keys(section)))


def sections_at(schema: type[Section], path: KeyPath, document: Document) -> list[type[Section]]:
    """The models that may describe what is at `path`; of a union, those whose `type` is the one written."""
    models: list[type[Section]] = [schema]
    annotations: list[Any] = [schema]
    for length, part in enumerate(path, start=1):
        annotations = [below for annotation in annotations for below in _below(annotation, part)]
        models = [model for annotation in annotations for model in _models(annotation)]
        written = document.get((*path[:length], "type"))
        models = [model for model in models if _type_word(model) in (None, written)] or models
        annotations = [*models, *(annotation for annotation in annotations if not _models(annotation))]
    return models


def all_keys(schema: type[Section]) -> Iterator[str]:
    """Every key of the schema, dotted, `NAME` standing for names the user chooses; the outermost first."""
    level: list[tuple[str, Any, tuple[type[Section], ...]]] = [("", schema, ())]
    while level:
        deeper: list[tuple[str, Any, tuple[type[Section], ...]]] = []
        for prefix, annotation, around in level:
            for model in _models(annotation):
                if model in around:
                    continue
                for name, field in model.model_fields.items():
                    yield f"{prefix}{name}"
                    deeper.append((f"{prefix}{name}.", field.annotation, (*around, model)))
            for value_type in _values_of_mappings(annotation):
                deeper.append((f"{prefix}NAME.", value_type, around))
        level = deeper
    yield from [row.key for row in NO_EFFECT] + [feature.key for feature in NOT_BUILT]


def _plain(annotation: Any) -> Iterable[Any]:
    """The members of a union, without `Annotated` and None."""
    if get_origin(annotation) is Annotated:
        yield from _plain(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for part in get_args(annotation):
            yield from _plain(part)
    elif annotation is not NoneType:
        yield annotation


def _models(annotation: Any) -> list[type[Section]]:
    return [plain for plain in _plain(annotation) if isinstance(plain, type) and issubclass(plain, Section)]


def _values_of_mappings(annotation: Any) -> list[Any]:
    return [get_args(plain)[1] for plain in _plain(annotation) if get_origin(plain) is dict]


def _below(annotation: Any, part: str | int) -> Iterator[Any]:
    for plain in _plain(annotation):
        if isinstance(plain, type) and issubclass(plain, Section):
            if str(part) in plain.model_fields:
                yield plain.model_fields[str(part)].annotation
        elif get_origin(plain) is dict:
            yield get_args(plain)[1]
        elif get_origin(plain) is list:
            yield get_args(plain)[0]


def _type_word(model: type[Section]) -> str | None:
    """The `type` that chooses this member of a union."""
    field = model.model_fields.get("type")
    if field is None or get_origin(field.annotation) is not Literal or len(get_args(field.annotation)) != 1:
        return None
    return str(get_args(field.annotation)[0])
