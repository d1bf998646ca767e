"""Token ids as people read them: one cell a token, characters that several tokens share put together."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from modelyard.report.inspect_blocks import Cell, CellKind, clean, visible_space

if TYPE_CHECKING:
    from modelyard.data.tokenizer import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_MOST_JOINED = 8
"""Tokens put together for one character; no character has more bytes than four, but tokens may overlap two characters."""


class Vocabulary:
    """What each token id stands for; without a tokenizer every token is its number."""

    def __init__(self, tokenizer: Tokenizer | None):
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[bytes | None, bool]] = {}

    @classmethod
    def of_folder(cls, folder: Path | None) -> Vocabulary:
        """The tokenizer in a folder. Raises UserError where it cannot be read; no folder gives numbers."""
        if folder is None:
            return cls(None)
        from modelyard.data.tokenizer import load_tokenizer

        return cls(load_tokenizer(folder))

    @cached_property
    def _added(self) -> dict[int, tuple[str, bool]]:
        assert self._tokenizer is not None
        added = self._tokenizer.backend.get_added_tokens_decoder()
        return {number: (token.content, token.special) for number, token in added.items()}

    @cached_property
    def _byte_level(self) -> bool:
        assert self._tokenizer is not None
        decoder = json.loads(self._tokenizer.backend.to_str()).get("decoder") or {}
        return any(part.get("type") == "ByteLevel" for part in (decoder, *decoder.get("decoders", ())))

    def token(self, token_id: int) -> tuple[bytes | None, bool]:
        """A token's bytes (None: no such token), and whether it is special."""
        found = self._known.get(token_id)
        if found is None:
            found = self._known[token_id] = self._look_up(token_id)
        return found

    def _look_up(self, token_id: int) -> tuple[bytes | None, bool]:
        if self._tokenizer is None:
            return None, False
        if token_id in self._added:
            name, special = self._added[token_id]
            return name.encode(errors="replace"), special
        text: str | None = self._tokenizer.backend.id_to_token(token_id)
        if text is None:
            return None, False
        if self._byte_level:
            return b"".join(
                bytes([_BYTES[character]]) if character in _BYTES else character.encode()
                for character in text
            ), False
        if match := _BYTE_TOKEN.fullmatch(text):
            return bytes([int(match[1], 16)]), False
        return text.replace("▁", " ").encode(errors="replace"), False

    def cells(
        self,
        ids: Sequence[int] | np.ndarray,
        kinds: Sequence[CellKind],
        said: Sequence[int] | np.ndarray | None = None,
    ) -> list[Cell]:
        """Cells for ids of given kinds, in order; `said` is what they are in a conversation. Bytes that make no character are
        shown as `<0xE2>`."""
        cells: list[Cell] = []
        waiting: list[
            tuple[int, bytes, tuple[CellKind, int | None]]
        ] = []  # tokens that end inside a character

        def cell(
            text: str, numbers: tuple[int, ...], of: tuple[CellKind, int | None], special: bool = False
        ) -> None:
            cells.append(Cell(text, numbers, of[0], special, of[1]))

        def give_up() -> None:
            for number, content, of in waiting:
                cell(_hexadecimal(content), (number,), of)
            waiting.clear()

        roles: list[int | None] = [None] * len(kinds) if said is None else [int(value) for value in said]
        for token_id, of in zip((int(number) for number in ids), zip(kinds, roles, strict=True), strict=True):
            content, special = self.token(token_id)
            if of[0] == "padding" or content is None or special:
                give_up()
                name = f"⟨{token_id}⟩" if content is None else clean(content.decode(errors="replace"))
                cell(name.replace("\n", "⏎"), (token_id,), of, special or content is None)
                continue
            if waiting and waiting[0][2] != of:
                give_up()  # One character, half of it masked: shown as its bytes, so that both halves keep their kind.
            joined = b"".join(part for _, part, _ in waiting) + content
            text, whole = _decoded(joined)
            if text is None and waiting:
                give_up()
                text, whole = _decoded(content)
            if text is None:
                cell(_hexadecimal(content), (token_id,), of)
            elif whole:
                numbers = (*(number for number, _, _ in waiting), token_id)
                waiting.clear()
                cell(readable(text), numbers, of)
            else:
                waiting.append((token_id, content, of))
                if len(waiting) > _MOST_JOINED:
                    give_up()
        give_up()
        return cells


def readable(text: str) -> str:
    """Text of a token for people: white space to be seen, controls made harmless."""
    spaced = visible_space(text)
    return "\n".join(clean(line) for line in spaced.split("\n"))


def _decoded(content: bytes) -> tuple[str | None, bool]:
    """The text of bytes (None: they cannot begin UTF-8), and whether it ends with a whole character."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        text = decoder.decode(content)
    except UnicodeDecodeError:
        return None, False
    return text, not decoder.getstate()[0]


def _hexadecimal(content: bytes) -> str:
    """Bytes as `<0xE2>`; those that are readable by themselves as text."""
    parts = re.findall(rb"[\x00-\x7f]+|[\x80-\xff]", content)
    return "".join(readable(part.decode()) if part.isascii() else f"<0x{part[0]:02X}>" for part in parts)


def _byte_characters() -> dict[str, int]:
    """The printable characters that byte-level tokenizers write bytes as (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES = _byte_characters()
