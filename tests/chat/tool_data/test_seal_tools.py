"""Seal-Tools: what a conversation is made of, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from modelyard.chat.conversation import (
    Call,
    ConversationError,
    Message,
)
from modelyard.chat.formats import format_of, read_record
from modelyard.chat.schema import call_problem
from tests.chat.tool_data.records import EXPRESSION, SEAL, calls_of, result


def test_seal_tools_as_turns() -> None:
    assert format_of(SEAL) == "seal_tools"
    found = read_record(SEAL)
    place = found.messages[2].content["place"]
    assert place.startswith("place_")
    assert found.messages == (
        Message("user", "q"),
        Message("assistant", "", (Call("find", {"name": "Oslo"}), Call("now", {}))),
        Message("tool", found.messages[2].content),
        Message("tool", found.messages[3].content),
        Message("assistant", "", (Call("weather", {"at": place, "days": 3}),)),
    )
    assert list(found.messages[2].content) == ["place", "height"]
    assert isinstance(found.messages[2].content["height"], int)
    assert list(found.messages[3].content) == ["time"]
    assert read_record(SEAL) == found  # what is made up is made up the same
    assert read_record({**SEAL, "query": "r"}).messages[2].content["place"] != place
    assert found.tools[1] == {
        "type": "function",
        "function": {
            "name": "weather", "description": "weather!",
            "parameters": {"type": "object", "properties": {"at": {"type": "string"}, "days": {"type": "integer"}},
                           "required": ["at"]},
            "return": result({"degrees": "number"}),
        },
    }  # fmt: skip


def test_seal_tools_as_an_expression() -> None:
    found = read_record(SEAL, "seal_tools", EXPRESSION)
    assert found.messages[1:] == (
        Message("assistant", "", (Call("weather", "at=find(name='Oslo')['place'], days=3"), Call("now", {}))),
    )
    assert all(call_problem(call, found.tools) is None for call in found.messages[1].calls)
    # A result that is used twice would be asked for twice.
    twice = json.loads(json.dumps(SEAL))
    twice["calling"][1]["parameters"]["days"] = "API_call_1"
    found = read_record(twice, "seal_tools", EXPRESSION)
    made_up = found.messages[2].content
    assert calls_of(found)[1] == [("weather", {"at": made_up["place"], "days": made_up["height"]})]
    # And a name that is none in Python cannot stand in one.
    unnamed = json.loads(json.dumps(SEAL).replace('"find"', '"find-it"'))
    assert calls_of(read_record(unnamed, "seal_tools", EXPRESSION))[0][0] == ("find-it", {"name": "Oslo"})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"calling": []}, "it calls nothing"),
        ({"tools": []}, "there is no definition of the tool find that it calls"),
        ({"calling": [{"api": "weather", "parameters": {"at": "API_call_9"}}]}, "an argument is API_call_9, which no call before"),
        ({"calling": [{"nope": 1}]}, r"it is not as the format seal_tools has it \(KeyError: 'api'\)"),
        ({"tools": [3]}, "it is not as the format seal_tools has it"),
        ({"calling": None}, "it is not as the format seal_tools has it"),
    ],
)  # fmt: skip
def test_seal_tools_that_are_of_no_use(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConversationError, match=problem):
        read_record({**SEAL, **change})
