"""NESTFUL: questions answered by chains of calls that use the results of those before them.

Source: Basu et al. 2024, https://github.com/IBM/NESTFUL. `$var1.skyId$` in an argument is the field `skyId` of the result of the
call labelled `var1`; the last entry, `var_result`, names what is wanted and is no call. The definitions are in a file of
their own, in groups (`spec` of a record).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelyard.chat.conversation import Conversation, ConversationError, Message
from modelyard.chat.tool_data.definitions import json_schema, load_definitions, tool
from modelyard.chat.tool_data.nested import Result, Step, answer

_REFERENCE = re.compile(r"\$(var\d+)((?:\.[^.$\[\]]+|\[\d+\])*)\$")
_STEP = re.compile(r"\.([^.\[]+)|\[(\d+)\]")
_PARAMETERS = ("parameters", "arguments", "path_parameters", "query_parameters")
_SPELLINGS = {"allowed_values": "enum", "possible_values": "enum", "default_value": "default"}
"""Keys of these definitions → JSON schema's."""


def read(
    record: Mapping[str, Any], *, definitions: Path | None = None, expression: bool = False
) -> Conversation:
    """The conversation of a record. Raises ConversationError; UserError for `definitions`, the set's specification."""
    if definitions is None:
        raise ConversationError("its tools are defined in a file of their own: name it in `definitions`")
    known = load_definitions(definitions)
    group = record.get("spec", "")
    if group not in known:
        raise ConversationError(f"{definitions} has no definitions of '{group}', only of {', '.join(known)}")
    tools: dict[str, dict[str, Any]] = {}
    steps = []
    for number, call in enumerate(record["output"]):
        name = call["name"]
        if name == "var_result":
            continue
        if name not in tools:
            tools[name] = _tool(name, known[group])
        arguments = {key: _referred(value) for key, value in call["arguments"].items()}
        steps.append(Step(call.get("label", f"call {number + 1}"), name, arguments, tools[name]["function"]))
    if not steps:
        raise ConversationError("it calls nothing")
    messages = (Message("user", record["input"]), *answer(steps, record["input"], expression=expression))
    return Conversation(messages, tuple(tools.values()))


def _referred(value: Any) -> Any:
    if isinstance(value, list):
        return [_referred(inner) for inner in value]
    if isinstance(value, Mapping):
        return {key: _referred(inner) for key, inner in value.items()}
    if not isinstance(value, str) or not (found := _REFERENCE.search(value)):
        return value
    if found[0] != value:
        raise ConversationError(f"an argument computes with results ({value}), which no call can say")
    path = tuple(name or int(number) for name, number in _STEP.findall(found[2]))
    return Result(found[1], path)


def _tool(name: str, known: list[dict[str, Any]]) -> dict[str, Any]:
    given = next((one for one in known if one["name"] == name), None)
    if given is None:
        raise ConversationError(f"there is no definition of the tool {name} that it calls")
    named = [item for key in _PARAMETERS for item in (given.get(key) or {}).items()]
    required = [key for key, one in named if one.get("required") is True]
    results = given.get("output_parameters")
    return tool(
        name,
        given.get("description", ""),
        {"type": "object", "properties": {key: _schema(one) for key, one in named}, "required": required},
        {"type": "object", "properties": {key: _schema(one) for key, one in results.items()}}
        if results
        else None,
    )


def _schema(given: Mapping[str, Any]) -> Any:
    """A parameter: `required` is told elsewhere, and an empty list of values allows all."""
    spelt = {
        _SPELLINGS.get(key, key): value for key, value in given.items() if key not in ("required", "optional")
    }
    if not spelt.get("enum", True):
        del spelt["enum"]
    properties = spelt.get("properties")
    if isinstance(properties, Mapping):
        spelt["properties"] = {
            key: _schema(one) if isinstance(one, Mapping) else {} for key, one in properties.items()
        }
    return json_schema(spelt)
