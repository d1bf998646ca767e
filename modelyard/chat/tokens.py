"""Segments → token ids, each with what it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from modelyard.chat.conversation import Conversation, ConversationError
from modelyard.chat.families import Family
from modelyard.chat.segments import Kind, Segment, lane_value, sft_values
from modelyard.data.tokenizer import Tokenizer, replace_surrogates

_TRAINED = np.isin(np.arange(256), sorted(sft_values()))


@dataclass(frozen=True)
class Tokenized:
    """A conversation as tokens."""

    ids: np.ndarray
    """uint32 [tokens]"""
    kinds: np.ndarray
    """uint8 [tokens]: `lane_value` of each token's segment."""


def trained(kinds: np.ndarray) -> np.ndarray:
    """Which tokens fine-tuning trains on, from their kinds: bool [tokens]."""
    return _TRAINED[kinds]


def tokenize_segments(segments: Sequence[Segment], tokenizer: Tokenizer) -> Tokenized:
    """Cut each segment into tokens by itself; strings of special tokens in it are text like any other.

    So the tokens of a prompt are the first tokens of prompt and answer, whatever the answer begins with, and no content can
    end its own message. Raises ConversationError where the vocabulary lacks a token that the format is made of.
    """
    ids: list[np.ndarray] = []
    kinds: list[np.ndarray] = []
    texts = [replace_surrogates(segment.text) for segment in segments if not segment.special]
    plain = iter(tokenizer.encode_ids(texts))
    for segment in segments:
        found = np.array([_special(segment, tokenizer)], np.uint32) if segment.special else next(plain)
        ids.append(found)
        kinds.append(np.full(len(found), lane_value(segment), np.uint8))
    return Tokenized(np.concatenate(ids), np.concatenate(kinds))


def tokenize_conversation(
    conversation: Conversation, family: Family, tokenizer: Tokenizer, *, answer: bool = False
) -> Tokenized:
    """A conversation in its family's format as tokens; `answer` as in `Family.render`."""
    return tokenize_segments(family.render(conversation, answer=answer), tokenizer)


def untrained_reason(tokenized: Tokenized) -> str | None:
    """Why a conversation is no use for fine-tuning: nothing in it is trained on, or an answer that is does not end in a
    token that is. None where it is of use."""
    lanes = trained(tokenized.kinds)
    if not lanes.any():
        return "no token of it is trained on: it has no message of the assistant, or their weights are 0"
    terminators = lanes & (tokenized.kinds & 7 == Kind.TERMINATOR)
    # The trained stretches: each has to end with its terminator.
    ends = np.flatnonzero(lanes & ~np.append(lanes[1:], False))
    if not terminators[ends].all():
        return "an answer that is trained on does not end in a token that ends it"
    return None


def _special(segment: Segment, tokenizer: Tokenizer) -> int:
    token_id = tokenizer.backend.token_to_id(segment.text)
    if token_id is None:
        raise ConversationError(
            f"the tokenizer {tokenizer.folder} has no token '{segment.text}', which this chat format is made of"
        )
    return token_id
