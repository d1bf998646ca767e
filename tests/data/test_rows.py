"""Rows: cut from the stream or packed whole, every token where it belongs, from any direction."""

from __future__ import annotations

import numpy as np
import pytest

from modelyard.data.layout import lay_out
from modelyard.data.order import DocumentOrder
from modelyard.data.rows import BlockTable, CutRows, Rows, WholeRows, refuse_overlong, stretches
from modelyard.errors import UserError
from tests.data.in_memory import InMemory


def open_rows(
    kind: type[Rows], lengths: list[int], sequence_length: int, shuffle: str = "epoch", passes: int = 1
):
    dataset = InMemory.of_lengths(lengths)
    order = DocumentOrder(len(lengths), key=3, shuffle=shuffle, passes=passes)
    return kind(dataset, order, sequence_length)


def tokens(rows: Rows, index: int) -> list[int]:
    return [t for d, b, e in rows.row(index) for t in rows.dataset.document(d, b, e).tolist()]


def test_cut_rows_by_hand():
    rows = open_rows(CutRows, [3, 0, 5, 2], 4, "disabled")
    assert rows.row(0) == [(0, 0, 3), (2, 0, 2)]
    assert rows.row(1) == [(2, 1, 5), (3, 0, 1)]  # overlaps by the token that was the last target of row 0
    assert rows.row(2) == [(3, 0, 2), (0, 0, 3)]  # the next epoch follows without a seam
    assert rows.row(5) == [(0, 0, 3), (2, 0, 2)]  # 20 tokens later: two epochs
    assert rows.rows_per_epoch() == 2.5


@pytest.mark.parametrize("kind", [CutRows, WholeRows])
def test_one_pass_has_every_token_once(kind):
    lengths = np.random.default_rng(0).integers(0, 9, 25_000).tolist()
    rows = open_rows(kind, lengths, 1000, "epoch")
    targets = []
    for pieces in rows.one_pass():
        row = [t for d, b, e in pieces for t in rows.dataset.document(d, b, e).tolist()]
        assert 0 < len(row) <= 1001
        targets += row if kind is WholeRows else row[1:]
    if kind is CutRows:  # the first token of the epoch is the one that is no target
        targets += tokens(rows, [rows._place(i) for i in range(rows.table.first[1])].index(0))[:1]
    assert sorted(targets) == list(range(sum(lengths)))


def test_a_batch_is_not_one_long_document():
    """One document fills a tenth of the data: of the first 20 rows it gets about 2, not all."""
    rows = open_rows(CutRows, [1000] + [100] * 90, 10, "epoch")
    of_the_long_one = sum(any(piece.document == 0 for piece in rows.row(index)) for index in range(100))
    assert 3 <= of_the_long_one <= 20


def test_whole_rows_by_hand():
    # Rows of 5 tokens. 4 → 1 free; 3 → 2 free; 2 fits that exactly; 1 fits the first. 6 is too long, 0 is nothing.
    rows = open_rows(WholeRows, [1, 3, 6, 4, 0, 2], 4, "disabled")
    assert rows.row(0) == [(0, 0, 1), (3, 0, 4)]
    assert rows.row(1) == [(1, 0, 3), (5, 0, 2)]
    assert rows.row(2) == rows.row(0)
    assert rows.rows_per_epoch() == 2
    assert rows.facts() == {"documents_seen": 6, "over_long_documents": 1, "longest_document": 6, "fill": 1.0}


@pytest.mark.parametrize("shuffle", ["epoch", "skip_first_epoch", "disabled"])
def test_cut_rows_are_the_stream(shuffle):
    lengths = np.random.default_rng(0).integers(0, 9, 25_000).tolist()
    rows = open_rows(CutRows, lengths, 1000, shuffle)
    total = sum(lengths)
    assert rows.order.blocks_per_cycle == 2
    count = -(-2 * total // 1000)  # the rows that begin in the first two epochs
    places = [rows._place(index) for index in range(count)]
    assert sorted(places) == list(range(count))
    one = total // 1000
    assert (places[:one] == list(range(one))) == (shuffle != "epoch")
    assert (places == list(range(count))) == (shuffle == "disabled")
    stream = tokens(rows, places.index(0))[:1]
    for place in range(count):
        row = tokens(rows, places.index(place))
        assert len(row) == 1001
        assert row[0] == stream[-1]
        stream += row[1:]
    # Every token exactly once in each epoch, documents in one piece.
    assert sorted(stream[:total]) == list(range(total))
    assert sorted(stream[total : 2 * total]) == list(range(total))
    assert (stream[:total] == list(range(total))) == (shuffle != "epoch")


@pytest.mark.parametrize("kind", [CutRows, WholeRows])
def test_rows_do_not_depend_on_what_was_read_before(kind):
    lengths = np.random.default_rng(1).integers(1, 60, 25_000).tolist()
    forward, random_access, restored = (open_rows(kind, lengths, 128) for _ in range(3))
    expected = [forward.row(index) for index in range(12_000)]
    for index in np.random.default_rng(2).permutation(12_000)[:60].tolist():
        assert random_access.row(index) == expected[index]
    restored.table.restore(forward.table.sizes())
    assert restored.row(11_999) == expected[11_999]
    assert forward.fingerprint == restored.fingerprint


def test_whole_rows_have_every_document_once_an_epoch():
    lengths = np.maximum(np.random.default_rng(1).lognormal(3.5, 1, 25_000), 1).astype(int).tolist()
    rows = open_rows(WholeRows, lengths, 255)
    fits = [d for d, length in enumerate(lengths) if length <= 256]
    rows.table.find(10**5)
    per_epoch = [rows.table.first[2], rows.table.first[4] - rows.table.first[2]]
    start = 0
    for count in per_epoch:
        pieces = [piece for index in range(start, start + count) for piece in rows.row(index)]
        assert sorted(piece.document for piece in pieces) == fits
        assert all((piece.begin, piece.end) == (0, lengths[piece.document]) for piece in pieces)
        start += count
    assert all(sum(e - b for _, b, e in rows.row(index)) <= 256 for index in range(start))
    facts = rows.facts()
    assert facts["fill"] > 0.99
    assert (facts["documents_seen"], facts["over_long_documents"]) == (25_000, 25_000 - len(fits))
    assert rows.rows_per_epoch() == per_epoch[0]


def test_full_shuffle_has_every_document_as_often():
    lengths = np.random.default_rng(1).integers(1, 60, 5_000).tolist()
    rows = open_rows(WholeRows, lengths, 128, "full", passes=4)
    rows.table.grow(rows.order.blocks_per_cycle)
    cycle = rows.table.first[-1]
    pieces = [piece.document for index in range(cycle) for piece in rows.row(index)]
    assert np.array_equal(np.bincount(pieces), np.full(5_000, 4))
    assert rows.rows_per_epoch() == cycle / 4


def test_a_sequence_longer_than_all_data_repeats_it():
    rows = open_rows(CutRows, [2, 3], 12)
    first = tokens(rows, 0)
    assert len(first) == 13
    assert [sorted(first[:5]), sorted(first[5:10])] == [[0, 1, 2, 3, 4]] * 2
    assert rows.rows_per_epoch() == 5 / 12
    packed = open_rows(WholeRows, [2, 3], 12)
    assert [sorted(tokens(packed, index)) for index in range(3)] == [[0, 1, 2, 3, 4]] * 3


def test_nothing_fits():
    rows = open_rows(WholeRows, [50, 70], 32)
    with pytest.raises(UserError, match=r"in memory: no document fits .* 33 tokens \(the longest has 70\)"):
        rows.row(0)


def test_blocks_without_a_row_are_passed_over():
    # As stored, the first block's documents are all too long for a row.
    rows = open_rows(WholeRows, [50] * 13_000 + [32] * 12_000, 32, "disabled")
    assert rows.order.blocks_per_cycle == 2
    assert rows.row(0) == [(13_000, 0, 32)]
    assert rows.row(12_000) == rows.row(0)
    assert rows.rows_per_epoch() == 12_000


def test_fingerprint_changes_with_what_decides_a_row():
    base = open_rows(CutRows, [3, 4], 8)
    for other in (
        open_rows(WholeRows, [3, 4], 8),
        open_rows(CutRows, [4, 3], 8),
        open_rows(CutRows, [3, 4], 9),
        open_rows(CutRows, [3, 4], 8, "disabled"),
        open_rows(CutRows, [3, 4], 8, "full", passes=2),
    ):
        assert other.fingerprint != base.fingerprint


def test_table_grows_as_far_as_asked():
    asked = []

    def size_of(block: int) -> int:
        asked.append(block)
        return [3, 0, 2][block % 3]

    table = BlockTable(size_of, blocks_per_cycle=3)
    assert [table.find(unit) for unit in (0, 2, 3, 4, 5)] == [0, 0, 2, 2, 3]
    assert asked == [0, 1, 2, 3]
    assert table.sizes() == [3, 0, 2, 3]
    table.restore([9])  # less than is known: left alone
    assert table.first == [0, 3, 3, 5, 8]
    with pytest.raises(LookupError):
        BlockTable(lambda block: 0, blocks_per_cycle=3).find(0)


@pytest.mark.parametrize("kind", [CutRows, WholeRows])
def test_only_blocks_that_are_read_are_asked_from_disk(kind, monkeypatch):
    asked = []
    monkeypatch.setattr(InMemory, "will_need", lambda self, ranges: asked.append(ranges))
    rows = open_rows(kind, [10] * 35_000, 100)
    rows.table.grow(5)
    rows.rows_per_epoch()
    assert asked == []
    first, second = rows.row(0), rows.row(1)
    assert len(asked) == 1
    covered = {document for begin, end in asked[0] for document in range(begin, end)}
    assert {piece.document for piece in first + second} < covered
    assert len(covered) == rows.order.documents(0)


def test_huge_blocks_are_read_document_by_document(monkeypatch):
    monkeypatch.setattr("modelyard.data.rows._ADVISED_TOKENS", 99)
    monkeypatch.setattr(InMemory, "will_need", lambda self, ranges: pytest.fail("asked for too much"))
    assert sum(end - begin for _, begin, end in open_rows(CutRows, [10] * 10, 20).row(0)) == 21


def test_split_rows_by_hand():
    # Rows of 5 tokens: 11 become 5, 5 and 3, each beginning with the token that ended the one before.
    numbers, begins, lengths = stretches(np.array([11, 5, 0, 1, 6]), 4)
    assert numbers.tolist() == [0, 0, 0, 1, 2, 3, 4, 4]
    assert begins.tolist() == [0, 4, 8, 0, 0, 0, 0, 4]
    assert lengths.tolist() == [5, 5, 3, 5, 0, 1, 5, 2]
    dataset = InMemory.of_lengths([11, 2])
    rows = WholeRows(dataset, DocumentOrder(2, key=3, shuffle="disabled", passes=1), 4, split=True)
    assert [rows.row(i) for i in range(3)] == [[(0, 0, 5)], [(0, 4, 9)], [(0, 8, 11), (1, 0, 2)]]
    facts = rows.facts()
    assert (facts["documents_seen"], facts["over_long_documents"], facts["longest_document"]) == (2, 0, 11)


@pytest.mark.parametrize("isolate", [True, False])
def test_split_documents_have_every_token_as_a_target_once(isolate):
    lengths = np.random.default_rng(1).integers(0, 60, 3000).tolist()
    dataset = InMemory.of_lengths(lengths)
    rows = WholeRows(dataset, DocumentOrder(3000, key=3, shuffle="epoch", passes=1), 20, split=True)
    everything = [(dataset, pieces) for pieces in rows.one_pass()]
    layout = lay_out(
        everything, sequence_length=20, vocab_size=dataset.num_tokens, isolate=isolate, mask=False
    )
    targets = layout.labels[layout.labels >= 0]
    firsts = set(np.cumsum([0, *lengths])[:-1].tolist())
    inner = sorted(set(range(sum(lengths))) - firsts)
    assert sorted(t for t in targets.tolist() if t not in firsts) == inner
    if isolate:
        assert len(targets) == len(inner)


def test_over_long_documents_are_refused_with_the_longest():
    dataset = InMemory.of_lengths([5, 40, 6, 41, 3, 41, 7, 8, 9])
    refuse_overlong(dataset, 41)
    with pytest.raises(UserError) as error:
        refuse_overlong(dataset, 5)
    assert error.value.problems == [
        "7 of 9 documents are longer than a row of sequence_length + 1 = 5 tokens: document 3 of in memory (41 tokens), "
        "document 5 of in memory (41 tokens), document 1 of in memory (40 tokens), document 8 of in memory (9 tokens), document 7 of in "
        "memory (8 tokens) and 2 more; raise batch.sequence_length to 40, or say what becomes of them: batch.overlong: drop | "
        "split",
    ]
