"""What an inspection found, as blocks that the terminal, the HTML page and `--json` each draw in their own way."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

CellKind = Literal["trained", "masked", "padding", "remark"]
"""`trained`: a target of the loss. `masked`: read by the model, never a target. `remark`: no token but a word of ours."""


@dataclass(frozen=True)
class Cell:
    """One token as people see it, or the few that make one character together."""

    text: str
    """White space and controls already visible; a line break stands after its `⏎`."""
    ids: tuple[int, ...]
    kind: CellKind
    special: bool = False
    said: int | None = None
    """What it is in a conversation (`modelyard.chat.segments.lane_value`); None: part of none."""


@dataclass(frozen=True)
class Heading:
    """The beginning of a section, or of a part of one."""

    text: str
    part: bool = False


@dataclass(frozen=True)
class Facts:
    """Names and values."""

    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """Columns with a heading each; `text` names the columns that are words, the others are numbers."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: frozenset[int] = frozenset({0})


@dataclass(frozen=True)
class Histogram:
    """Counts by bucket."""

    title: str
    bars: Sequence[tuple[str, int, bool]]
    """Label, count, and whether `remark` is about it."""
    remark: str = ""


@dataclass(frozen=True)
class Tokens:
    """A document, or a document's part of a row."""

    title: str
    cells: Sequence[Cell]


@dataclass(frozen=True)
class Note:
    """A line of text."""

    text: str


Block = Heading | Facts | Table | Histogram | Tokens | Note


@dataclass
class Inspection:
    """Everything that is shown. Faults make the exit status 1, warnings do not."""

    title: str
    blocks: list[Block] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    """The same numbers for machines; plain values."""

    def add(self, *blocks: Block) -> None:
        """Append blocks."""
        self.blocks += blocks

    def fault(self, *lines: str) -> None:
        """Something is wrong; each line says what and what to do. Said once."""
        self.faults += [line for line in dict.fromkeys(lines) if line not in self.faults]

    def warn(self, *lines: str) -> None:
        """Something is probably not meant."""
        self.warnings += [line for line in dict.fromkeys(lines) if line not in self.warnings]


def clean(text: str) -> str:
    """`text` without anything that a terminal acts upon, or that hides or reorders what is beside it.

    Controls of ASCII become their pictures (`␛`), other controls, formatting characters (bidirectional overrides, joiners)
    and code points without a character `\\u202e`. Line breaks stay.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(character if character == "\n" else _visible(character) for character in text)


def _visible(character: str) -> str:
    code = ord(character)
    if code < 32:
        return chr(0x2400 + code)
    if code == 127:
        return "␡"
    if unicodedata.category(character) in ("Cc", "Cf", "Co", "Cn", "Cs", "Zl", "Zp"):
        return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
    return character


def visible_space(text: str) -> str:
    """A token's text with its white space to be seen, as people still like to read it.

    A space before a word stays a space; every other one is `·`. A tab is `⇥`, a line break `⏎` and the break itself.
    """
    lead, rest = (" ", text[1:]) if text[:1] == " " and len(text) > 1 and text[1] != " " else ("", text)
    shown = rest.replace(" ", "·").replace("\r", "␍").replace("\t", "⇥").replace("\n", "⏎\n")
    return lead + shown
