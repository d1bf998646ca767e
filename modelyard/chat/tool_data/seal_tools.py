"""Seal-Tools: a question, the calls that answer it, the definitions of their tools.

Source: Wu et al. 2024, https://github.com/fairyshine/Seal-Tools; `tools` beside each record hold the definitions of the tools
that it calls. `API_call_3` in an argument is the value that an earlier call lists under `responses`, in the order of its
definition's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from modelyard.chat.conversation import Conversation, ConversationError, Message
from modelyard.chat.tool_data.definitions import properties_schema, tool
from modelyard.chat.tool_data.nested import Result, Step, answer

_REFERENCE = re.compile(r"API_call_\d+")


def read(record: Mapping[str, Any], *, expression: bool = False) -> Conversation:
    """The conversation of a record. Raises ConversationError."""
    tools = [_tool(one) for one in record["tools"]]
    definitions = {one["function"]["name"]: one["function"] for one in tools}
    values: dict[str, Result] = {}
    steps = []
    for number, call in enumerate(record["calling"]):
        name = call["api"]
        if name not in definitions:
            raise ConversationError(f"there is no definition of the tool {name} that it calls")
        label = f"call {number + 1}"
        arguments = {key: _referred(value, values) for key, value in call["parameters"].items()}
        steps.append(Step(label, name, arguments, definitions[name]))
        fields = definitions[name].get("return", {}).get("properties", {})
        values |= {given: Result(label, (field,)) for given, field in zip(call.get("responses", ()), fields)}
    if not steps:
        raise ConversationError("it calls nothing")
    messages = (Message("user", record["query"]), *answer(steps, record["query"], expression=expression))
    return Conversation(messages, tuple(tools))


def _referred(value: Any, values: Mapping[str, Result]) -> Any:
    if isinstance(value, str) and _REFERENCE.fullmatch(value):
        if value not in values:
            raise ConversationError(f"an argument is {value}, which no call before it gives")
        return values[value]
    return [_referred(inner, values) for inner in value] if isinstance(value, list) else value


def _tool(given: Mapping[str, Any]) -> dict[str, Any]:
    responses = given.get("responses")
    return tool(
        given["api_name"],
        given.get("api_description", ""),
        properties_schema(given["parameters"], given.get("required", [])),
        properties_schema(responses) if responses else None,
    )
