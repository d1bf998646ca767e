"""A conversation as every part takes it, whatever file it came from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from modelyard.chat.expression import is_expression
from modelyard.errors import did_you_mean

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")
_SAME: dict[str, Role] = {"developer": "system", "ipython": "tool", "function": "tool"}
"""Other names of the same roles."""


class ConversationError(ValueError):
    """Why a conversation cannot be used, for a message that names its record."""


@dataclass(frozen=True)
class Call:
    """A call of a tool."""

    name: str
    arguments: Any
    """JSON object, its keys in their order, nothing added; a text where the call is an expression."""
    id: str | None = None


@dataclass(frozen=True)
class Message:
    role: Role
    content: Any = ""
    """Text; of a tool's result any JSON value."""
    calls: tuple[Call, ...] = ()
    trained: bool = True
    """Of the assistant: False leaves the message out of the loss."""


@dataclass(frozen=True)
class Conversation:
    messages: tuple[Message, ...]
    tools: tuple[Any, ...] = ()
    """Definitions as they came (JSON objects), nothing added or left out."""


def read_conversation(messages: Any, tools: Any = None) -> Conversation:
    """A conversation from messages as OpenAI's interface has them (`role`, `content`, `tool_calls`, `weight`).

    `arguments` may be an object or its JSON text; `tools` a list or its JSON text. Raises ConversationError, which names the
    message (from 1).
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise ConversationError(f"messages are {_kind(messages)}, not a list")
    if not messages:
        raise ConversationError("there are no messages")
    found = []
    for number, message in enumerate(messages, 1):
        try:
            found.append(_message(message))
        except ConversationError as error:
            raise ConversationError(f"message {number}: {error}") from None
    return Conversation(tuple(found), _tools(tools))


def as_message(message: Message) -> dict[str, Any]:
    """A message as OpenAI's interface has it, which `read_conversation` reads again."""
    found: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.calls:
        found["tool_calls"] = [
            {
                **({} if call.id is None else {"id": call.id}),
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in message.calls
        ]
    return found if message.trained else {**found, "weight": 0}


def as_record(conversation: Conversation) -> dict[str, Any]:
    """`messages`, and `tools` where there are any: a line of a file that `prepare` reads."""
    messages = [as_message(message) for message in conversation.messages]
    return {"messages": messages, **({"tools": list(conversation.tools)} if conversation.tools else {})}


_KEYS = ("role", "content", "tool_calls", "weight", "name", "tool_call_id", "function_call", "refusal")


def _message(message: Any) -> Message:
    if not isinstance(message, Mapping):
        raise ConversationError(f"it is {_kind(message)}, not an object")
    role = message.get("role")
    role = _SAME.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        names = (*ROLES, *_SAME)
        hint = did_you_mean(role, names) if isinstance(role, str) else ""
        raise ConversationError(f"role is {role!r}, not one of {', '.join(names)}{hint}")
    if unknown := [key for key in message if key not in _KEYS]:
        raise ConversationError(f"'{unknown[0]}' is no key of a message{did_you_mean(unknown[0], _KEYS)}")
    given = message.get("tool_calls") or ()
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise ConversationError(f"tool_calls are {_kind(given)}, not a list")
    calls = tuple(_call(call) for call in given)
    if one := message.get("function_call"):
        calls = (*calls, _call(one))
    if calls and role != "assistant":
        raise ConversationError(f"a message of {role} cannot call tools")
    content = message.get("content")
    if role == "tool":
        content = "" if content is None else content
    elif content is None and calls:
        content = ""
    elif isinstance(content, list):
        content = _joined(content)
    if role != "tool" and not isinstance(content, str):
        raise ConversationError(f"content is {_kind(content)}, not text")
    weight = message.get("weight")
    if weight not in (None, 0, 1):
        raise ConversationError(f"weight is {weight!r}; 0 leaves the message out of the loss, 1 does not")
    return Message(role, content, calls, trained=weight != 0)


def _joined(parts: list[Any]) -> str:
    texts = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            kind = part.get("type") if isinstance(part, Mapping) else _kind(part)
            raise ConversationError(f"content has a part of type {kind!r}; only text can be trained on")
    return "".join(texts)


def _call(call: Any) -> Call:
    function = call.get("function", call) if isinstance(call, Mapping) else call
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ConversationError("a tool call has no name")
    arguments = function.get("arguments", function.get("parameters", {}))
    identity = call["id"] if isinstance(call.get("id"), str) else None
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except ValueError as error:
            if is_expression(arguments):
                return Call(function["name"], arguments, identity)
            raise ConversationError(
                f"the arguments of the call of {function['name']} are no JSON ({error})"
            ) from None
    if not isinstance(arguments, Mapping):
        raise ConversationError(
            f"the arguments of the call of {function['name']} are {_kind(arguments)}, not an object"
        )
    return Call(function["name"], arguments, identity)


def _tools(tools: Any) -> tuple[Any, ...]:
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise ConversationError(f"tools are no JSON ({error})") from None
    if tools is None:
        return ()
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ConversationError("tools are not a list of objects")
    return tuple(tools)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a truth value", type(None): "null"}
    return next((name for kind, name in names.items() if isinstance(value, kind)), f"{value!r}")
