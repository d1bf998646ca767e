"""Seal-Tools: what a conversation is made of, and what is refused."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from modelyard.chat.conversation import (
    Call,
    Conversation,
    ConversationError,
    Message,
    as_record,
    read_conversation,
)
from modelyard.chat.expression import has_calls, read_arguments
from modelyard.chat.families import QWEN, Llama3
from modelyard.chat.formats import FORMATS, Reading, format_of, read_record, read_records
from modelyard.chat.schema import call_problem
from modelyard.chat.segments import text_of
from modelyard.chat.tool_data.bfcl import MORE_NEEDED, NO_FUNCTION
from modelyard.chat.tool_data.convert import (
    Counts,
    convert_file,
    distinct_tools,
    kind_of,
    read_file,
    with_tools,
)
from modelyard.chat.tool_data.definitions import json_schema, load_definitions
from modelyard.errors import UserError
from tests.conftest import ROOT

from tests.chat.tool_data.records import EXPRESSION, SEAL, calls_of, result, seal


def test_seal_tools_as_turns() -> None:
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

