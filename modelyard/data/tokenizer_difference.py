"""Whether two tokenizer folders make the same tokens of the same text, whatever their files look like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from modelyard.files import sha256

FILE = "tokenizer.json"


def tokenizer_difference(one: Path, other: Path) -> str | None:
    """What `one` and `other` disagree on, in a few words; None where every token that both have is the same.

    One may have tokens that the other lacks: a tokenizer that was given more special tokens still reads the old ones.
    None too where one of the folders has no tokenizer.json to compare.
    """
    files = [folder / FILE for folder in (one, other)]
    try:
        if sha256(files[0]) == sha256(files[1]):
            return None
        first, second = (json.loads(file.read_text(encoding="utf-8")) for file in files)
        ids, other_ids = _ids(first), _ids(second)
        for token, number in ids.items():
            if other_ids.get(token, number) != number:
                return f"{token!r} is token {number} in one and {other_ids[token]} in the other"
        if len(ids.keys() & other_ids.keys()) < min(len(ids), len(other_ids)):
            token = next(token for token in ids if token not in other_ids)
            return f"only one of them has the token {token!r}"
        if _merges(first) != _merges(second):
            return "their merges differ"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return None


def _ids(tokenizer: dict[str, Any]) -> dict[str, int]:
    vocabulary = tokenizer["model"]["vocab"]
    if isinstance(vocabulary, list):  # unigram models: [token, score], numbered by their place
        vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
    return vocabulary | {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}


def _merges(tokenizer: dict[str, Any]) -> list[tuple[str, ...]]:
    """Pairs, which are written as `"a b"` or `["a", "b"]`."""
    merges = tokenizer["model"].get("merges") or []
    return [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]
