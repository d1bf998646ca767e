"""`modelyard migrate`: a configuration of any dialect, written again in today's spelling.

Order, comments and the way numbers are written are kept; each rewritten key says what it was called; defaults of the
dialect that are not today's are written out. What comes out is read again and compared before it is shown.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from modelyard.config.document import Document, KeyPath, dotted
from modelyard.config.loader import Loaded, load_reading
from modelyard.config.newest import DIALECT, OUTPUT_STARTS, TODAYS_DEFAULTS
from modelyard.config.problems import shown
from modelyard.config.reading import Reading, merge_documents, read_documents
from modelyard.config.starting import shape_is_absent, starting_point
from modelyard.config.yaml import parse_scalar, parse_yaml
from modelyard.errors import RunFailed, UserError

Place = tuple[str, int]
"""A file and a line in it, from 1; line 0 for what has none."""


@dataclass(frozen=True)
class Migrated:
    """A configuration in today's spelling."""

    text: str
    problems: list[str]
    """What has to be changed by hand; empty for a text that means what the original means."""


def migrate(files: Sequence[Path | str], overrides: Sequence[str]) -> Migrated:
    """Write the merged configuration in today's spelling.

    With problems the text is as far as it goes. Raises UserError where nothing can be made of the files.
    """
    reading = read_documents(files, overrides)
    loaded, problems = _load(reading)
    names = [str(file) for file in files] + [f"{len(overrides)} override(s)"] * bool(overrides)
    text = _Writer(reading, files, loaded.silent_shape if loaded else {}).text(names, problems)
    if loaded is not None and not problems:
        _check(text, loaded)
    return Migrated(text, problems)


def _load(reading: Reading) -> tuple[Loaded | None, list[str]]:
    try:
        loaded = load_reading(reading, keep_problems=True)
    except UserError as error:
        return None, error.problems
    # For a run these are in the way only while the shape is not there; for what is written here, for good.
    return loaded, loaded.problems + reading.translation.undecided


def _check(text: str, original: Loaded) -> None:
    """Raises RunFailed where the text does not mean what the original means."""
    again, problems = _load(merge_documents([parse_yaml(text, "the migrated file")], original.kind))
    if again is not None:
        problems = problems + again.notices
        if again.config.model_dump() != original.config.model_dump():
            problems.append("its resolved configuration is another")
        if again.architecture != original.architecture:
            problems.append("its architecture is another")
    if problems:
        raise RunFailed(
            f"the file cannot be migrated, which is a fault of this program: {'; '.join(problems)}"
        )


@dataclass
class _Line:
    """A line of the result."""

    indent: int
    text: str
    place: Place
    """Where the original has it."""
    is_value: bool
    remarks: list[str] = field(default_factory=list)
    above: list[str] = field(default_factory=list)
    below: list[str] = field(default_factory=list)


class _Writer:
    def __init__(self, reading: Reading, files: Sequence[Path | str], silent_shape: dict[KeyPath, Any]):
        self.reading = reading
        self._sources = {str(file): _Source(Path(file).read_text(encoding="utf-8-sig")) for file in files}
        self._order = {name: number for number, name in enumerate(self._sources)}
        self._remarks: dict[KeyPath, list[str]] = {}
        for notice in reading.notices:
            if notice.path and notice.was:
                self._remark(notice.path, f"was {notice.was.replace('model.base_model.', 'base_model.')}")
        self.document = Document(
            _copy(reading.document.values), dict(reading.document.origins), reading.document.name
        )
        self._add_defaults()
        for key, value in silent_shape.items():
            self.document.put(key, value, "")
            self._remark(key, "default of the dialect, then and now")

    def _remark(self, key: KeyPath, remark: str) -> None:
        remarks = self._remarks.setdefault(key, [])
        if remark not in remarks:
            remarks.append(remark)

    def _add_defaults(self) -> None:
        self.defaults: list[KeyPath] = []
        self.unknown: list[str] = []
        if self.reading.kind != "train":
            return
        base, _, _ = starting_point(self.reading.document, [])
        absent = shape_is_absent(self.reading.document, base)
        found = self.reading.translation.defaults(self.reading.document, base, shape_known=not absent)
        for key, value in found.items():
            self.document.put(key, value, "")
            self._remark(key, f"default of the newest dialect; today's: {TODAYS_DEFAULTS[key]}")
        self.defaults = list(found)
        model = self.reading.document
        if (
            self.reading.translation.newest_model
            and absent
            and model.get(("pretrained", "model_weights")) is False
        ):
            self.unknown = [
                f"{' and '.join(map(dotted, OUTPUT_STARTS))}: hidden_size ** -0.5 in {DIALECT}; "
                "the hidden size is not known while pretrained.path is not there"
            ]

    def text(self, names: list[str], problems: list[str]) -> str:
        """The whole file."""
        lines = list(self._mapping(self.document.values, (), 0))
        tail = self._attach_comments(lines)
        result = self._header(names, problems)
        flat = False
        for line in lines:
            if line.indent == 0 and result and not (line.is_value and flat):
                result.append("")
            flat = line.indent == 0 and line.is_value
            pad = " " * line.indent
            result += [f"{pad}{comment}" for comment in line.above]
            remark = f"  # {'; '.join(line.remarks)}" if line.remarks else ""
            result += [f"{pad}{line.text}{remark}", *line.below]
        return "\n".join([*result, *tail]) + "\n"

    def _header(self, names: list[str], problems: list[str]) -> list[str]:
        lines = [f"# {', '.join(names)} in today's spelling, by `modelyard migrate`."]
        left_out = [notice for notice in self.reading.notices if not notice.path and notice.was]
        if left_out:
            lines.append("# Left out:")
            lines += [f"#   {notice}" for notice in left_out]
        if self.unknown:
            lines.append("# Not written out:")
            lines += [f"#   {line}" for line in self.unknown]
        if problems:
            lines.append("# NOT COMPLETE. To be changed by hand:")
            lines += [f"#   {problem}" for problem in problems]
        refused = self.reading.translation.refused
        if refused:
            lines.append("# Not translated:")
            lines += [f"#   {dotted(entry.key)}: {_flow(entry.value)}" for entry in refused]
        return lines

    # Values

    def _place(self, key: KeyPath) -> Place:
        origin = self.document.origin(key)
        name, _, line = origin.rpartition(":")
        return (name, int(line)) if name in self._sources and line.isdecimal() else (origin, 0)

    def _rank(self, key: KeyPath, value: Any) -> tuple[int, int]:
        """Where a key stood first: sections by the first of what is in them."""
        if isinstance(value, dict) and value:
            return min(self._rank((*key, name), below) for name, below in value.items())
        if not self.document.origin(key):
            return len(self._order) + 1, 0  # a default: after what was written
        name, line = self._place(key)
        return self._order.get(name, len(self._order)), line

    def _mapping(self, values: dict[str, Any], key: KeyPath, indent: int) -> Iterator[_Line]:
        for name in sorted(values, key=lambda name: self._rank((*key, name), values[name])):
            here, value = (*key, name), values[name]
            place, remarks = self._place(here), self._remarks.get(here, [])
            if isinstance(value, dict) and value:
                yield _Line(indent, f"{_key(name)}:", place, False, list(remarks))
                yield from self._mapping(value, here, indent + 2)
            elif isinstance(value, list) and any(isinstance(item, dict) and item for item in value):
                yield _Line(indent, f"{_key(name)}:", place, False, list(remarks))
                yield from self._items(value, here, indent + 2)
            else:
                yield _Line(indent, f"{_key(name)}: {self._value(value, here)}", place, True, list(remarks))

    def _items(self, values: list[Any], key: KeyPath, indent: int) -> Iterator[_Line]:
        for number, value in enumerate(values):
            here = (*key, number)
            if isinstance(value, dict) and value:
                first, *rest = self._mapping(value, here, indent + 2)
                first.indent, first.text = indent, f"- {first.text}"
                yield first
                yield from rest
            else:
                yield _Line(indent, f"- {self._value(value, here)}", self._place(here), True)

    def _value(self, value: Any, key: KeyPath) -> str:
        if isinstance(value, list):
            return f"[{', '.join(self._value(item, (*key, number)) for number, item in enumerate(value))}]"
        file, line = self._place(key)
        written = self._sources[file].scalars.get(line, []) if file in self._sources else []
        for text, meant in written:
            if meant == value and type(meant) is type(value):
                return text
        return _flow(value)

    # Comments

    def _attach_comments(self, lines: list[_Line]) -> list[str]:
        """Give each comment of the files to the line that it stood at or above; return those after the last."""
        at: dict[Place, _Line] = {}
        first: dict[Place, _Line] = {}
        last = {line.place: line for line in lines}
        for line in lines:
            first.setdefault(line.place, line)
            if line.is_value:
                at.setdefault(line.place, line)
        at = first | at
        tail = []
        for name, source in self._sources.items():
            places = sorted(number for file, number in first if file == name)
            for number, (comment, column) in source.comments.items():
                if column is None:
                    column = 0
                    if (name, number) in at:
                        at[name, number].remarks.insert(0, comment.lstrip("# "))
                        continue
                after = next((place for place in places if place > number), None)
                before = next((place for place in reversed(places) if place < number), None)
                if before is not None and after is not None and column > first[name, after].indent:
                    # It ends a section: the next key is further left.
                    line = last[name, before]
                    line.below.append(" " * min(column, line.indent) + comment)
                elif after is None:
                    tail.append(comment)
                else:
                    first[name, after].above.append(comment)
        return tail


class _Source:
    """What is not in the values of a file: comments, and how numbers were written."""

    def __init__(self, text: str):
        self.comments: dict[int, tuple[str, int | None]] = {}
        """By line: the comment, and its column where it has the line for itself."""
        self.scalars: dict[int, list[tuple[str, Any]]] = {}
        """By line: the numbers, yes and no, and quoted words in it, as they are written and as they are meant."""
        inside = []
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            if isinstance(token, yaml.ScalarToken):
                inside.append((token.start_mark.index, token.end_mark.index))
                meant = parse_scalar(token.value) if token.plain else token.value
                written = text[token.start_mark.index : token.end_mark.index]
                if "\n" not in written and (not token.plain or isinstance(meant, int | float)):
                    self.scalars.setdefault(token.start_mark.line + 1, []).append((written, meant))
        begin = 0
        for number, line in enumerate(text.split("\n"), start=1):
            for match in re.finditer(r"(?:^|(?<=\s))#", line):
                index = begin + match.start()
                if not any(start <= index < end for start, end in inside):
                    comment = line[match.start() :].rstrip()
                    alone = not line[: match.start()].strip()
                    self.comments[number] = (comment, match.start() if alone else None)
                    break
            begin += len(line) + 1


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(below) for key, below in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _key(name: str) -> str:
    return name if re.fullmatch(r"\w[\w./-]*", name) else _quoted(name)


def _flow(value: Any) -> str:
    """A value in one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(str(key))}: {_flow(below)}" for key, below in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(_flow, value))}]"
    if isinstance(value, str):
        return value if _is_plain(value) else _quoted(value)
    if isinstance(value, float):
        return _number(value)
    return shown(value)


def _number(value: float) -> str:
    if value != value or abs(value) == float("inf"):
        return ".nan" if value != value else ".inf" if value > 0 else "-.inf"
    mantissa, exponent, power = repr(value).partition("e")
    # Without a point some readers of YAML take `1e-05` for text.
    return f"{mantissa if '.' in mantissa else mantissa + '.0'}{exponent}{power}"


def _is_plain(text: str) -> bool:
    """Whether this reader and a common one of YAML take the bare word for the same text."""
    if not re.fullmatch(r"[\w./~-][\w./~:@+=-]*( [\w./~@+=-]+)*", text) or parse_scalar(text) != text:
        return False
    try:
        return bool(yaml.safe_load(f"- [{text}]") == [[text]])
    except (yaml.YAMLError, ValueError):
        return False


def _quoted(text: str) -> str:
    return str(yaml.safe_dump(text, default_style='"', allow_unicode=True, width=10**9)).strip()
