"""ToolAlpaca: what the conversations of a record are made of, and what is refused."""

from __future__ import annotations

import json

import pytest

from modelyard.chat.conversation import (
    Conversation,
    ConversationError,
    Message,
)
from modelyard.chat.formats import format_of, read_record, read_records
from tests.chat.tool_data.records import EXPRESSION, calls_of, result


def action(name: str, arguments: str) -> dict[str, str]:
    return {"Action": name, "Action_Input": arguments}


ALPACA = {
    "Documentation": json.dumps({
        "paths": {
            "/search": {"get": {
                "operationId": "search", "description": "s",
                "parameters": [
                    {"name": "q", "required": True, "description": "what", "schema": {"type": "string"}},
                    {"name": "sex", "schema": {"type": "string", "enum": ["m", "f"]}},
                ],
                "responses": {"200": {"content": {"application/json": {"schema": result({"petId": "integer"})}}}},
            }},
            "/pet": {"post": {
                "operationId": "feed", "summary": "f",
                "requestBody": {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Food"}}}},
            }},
        },
        "components": {"schemas": {"Food": {**result({"petId": "integer", "g": "number"}), "required": ["petId"]}}},
    }),
    "Instructions": ["one", "two", "three", "four", "five", "six", "seven"],
    "Golden_Answers": [
        [action("search", '{"q": "", "sex": ""}')],
        [action("search", '{"q": "x"}'), action("search", '{"q": "y"}'), action("[Optional]feed", "{}")],
        [action("search", '{"q": "x"}'), action("feed", '{"petId": ${petId from search}, "g": 2}')],
        [action("getDetails", '{"Question":"Which?"}'), action("feed", '{"petId": ${petId from getDetails}}')],
        [action("feed", '{"petId": ${some pet}}')],
        [action("feed", '{"petId": ${petId from search}}')],
        [action("walk", "{}")],
    ],
}  # fmt: skip


def test_toolalpaca() -> None:
    assert format_of(ALPACA) == "toolalpaca"
    one, two, three, four, *useless = read_records(ALPACA)
    assert isinstance(one, Conversation)
    assert isinstance(two, Conversation)
    assert isinstance(three, Conversation)
    assert isinstance(four, Conversation)
    assert calls_of(one) == [[("search", {"q": ""})]]  # "" of an optional argument is none
    assert calls_of(two) == [[("search", {"q": "x"}), ("search", {"q": "y"})]]
    assert calls_of(three) == [
        [("search", {"q": "x"})],
        [("feed", {"petId": three.messages[2].content["petId"], "g": 2})],
    ]
    assert isinstance(three.messages[2].content["petId"], int)
    assert four.messages == (Message("user", "four"), Message("assistant", "Which?"))
    assert list(map(str, useless)) == [
        'an argument stands for a value that the set does not have: {"petId": ${some pet}}',
        "an argument is petId of a result of search, which is not called before",
        "there is no definition of the tool walk that it calls",
    ]
    assert one.tools[0]["function"] == {
        "name": "search", "description": "s",
        "parameters": {
            "type": "object",
            "properties": {"q": {"type": "string", "description": "what"}, "sex": {"type": "string", "enum": ["m", "f"]}},
            "required": ["q"],
        },
        "return": result({"petId": "integer"}),
    }  # fmt: skip
    assert one.tools[1]["function"]["parameters"] == {
        **result({"petId": "integer", "g": "number"}),
        "required": ["petId"],
    }
    nested = list(read_records(ALPACA, None, EXPRESSION))[2]
    assert isinstance(nested, Conversation)
    assert calls_of(nested) == [[("feed", "petId=search(q='x')['petId'], g=2")]]
    with pytest.raises(
        ConversationError, match=r"it holds 7 conversations: .* \(examples/tools/convert.py\)"
    ):
        read_record(ALPACA)


def test_toolalpaca_without_its_document() -> None:
    (found,) = read_records(ALPACA | {"Documentation": "{"})
    assert str(found).startswith("its Documentation is no OpenAPI document in JSON")
