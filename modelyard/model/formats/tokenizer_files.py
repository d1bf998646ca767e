"""The files of a tokenizer, as files: copying them along, and looking up special tokens without any library."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from modelyard.errors import UserError
from modelyard.files import CHAT_FILE

_PATTERNS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*.jinja",
    "chat_template.json",
    CHAT_FILE,
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""A folder with one of these has a tokenizer."""
_ROLES = ("bos_token", "eos_token", "pad_token")


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZERS)


def copy_tokenizer(source: Path, destination: Path) -> None:
    """Copy the tokenizer's files, and the licences beside them, into an existing folder."""
    for pattern in _PATTERNS:
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, destination / path.name)


def stop_token_ids(folder: Path) -> list[int]:
    """What ends an answer in the chat format that conversations were written in; empty where there was none."""
    stops = _read(folder / CHAT_FILE).get("stops", [])
    ids = _ids(folder)
    return sorted({ids[token] for token in stops if token in ids})


def special_token_ids(folder: Path) -> dict[str, int]:
    """`bos_token_id`, `eos_token_id` and `pad_token_id`, those that the folder's files define."""
    texts: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        document = _read(folder / file)
        for role in _ROLES:
            value = document.get(role)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                texts[role] = text
    ids = _ids(folder)
    return {f"{role}_id": ids[text] for role, text in texts.items() if text in ids}


def _ids(folder: Path) -> dict[str, int]:
    """The vocabulary: token → id."""
    tokenizer = _read(folder / "tokenizer.json")
    ids = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    return vocabulary | ids if isinstance(vocabulary, dict) else ids


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    return document if isinstance(document, dict) else {}
