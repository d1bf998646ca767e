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
    labels: dict[str, str] = {}
    steps = []
    for number, call in enumerate(record["output"]):
        name = call["name"]
        if name == "var_result":
            continue
        if name not in tools:
            tools[name] = _tool(name, call["arguments"], known[group])
        arguments = {key: _referred(value, labels) for key, value in call["arguments"].items()}
        steps.append(Step(f"call {number + 1}", name, arguments, tools[name]["function"]))
        labels[call.get("label", "")] = (
            f"call {number + 1}"  # one that is given twice is the later one from there on
        )
    if not steps:
        raise ConversationError("it calls nothing")
    messages = (Message("user", record["input"]), *answer(steps, record["input"], expression=expression))
    return Conversation(messages, tuple(tools.values()))


def _referred(value: Any, labels: Mapping[str, str]) -> Any:
    if isinstance(value, list):
        return [_referred(inner, labels) for inner in value]
    if isinstance(value, Mapping):
        return {key: _referred(inner, labels) for key, inner in value.items()}
    if not isinstance(value, str) or not (found := _REFERENCE.search(value)):
        return value
    if found[0] != value:
        raise ConversationError(f"an argument computes with results ({value}), which no call can say")
    if found[1] not in labels:
        raise ConversationError(f"an argument is {value}, which no call before it gives")
    path = tuple(name or int(number) for name, number in _STEP.findall(found[2]))
    return Result(labels[found[1]], path)


def _tool(name: str, called_with: Mapping[str, Any], known: list[dict[str, Any]]) -> dict[str, Any]:
    candidates = [one for one in known if one["name"] == name]
    if not candidates:
        raise ConversationError(f"there is no definition of the tool {name} that it calls")
    # Some names are defined more than once: the one that the call is of.
    given = next((one for one in candidates if called_with.keys() <= dict(_named(one)).keys()), candidates[0])
    named = _named(given)
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


def _named(definition: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [item for key in _PARAMETERS for item in (definition.get(key) or {}).items()]


def _schema(given: Mapping[str, Any]) -> Any:
    """A parameter: `required` is told elsewhere, and an empty list of values (or a text about them) allows all."""
    spelt = {
        _SPELLINGS.get(key, key): value for key, value in given.items() if key not in ("required", "optional")
    }
    if not (spelt.get("enum") and isinstance(spelt["enum"], list)):
        spelt.pop("enum", None)
    properties = spelt.get("properties")
    if isinstance(properties, Mapping):
        spelt["properties"] = {
            key: _schema(one) if isinstance(one, Mapping) else {} for key, one in properties.items()
        }
    return json_schema(spelt)
