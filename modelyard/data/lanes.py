"""Which tokens are trained on: from the lanes beside the tokens, when they are read. Nothing is tokenised for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from modelyard.chat.segments import LossLane, trained

if TYPE_CHECKING:
    from modelyard.data.datasets import IndexedDataset

MASK_LANE = "loss_mask"
"""Lane of uint8: 1 where a token must not be a target."""
KIND_LANE = "kind"
"""Lane of uint8: what each token of a conversation is, `modelyard.chat.segments.lane_value`."""
NO_KIND = 7
"""Stands for the kind of a token that is part of no conversation."""


def has_kinds(dataset: IndexedDataset) -> bool:
    """Whether it holds conversations whose tokens say what they are."""
    return KIND_LANE in dataset.lanes


def not_targets(
    dataset: IndexedDataset, document: int, begin: int, end: int, *, spans: bool, lane: LossLane
) -> np.ndarray | None:
    """Which tokens of a stretch of a document are no targets, bool [end - begin]; None: all of them are.

    A conversation's are told by `lane`; another document's, with `spans`, by the spans it was prepared with.
    """
    if KIND_LANE in dataset.lanes:
        # The last answer is known from the whole.
        whole = dataset.lane(KIND_LANE, document)
        assert whole is not None
        return ~trained(whole, lane)[begin:end]
    masked = dataset.lane(MASK_LANE, document, begin, end) if spans else None
    return None if masked is None else masked != 0
