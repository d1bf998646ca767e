"""A batch row by row as the model gets it: every document's place, positions, targets and padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from modelyard.config.train import TrainConfig
from modelyard.data.datasets import IndexedDataset
from modelyard.data.lanes import KIND_LANE, has_kinds
from modelyard.data.layout import IGNORED, Layout
from modelyard.data.rows import Piece
from modelyard.report.inspect_blocks import Cell, CellKind, Heading, Inspection, Note, Tokens
from modelyard.report.inspect_data import Options, omitted, shortened
from modelyard.report.inspect_kinds import LANE_WORDS, targets_by_kind
from modelyard.report.inspect_tokens import Vocabulary


def show_rows(
    config: TrainConfig,
    rows: list[tuple[IndexedDataset, list[Piece]]],
    layout: Layout,
    vocabulary: Vocabulary,
    options: Options,
    inspection: Inspection,
) -> None:
    """Add rows of a batch: which documents they are made of, and their arrays, whose first rows these are."""
    batch = config.batch
    more = batch.batch_size - len(rows)
    inspection.add(Heading(f"batch {options.iteration}, row by row"))
    first = "the row" if batch.cross_document_attention else "its document"
    notes = []
    if any(has_kinds(dataset) for dataset, _ in rows):
        notes.append(
            f"Of conversations the loss is on {LANE_WORDS[batch.loss_lane]} (batch.loss_lane: {batch.loss_lane}); each is "
            "predicted from what stands before it."
        )
    if not all(has_kinds(dataset) for dataset, _ in rows):
        notes.append(
            "Coloured: a target of the loss, predicted from what stands before it. Dimmed: read, but no target (masked, or the "
            f"first of {first})."
        )
    if more:
        notes.append(f"{more:,} more rows are not shown (--rows).")
    inspection.add(Note(" ".join(notes)))
    values = []
    for number, (dataset, pieces) in enumerate(rows):
        inputs, labels, positions = (array[number] for array in layout[:3])
        _check_shift(inputs, labels, number, inspection)
        filled = sum(end - begin for _, begin, end in pieces)
        targets = int((labels != IGNORED).sum())
        padding = batch.sequence_length + 1 - filled
        segments = [edge for edge in layout.cu_seqlens[number].tolist() if edge < batch.sequence_length]
        edges = ", ".join(map(str, segments[:12])) + (" …" if len(segments) > 12 else "")
        inspection.add(
            Heading(
                f"row {number}: {len(pieces):,} document{'s' if len(pieces) != 1 else ''}, {targets:,} of "
                f"{batch.sequence_length:,} positions trained"
                + (f", {padding:,} padding" if padding > 0 else "")
                + f", attention segments begin at {edges}",
                part=True,
            )
        )
        # A row has one token more than positions: the last is only ever a target.
        tokens = np.append(
            inputs,
            labels[-1]
            if labels[-1] != IGNORED
            else _last_token(dataset, pieces, filled, batch.sequence_length),
        )
        in_loss = np.concatenate(([False], labels != IGNORED))
        said = _said(dataset, pieces, layout, number)
        at = 0
        for document, begin, end in pieces:
            after = at + end - begin
            inspection.add(
                _piece(
                    dataset,
                    document,
                    begin,
                    at,
                    tokens[at:after],
                    in_loss[at:after],
                    None if said is None else said[at:after],
                    positions,
                    vocabulary,
                    options,
                )
            )
            at = after
        if padding > 0:
            inspection.add(
                Tokens(
                    f"padding · {padding:,} tokens · a segment of its own, never a target",
                    [Cell(f" {padding:,} × padding ", (), "padding")],
                )
            )
        values.append({"dataset": dataset.name, "documents": [piece[0] for piece in pieces], "targets": targets,
                       "padding": max(padding, 0), "segments": segments,
                       **({} if said is None else {"targets_by_kind": targets_by_kind(said[in_loss].tolist())})})  # fmt: skip
    inspection.values["batch"] = {"iteration": options.iteration, "rows": values}


def _said(dataset: IndexedDataset, pieces: Sequence[Piece], layout: Layout, number: int) -> np.ndarray | None:
    """What each token of a row is in its conversation, uint8 [sequence + 1]: from the batch, but for the first, which is no
    target. None where the row is of no conversations."""
    if layout.kinds is None or not pieces or not has_kinds(dataset):
        return None
    document, begin, _ = pieces[0]
    first = dataset.lane(KIND_LANE, document, begin, begin + 1)
    assert first is not None
    return np.concatenate((first, layout.kinds[number]))


def _last_token(dataset: IndexedDataset, pieces: Sequence[Piece], filled: int, length: int) -> int:
    """The token after the last position: a target only, and here one that the loss leaves out."""
    if filled <= length or not pieces:
        return 0
    document, _, end = pieces[-1]
    return int(dataset.document(document, end - 1, end)[0])


def _check_shift(inputs: np.ndarray, labels: np.ndarray, number: int, inspection: Inspection) -> None:
    """Every target is the input of the next position; anything else is our own mistake, and worth stopping for."""
    wrong = np.flatnonzero((labels[:-1] != IGNORED) & (labels[:-1] != inputs[1:]))
    if len(wrong):
        inspection.fault(
            f"row {number}: the target at position {wrong[0]} is not the next input: this is a mistake of the program, please report it"
        )


def _piece(
    dataset: IndexedDataset,
    document: int,
    begin: int,
    at: int,
    tokens: np.ndarray,
    targets: np.ndarray,
    said: np.ndarray | None,
    positions: np.ndarray,
    vocabulary: Vocabulary,
    options: Options,
) -> Tokens:
    """A document's part of a row, beginning at position `at` of the row."""
    count = len(tokens)
    length = int(dataset.lengths(document, document + 1)[0])
    last = min(at + count, len(positions)) - 1
    whole = "whole" if count == length else f"tokens {begin:,}–{begin + count - 1:,} of {length:,}"
    place = f"positions {positions[at]:,}–{positions[last]:,}" if at < len(positions) else "a target only"
    title = (
        f"{dataset.where(document)} · {count:,} tokens ({whole}) · {place} · {int(targets.sum()):,} trained"
    )
    cells: list[Cell] = []
    for first, end in shortened(count, options.tokens):
        if first:
            cells.append(omitted(count - options.tokens))
        kinds: list[CellKind] = ["trained" if target else "masked" for target in targets[first:end]]
        cells += vocabulary.cells(tokens[first:end], kinds, None if said is None else said[first:end])
    return Tokens(title, cells)
