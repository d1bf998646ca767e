"""Records of tool-call sets, written by hand."""

from __future__ import annotations

from typing import Any

from modelyard.chat.conversation import (
    Conversation,
)
from modelyard.chat.formats import Reading

EXPRESSION = Reading(nested="expression")


def calls_of(conversation: Conversation) -> list[list[tuple[str, Any]]]:
    """(name, arguments) of each message that calls."""
    return [[(call.name, call.arguments) for call in m.calls] for m in conversation.messages if m.calls]


def result(fields: dict[str, str]) -> dict[str, Any]:
    properties = {name: {"type": kind} for name, kind in fields.items()}
    return {"type": "object", "properties": properties}


def seal(
    name: str, parameters: dict[str, str], responses: dict[str, str], required: list[str]
) -> dict[str, Any]:
    return {
        "api_name": name, "api_description": f"{name}!", "field": "x", "required": required,
        "parameters": {key: {"type": kind} for key, kind in parameters.items()},
        "responses": {key: {"type": kind} for key, kind in responses.items()},
    }  # fmt: skip


SEAL = {
    "id": "x",
    "query": "q",
    "tools": [
        seal("find", {"name": "str"}, {"place": "str", "height": "int"}, ["name"]),
        seal("weather", {"at": "str", "days": "int"}, {"degrees": "float"}, ["at"]),
        seal("now", {}, {"time": "str"}, []),
    ],
    "calling": [
        {"api": "find", "parameters": {"name": "Oslo"}, "responses": ["API_call_0", "API_call_1"]},
        {"api": "weather", "parameters": {"at": "API_call_0", "days": 3}, "responses": ["API_call_2"]},
        {"api": "now", "parameters": {}, "responses": ["API_call_3"]},
    ],
}
