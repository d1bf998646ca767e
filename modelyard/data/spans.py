"""Loss-masking spans: character ranges of a text → a mask over its tokens.

The text is tokenised once, whole, as it would be without spans; then each token asks whether one of its characters
lies in a span. (Cutting the text at span edges and tokenising the pieces changes the tokens.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


class SpanError(ValueError):
    """Spans that do not fit their text; the message says which and why."""


def character_mask(spans: Any, length: int) -> np.ndarray:
    """Which of a text's characters lie in a span.

    Args:
        spans: `[[first, last], …]`, both inclusive, in any order, overlapping or nested; `[n, n - 1]` is empty.
        length: characters of the text.

    Returns:
        bool [length].

    Raises:
        SpanError: not pairs of integers, a reversed span, or one outside the text.
    """
    if not isinstance(spans, Sequence | np.ndarray) or isinstance(spans, str):
        raise SpanError(f"the spans are {type(spans).__name__}, not a list of [first, last] pairs")
    edges = np.zeros(length + 1, np.int32)
    for span in spans:
        if (
            not isinstance(span, Sequence | np.ndarray)
            or len(span) != 2
            or not all(isinstance(edge, int | np.integer) and not isinstance(edge, bool) for edge in span)
        ):
            raise SpanError(f"span {span!r} is not a pair of integers")
        first, last = int(span[0]), int(span[1])
        if first < 0 or last < first - 1:
            raise SpanError(f"span [{first}, {last}] is reversed or negative")
        if last >= length or first > length:
            raise SpanError(
                f"span [{first}, {last}] lies beyond the text, whose last character is {length - 1}"
            )
        edges[first] += 1
        edges[last + 1] -= 1
    return np.cumsum(edges[:-1]) > 0


def token_mask(masked: np.ndarray, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """Which tokens touch a masked character.

    A character that no token claims (a normaliser drops it or joins it to its neighbour, as NFC does with accents)
    counts with the nearest one before it that some token claims. A token of no character (the space that SentencePiece
    puts in front) counts as the character it stands before.

    Args:
        masked: bool [characters], from `character_mask`.
        offsets: half-open character range of every token, as the tokenizer gives them.

    Returns:
        uint8 [tokens], 1 = touches a masked character.
    """
    ranges = np.array(offsets, np.int64).reshape(-1, 2)
    length = len(masked)
    if not len(ranges) or not length:
        return np.zeros(len(ranges), np.uint8)
    begins = np.minimum(ranges[:, 0], length - 1)
    ends = np.clip(ranges[:, 1], begins + 1, length)
    claims = np.zeros(length + 1, np.int64)
    np.add.at(claims, begins, 1)
    np.add.at(claims, ends, -1)
    claimed = np.cumsum(claims[:-1]) > 0
    owner = np.maximum.accumulate(np.where(claimed, np.arange(length), -1))
    owner[owner < 0] = np.argmax(claimed)
    counts = np.concatenate(([0], np.cumsum(np.bincount(owner[masked], minlength=length) > 0)))
    return (counts[ends] > counts[begins]).astype(np.uint8)
