"""Prompts to text: the tokenizer around `generate`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelyard.errors import UserError
from modelyard.generate.sample import SamplingOptions, Speaker, generate
from modelyard.model.decoder import Decoder

__all__ = ["Completion", "Generator", "Piece", "SamplingOptions"]


@dataclass(frozen=True)
class Piece:
    """What one new token added."""

    token_id: int
    text: str
    """Empty while a character is incomplete, and for special tokens."""


@dataclass(frozen=True)
class Completion:
    prompt: str
    text: str
    """The new text: the prompt with it appended is the whole. Special tokens are left out."""
    token_ids: list[int]
    """The new tokens; the stop token too where there was one, as in transformers."""


def pieces(
    before: Sequence[int], tokens: Iterable[int], decode: Callable[[Sequence[int]], str]
) -> Iterator[Piece]:
    """Each of `tokens`, which come after `before`, with the text that it completes; characters are never split."""
    ids = list(before)
    begin, shown = 0, len(ids)

    def added() -> str:
        """The text of ids[shown:]. Decoded from `begin`, the piece before, whose end shapes how it begins: some
        tokenizers drop the first space of whatever they decode."""
        return decode(ids[begin:])[len(decode(ids[begin:shown])) :]

    held: int | None = None
    for token in tokens:
        if held is not None:
            yield Piece(held, "")
        ids.append(token)
        text = added()
        if text.endswith("\ufffd"):
            held = token  # perhaps the first bytes of a character
            continue
        held = None
        yield Piece(token, text)
        begin, shown = (shown if text else begin), len(ids)
    if held is not None:
        yield Piece(held, added())


class Generator:
    """A model with its tokenizer."""

    def __init__(self, model: Decoder | Speaker, folder: Path):
        """`folder` holds the tokenizer and, if it is a model's, what starts and ends a text (generation_config.json).

        Raises UserError when there is no usable tokenizer.
        """
        self.model = model
        self.tokenizer = _load_tokenizer(folder)
        refuse_another_tokenizer(folder, len(self.tokenizer), model.architecture.vocab_size)
        self.stop_ids = stop_ids(folder, self.tokenizer.eos_token_id)
        self._start_id = _start_id(folder, self.tokenizer)

    def encode(self, prompt: str) -> list[int]:
        """The prompt's tokens as transformers makes them; an empty prompt is begin-of-sequence."""
        ids: list[int] = self.tokenizer(prompt)["input_ids"]
        if ids:
            return ids
        if self._start_id is None:
            raise UserError(
                "the tokenizer has neither a begin- nor an end-of-sequence token, so the prompt cannot be empty"
            )
        return [self._start_id]

    def stream(self, prompt: str, options: SamplingOptions) -> Iterator[Piece]:
        """Yield each new token with the text that it completes; characters are never split."""
        ids = self.encode(prompt)
        tokens = generate(self.model, tuple(ids), options, stop_ids=self.stop_ids)
        return pieces(ids, tokens, self._decode)

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def complete(self, prompt: str, options: SamplingOptions) -> Completion:
        made = list(self.stream(prompt, options))
        return Completion(prompt, "".join(p.text for p in made), [p.token_id for p in made])


def _load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever the library raises: a missing file, a broken one, a missing package
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"no usable tokenizer in {folder}: {reason}") from None


def _config_value(folder: Path, name: str) -> Any:
    """What generation_config.json says, else config.json: the order in which transformers looks."""
    for file in ("generation_config.json", "config.json"):
        if (folder / file).is_file():
            value = json.loads((folder / file).read_text(encoding="utf-8")).get(name)
            if value is not None:
                return value
    return None


def refuse_another_tokenizer(folder: Path, tokens: int, vocabulary: int) -> None:
    """Raise UserError where the tokenizer in `folder` has more tokens than the model's vocabulary."""
    if tokens > vocabulary:
        raise UserError(
            f"the tokenizer in {folder} has {tokens:,} tokens, the model {vocabulary:,}: it is another's"
        )


def stop_ids(folder: Path, end_id: int | None) -> frozenset[int]:
    """The tokens that end a text: the model's, else the tokenizer's own, `end_id`."""
    value = _config_value(folder, "eos_token_id")
    value = end_id if value is None else value
    return frozenset(value if isinstance(value, list) else [] if value is None else [value])


def _start_id(folder: Path, tokenizer: Any) -> int | None:
    """Begin-of-sequence; where there is none, the end token, which is what stood before every document."""
    candidates = (tokenizer.bos_token_id, _config_value(folder, "bos_token_id"), tokenizer.eos_token_id)
    return next((token for token in candidates if token is not None), None)
