"""Conversations for people: what the kinds are called, how many tokens there are of each, and what is wrong with answers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from modelyard.chat.segments import Kind, LossLane, kind_of, role_of
from modelyard.data.datasets import IndexedDataset
from modelyard.data.lanes import KIND_LANE
from modelyard.report.inspect_blocks import Inspection, Table
from modelyard.report.inspect_data import seen_text
from modelyard.report.inspect_lanes import KNOWN, Kinds, Spans
from modelyard.report.inspect_scan import Scan

LANE_WORDS: dict[LossLane, str] = {
    "sft": "what the assistant says: content, tool calls, terminators",
    "last_answer": "what the assistant says last: content, tool calls, terminators of one message",
    "all": "every token",
}
"""What each loss lane trains on."""


def kind_name(value: int) -> str:
    """`content`, `tool call`; of a byte of the kind lane."""
    return kind_of(value).name.lower().replace("_", " ") if KNOWN[value] else "unknown"


def role_name(value: int) -> str:
    """`assistant`; empty where nobody says it."""
    return (role_of(value) or "") if KNOWN[value] else ""


def kinds_table(kinds: Kinds) -> Table:
    """Tokens by kind and role, and which of them are trained on."""
    every, in_loss = int(kinds.tokens.sum()), int(kinds.trained.sum())

    def share(count: int, of: int) -> str:
        return f"{count / of:.1%}" if count else ""

    rows = [
        [
            kind_name(value),
            role_name(value),
            f"{count:,}",
            share(count, every),
            f"{of_them:,}" if of_them else "",
            share(of_them, in_loss),
        ]
        for value, count, of_them in kinds.rows()
    ]
    columns = ["kind", "role", "tokens", "of all", "trained", "of the loss"]
    return Table(columns, rows, frozenset({0, 1}))


def answers_text(kinds: Kinds) -> str:
    """How many answers are trained on, and whether they end."""
    if not kinds.answers:
        return "none is trained on"
    share = kinds.ended / kinds.answers
    # 99.996% is not all of them.
    shown = "100%" if kinds.ended == kinds.answers else f"{min(share, 0.9999):.2%}"
    return f"{kinds.answers:,} are trained on, {shown} of them end in a trained terminator"


def kinds_values(kinds: Kinds | None) -> dict[str, Any]:
    """The same for `--json`; nothing without conversations."""
    if kinds is None:
        return {}
    every = int(kinds.tokens.sum())
    return {
        "loss_lane": kinds.loss_lane,
        "answers": kinds.answers,
        "answers_ended": kinds.ended,
        "documents_with_open_answers": kinds.unended.count,
        "kinds": [
            {"kind": kind_name(value), "role": role_name(value) or None, "tokens": count, "share": count / every,
             "trained_tokens": of_them}
            for value, count, of_them in kinds.rows()
        ],
    }  # fmt: skip


def spans_values(spans: Spans | None) -> dict[str, Any]:
    """Counts of what is wrong with the spans of rendered chats, for `--json`; nothing where they were not judged."""
    if spans is None:
        return {}
    return {
        "chats": spans.chats,
        "chats_that_end_open": spans.unended.count,
        "chats_that_end_masked": spans.last_masked.count,
        "chats_with_masked_calls": spans.calls_masked.count,
        "chats_with_trained_headers": spans.headers_trained.count,
    }


def targets_by_kind(values: Iterable[int]) -> dict[str, int]:
    """How many tokens there are of each kind and role, `content assistant` → count."""
    found: dict[str, int] = {}
    for value in values:
        name = f"{kind_name(value)} {role_name(value)}".strip()
        found[name] = found.get(name, 0) + 1
    return found


def judge_lanes(
    inspection: Inspection, dataset: IndexedDataset, scan: Scan, *, mask_used: bool = True
) -> None:
    """Faults of conversations, and warnings about spans of rendered chats."""
    if scan.kinds is not None:
        _judge_kinds(inspection, dataset, scan, scan.kinds)
    if scan.spans is not None and mask_used:
        _judge_spans(inspection, dataset, scan, scan.spans)


def _judge_kinds(inspection: Inspection, dataset: IndexedDataset, scan: Scan, kinds: Kinds) -> None:
    by = f"by the loss lane {kinds.loss_lane}"
    if scan.untrained.count:
        advice = "prepare the data again: it leaves such conversations out, or names them"
        inspection.fault(seen_text(dataset, scan, scan.untrained, f"have nothing to train on {by}", advice))
    if kinds.unended.count:
        count = kinds.answers - kinds.ended
        what = f"have answers ({count:,} in all) that do not end in a trained terminator"
        advice = "a model that is trained on them does not learn to stop: prepare the data again"
        inspection.fault(seen_text(dataset, scan, kinds.unended, what, advice))
    if kinds.unknown:
        inspection.fault(
            f"{dataset.name}: {kinds.unknown:,} tokens are of a kind that there is not: the lane '{KIND_LANE}' is damaged, or "
            "of a later version of this program"
        )


_BETTER = "dataset.conversations tells what is trained on from the messages, without spans"


def _judge_spans(inspection: Inspection, dataset: IndexedDataset, scan: Scan, spans: Spans) -> None:
    for found, what, advice in (
        (
            spans.unended,
            "train on a last answer that does not end in an end-of-turn token",
            "a model that is trained on them does not learn to stop: end the text with one, outside the spans",
        ),
        (
            spans.last_masked,
            "end on a turn that is masked: the user has the last word, or the last answer is missing in the loss",
            f"end conversations with the assistant; {_BETTER}",
        ),
        (
            spans.calls_masked,
            "have masked tool calls (<|python_tag|> … <|eom_id|>) though other answers are trained on",
            f"spans that are cut at <|eot_id|> miss them; {_BETTER}",
        ),
        (
            spans.headers_trained,
            "have the header of a message in the loss: a trained stretch runs on into the next message",
            f"results of tools, or the user's words, are trained on then; {_BETTER}",
        ),
    ):
        if found.count:
            inspection.warn(seen_text(dataset, scan, found, what, advice))


def is_assistants(value: int) -> bool:
    """Content that the assistant says, which is told from what others say."""
    return bool(KNOWN[value]) and kind_of(value) == Kind.CONTENT and role_of(value) == "assistant"
