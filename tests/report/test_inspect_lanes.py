"""What is counted of lanes: kinds of conversations, answers that do not end, spans that were made wrongly. By hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from modelyard.chat.segments import Kind, LossLane, trained
from modelyard.data.datasets import StoredDataset
from modelyard.data.tokenizer import load_tokenizer
from modelyard.report import inspect_scan
from modelyard.report.inspect_lanes import KNOWN, Kinds, Seen, TurnTokens
from modelyard.report.inspect_scan import Scan, scan
from tests.data.in_memory import InMemory
from tests.report.inspecting import byte, make_store

HEAD, SAYS = byte(Kind.HEADER, "assistant"), byte(Kind.CONTENT, "assistant")
CALLS, ENDS = byte(Kind.TOOL_CALL, "assistant"), byte(Kind.TERMINATOR, "assistant")
ASKS, ASKED = byte(Kind.CONTENT, "user"), byte(Kind.TERMINATOR, "user")
GIVES = byte(Kind.TOOL_RESULT, "tool")
LEFT_OUT = [byte(kind, "assistant", trained=False) for kind in (Kind.CONTENT, Kind.TERMINATOR)]
CHATS = [
    [byte(Kind.BEGIN), ASKS, ASKED, HEAD, SAYS, SAYS, ENDS],
    [ASKS, ASKED, HEAD, CALLS, ENDS, GIVES, HEAD, SAYS, SAYS, SAYS],  # its last answer is cut off
    [ASKS, HEAD, *LEFT_OUT],  # nothing is trained on
    [ASKS, HEAD, *LEFT_OUT, ASKS, HEAD, SAYS, ENDS],
]


def look(path: Path, lane: LossLane) -> Scan:
    documents = [list(range(2, 2 + len(chat))) for chat in CHATS]
    store = StoredDataset(make_store(path, None, documents, kinds=CHATS))
    return scan(store, vocabularies={}, bos=None, eos=None, limit=10**9, loss_lane=lane)


@pytest.mark.parametrize("chunk", [1 << 20, 8, 3])
@pytest.mark.parametrize(
    ("lane", "masked", "answers", "ended", "of_answers"),
    [("sft", 29 - 3 - 5 - 2, 4, 3, 6), ("last_answer", 29 - 3 - 3 - 2, 3, 2, 6), ("all", 0, 4, 3, 6)],
)
def test_kinds_are_counted(tmp_path, monkeypatch, chunk, lane, masked, answers, ended, of_answers):
    """Whatever is held at a time: a document that is longer than that is still known from its whole."""
    monkeypatch.setattr(inspect_scan, "CHUNK_TOKENS", chunk)
    found = look(tmp_path / "s", lane)
    assert found.kinds is not None
    assert (found.documents, found.tokens, found.masked) == (4, 29, masked)
    assert (found.kinds.answers, found.kinds.ended) == (answers, ended)
    assert found.kinds.unended == Seen(1, [1])
    assert found.untrained == (Seen() if lane == "all" else Seen(1, [2]))
    rows = {value: counts for value, *counts in found.kinds.rows()}
    # Both kinds of content are a row: those of messages that are left out, and those that are not.
    assert rows[SAYS] == [8, {"sft": 6, "last_answer": 6, "all": 8}[lane]]
    assert rows[CALLS] == [1, {"sft": 1, "last_answer": 0, "all": 1}[lane]]
    assert rows[ENDS] == [5, {"sft": 3, "last_answer": 2, "all": 5}[lane]]
    assert rows[ASKS] == [5, 5 if lane == "all" else 0]
    assert list(rows) == sorted(rows, key=lambda value: (value & 7, value))
    assert sum(count for count, _ in rows.values()) == 29


@pytest.mark.parametrize("lane", ["sft", "last_answer", "all"])
def test_many_conversations_as_one_by_one(tmp_path: Path, lane: LossLane) -> None:
    random = np.random.default_rng(7)
    chats = [
        random.choice([ASKS, HEAD, SAYS, CALLS, ENDS, *LEFT_OUT], random.integers(1, 12)) for _ in range(300)
    ]
    store = StoredDataset(make_store(tmp_path / "s", None, chats, kinds=[chat.tolist() for chat in chats]))
    found = scan(store, vocabularies={}, bos=None, eos=None, limit=10**9, loss_lane=lane)
    assert found.kinds is not None
    answers, open_ones = 0, []
    for number, chat in enumerate(chats):
        said = trained(chat, lane) & trained(chat)
        runs = "".join("x" if one else " " for one in said)
        ends = [at for at in range(len(chat)) if said[at] and not runs[at + 1 :].startswith("x")]
        answers += len(ends)
        if any(chat[at] != ENDS for at in ends):
            open_ones.append(number)
    assert found.kinds.answers == answers
    assert (found.kinds.unended.count, found.kinds.unended.named) == (len(open_ones), open_ones[:3])
    assert found.masked == sum(int((~trained(chat, lane)).sum()) for chat in chats)
    assert found.kinds.trained.sum() == found.tokens - found.masked


def test_bytes_that_mean_nothing() -> None:
    """Seven kinds, four roles and none, and a mark of messages that are left out: 7 × 5 × 2."""
    assert KNOWN.sum() == 70
    kinds = Kinds("sft")
    values = np.array([SAYS, 7, 255, ENDS], np.uint8)
    kinds.add(values, np.zeros(4, bool), np.array([4]), np.array([0]))
    assert (kinds.unknown, [value for value, *_ in kinds.rows()]) == (2, [SAYS, ENDS])


def test_documents_are_named_by_the_first() -> None:
    seen = Seen()
    for documents in ([4], [], [6, 7, 9], [11]):
        seen.add(np.array(documents, np.int64))
    assert (seen.count, seen.named, seen.first) == (5, [4, 6, 7], 4)


# Spans

END, END_OF_CALL, HEADER, CALL, TEXT_END, BREAK = 3, 4, 5, 6, 2, 9
TURNS = TurnTokens((END, END_OF_CALL), (HEADER,), (CALL, END_OF_CALL))
ASK = [HEADER, 20, END, HEADER]
"""A turn of the user and the header of the answer."""


def chat(*stretches: tuple[int, list[int]]) -> tuple[list[int], list[int]]:
    """Tokens and mask of stretches that are each masked or not."""
    return [token for _, part in stretches for token in part], [m for m, part in stretches for _ in part]


@pytest.mark.parametrize(
    ("document", "found"),
    [
        (chat((1, ASK), (0, [30, END])), ""),
        (chat((1, ASK), (0, [30, END, TEXT_END])), ""),
        (chat((1, ASK), (0, [30, END, BREAK, TEXT_END])), ""),
        (chat((1, ASK), (0, [30, END]), (1, [BREAK])), ""),
        (chat((1, ASK), (0, [30, END]), (1, [BREAK]), (0, [TEXT_END])), ""),
        (chat((1, ASK), (0, [30, END, 31, 32, 33])), "unended"),
        (chat((1, ASK), (0, [30, 31])), "unended"),
        (chat((1, ASK), (0, [30, 31]), (1, [END])), "unended"),
        (chat((1, ASK), (0, [30]), (1, [END]), (0, [TEXT_END])), "unended"),
        (chat((1, ASK), (0, [30, END]), (1, ASK), (0, [31])), "unended"),
        (chat((1, ASK), (0, [30, END]), (1, [HEADER, 21, END])), "last_masked"),
        (chat((1, ASK), (0, [30, END]), (1, [HEADER, 21, END, TEXT_END])), "last_masked"),
        (chat((1, [*ASK, CALL, 33, END_OF_CALL, HEADER, 40, END, HEADER]), (0, [30, END])), "calls_masked"),
        (chat((1, ASK), (0, [CALL, 33, END_OF_CALL, HEADER, 40, END])), "headers_trained"),
        # Not a chat, or nothing of it is trained on: another's matter.
        (chat((1, [20, 21]), (0, [22, 23])), None),
        (chat((1, [*ASK, 30, END])), None),
        # The first token of a document is no target, whatever the mask says of it.
        (chat((0, [HEADER]), (1, [20, END, HEADER]), (0, [30, END])), ""),
    ],
)  # fmt: skip
def test_spans_that_were_made_wrongly(document: tuple[list[int], list[int]], found: str | None) -> None:
    good = chat((1, ASK), (0, [30, END]))
    documents = [good, document, good]
    dataset = InMemory(
        [np.array(tokens) for tokens, _ in documents], [np.array(mask) for _, mask in documents]
    )
    spans = scan(dataset, vocabularies={}, bos=None, eos=None, limit=10**9, turns=TURNS).spans
    assert spans is not None
    assert spans.chats == 2 + (found is not None)
    names = ("unended", "last_masked", "calls_masked", "headers_trained")
    expected = {name: Seen(1, [1]) if name == found else Seen() for name in names}
    assert {name: getattr(spans, name) for name in names} == expected


def test_turns_are_known_by_their_tokens(chat_tokenizers: dict[str, Path], tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(chat_tokenizers["llama3"])
    turns = TurnTokens.of(tokenizer)
    assert turns is not None

    def names(ids: tuple[int, ...]) -> set[str | None]:
        return {tokenizer.backend.id_to_token(number) for number in ids}

    assert names(turns.ends) == {"<|eot_id|>", "<|eom_id|>"}
    assert names(turns.headers) == {"<|start_header_id|>"}
    assert names(turns.calls) == {"<|python_tag|>", "<|eom_id|>"}
    assert TurnTokens.of(load_tokenizer(tokenizer_folder)) is None
    assert TurnTokens.of(None) is None
