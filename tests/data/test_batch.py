"""Batches: inputs, labels, positions and segments by hand, and against a plain slow twin on random rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from modelyard.data.batch import Batch, assemble
from modelyard.data.rows import Piece
from modelyard.errors import UserError
from tests.data.in_memory import InMemory

DATA = InMemory(
    [np.array([1, 10, 11, 2]), np.array([1, 20, 2]), np.array([1, 30, 31, 32, 33, 2])],
    masks=[np.array([0, 1, 0, 0]), np.array([0, 0, 1]), np.array([0, 1, 1, 0, 0, 0])],
)


def batch_of(*rows: list[tuple[int, int, int]], sequence: int, isolate: bool, mask: bool = False) -> Batch:
    pieces = [(DATA, [Piece(*piece) for piece in row]) for row in rows]
    return assemble(pieces, sequence_length=sequence, vocab_size=40, isolate=isolate, mask=mask)


def same(one: Batch, other: Batch) -> bool:
    return all(
        torch.equal(getattr(one, name), getattr(other, name))
        for name in ("input_ids", "labels", "positions", "cu_seqlens")
    )


def test_together():
    # Documents 0 and 1 whole, then three tokens of document 2, of which the last is only a target.
    batch = batch_of([(0, 0, 4), (1, 0, 3), (2, 0, 3)], sequence=9, isolate=False)
    assert batch.input_ids.tolist() == [[1, 10, 11, 2, 1, 20, 2, 1, 30]]
    assert batch.labels.tolist() == [[10, 11, 2, 1, 20, 2, 1, 30, 31]]
    assert batch.positions.tolist() == [list(range(9))]
    assert batch.cu_seqlens.tolist() == [[0, 9]]
    assert batch.num_targets == 9
    assert [t.dtype for t in (batch.input_ids, batch.labels, batch.positions)] == [torch.int64] * 3
    assert batch.cu_seqlens.dtype == torch.int32


def test_isolated():
    batch = batch_of([(0, 0, 4), (1, 0, 3), (2, 0, 3)], sequence=9, isolate=True)
    assert batch.input_ids.tolist() == [[1, 10, 11, 2, 1, 20, 2, 1, 30]]
    assert batch.labels.tolist() == [[10, 11, 2, -100, 20, 2, -100, 30, 31]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1]]
    assert batch.cu_seqlens.tolist() == [[0, 4, 7, 9]]


def test_continued_document_starts_a_segment():
    batch = batch_of([(2, 2, 6), (1, 0, 1)], sequence=4, isolate=True)
    assert batch.input_ids.tolist() == [[31, 32, 33, 2]]
    assert batch.labels.tolist() == [
        [32, 33, 2, -100]
    ]  # the first token of document 1 is no target of document 2
    assert batch.positions.tolist() == [[0, 1, 2, 3]]
    assert batch.cu_seqlens.tolist() == [[0, 4]]  # it has no input position here, so no segment


@pytest.mark.parametrize("isolate", [True, False])
def test_padding(isolate):
    batch = batch_of([(0, 0, 4), (1, 0, 3)], [(2, 0, 6)], sequence=9, isolate=isolate)
    assert batch.input_ids.tolist() == [[1, 10, 11, 2, 1, 20, 2, 0, 0], [1, 30, 31, 32, 33, 2, 0, 0, 0]]
    boundary = -100 if isolate else 1
    assert batch.labels.tolist() == [
        [10, 11, 2, boundary, 20, 2, -100, -100, -100],
        [30, 31, 32, 33, 2, -100, -100, -100, -100],
    ]
    if isolate:
        assert batch.cu_seqlens.tolist() == [[0, 4, 7, 9], [0, 6, 9, 9]]
        assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1], [0, 1, 2, 3, 4, 5, 0, 1, 2]]
    else:
        assert batch.cu_seqlens.tolist() == [[0, 7, 9], [0, 6, 9]]
        assert batch.positions.tolist() == [list(range(9))] * 2


def test_a_row_of_exactly_its_length_has_no_target_at_the_end():
    batch = batch_of([(0, 0, 4)], sequence=4, isolate=True)
    assert batch.labels.tolist() == [[10, 11, 2, -100]]
    assert batch.cu_seqlens.tolist() == [[0, 4]]


def test_masked_tokens_are_inputs_but_no_targets():
    batch = batch_of([(0, 0, 4), (1, 0, 3), (2, 0, 3)], sequence=9, isolate=False, mask=True)
    assert batch.input_ids.tolist() == [[1, 10, 11, 2, 1, 20, 2, 1, 30]]
    assert batch.labels.tolist() == [[-100, 11, 2, 1, 20, -100, 1, -100, -100]]


def test_masks_stay_right_over_a_cut():
    # Document 2 cut after its second token: the mask of the rest must not shift.
    first = batch_of([(1, 0, 3), (2, 0, 2)], sequence=4, isolate=True, mask=True)
    second = batch_of([(2, 1, 6)], sequence=4, isolate=True, mask=True)
    assert first.labels.tolist() == [[20, -100, -100, -100]]  # 30 is masked
    assert second.input_ids.tolist() == [[30, 31, 32, 33]]
    assert second.labels.tolist() == [[-100, 32, 33, 2]]  # 31 is masked


def slow_twin(row: list[tuple[int, int, int]], sequence: int, isolate: bool, mask: bool):
    """One position after the other: (inputs, labels, positions, segment of each position)."""
    tokens, owner, masked = [], [], []
    for number, (document, begin, end) in enumerate(row):
        for place in range(begin, end):
            tokens.append(int(DATA.document(document)[place]))
            owner.append(number)
            masked.append(bool(DATA.lane("loss_mask", document)[place]))
    inputs, labels, positions, segment = [], [], [], []
    for place in range(sequence):
        inside = place < len(tokens)
        inputs.append(tokens[place] if inside else 0)
        target = place + 1 < len(tokens) and not (mask and masked[place + 1])
        if target and owner[place] != owner[place + 1]:
            # A document's inside begins with a token that was a target in the row before.
            target = not isolate and row[owner[place + 1]][1] == 0
        labels.append(tokens[place + 1] if target else -100)
        segment.append(-1 if not inside else owner[place] if isolate else 0)
        new = place == 0 or (isolate and segment[place] != segment[place - 1])
        positions.append(0 if new else positions[-1] + 1)
    return inputs, labels, positions, segment


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize("mask", [True, False])
def test_against_the_slow_twin(isolate, mask):
    random = np.random.default_rng(int(isolate) + 2 * int(mask))
    for _ in range(60):
        sequence = int(random.integers(1, 20))
        rows = []
        for _ in range(3):
            row: list[tuple[int, int, int]] = []
            room = sequence + 1
            while room and (not row or random.random() < 0.85):
                document = int(random.integers(0, 3))
                begin = int(random.integers(0, len(DATA.document(document))))
                end = min(int(random.integers(begin + 1, len(DATA.document(document)) + 1)), begin + room)
                row.append((document, begin, end))
                room -= end - begin
            rows.append(row)
        batch = batch_of(*rows, sequence=sequence, isolate=isolate, mask=mask)
        for number, row in enumerate(rows):
            inputs, labels, positions, segment = slow_twin(row, sequence, isolate, mask)
            assert batch.input_ids[number].tolist() == inputs
            assert batch.labels[number].tolist() == labels
            assert batch.positions[number].tolist() == positions
            starts = [p for p in range(sequence) if p == 0 or segment[p] != segment[p - 1]]
            bounds = batch.cu_seqlens[number].tolist()
            assert bounds[: len(starts)] == starts
            assert set(bounds[len(starts) :]) == {sequence}
        assert int((batch.cu_seqlens[:, -2] < sequence).sum()) > 0  # no wider than the widest row needs
        assert batch.num_targets == sum(label != -100 for row in batch.labels.tolist() for label in row)


def test_some_rows_are_what_they_would_be_alone():
    rows = [[(0, 0, 4), (1, 0, 3)], [(2, 0, 6)], [(1, 0, 3), (1, 0, 3), (1, 0, 3)]]
    whole = batch_of(*rows, sequence=8, isolate=True)
    assert len(whole) == 3
    for begin, end in ((0, 1), (1, 2), (0, 2), (1, 3), (0, 3)):
        assert same(whole.rows(begin, end), batch_of(*rows[begin:end], sequence=8, isolate=True))


def test_boundaries_stay_on_the_host():
    batch = batch_of([(0, 0, 4)], sequence=4, isolate=True).to("meta")
    assert (batch.input_ids.device.type, batch.cu_seqlens.device.type) == ("meta", "cpu")


def test_token_outside_the_vocabulary_is_named():
    with pytest.raises(
        UserError, match=r"token 33 in document 2 of in memory is outside the model's vocabulary of 33"
    ):
        assemble(
            [(DATA, [Piece(0, 0, 4), Piece(2, 0, 6)])],
            sequence_length=9,
            vocab_size=33,
            isolate=True,
            mask=False,
        )


def test_numbers_of_tokens_go_along() -> None:
    numbers = torch.arange(12).view(3, 4)
    batch = replace(Batch.empty(3, 4), numbers=numbers)
    assert batch.rows(1, 3).to("cpu").numbers.tolist() == [[4, 5, 6, 7], [8, 9, 10, 11]]  # type: ignore[union-attr]
    assert Batch.empty(3, 4).rows(0, 1).to("cpu").numbers is None
