"""The newest dialect's batch, in tokens of a micro-batch and floating with the processes, as rows of an explicit batch."""

from __future__ import annotations

from typing import Any

from modelyard.config.dialect import Notice
from modelyard.config.document import Document, KeyPath, dotted
from modelyard.config.newest import (
    BATCH_PARTS,
    BATCH_SIZE,
    BREADTH_FIRST,
    DEFAULT_TOKENS,
    DEPTH_FIRST,
    LONGEST,
    MICRO_BATCH,
    SEQUENCE,
    TOKENS,
)
from modelyard.config.parts import Parts
from modelyard.config.problems import shown

TODAYS_ROW = 2048
"""`batch.sequence_length` where the older dialect says nothing, in tokens."""


def whole(value: Any) -> int | None:
    """A number of things, at least 1, in any notation; None for anything else."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return int(value) if number and 1 <= value < 2**63 and value == int(value) else None


def decide_batch(parts: Parts, merged: Document, *, rows_are_given: bool, row_is_given: bool = False) -> None:
    """`data.micro_batch_size` and its companions, in tokens, to rows of `batch`.

    `rows_are_given`: a later file or override has `batch.micro_batch_size`. `row_is_given`: the length of a row is that of
    the older dialect, its default included.
    """
    sizes = {}
    for key in BATCH_PARTS:
        value = parts.get(key)
        sizes[key] = whole(value)
        if value is not None and sizes[key] is None:
            unit = "tokens" if key in (TOKENS, LONGEST) else "micro-batches"
            parts.problem(
                key, f"{dotted(key)} = {shown(value)}: expected a whole number of {unit}, at least 1"
            )
    tokens, longest = sizes[TOKENS] or DEFAULT_TOKENS, sizes[LONGEST]
    if row_is_given and not merged.has(SEQUENCE):
        merged.put(SEQUENCE, TODAYS_ROW, "today's default")
    row = _row(parts, merged, tokens, longest, given=parts.has(TOKENS))
    if row is None:
        return
    rows = max(1, tokens // row)
    if parts.has(TOKENS) and not rows_are_given:
        if tokens % row:
            below = tokens // row * row
            near = f"{below} and {below + row}" if below else str(row)
            parts.problem(
                TOKENS,
                f"{dotted(TOKENS)} = {tokens} tokens is no multiple of a row of {row} tokens "
                f"({_row_from(parts, merged)}); nearest that are: {near}",
            )
            return
        if sizes[TOKENS]:
            parts.write(merged, [TOKENS], MICRO_BATCH, rows)
    else:
        rows = whole(merged.get(MICRO_BATCH)) or rows
    _batch_size(parts, merged, row, rows, sizes)


def _row(parts: Parts, merged: Document, tokens: int, longest: int | None, *, given: bool) -> int | None:
    """Length of a row, in tokens, written into `merged` where that dialect's keys decide it."""
    if merged.get(SEQUENCE) is not None:
        row = whole(merged.get(SEQUENCE))
        if row is None:
            return None  # The validation says it.
        if longest is not None and longest < row:
            parts.problem(
                LONGEST,
                f"{dotted(LONGEST)} = {longest} is below {dotted(SEQUENCE)} = {row} ({merged.origin(SEQUENCE)}): documents "
                "are cut where rows end and nowhere else; write the same in both, or leave one out",
            )
            return None
        if longest is not None:
            parts.left_out(
                LONGEST, f"{dotted(LONGEST)}: {longest}", f"rows are no longer than {dotted(SEQUENCE)}"
            )
        return row
    if longest is not None and longest < tokens:
        parts.write(merged, [LONGEST], SEQUENCE, longest)
        return longest
    if given:
        merged.put(SEQUENCE, tokens, parts.origin(TOKENS))
        parts.notices.append(
            Notice(
                f"{parts.origin(TOKENS)}: a row has the tokens of {dotted(TOKENS)}: {dotted(SEQUENCE)} is {tokens}",
                SEQUENCE,
                dotted(TOKENS),
            )
        )
    if longest is not None:
        parts.left_out(
            LONGEST, f"{dotted(LONGEST)}: {longest}", f"a row of {tokens} tokens holds no longer one"
        )
    return tokens


def _row_from(parts: Parts, merged: Document) -> str:
    key = LONGEST if parts.has(LONGEST) else SEQUENCE
    origin = parts.origin(key) if key == LONGEST else merged.origin(key)
    return f"{dotted(key)}, {origin}"


def _batch_size(
    parts: Parts, merged: Document, row: int, rows: int, sizes: dict[KeyPath, int | None]
) -> None:
    size = whole(merged.get(BATCH_SIZE))
    counts = {key: count for key in (DEPTH_FIRST, BREADTH_FIRST) if (count := sizes[key])}
    micro_batches = 1
    for count in counts.values():
        micro_batches *= count
    if not merged.has(BATCH_SIZE):
        key = next((key for key in (TOKENS, *counts) if parts.has(key)), ("batch",))
        where = parts.origin(key) if parts.has(key) else merged.origin(("batch",))
        if not merged.has(("batch",)):
            merged.put(("batch",), {}, where)
        parts.problems.append(
            f"{where}: {dotted(BATCH_SIZE)} is missing: in the newest dialect the batch grows with the number of processes, "
            f"here it never does; write batch: {{batch_size: N}}, the rows of {row} tokens in an optimizer step over all "
            f"processes ({rows * micro_batches} for each process there was)"
        )
        return
    if size is None:
        return
    if size % (rows * micro_batches) and counts:
        product = " x ".join(map(str, (rows, *counts.values())))
        parts.problem(
            next(iter(counts)),
            f"{' and '.join(map(dotted, counts))}: {dotted(BATCH_SIZE)} {size} ({merged.origin(BATCH_SIZE)}) is no multiple "
            f"of {product} rows, so no number of processes makes it",
        )
        return
    for key, count in counts.items():
        why = f"how many micro-batches there are follows from {dotted(BATCH_SIZE)} {size} and {dotted(MICRO_BATCH)}"
        parts.left_out(key, f"{dotted(key)}: {count}", why)
