"""Which calls fit their definitions, and what is said of the others."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from modelyard.chat.conversation import Call, Conversation, Message
from modelyard.chat.schema import call_problem, validity

WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "Weather of a place",
    "parameters": {
        "type": "object",
        "properties": {
            "place": {"type": "string"},
            "days": {"type": "integer", "minimum": 1},
            "unit": {"enum": ["celsius", "fahrenheit"]},
            "at": {
                "type": "array",
                "items": {"type": "object", "properties": {"h": {"type": "number"}}, "required": ["h"]},
            },
        },
        "required": ["place"],
    },
}
FIND = {
    "name": "find",
    "parameters": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
}
TOOLS = [{"type": "function", "function": WEATHER}, FIND, {"name": "now"}, {"name": "free", "parameters": {}}]


@pytest.mark.parametrize(
    "call",
    [
        Call("get_weather", {"place": "Oslo"}),
        Call("get_weather", {"place": "Oslo", "days": 2.0, "unit": "celsius", "at": [{"h": 6}, {"h": 7.5}]}),
        Call("find", {"name": ""}),
        Call("now", {}),
        Call("now", {"anything": 1}),  # nothing is said about its arguments
        Call("free", {"anything": None}),
        # Results of calls may be anything, wherever they are.
        Call("get_weather", "place=find(name='x')['id'], days=now()"),
        Call("get_weather", "find('x'), 3, unit=now().unit, at=[{'h': now()}]"),
        Call("get_weather", "place=find(name=find(name='x'))"),
    ],
)
def test_calls_that_fit(call: Call) -> None:
    assert call_problem(call, TOOLS) is None


@pytest.mark.parametrize(
    ("name", "arguments", "problem"),
    [
        ("get_wether", {}, "'get_wether' is no tool; did you mean 'get_weather'?"),
        ("zzz", {}, "'zzz' is no tool; there are get_weather, find, now, free"),
        ("get_weather", [1], "the arguments of get_weather are [1], not an object"),
        ("get_weather", "oslo", "the arguments of get_weather are no JSON object: 'oslo' is neither a JSON value nor a call"),
        ("get_weather", {"days": 1}, "'place' is missing in the call of get_weather"),
        ("get_weather", {"place": "x", "day": 1}, "'day' is no argument of get_weather; did you mean 'days'?"),
        ("find", {"zzz": 1}, "'zzz' is no argument of find; there are name"),
        ("get_weather", {"place": "x", "days": "3"}, 'argument days of get_weather is "3", not of type integer'),
        ("get_weather", {"place": "x", "days": True}, "argument days of get_weather is true, not of type integer"),
        ("get_weather", {"place": None}, "argument place of get_weather is null, not of type string"),
        ("get_weather", {"place": "x", "days": 0}, "argument days of get_weather: 0 is less than the minimum of 1"),
        (
            "get_weather",
            {"place": "x", "unit": "Celsius"},
            'argument unit of get_weather is "Celsius", not one of "celsius", "fahrenheit"; did you mean \'celsius\'?',
        ),
        ("get_weather", {"place": "x", "at": [{"h": 1}, {"x": 1}]}, "'h' of at[1] is missing in the call of get_weather (given: 'x')"),
        ("get_weather", {"place": "x", "at": [{"h": "1"}]}, 'argument at[0].h of get_weather is "1", not of type number'),
        # Inside an expression the rest is held to its definition, and so is each call in it.
        ("get_weather", "days=now()", "'place' is missing in the call of get_weather"),
        ("get_weather", "place=now(), days='3'", 'argument days of get_weather is "3", not of type integer'),
        ("get_weather", "place=find(nam='x')", "in argument place of get_weather: 'nam' is no argument of find; did you mean 'name'?"),
        ("get_weather", "place=find(1)", "in argument place of get_weather: argument name of find is 1, not of type string"),
        ("get_weather", "place=find(name=gone())", "in argument place of get_weather: in argument name of find: "
         "'gone' is no tool; there are get_weather, find, now, free"),
        ("find", "1, 2", "the arguments of find are no JSON object: it has more arguments without a name than there are"),
    ],
)  # fmt: skip
def test_what_is_said_of_a_call_that_does_not_fit(name: str, arguments: Any, problem: str) -> None:
    assert call_problem(Call(name, arguments), TOOLS) == problem


def test_no_tools_at_all() -> None:
    assert call_problem(Call("f", {}), ()) == "'f' is called, but no tools are given"


def test_a_definition_may_say_what_else_there_may_be() -> None:
    def tools(**more: Any) -> list[Any]:
        return [{"name": "f", "parameters": {"type": "object", "properties": {"a": {}}, **more}}]

    call = Call("f", {"b": 1})
    assert call_problem(call, tools(additionalProperties=True)) is None
    assert call_problem(call, tools(patternProperties={"^b": {}})) is None
    assert call_problem(call, tools(additionalProperties={"type": "string"})) == (
        "argument b of f is 1, not of type string"
    )
    refused = call_problem(call, tools(additionalProperties=False))
    assert refused is not None
    assert refused.startswith("the arguments of f: Additional properties are not allowed")


@pytest.mark.parametrize(
    ("parameters", "problem"),
    [
        ({"type": "dict"}, "parameters.type of f is no JSON schema: \"dict\" is none of its types; did you mean 'object'?"),
        ({"properties": {"a": {"type": "any"}}}, 'parameters.properties.a.type of f is no JSON schema: "any" is none of its types'),
        ({"properties": {"a": {"required": True}}}, "parameters.properties.a.required of f is no JSON schema: True is not of type 'array'"),
        ({"$ref": "https://example.com/schema.json"}, "parameters of f cannot be checked: "),
        ({"$ref": "#"}, "parameters of f cannot be checked: maximum recursion depth exceeded"),
        ({"properties": {"a": {"pattern": "("}}}, "parameters.properties.a.pattern of f is no JSON schema: '(' is not a 'regex'"),
        ([], None),
        ("text", "parameters of f is no JSON schema: 'text' is not of type 'object', 'boolean'"),
    ],
)  # fmt: skip
def test_definitions_of_any_kind_are_survived_and_nothing_is_fetched(
    parameters: Any, problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("it asks the network"))
    found = call_problem(Call("f", {"a": "x"}), [{"name": "f", "parameters": parameters}])
    assert found is None if problem is None else found is not None and found.startswith(problem), found
    assert found is None or "\n" not in found


@pytest.mark.parametrize("tools", [[None], ["x"], [{}], [{"function": 1, "name": "f"}], [{"name": ["f"]}]])
def test_tools_of_any_kind_are_survived(tools: list[Any]) -> None:
    found = call_problem(Call("f", {}), tools)
    assert found is None if tools[0] == {"function": 1, "name": "f"} else "'f' is no tool" in str(found)


def test_the_share_of_calls_that_fit() -> None:
    calls = (Call("find", {"name": "x"}), Call("find", {}), Call("fnd", {}), Call("find", {"name": 1}))
    said = Message("assistant", "", calls)
    talks = [
        Conversation((Message("user", "x"), said, Message("tool", "y"), said), tuple(TOOLS)),
        Conversation((Message("assistant", "", calls[:1]),)),
    ]
    found = validity(talks)
    assert (found.valid, found.calls) == (2, 9)
    assert found.problems == {
        "missing argument": 2,
        "unknown tool": 2,
        "wrong type": 2,
        "no tools are given": 1,
    }
