"""Tool-call sets in stores: what a config leaves open of their formats reaches the tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from modelyard.chat.conversation import Conversation
from modelyard.chat.families import QWEN, Llama3
from modelyard.chat.formats import Reading, read_record, read_records
from modelyard.chat.tokens import tokenize_conversation
from modelyard.data.tokenizer import load_tokenizer
from modelyard.errors import UserError
from tests.chat.tool_data.records import SEAL
from tests.chat.tool_data.test_api_bank import API_BANK
from tests.chat.tool_data.test_nestful import NESTFUL
from tests.chat.tool_data.test_toolalpaca import ALPACA
from tests.data.test_conversations import WriteJsonl, make


@pytest.mark.parametrize("nested", ["turns", "expression"])
def test_calls_inside_calls(
    nested: Any, chat_tokenizers: dict[str, Path], write_jsonl: WriteJsonl, tmp_path: Path
) -> None:
    source = write_jsonl([SEAL])
    store = make(tmp_path, source, chat_tokenizers["qwen2.5"], family="qwen2.5", nested=nested)
    expected = tokenize_conversation(
        read_record(SEAL, None, Reading(nested)), QWEN, load_tokenizer(chat_tokenizers["qwen2.5"])
    )
    assert store.document(0).tolist() == expected.ids.tolist()
    assert store.lane("kind", 0).tolist() == expected.kinds.tolist()


def test_definitions_beside_the_records(
    chat_tokenizers: dict[str, Path], write_jsonl: WriteJsonl, tmp_path: Path
) -> None:
    source, spec = write_jsonl([NESTFUL]), tmp_path / "spec.json"
    tokenizer = chat_tokenizers["qwen2.5"]
    tools = [
        {"name": "find", "parameters": {"query": {}}},
        {"name": "fly", "parameters": {"origin": {}, "to": {}}},
    ]
    options: dict[str, Any] = {"family": "qwen2.5", "format": "nestful", "definitions": str(spec)}
    with pytest.raises(UserError, match=r"definitions: .*spec.json does not exist"):
        make(tmp_path, source, tokenizer, **options)
    spec.write_text(json.dumps({"executable": tools}))
    store = make(tmp_path, source, tokenizer, **options)
    found = load_tokenizer(tokenizer).backend.decode(store.document(0).tolist(), skip_special_tokens=False)
    assert '"name": "fly", "description": ""' in found


def test_a_record_of_many_conversations(
    chat_tokenizers: dict[str, Path], write_jsonl: WriteJsonl, tmp_path: Path
) -> None:
    source, tokenizer = write_jsonl([ALPACA]), chat_tokenizers["qwen2.5"]
    with pytest.raises(UserError, match="record 1: an argument"):
        make(tmp_path, source, tokenizer, family="qwen2.5")
    store = make(tmp_path, source, tokenizer, family="qwen2.5", unusable="drop")
    usable = [one for one in read_records(ALPACA) if isinstance(one, Conversation)]
    assert store.num_documents == len(usable) == 4
    expected = tokenize_conversation(usable[3], QWEN, load_tokenizer(tokenizer))
    assert store.document(3).tolist() == expected.ids.tolist()


def test_text_beside_calls(chat_tokenizers: dict[str, Path], write_jsonl: WriteJsonl, tmp_path: Path) -> None:
    source, tokenizer = write_jsonl([API_BANK]), chat_tokenizers["llama3"]
    with pytest.raises(UserError, match="no place for text beside a tool call"):
        make(tmp_path, source, tokenizer, family="llama3")
    store = make(tmp_path, source, tokenizer, family="llama3", text_beside_calls="drop")
    expected = tokenize_conversation(
        read_record(API_BANK, None, Reading(text_beside_calls="drop")), Llama3(), load_tokenizer(tokenizer)
    )
    assert store.document(0).tolist() == expected.ids.tolist()
