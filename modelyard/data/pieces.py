r"""Token ids by way of a text's pieces: the same ids as the tokenizer's own, several times as fast.

A byte-level BPE tokenizer cuts a text by a regular expression and merges inside each piece alone, so a piece has the same
ids wherever it stands, and a text is a sequence of pieces that nearly all have been met before. Here the text is cut by
the `regex` module and the ids are looked up; only pieces met for the first time go through the tokenizer.

Whether both cut alike is not taken on trust. Only expressions that are known here are used (they consist of alternatives of
character classes, which both programs try from left to right); each character is tried in both the first time it is met,
as programs follow different versions of Unicode; a new piece must be one piece by itself; and a text that holds a character
or a string for which any of this fails goes through the tokenizer whole.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import regex
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
EXPRESSIONS = (LLAMA_3, QWEN_2, GPT_2)

MOST_PIECES = 1 << 17
"""Kept by each process, about 30 MB. Later ones are looked up each time."""
LONGEST_PIECE = 64
"""Characters; longer ones hardly come again."""

_PROBES = (
    "{0}",
    "{0}a",
    "{0}1",
    "{0}!",
    " {0}a",
    " {0}1",
    "a{0}a",
    "1{0}1",
    " {0}",
    "{0} ",
    " {0} a",
    "!{0}!",
    "{0}\n",
    "\n{0}",
    "a'{0}",
    "'{0}e",
    "'r{0}",
    "'l{0}",
    "'v{0}",
)
"""Texts that are cut differently for a letter, a number, a space, a line end, a sign, and for each letter of `'re`, `'ve`."""

Encode = Callable[[Sequence[str]], list[Any]]


class Pieces:
    """The pieces met so far, and their ids.

    Args:
        backend: the tokenizer.
        encode: gives the backend's encodings of many texts, as they are wanted.
    """

    def __init__(
        self, backend: Backend, encode: Encode, expression: str, strings: Sequence[str], composed: bool
    ):
        self._backend = backend
        self._encode = encode
        self._cut = regex.compile(expression).findall
        self._strings = tuple(strings)
        self._composed = composed
        self._ids: dict[str, bytes] = {}
        self._same: set[str] = set()
        self._other: set[str] = set()
        self._meet(set(map(chr, range(128))))
        self._ascii = not self._other

    @classmethod
    def of(cls, backend: Backend, encode: Encode) -> Pieces | None:
        """For a tokenizer that works this way; None for any other."""
        # The parts one by one: the whole tokenizer as JSON takes half a second.
        expression = _expression(_description(backend.pre_tokenizer))
        normalizer, model = _description(backend.normalizer), backend.model
        plain = isinstance(model, BPE) and not (
            model.dropout
            or model.continuing_subword_prefix
            or model.end_of_word_suffix
            or model.byte_fallback
        )
        if not plain or expression not in EXPRESSIONS or normalizer not in (None, {"type": "NFC"}):
            return None
        strings = [
            token.content for token in backend.get_added_tokens_decoder().values() if not token.special
        ]
        return cls(backend, encode, expression, strings, normalizer is not None)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, uint32 [tokens]."""
        known = self._ids
        found: list[bytes | None] = [None] * len(texts)
        cut: dict[int, list[str]] = {}
        whole: list[int] = []
        for number, text in enumerate(texts):
            if not self._cut_alike(text):
                whole.append(number)
                continue
            pieces = self._cut(text)
            try:
                found[number] = b"".join(map(known.__getitem__, pieces))
            except KeyError:
                cut[number] = pieces
        missing: set[str] = set()
        for pieces in cut.values():
            missing.update(set(pieces).difference(known))
        new = self._look_up(missing)
        for number, pieces in cut.items():
            try:
                found[number] = b"".join(map(known.__getitem__, pieces))
            except KeyError:
                try:  # some are not kept
                    found[number] = b"".join([known.get(piece) or new[piece] for piece in pieces])
                except KeyError:
                    whole.append(number)
        for number, encoding in zip(whole, self._encode([texts[number] for number in whole]), strict=True):
            found[number] = _bytes(encoding)
        return [np.frombuffer(ids or b"", np.uint32) for ids in found]

    def _cut_alike(self, text: str) -> bool:
        """Whether the tokenizer cuts the text where we do."""
        if not (self._ascii and text.isascii()):
            characters = set(text)
            if not characters <= self._same:
                self._meet(characters - self._same)
                if not characters <= self._same:
                    return False
            if self._composed and not unicodedata.is_normalized("NFC", text):
                return False
        return not any(string in text for string in self._strings)

    def _look_up(self, pieces: Iterable[str]) -> dict[str, bytes]:
        """Ids of pieces met for the first time, but for those that the tokenizer would not leave whole."""
        usable = [piece for piece in pieces if self._cut(piece) == [piece]]
        new = dict(zip(usable, map(_bytes, self._encode(usable)), strict=True))
        for piece, ids in new.items():
            if len(self._ids) >= MOST_PIECES:
                break
            if len(piece) <= LONGEST_PIECE:
                self._ids[piece] = ids
        return new

    def _meet(self, characters: set[str]) -> None:
        """Try characters in both programs."""
        before = self._backend.pre_tokenizer
        for character in characters - self._other:
            texts = [probe.format(character) for probe in _PROBES]
            same = unicodedata.category(character) != "Cn" and all(
                self._cut(text) == [text[begin:end] for _, (begin, end) in before.pre_tokenize_str(text)]
                for text in texts
            )
            (self._same if same else self._other).add(character)


def _bytes(encoding: Any) -> bytes:
    return np.array(encoding.ids, np.uint32).tobytes()


def _description(part: Any) -> Any:
    """What the tokenizer's file says of one of its parts; None when it has none."""
    return None if part is None else json.loads(part.__getstate__())


def _expression(pre_tokenizer: Any) -> str | None:
    """The expression by which a byte-level pre-tokenizer cuts; None when it does anything else."""
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return GPT_2
        case {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": str(expression)},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return expression
    return None
