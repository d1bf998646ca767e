"""API-Bank: conversations with calls, one after the other, and their real results.

Source: Li et al. 2023, https://github.com/AlibabaResearch/DAMO-ConvAI (api-bank). The set has no definitions beside its
conversations. Without a file of them (`definitions`) a tool is defined by how it is called: its name, the names of its
arguments, and the types of their values.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelyard.chat.conversation import Call, Conversation, ConversationError, Message
from modelyard.chat.tool_data.definitions import json_schema, load_definitions, properties_schema, tool

_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}


def read(record: Mapping[str, Any], *, definitions: Path | None = None) -> Conversation:
    """The conversation of a record. Raises ConversationError; UserError for `definitions`."""
    messages: list[Message] = []
    calls: list[Call] = []
    for number, turn in enumerate(record["turns"], 1):
        before = messages[-1] if messages else None
        if turn["role"] == "User":
            messages.append(Message("user", turn["text"]))
        elif turn["role"] == "AI":
            if before is not None and before.role == "assistant":
                messages[-1] = Message("assistant", f"{before.content}\n{turn['text']}")  # it went on
            else:
                messages.append(Message("assistant", turn["text"]))
        elif turn["role"] == "API":
            call = _call(turn)
            calls.append(call)
            # What it says before it calls is of the same message.
            said = messages.pop().content if before is not None and before.role == "assistant" else ""
            messages += [Message("assistant", said, (call,)), Message("tool", turn["result"]["output"])]
        else:
            raise ConversationError(f"turn {number} is of {turn['role']!r}, who is none of User, AI, API")
    if not messages:
        raise ConversationError("it has no turns")
    while messages and messages[-1].role in ("user", "tool"):
        messages.pop()  # nobody answers
    if not messages:
        raise ConversationError("the assistant says nothing")
    return Conversation(tuple(messages), _tools(calls, definitions))


def _call(turn: Mapping[str, Any]) -> Call:
    """With the values as the tool took them, where those are told: the call itself has only texts."""
    given, taken = turn["param_dict"], turn["result"].get("input")
    same = isinstance(taken, Mapping) and list(taken) == list(given)
    return Call(turn["api_name"], dict(taken if same and isinstance(taken, Mapping) else given))


def _tools(calls: list[Call], definitions: Path | None) -> tuple[dict[str, Any], ...]:
    found: dict[str, dict[str, Any]] = {}
    if definitions is not None:
        known = {one["name"]: one for tools in load_definitions(definitions).values() for one in tools}
        for call in calls:
            if call.name not in known:
                raise ConversationError(f"there is no definition of the tool {call.name} that it calls")
            given = known[call.name]
            parameters = given.get("parameters") or properties_schema(given.get("input_parameters", {}))
            found[call.name] = tool(call.name, given.get("description", ""), json_schema(parameters))
        return tuple(found.values())
    for call in calls:
        function = found.setdefault(call.name, tool(call.name, "", properties_schema({}, [])))["function"]
        parameters, first = function["parameters"], not function["parameters"]["properties"]
        required = parameters["required"]
        parameters["required"] = [
            key for key in (call.arguments if first else required) if key in call.arguments
        ]
        for key, value in call.arguments.items():
            schema = {"type": _TYPES[type(value)]} if type(value) in _TYPES else {}
            if parameters["properties"].setdefault(key, schema) != schema:
                parameters["properties"][key] = {}  # it takes values of several types
    return tuple(found.values())
