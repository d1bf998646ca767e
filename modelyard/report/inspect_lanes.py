"""What the lanes beside the tokens say: of conversations what each token is and which answers do not end, of texts with spans
the marks of spans that were made wrongly. Chunk by chunk, for `inspect_scan`."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from modelyard.chat.conversation import ROLES
from modelyard.chat.segments import Kind, LossLane, trained
from modelyard.data.lanes import KIND_LANE, MASK_LANE
from modelyard.data.tokenizer import END_OF_TURN, Tokenizer

_NAMED = 3
"""Of the documents that have something in common, how many are named."""
KNOWN = np.array(
    [value & 7 < len(Kind) and value >> 3 & 7 <= len(ROLES) and value < 128 for value in range(256)]
)
"""Which bytes of the kind lane mean something, bool [256]."""


@dataclass
class Seen:
    """Documents with something in common: how many, and the first few."""

    count: int = 0
    named: list[int] = field(default_factory=list)

    @property
    def first(self) -> int | None:
        """The first of them."""
        return self.named[0] if self.named else None

    def add(self, documents: np.ndarray) -> None:
        """Add documents by number, ascending, int64 [documents]."""
        self.count += len(documents)
        self.named += documents[: _NAMED - len(self.named)].tolist()


def left_out(values: np.ndarray, lengths: np.ndarray, name: str, loss_lane: LossLane) -> np.ndarray:
    """Which tokens of whole documents are no targets by their lane `name`, bool [tokens]; a document's first is told as any."""
    if name == MASK_LANE:
        return values != 0
    if loss_lane != "last_answer":
        return ~trained(values, loss_lane)
    # The last answer is known from the whole, and from the whole of one document alone.
    documents = np.split(values, np.cumsum(lengths)[:-1])
    return ~np.concatenate([trained(document, loss_lane) for document in documents])


@dataclass
class Kinds:
    """What the tokens of conversations are."""

    loss_lane: LossLane
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    """Of each value of the lane (`modelyard.chat.segments.lane_value`), int64 [256]."""
    trained: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    """Of these the ones that are trained on, int64 [256]."""
    answers: int = 0
    """Messages of the assistant that are trained on."""
    ended: int = 0
    """Of these the ones whose last trained token is one that ends a message."""
    unended: Seen = field(default_factory=Seen)
    """Documents with another."""

    def add(self, values: np.ndarray, masked: np.ndarray, lengths: np.ndarray, numbers: np.ndarray) -> None:
        """Add documents.

        Args:
            values: their lane, uint8 [tokens].
            masked: which tokens are no targets, bool [tokens].
            lengths: tokens of each document, none of them empty, int64 [documents].
            numbers: of the documents, int64 [documents].
        """
        counts = np.bincount(values.astype(np.int64) + 256 * masked, minlength=512)
        self.trained += counts[:256]
        self.tokens += counts[:256] + counts[256:]
        # Whatever else the lane `all` trains on, an answer is what the assistant says.
        said = trained(values) if self.loss_lane == "all" else ~masked
        lasts = np.cumsum(lengths) - 1
        after = np.append(said[1:], False)
        after[lasts] = False
        ends = np.flatnonzero(said & ~after)
        well = values[ends] & 7 == Kind.TERMINATOR
        self.answers += len(ends)
        self.ended += int(np.count_nonzero(well))
        self.unended.add(numbers[np.unique(np.searchsorted(lasts, ends[~well]))])

    @property
    def unknown(self) -> int:
        """Tokens whose byte means nothing."""
        return int(self.tokens[~KNOWN].sum())

    def rows(self) -> list[tuple[int, int, int]]:
        """(value without the mark of messages that are left out, tokens, trained tokens) of each kind and role there is."""
        found: dict[int, list[int]] = {}
        for value in np.flatnonzero((self.tokens > 0) & KNOWN).tolist():
            of_both = found.setdefault(value & 63, [0, 0])
            of_both[0] += int(self.tokens[value])
            of_both[1] += int(self.trained[value])
        by_kind = sorted(found.items(), key=lambda item: (item[0] & 7, item[0]))
        return [(value, tokens, in_loss) for value, (tokens, in_loss) in by_kind]


@dataclass(frozen=True)
class TurnTokens:
    """Ids by which turns are known in a rendered chat."""

    ends: tuple[int, ...]
    headers: tuple[int, ...]
    calls: tuple[int, ...]
    """What begins and ends a tool call, and stands nowhere else."""

    @classmethod
    def of(cls, tokenizer: Tokenizer | None) -> TurnTokens | None:
        """None where the tokenizer has no token that ends a turn."""

        def ids(*names: str) -> tuple[int, ...]:
            found = (tokenizer.backend.token_to_id(name) for name in names) if tokenizer else ()
            return tuple(number for number in found if number is not None)

        ends = ids(*END_OF_TURN)
        headers = ids("<|start_header_id|>", "<|im_start|>")
        return cls(ends, headers, ids("<|python_tag|>", "<|eom_id|>")) if ends else None


@dataclass
class Spans:
    """What is wrong with the spans of rendered chats: documents with a token that ends a turn, and something trained on."""

    turns: TurnTokens
    chats: int = 0
    unended: Seen = field(default_factory=Seen)
    """The last trained stretch does not end in a token that ends a turn."""
    last_masked: Seen = field(default_factory=Seen)
    """It does, and another turn comes after it."""
    calls_masked: Seen = field(default_factory=Seen)
    headers_trained: Seen = field(default_factory=Seen)

    def add(self, tokens: np.ndarray, masked: np.ndarray, lengths: np.ndarray, numbers: np.ndarray) -> None:
        """Add documents; arguments as of `Kinds.add`, and their tokens [tokens]."""
        lasts = np.cumsum(lengths) - 1
        starts = lasts + 1 - lengths
        in_loss = ~masked
        in_loss[starts] = False
        places = np.arange(len(tokens))

        def last_of(which: np.ndarray) -> np.ndarray:
            """The last such token of each document, -1 where it has none."""
            return np.maximum.reduceat(np.where(which, places, -1), starts)

        def has(which: np.ndarray) -> np.ndarray:
            return np.logical_or.reduceat(which, starts)

        ends = _one_of(tokens, self.turns.ends)
        last_trained, last_end = last_of(in_loss), last_of(ends)
        chats = (last_trained >= 0) & (last_end >= 0)
        self.chats += int(np.count_nonzero(chats))
        # What may stand behind the end of the last turn: a line break of the template, the end of the text.
        last_trained_end = last_of(ends & in_loss)
        gap = last_trained - last_trained_end
        ended = (last_trained_end >= 0) & (gap <= _AFTER_THE_END)
        self.unended.add(numbers[chats & ~ended])
        self.last_masked.add(numbers[chats & ended & (last_end > last_trained)])
        self.calls_masked.add(numbers[chats & has(masked & _one_of(tokens, self.turns.calls))])
        self.headers_trained.add(numbers[chats & has(in_loss & _one_of(tokens, self.turns.headers))])


_AFTER_THE_END = 2


def _one_of(tokens: np.ndarray, ids: tuple[int, ...]) -> np.ndarray:
    """Faster than `np.isin` for a few."""
    found = np.zeros(len(tokens), bool)
    for number in ids:
        found |= tokens == number
    return found


def lane_of(lanes: frozenset[str]) -> str | None:
    """The lane that says which tokens are trained on; None where nothing does."""
    return KIND_LANE if KIND_LANE in lanes else MASK_LANE if MASK_LANE in lanes else None
