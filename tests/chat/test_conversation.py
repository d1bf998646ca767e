"""Messages as they come; what is wrong with one is named."""

from __future__ import annotations

import json
from typing import Any

import pytest

from modelyard.chat.conversation import Call, ConversationError, Message, read_conversation


def test_roles_and_spellings() -> None:
    found = read_conversation(
        [
            {"role": "developer", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, "b"]},
            {
                "role": "assistant",
                "content": None,
                "function_call": {"name": "f", "arguments": '{"x": [1.0, null]}'},
            },
            {"role": "function", "content": {"y": 1}, "name": "f"},
            {"role": "assistant", "content": "z", "weight": 0},
        ]
    )
    assert found.messages == (
        Message("system", "s"),
        Message("user", "ab"),
        Message("assistant", "", (Call("f", {"x": [1.0, None]}),)),
        Message("tool", {"y": 1}),
        Message("assistant", "z", trained=False),
    )


def test_arguments_and_tools_are_the_same_as_text_and_as_objects() -> None:
    arguments, tools = {"b": 1, "a": {"c": 1.5}}, [{"name": "f", "parameters": {"z": {}, "a": None}}]
    call: dict[str, Any] = {"id": "1", "function": {"name": "f", "arguments": arguments}}
    as_text = {"id": "1", "function": {"name": "f", "arguments": json.dumps(arguments)}}
    one = read_conversation([{"role": "assistant", "tool_calls": [call]}], tools)
    other = read_conversation([{"role": "assistant", "tool_calls": [as_text]}], json.dumps(tools))
    assert one == other
    # Nothing is added, nothing left out, nothing moved.
    assert json.dumps(one.tools[0]) == json.dumps(tools[0])
    assert json.dumps(one.messages[0].calls[0].arguments) == '{"b": 1, "a": {"c": 1.5}}'


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ("hi", "messages are text, not a list"),
        ([], "there are no messages"),
        ([{"role": "user", "content": "x"}, "y"], "message 2: it is text, not an object"),
        ([{"role": "asistant", "content": "x"}], "message 1: role is 'asistant', not one of .*did you mean 'assistant'"),
        ([{"content": "x"}], "message 1: role is None"),
        ([{"role": "user", "contents": "x"}], "'contents' is no key of a message.*'content'"),
        ([{"role": "user", "content": None}], "message 1: content is null, not text"),
        ([{"role": "user", "content": 3}], "content is 3, not text"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "a part of type 'image_url'; only text"),
        ([{"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f"}}]}], "a message of user cannot call"),
        ([{"role": "assistant", "tool_calls": [{"function": {}}]}], "a tool call has no name"),
        ([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}], "the arguments of the call of f are no JSON"),
        ([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}], "the call of f are a list, not an object"),
        ([{"role": "assistant", "content": "x", "weight": 0.5}], "weight is 0.5; 0 leaves the message out"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(messages: Any, problem: str) -> None:
    with pytest.raises(ConversationError, match=problem):
        read_conversation(messages)


@pytest.mark.parametrize(
    ("tools", "problem"),
    [("[", "tools are no JSON"), ({"a": 1}, "not a list of objects"), ([1], "not a list of objects")],
)
def test_tools_that_are_none(tools: Any, problem: str) -> None:
    with pytest.raises(ConversationError, match=problem):
        read_conversation([{"role": "user", "content": "x"}], tools)
