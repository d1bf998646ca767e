"""YAML as people write it, with the line of every key: files and `a.b.c=value` overrides.

Words and numbers follow neither YAML 1.1 nor 1.2 to the letter, but what is meant: yes/no/on/off/true/false are
booleans, `1e-4`, `1e-06` and `100_000` are numbers, `1:30` and `2024-01-01` stay text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from modelyard.config.document import Document, KeyPath
from modelyard.errors import UserError, missing_path

_WORDS: dict[str, bool | None] = {
    "": None,
    "~": None,
    **dict.fromkeys(("null", "Null", "NULL")),
    **{spelling: True for word in ("true", "yes", "on") for spelling in (word, word.title(), word.upper())},
    **{spelling: False for word in ("false", "no", "off") for spelling in (word, word.title(), word.upper())},
}
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9_]*)")
_HEXADECIMAL = re.compile(r"0x[0-9a-fA-F_]+")
_FLOAT = re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?")
DEEPEST = 64
"""Levels of sections and lists; more is no configuration, and would exhaust the stack of what reads it."""
MOST_VALUES = 100_000
"""Values of a file, counting what an alias stands for at each place: a few lines of aliases can mean billions."""
LONGEST_NUMBER = 300
"""Digits; a longer word is text (Python itself refuses to read whole numbers of a few thousand digits)."""
_NOT_FINITE = re.compile(r"([-+]?)\.(inf|Inf|INF|nan|NaN|NAN)")


def parse_scalar(text: str) -> Any:
    """The value of an unquoted word: null, a boolean, a number, or else the text itself."""
    if text in _WORDS:
        return _WORDS[text]
    if len(text) > LONGEST_NUMBER:
        return text
    if _INTEGER.fullmatch(text):
        return _integer(int(text.replace("_", "")))
    if _HEXADECIMAL.fullmatch(text):
        return _integer(int(text.replace("_", ""), 16))
    if _FLOAT.fullmatch(text) and not re.fullmatch(r"[-+]?0[0-9]+", text):
        return float(text.replace("_", ""))
    if match := _NOT_FINITE.fullmatch(text):
        return float(match[1] + match[2].lower())
    return text


def _integer(value: int) -> int | float:
    """What does not fit in 64 bits counts nothing here, and no arithmetic downstream is made for it."""
    return value if abs(value) < 2**63 else float(value)


def read_yaml(path: Path) -> Document:
    """Read a configuration file. Raises UserError with every problem, one line each."""
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a YAML file")
    if not path.exists():
        raise UserError(missing_path(path))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file (byte {error.start} is not UTF-8)") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, name: str) -> Document:
    """Read a configuration from text; `name` stands for the file in messages."""
    node = _compose(text, name)
    if node is None:
        raise UserError(
            f"{name} is empty; a configuration has sections such as training, batch, data, model, run"
        )
    if not isinstance(node, yaml.MappingNode):
        what = "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
        raise UserError(
            f"{name}:{_line(node)}: found {what}, but a configuration is made of `key: value` sections"
        )
    builder = _Builder(name)
    values = builder.value(node, ())
    if builder.problems:
        raise UserError(*builder.problems)
    return Document(values, builder.origins, name)


def parse_override(text: str, number: int) -> Document:
    """Read `a.b.c=value`, the `number`-th override on the command line (from 1). Raises UserError."""
    name = f"override {number}"
    key, equals, written = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        written = text if len(text) <= 80 else text[:80] + "…"
        raise UserError(f"{name}: '{written}' is not KEY=VALUE, such as training.train_iters=50")
    builder = _Builder(name)
    node = _compose(written, f"{name} ({key.strip()})")
    value = None if node is None else builder.value(node, ())
    if builder.problems:
        raise UserError(*builder.problems)
    document = Document({}, {}, name)
    document.put(tuple(parts), value, name)
    return document


_BEGINNINGS = (
    yaml.BlockMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.FlowSequenceStartToken,
)
_ENDS = (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)


def _compose(text: str, name: str) -> yaml.Node | None:
    try:
        depth = 0
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            depth += isinstance(token, _BEGINNINGS) - isinstance(token, _ENDS)
            if depth > DEEPEST:
                raise UserError(
                    f"{name}:{token.start_mark.line + 1}: sections or lists are nested more than {DEEPEST} deep"
                )
            if isinstance(token, yaml.TagToken):
                raise UserError(
                    f"{name}:{token.start_mark.line + 1}: tags (`!...`) are not read; quote text instead"
                )
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = error.problem or "cannot be read"
        if "'\\t'" in problem:
            problem = "a tab; YAML is indented with spaces"
        elif problem == "mapping values are not allowed here":
            problem = "a second `:` in one line, or a line indented too far"
        elif "but found another document" in problem:
            problem = "a second document (`---`) in one file"
        raise UserError(f"{name}:{mark.line + 1 if mark else 1}: not valid YAML: {problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{name}: not valid YAML: {str(error).splitlines()[0]}") from None


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


class _Builder:
    """Turns YAML nodes into plain values, noting where each was written."""

    def __init__(self, name: str):
        self.name = name
        self.origins: dict[KeyPath, str] = {}
        self.problems: list[str] = []
        self._inside: set[int] = set()
        self._count = 0
        self._merging = 0  # sections around the one that is merged

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        self._count += 1
        if self._count > MOST_VALUES:
            raise UserError(
                f"{self.name}: aliases (`*name`) make more than {MOST_VALUES:,} values of this file; write out what is meant"
            )
        if isinstance(node, yaml.ScalarNode):
            return parse_scalar(node.value) if node.style is None else node.value
        if len(path) + self._merging > DEEPEST:
            raise UserError(f"{self._origin(node)}: sections or lists are nested more than {DEEPEST} deep")
        if id(node) in self._inside:
            self._complain(node, "an alias (`*name`) that contains itself")
            return None
        self._inside.add(id(node))
        try:
            return self._mapping(node, path) if isinstance(node, yaml.MappingNode) else self._list(node, path)
        finally:
            self._inside.discard(id(node))

    def _list(self, node: yaml.Node, path: KeyPath) -> list[Any]:
        values = []
        for index, item in enumerate(node.value):
            self.origins[(*path, index)] = self._origin(item)
            values.append(self.value(item, (*path, index)))
        return values

    def _mapping(self, node: yaml.Node, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        lines: dict[str, int] = {}
        merged = []
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._complain(key_node, "a key must be a word, not a list or section")
                continue
            key = key_node.value
            if key == "<<" and key_node.style is None:
                merged.append(value_node)
                continue
            if key in lines:
                self._complain(key_node, f"'{key}' is given twice (first in line {lines[key]})")
                continue
            lines[key] = _line(key_node)
            self.origins[(*path, key)] = self._origin(key_node)
            result[key] = self.value(value_node, (*path, key))
        for value_node in merged:
            self._merge_key(value_node, path, result)
        return result

    def _merge_key(self, node: yaml.Node, path: KeyPath, result: dict[str, Any]) -> None:
        """`<<: *defaults`: keys of the other section that are not written here."""
        if not isinstance(node, yaml.MappingNode):
            self._complain(node, "`<<:` takes one section, as in `<<: *defaults`")
            return
        nested = _Builder(self.name)
        nested._inside, nested._count = self._inside, self._count
        nested._merging = self._merging + len(path) + 1
        values = nested.value(node, ())
        self._count = nested._count
        self.problems += nested.problems
        if values is None:  # it contains itself, as was said
            return
        for key, value in values.items():
            if key not in result:
                result[key] = value
                self.origins.update(
                    {path + below: origin for below, origin in nested.origins.items() if below[0] == key}
                )

    def _origin(self, node: yaml.Node) -> str:
        return self.name if self.name.startswith("override ") else f"{self.name}:{_line(node)}"

    def _complain(self, node: yaml.Node, problem: str) -> None:
        self.problems.append(f"{self._origin(node)}: {problem}")
