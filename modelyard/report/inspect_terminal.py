"""An inspection in a terminal: coloured where there is one; where there is none, with brackets around masked tokens, and of
conversations a line for every kind."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TextIO

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from modelyard.chat.segments import Kind, kind_of
from modelyard.report.inspect_blocks import (
    Block,
    Cell,
    Facts,
    Heading,
    Histogram,
    Inspection,
    Note,
    Table,
    Tokens,
    clean,
)
from modelyard.report.inspect_kinds import is_assistants, kind_name, role_name
from modelyard.report.inspect_lanes import KNOWN

_WIDEST = 140
_UNKNOWN_WIDTH = 110
_ENDLESS = 1_000_000
_BAR = 40
_EIGHTHS = " ▏▎▍▌▋▊▉█"
# Two shades a kind, in turn, so that tokens can be told apart; from the sixteen colours that every theme makes legible.
_SHADES = {
    "trained": ("green", "bold cyan"),
    "masked": ("bright_black", "italic bright_black"),
    "padding": ("bright_black", "bright_black"),
    "remark": ("dim italic", "dim italic"),
}
# The same for kinds of conversations. What is trained on is underlined, so that neither needs the other's colour.
_ANSWER = "bold green"
_SAID = {
    Kind.BEGIN: "bright_black",
    Kind.HEADER: "bright_black",
    Kind.CONTENT: "cyan",
    Kind.TOOL_CALL: "bold magenta",
    Kind.TOOL_RESULT: "yellow",
    Kind.TERMINATOR: "bold red",
    Kind.SEPARATOR: "blue",
}
_LEGEND = (
    ("begin, header", _SAID[Kind.HEADER]),
    ("user and system", _SAID[Kind.CONTENT]),
    ("assistant", _ANSWER),
    ("tool call", _SAID[Kind.TOOL_CALL]),
    ("tool result", _SAID[Kind.TOOL_RESULT]),
    ("terminator", _SAID[Kind.TERMINATOR]),
    ("separator", _SAID[Kind.SEPARATOR]),
    ("trained on", "underline"),
)
_NAME_WIDTHS = (13, 11)
"""Columns of a kind's name and of a role's."""


class Terminal:
    """Prints inspections to a stream; `ids` shows token ids too."""

    def __init__(self, stream: TextIO | None = None, *, ids: bool = False):
        self._ids = ids
        self._explained = False
        """Whether it was said what the kinds look like."""
        self._stream = stream or sys.stdout
        there = Console(file=self._stream)
        self._colour = there.is_terminal and "NO_COLOR" not in os.environ
        known = there.is_terminal or "COLUMNS" in os.environ
        self._folds = known
        """Whether tables have to fit: what is written to a file or a pipe is searched and cut by column."""
        width = there.width if known else _UNKNOWN_WIDTH
        self._console = Console(
            # Without colours the lines go through `show`, which takes the spaces at their ends away.
            file=self._stream if self._colour else io.StringIO(),
            width=max(40, min(width, _WIDEST)),
            color_system="auto" if self._colour else None,
            force_terminal=self._colour,
            highlight=False,
            markup=False,
            emoji=False,
        )

    def show(self, inspection: Inspection) -> None:
        """Print everything; faults last, where people look."""
        for block in inspection.blocks:
            self._block(block)
        self._line("")
        for warning in inspection.warnings:
            self._line(f"warning: {warning}", "yellow", whole=True)
        for fault in inspection.faults:
            self._line(f"fault: {fault}", "bold red", whole=True)
        counts = [
            f"{len(lines)} {name}{'s' if len(lines) > 1 else ''}"
            for name, lines in (("fault", inspection.faults), ("warning", inspection.warnings))
            if lines
        ]
        self._line(", ".join(counts) if counts else "nothing wrong was found")
        if not self._colour and isinstance(self._console.file, io.StringIO):
            lines = self._console.file.getvalue().splitlines()
            self._stream.write("\n".join(line.rstrip() for line in lines).lstrip("\n") + "\n")

    def _block(self, block: Block) -> None:
        match block:
            case Heading():
                self._line("")
                self._line(block.text, "bold")
            case Note():
                self._line(block.text, "dim")
            case Facts():
                self._facts(block)
            case Table():
                self._table(block)
            case Histogram():
                self._histogram(block)
            case Tokens():
                self._tokens(block)

    def _line(self, text: str, style: str = "", *, whole: bool = False) -> None:
        """Print a line; `whole` leaves breaking it to the terminal, so that it can be searched and copied."""
        shown = Text(clean(text), style if self._colour else "")
        self._console.print(shown, overflow="ignore" if whole else "fold", soft_wrap=whole)

    def _facts(self, block: Facts) -> None:
        if not self._folds:
            self._names_and_values([(f"  {clean(name)}", value) for name, value in block.rows])
            return
        grid = RichTable.grid(padding=(0, 2))
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        for name, value in block.rows:
            grid.add_row(Text(f"  {clean(name)}", "dim" if self._colour else ""), Text(clean(value)))
        self._console.print(grid)

    def _names_and_values(self, rows: Sequence[tuple[str, str]]) -> None:
        """A line each, never broken here."""
        width = max((cell_len(name) for name, _ in rows), default=0)
        for name, value in rows:
            self._line(f"{name}{' ' * (width - cell_len(name))}  {value}", whole=True)

    def _table(self, block: Table) -> None:
        """Columns where they fit; else a block of lines for each row, so that no number or name is ever broken."""
        table = RichTable(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 0))
        for number, column in enumerate(block.columns):
            table.add_column(
                clean(column), justify="left" if number in block.words else "right", no_wrap=True
            )
        for row in block.rows:
            table.add_row(*(Text(clean(cell)) for cell in row))
        # Measured where there is room for anything: in the console's own width it never says more than that.
        width = Measurement.get(self._console, self._console.options.update(width=_ENDLESS), table).maximum
        screen = self._console.width
        if width + 2 * len(block.columns) <= screen or not self._folds:
            table.padding = (0, 1)
            width += 2 * len(block.columns)
        elif width > screen:
            self._stacked(block)
            return
        self._console.width = max(screen, width)
        self._console.print(table)
        self._console.width = screen

    def _stacked(self, block: Table) -> None:
        for row in block.rows:
            self._line(f"  {block.columns[0]} {row[0]}", whole=True)
            named = zip(block.columns[1:], row[1:], strict=True)
            self._names_and_values([(f"    {clean(name)}", value) for name, value in named if value])

    def _histogram(self, block: Histogram) -> None:
        most = max((count for _, count, _ in block.bars), default=0)
        label_width = max((len(label) for label, _, _ in block.bars), default=0)
        self._line(f"  {block.title}", "dim")
        for label, count, marked in block.bars:
            eighths = round(8 * _BAR * count / max(most, 1))
            bar = "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
            text = Text(f"  {label:>{label_width}} ")
            text.append(bar or ("▏" if count else ""), ("red" if marked else "blue") if self._colour else "")
            text.append(f" {count:,}" + ("  *" if marked and count else ""))
            self._console.print(text)
        if block.remark and any(marked and count for _, count, marked in block.bars):
            self._line(f"  * {block.remark}", "dim")

    def _tokens(self, block: Tokens) -> None:
        of_kinds = any(cell.said is not None for cell in block.cells)
        self._line("")
        if of_kinds:
            self._explain()
        title = clean(block.title)
        self._line(f"── {title} {'─' * (self._console.width - cell_len(title) - 4)}".rstrip(), "dim")
        if of_kinds and not self._colour:
            self._listed(block)
            return
        self._run(self._coloured(block) if self._colour else self._bracketed(block))

    def _run(self, parts: Iterator[tuple[str, str]], first: str = "", others: str = "") -> None:
        """Print texts and their styles one after the other, behind the beginnings of the first and of every other line."""
        line, used = Text(first), 0
        room = self._console.width - cell_len(first)
        for text, style in parts:
            for number, part in enumerate(text.split("\n")):
                # Lines are broken between tokens alone, so that no space is lost.
                if number or (used and used + cell_len(part) > room):
                    self._console.print(line, overflow="fold")
                    line, used = Text(others), 0
                line.append(part, style)
                used += cell_len(part)
        if used:
            self._console.print(line, overflow="fold")

    def _explain(self) -> None:
        """Say once what the kinds of conversations look like."""
        if self._explained:
            return
        self._explained = True
        if self._colour:
            parts = [Text(name, style) for name, style in _LEGEND]
            self._console.print(Text("   ").join(parts))
        else:
            self._line("Of each stretch: * where it is trained on, what it is, who says it, its tokens.")
        self._line("")

    def _listed(self, block: Tokens) -> None:
        """A line, or several, for every stretch of one kind, with `*` before what is trained on."""
        kind_width, role_width = _NAME_WIDTHS
        for (said, state), group in groupby(block.cells, key=lambda cell: (cell.said, cell.kind)):
            mark = "*" if state == "trained" else " "
            names = ("", "") if said is None else (kind_name(said), role_name(said))
            first = f"{mark} {names[0]:<{kind_width}}{names[1]:<{role_width}}"
            cells = list(group)
            texts = [self._text(cell) for cell in cells]
            between = [
                "" if number == 0 or texts[number - 1].endswith("\n") else "│" for number in range(len(texts))
            ]
            parts = zip(map("".join, zip(between, texts, strict=True)), [""] * len(texts), strict=True)
            self._run(parts, first, f"{mark}{' ' * (len(first) - 1)}")

    def _coloured(self, block: Tokens) -> Iterator[tuple[str, str]]:
        for number, cell in enumerate(block.cells):
            style = _SHADES[cell.kind][number % 2]
            if cell.said is not None:
                yield self._text(cell), _said_style(cell.said, number, cell.kind == "trained")
                continue
            if cell.special:
                style = "bold magenta" if cell.kind == "trained" else "magenta dim"
            yield self._text(cell), style

    def _bracketed(self, block: Tokens) -> Iterator[tuple[str, str]]:
        """Boundaries as `│`, stretches that are no targets in ⟦ ⟧."""
        inside, boundary = False, ""
        for cell in block.cells:
            masked = cell.kind in ("masked", "padding")
            if cell.kind != "remark" and masked != inside:
                boundary, inside = "⟦" if masked else "⟧", masked
            text = self._text(cell)
            yield boundary + text, ""
            boundary = "" if text.endswith("\n") else "│"
        if inside:
            yield "⟧", ""

    def _text(self, cell: Cell) -> str:
        """A token as text, with its id where that is wanted, before the line break that it may end with."""
        if not self._ids or not cell.ids or cell.text == f"⟨{cell.ids[0]}⟩":
            return cell.text
        shown = cell.text.rstrip("\n")
        return f"{shown}⟨{'+'.join(map(str, cell.ids))}⟩{cell.text[len(shown) :]}"


def _said_style(said: int, number: int, trained: bool) -> str:
    """How the token with this number of a conversation is shown: every other one slanted, so that they can be told apart."""
    style = _ANSWER if is_assistants(said) else _SAID[kind_of(said)] if KNOWN[said] else "reverse"
    return f"{style}{' italic' if number % 2 else ''}{' underline' if trained else ''}"
