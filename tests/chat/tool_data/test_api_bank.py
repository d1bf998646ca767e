"""API-Bank: what a conversation is made of, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from modelyard.chat.conversation import (
    Call,
    ConversationError,
    Message,
)
from modelyard.chat.families import Llama3
from modelyard.chat.formats import Reading, format_of, read_record
from modelyard.chat.tool_data.convert import (
    kind_of,
)


def api(name: str, given: dict[str, str], taken: Any, output: Any) -> dict[str, Any]:
    return {
        "role": "API",
        "api_name": name,
        "param_dict": given,
        "result": {"input": taken, "output": output},
    }


API_BANK = {
    "turns": [
        {"role": "User", "text": "a"},
        {"role": "AI", "text": "b"},
        api("book", {"n": "2", "who": "['x']"}, {"n": 2, "who": ["x"]}, {"ok": True}),
        {"role": "AI", "text": "c"},
        {"role": "AI", "text": "d"},
        {"role": "User", "text": "e"},
        api("today", {}, None, "2023-03-31"),
        api("book", {"n": "3"}, {"other": 3}, "success"),
        {"role": "AI", "text": "f"},
        {"role": "User", "text": "bye"},
    ]
}


def test_api_bank() -> None:
    assert format_of(API_BANK) == "api_bank"
    found = read_record(API_BANK)
    assert found.messages == (
        Message("user", "a"),
        Message("assistant", "b", (Call("book", {"n": 2, "who": ["x"]}),)),
        Message("tool", {"ok": True}),
        Message("assistant", "c\nd"),
        Message("user", "e"),
        Message("assistant", "", (Call("today", {}),)),
        Message("tool", "2023-03-31"),
        Message("assistant", "", (Call("book", {"n": "3"}),)),
        Message("tool", "success"),
        Message("assistant", "f"),
    )
    # Without definitions: what the calls tell, in all calls of it the same where it is required.
    book, today = (tool["function"]["parameters"] for tool in found.tools)
    assert book == {"type": "object", "properties": {"n": {}, "who": {"type": "array"}}, "required": ["n"]}
    assert today == {"type": "object", "properties": {}, "required": []}
    assert kind_of(found) == "multi-step"


def test_text_beside_calls_can_be_left_out() -> None:
    with pytest.raises(ConversationError, match="no place for text beside a tool call"):
        Llama3().render(read_record(API_BANK))
    found = read_record(API_BANK, None, Reading(text_beside_calls="drop"))
    assert found.messages[1] == Message("assistant", "", (Call("book", {"n": 2, "who": ["x"]}),))
    assert found.messages[3] == Message("assistant", "c\nd")
    Llama3().render(found)


def test_api_bank_with_definitions(tmp_path: Path) -> None:
    for name in ("book", "today"):
        definition = {"name": name, "description": "d", "input_parameters": {"n": {"type": "int"}}}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(definition) + "\n")
    found = read_record(API_BANK, None, Reading(definitions=tmp_path))
    assert found.tools[0]["function"] == {
        "name": "book",
        "description": "d",
        "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}},
    }
    gone = {"turns": [*API_BANK["turns"][:-1], api("gone", {}, {}, 1), API_BANK["turns"][3]]}
    with pytest.raises(ConversationError, match="no definition of the tool gone"):
        read_record(gone, None, Reading(definitions=tmp_path))


@pytest.mark.parametrize(
    ("turns", "problem"),
    [
        ([], "it has no turns"),
        ([{"role": "User", "text": "a"}], "the assistant says nothing"),
        ([{"role": "Bot", "text": "a"}], "turn 1 is of 'Bot', who is none of User, AI, API"),
        ([{"role": "API"}], "it is not as the format api_bank has it"),
    ],
)
def test_api_bank_that_is_of_no_use(turns: list[Any], problem: str) -> None:
    with pytest.raises(ConversationError, match=problem):
        read_record({"turns": turns})
