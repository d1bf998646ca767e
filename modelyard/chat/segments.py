"""A rendered conversation: pieces of text that each are one thing, and what of them is trained on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Literal

import numpy as np

from modelyard.chat.conversation import ROLES, Role


class Kind(IntEnum):
    """What a token of a conversation is."""

    BEGIN = 0
    """Begin of the sequence."""
    HEADER = 1
    """Says whose message begins; of the assistant it is what a prompt for an answer ends in."""
    CONTENT = 2
    TOOL_CALL = 3
    TOOL_RESULT = 4
    TERMINATOR = 5
    """Ends a message; what the model says when it has said all."""
    SEPARATOR = 6
    """Stands between messages and is never sampled."""


@dataclass(frozen=True)
class Segment:
    text: str
    kind: Kind
    role: Role | None = None
    special: bool = False
    """Whether `text` is one token of the vocabulary, not text to be cut into tokens."""
    trained: bool = True
    """False in a message that is left out of the loss."""


TRAINED_KINDS = (Kind.CONTENT, Kind.TOOL_CALL, Kind.TERMINATOR)
"""What an assistant says."""
_NO_ROLE = len(ROLES)
_UNTRAINED = 1 << 6


def lane_value(segment: Segment) -> int:
    """A byte for each token of the segment: its kind (3 bits), whose it is (3 bits), whether its message is left out."""
    role = _NO_ROLE if segment.role is None else ROLES.index(segment.role)
    return segment.kind | role << 3 | (0 if segment.trained else _UNTRAINED)


def kind_of(value: int) -> Kind:
    return Kind(value & 7)


def role_of(value: int) -> Role | None:
    number = value >> 3 & 7
    return None if number == _NO_ROLE else ROLES[number]


LossLane = Literal["sft", "last_answer", "all"]

_SFT = np.zeros(256, bool)
_SFT[[lane_value(Segment("", kind, "assistant")) for kind in TRAINED_KINDS]] = True


def trained(kinds: np.ndarray, lane: LossLane = "sft") -> np.ndarray:
    """Which tokens of a whole conversation are trained on, from their bytes: bool [tokens].

    `sft`: the assistant's content, tool calls and terminators, but not in messages that are left out; `last_answer`: of these
    the last message alone; `all`: every token.
    """
    if lane == "all":
        return np.ones(len(kinds), bool)
    found = _SFT[kinds]
    if lane == "last_answer":
        # It begins where the mask last rises, or after the end of an answer that it touches.
        begins = found & ~np.append(False, found[:-1])
        ends = found & (kinds & 7 == Kind.TERMINATOR)
        begins[1:] |= found[1:] & ends[:-1]
        places = np.flatnonzero(begins)
        found[: places[-1] if len(places) else 0] = False
    return found


def joined(segments: Iterable[Segment]) -> list[Segment]:
    """Neighbours that are one thing of one message as one segment, so that they are cut into tokens together, as in the whole
    text; white space between a header and what a user says goes with that, where it makes one token with how it begins. (An
    answer's header is left as it is: there the prompt ends.)"""
    found: list[Segment] = []
    for segment in segments:
        before = found[-1] if found else None
        if before is None or before.special or segment.special:
            found.append(segment)
        elif (before.kind, before.role, before.trained) == (segment.kind, segment.role, segment.trained):
            found[-1] = replace(before, text=before.text + segment.text)
        elif before.kind == Kind.HEADER and segment.kind == Kind.CONTENT and segment.role != "assistant":
            kept = before.text.rstrip()
            space = before.text[len(kept) :]
            if space.endswith(" ") or segment.text[:1].isspace():
                found[-1:] = [replace(before, text=kept)] if kept else []
                segment = replace(segment, text=space + segment.text)
            found.append(segment)
        else:
            found.append(segment)
    return found


def text_of(segments: Sequence[Segment]) -> str:
    """The whole as one text."""
    return "".join(segment.text for segment in segments)
