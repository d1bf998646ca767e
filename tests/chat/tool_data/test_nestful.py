"""NESTFUL: what a conversation is made of, and what is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from modelyard.chat.conversation import (
    ConversationError,
    as_record,
    read_conversation,
)
from modelyard.chat.families import QWEN, Llama3
from modelyard.chat.formats import Reading, format_of, read_record
from modelyard.chat.segments import text_of
from tests.chat.tool_data.records import calls_of, result

NESTFUL = {
    "spec": "executable",
    "input": "q",
    "output": [
        {"name": "find", "arguments": {"query": "Oslo"}, "label": "var1"},
        {"name": "find", "arguments": {"query": "Rome"}, "label": "var2"},
        {
            "name": "fly",
            "arguments": {"origin": "$var1.id$", "to": ["$var2.places[0].the id$"]},
            "label": "var3",
        },
        {"name": "var_result", "arguments": {"flights": "$var3$"}},
    ],
}


@pytest.fixture
def nestful(tmp_path: Path) -> Path:
    tools = [
        {"name": "find", "description": "f", "host": "h",
         "query_parameters": {"query": {"type": "String", "required": True, "allowed_values": []},
                              "limit": {"type": "Number", "allowed_values": "1-100", "default_value": 3}},
         "output_parameters": {"id": {"type": "Number"}}},
        {"name": "fly", "description": "", "arguments": {"wrong": {}}},
        {"name": "fly", "description": "right",
         "path_parameters": {"origin": {"required": True, "allowed_values": ["a"]}}, "parameters": {"to": {"type": "array"}}},
    ]  # fmt: skip
    path = tmp_path / "nestful_spec.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"executable": tools}).encode()))
    return path


def test_nestful_as_turns(nestful: Path) -> None:
    assert format_of(NESTFUL) == "nestful"
    found = read_record(NESTFUL, None, Reading(definitions=nestful))
    first, second = found.messages[2].content, found.messages[3].content
    assert calls_of(found) == [
        [("find", {"query": "Oslo"}), ("find", {"query": "Rome"})],
        [("fly", {"origin": first["id"], "to": [second["places"][0]["the id"]]})],
    ]
    assert isinstance(first["id"], float)  # as its definition has it, though the argument would be a text
    assert second["places"][0]["the id"].startswith("the_id_")
    assert [tool["function"]["name"] for tool in found.tools] == ["find", "fly"]
    assert found.tools[0]["function"]["parameters"] == {
        "type": "object",
        "properties": {"query": {"type": "string"}, "limit": {"type": "number", "default": 3}},
        "required": ["query"],
    }
    assert found.tools[0]["function"]["return"] == result({"id": "number"})
    assert found.tools[1]["function"]["description"] == "right"  # the one that takes the arguments
    assert list(found.tools[1]["function"]["parameters"]["properties"]) == ["to", "origin"]


def test_nestful_as_an_expression(nestful: Path) -> None:
    found = read_record(NESTFUL, None, Reading("expression", nestful))
    assert calls_of(found) == [
        [("fly", "origin=find(query='Oslo')['id'], to=[find(query='Rome')['places'][0]['the id']]")]
    ]
    # Both families hold it, and read it again.
    for family in (Llama3(), QWEN):
        segments = family.render(found)
        text = "".join(segment.text for segment in segments if segment.kind.name == "TOOL_CALL")
        assert family.parse(text) == found.messages[1]
    assert text_of(Llama3().render(found)).endswith(
        "<|python_tag|>fly(origin=find(query='Oslo')['id'], to=[find(query='Rome')['places'][0]['the id']])<|eot_id|>"
    )
    assert read_conversation(**as_record(found)) == found


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"query": "5 * $var1.id$"}, r"an argument computes with results \(5 \* \$var1.id\$\)"),
        ({"query": "$var9.id$"}, r"an argument is \$var9.id\$, which no call before it gives"),
    ],
)
def test_nestful_that_is_of_no_use(nestful: Path, arguments: dict[str, Any], problem: str) -> None:
    output = [NESTFUL["output"][0], {"name": "find", "arguments": arguments, "label": "var2"}]
    with pytest.raises(ConversationError, match=problem):
        read_record(NESTFUL | {"output": output}, None, Reading(definitions=nestful))
    with pytest.raises(ConversationError, match="no definitions of 'glaive', only of executable"):
        read_record(NESTFUL | {"spec": "glaive"}, None, Reading(definitions=nestful))
    with pytest.raises(ConversationError, match="no definition of the tool gone"):
        read_record(
            NESTFUL | {"output": [{"name": "gone", "arguments": {}}]}, None, Reading(definitions=nestful)
        )
    with pytest.raises(ConversationError, match="it calls nothing"):
        read_record(NESTFUL | {"output": NESTFUL["output"][-1:]}, None, Reading(definitions=nestful))
    with pytest.raises(ConversationError, match="name it in `definitions`"):
        read_record(NESTFUL)
