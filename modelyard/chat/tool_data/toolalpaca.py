"""ToolAlpaca, the simulated evaluation set: an API a record, with questions and the calls that answer them.

Source: Tang et al. 2023, https://github.com/tangqiaoyu/ToolAlpaca. Definitions are read from the API's OpenAPI document. A call
of `getDetails` is a question to the user, and ends the conversation. `${animeId from searchAnime}` in an argument is a field of
an earlier call's result; other `${…}` stand for values that the set does not have. Optional arguments given as "" are left
out: the set writes them for arguments that nobody asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from modelyard.chat.conversation import Conversation, ConversationError, Message
from modelyard.chat.tool_data.definitions import json_schema, tool
from modelyard.chat.tool_data.nested import Result, Step, answer

_REFERENCE = re.compile(r"\$\{(\w+) (?:\w+ )?from (\w+)\}?")
_MARK = "\ue000{} {}\ue001"
_DEEPEST = 20
"""References inside references that are followed."""


def read(
    record: Mapping[str, Any], *, expression: bool = False
) -> Iterator[Conversation | ConversationError]:
    """The conversations of a record, one a question; for one that is of no use, why."""
    try:
        tools = tuple(_tools(json.loads(record["Documentation"])))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        yield ConversationError(f"its Documentation is no OpenAPI document in JSON ({error!r})")
        return
    definitions = {one["function"]["name"]: one["function"] for one in tools}
    for asked, actions in zip(record["Instructions"], record["Golden_Answers"]):
        try:
            messages = _answer(asked, actions, definitions, expression)
            yield Conversation((Message("user", asked), *messages), tools)
        except ConversationError as error:
            yield error


def _answer(
    asked: str, actions: list[Mapping[str, str]], definitions: Mapping[str, dict[str, Any]], expression: bool
) -> list[Message]:
    steps: list[Step] = []
    labels: dict[str, str] = {}
    for number, action in enumerate(actions, 1):
        name = action["Action"]
        if name.startswith("[Optional]"):
            break  # whether it is called depends on a result
        if name == "getDetails":
            if steps:
                raise ConversationError("it asks the user in the middle of its calls")
            return [Message("assistant", json.loads(action["Action_Input"])["Question"])]
        if name not in definitions:
            raise ConversationError(f"there is no definition of the tool {name} that it calls")
        arguments = _arguments(action["Action_Input"], labels, definitions[name]["parameters"]["required"])
        labels[name] = f"call {number}"
        steps.append(Step(labels[name], name, arguments, definitions[name]))
    if not steps:
        raise ConversationError("it calls nothing")
    return answer(steps, asked, expression=expression)


def _arguments(text: str, labels: Mapping[str, str], required: list[str]) -> dict[str, Any]:
    marked = _REFERENCE.sub(lambda found: json.dumps(_MARK.format(found[1], found[2])), text)
    if "${" in marked or "{start date}" in marked:
        raise ConversationError(f"an argument stands for a value that the set does not have: {text}")
    try:
        given = json.loads(marked)
    except ValueError as error:
        raise ConversationError(f"the arguments {text} are no JSON ({error})") from None
    if not isinstance(given, dict):
        raise ConversationError(f"the arguments {text} are no JSON object")
    return {key: _referred(value, labels) for key, value in given.items() if value != "" or key in required}


def _referred(value: Any, labels: Mapping[str, str]) -> Any:
    if isinstance(value, list):
        return [_referred(inner, labels) for inner in value]
    if isinstance(value, Mapping):
        return {key: _referred(inner, labels) for key, inner in value.items()}
    if not isinstance(value, str) or not value.startswith("\ue000"):
        return value
    field, name = value[1:-1].split(" ")
    if name not in labels:
        raise ConversationError(f"an argument is {field} of a result of {name}, which is not called before")
    return Result(labels[name], (field,))


def _tools(document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for path in document["paths"].values():
        for operation in path.values():
            properties: dict[str, Any] = {}
            required: list[str] = []
            for parameter in operation.get("parameters", ()):
                schema = _resolved(parameter["schema"], document)
                said = {"description": parameter["description"]} if "description" in parameter else {}
                properties[parameter["name"]] = {**schema, **said}
                required += [parameter["name"]] if parameter.get("required") else []
            body = _resolved(_content(operation.get("requestBody", {})), document)
            properties |= body.get("properties", {})
            required += [name for name in body.get("required", ()) if name not in required]
            parameters = {"type": "object", "properties": properties, "required": required}
            answered: Mapping[str, Any] = next(iter(operation.get("responses", {}).values()), {})
            result = _resolved(_content(answered), document)
            yield tool(
                operation["operationId"],
                operation.get("description", operation.get("summary", "")),
                json_schema(parameters),
                json_schema(result) if result else None,
            )


def _content(holder: Mapping[str, Any]) -> dict[str, Any]:
    media: Mapping[str, Any] = next(iter(holder.get("content", {}).values()), {})
    return media.get("schema", {})


def _resolved(schema: Any, document: Mapping[str, Any], depth: int = 0) -> Any:
    """With what `$ref` names in its place."""
    if isinstance(schema, list):
        return [_resolved(inner, document, depth) for inner in schema]
    if not isinstance(schema, Mapping):
        return schema
    if isinstance(reference := schema.get("$ref"), str) and depth < _DEEPEST:
        found: Any = document
        for step in reference.removeprefix("#/").split("/"):
            found = found[step]
        return _resolved(found, document, depth + 1)
    return {key: _resolved(value, document, depth) for key, value in schema.items()}
