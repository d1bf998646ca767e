"""Segments → token ids, each with what it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from modelyard.chat.conversation import Conversation, ConversationError
from modelyard.chat.families import Family
from modelyard.chat.segments import Kind, Segment, lane_value, trained
from modelyard.data.tokenizer import Tokenizer, replace_surrogates


@dataclass(frozen=True)
class Tokenized:
    """A conversation as tokens."""

    ids: np.ndarray
    """uint32 [tokens]"""
    kinds: np.ndarray
    """uint8 [tokens]: `lane_value` of each token's segment."""


def tokenize_segments(segments: Sequence[Segment], tokenizer: Tokenizer) -> Tokenized:
    """Cut each segment into tokens by itself; strings of special tokens in it are text like any other.

    So the tokens of a prompt are the first tokens of prompt and answer, whatever the answer begins with, and no content can
    end its own message. Raises ConversationError where the vocabulary lacks a token that the format is made of.
    """
    return next(tokenize_many([segments], tokenizer))


def tokenize_many(conversations: Sequence[Sequence[Segment]], tokenizer: Tokenizer) -> Iterator[Tokenized]:
    """`tokenize_segments` of each of many, which is faster than one by one."""
    segments = [segment for conversation in conversations for segment in conversation]
    pieces: dict[tuple[str, bool], np.ndarray] = {}
    for inside in (False, True):
        texts = dict.fromkeys(
            segment.text
            for conversation in conversations
            for number, segment in enumerate(conversation)
            if not segment.special and _is_inside(conversation, number, tokenizer) == inside
        )
        found = tokenizer.encode_ids([replace_surrogates(text) for text in texts], inside=inside)
        pieces |= {(text, inside): ids for text, ids in zip(texts, found, strict=True)}
    specials = {
        name: np.array([number], np.uint32) for name, number in require_specials(segments, tokenizer).items()
    }
    for conversation in conversations:
        ids = [
            specials[segment.text]
            if segment.special
            else pieces[segment.text, _is_inside(conversation, number, tokenizer)]
            for number, segment in enumerate(conversation)
        ]
        values = np.array([lane_value(segment) for segment in conversation], np.uint8)
        yield Tokenized(np.concatenate(ids), np.repeat(values, [len(found) for found in ids]))


def _is_inside(segments: Sequence[Segment], number: int, tokenizer: Tokenizer) -> bool:
    """Whether a segment gets no space in front, as it would in the whole text: one that stands behind other text."""
    if tokenizer.prefix is None or number == 0:
        return False
    return tokenizer.prefix == "first" or not segments[number - 1].special


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


def require_specials(segments: Sequence[Segment], tokenizer: Tokenizer) -> dict[str, int]:
    """Ids of the special tokens in segments. Raises ConversationError where the vocabulary lacks one."""
    found: dict[str, int] = {}
    for text in dict.fromkeys(segment.text for segment in segments if segment.special):
        token_id = tokenizer.backend.token_to_id(text)
        if token_id is None:
            raise ConversationError(
                f"the tokenizer {tokenizer.folder} has no token '{text}', which this chat format is made of"
            )
        found[text] = token_id
    return found
