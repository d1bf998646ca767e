"""The Berkeley function-calling leaderboard: what a conversation is made of, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from modelyard.chat.conversation import (
    Call,
    ConversationError,
    Message,
)
from modelyard.chat.formats import Reading, format_of, read_record
from modelyard.chat.tool_data.bfcl import MORE_NEEDED, NO_FUNCTION
from tests.chat.tool_data.records import result


def bfcl(calls: list[dict[str, Any]] | None, messages: list[Any] | None = None) -> dict[str, Any]:
    function = {
        "name": "area.of",
        "description": "d",
        "parameters": {
            "type": "dict",
            "properties": {
                "type": {"type": "string"},
                "size": {"type": "tuple", "items": {"type": "float"}},
                "more": {"type": "dict", "properties": {"any": {"type": "any"}}},
            },
            "required": ["size"],
        },
    }
    asked = [messages or [{"role": "user", "content": "q"}]]
    return {"question": asked, "function": [function]} | ({} if calls is None else {"ground_truth": calls})


def test_bfcl_one_call_and_several() -> None:
    one = {
        "area.of": {"type": ["", "a"], "size": [[1, 2.5], [2, 1]], "more": [{"any": [7, 8], "b": ["", 1]}]}
    }
    two = {"area.of": {"size": [[]], "type": ["a", ""], "more": [[{"k": ["v"]}]]}}
    system = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    found = read_record(bfcl([one, two], system))
    assert found.messages == (
        Message("system", "s"),
        Message("user", "q"),
        Message("assistant", "", (
            Call("area.of", {"size": [1, 2.5], "more": {"any": 7}}),
            Call("area.of", {"size": [], "type": "a", "more": [{"k": "v"}]}),
        )),
    )  # fmt: skip
    assert found.tools[0]["function"]["parameters"] == {
        "type": "object",
        "properties": {
            "type": {"type": "string"},
            "size": {"type": "array", "items": {"type": "number"}},
            "more": {"type": "object", "properties": {"any": {}}},
        },
        "required": ["size"],
    }


def test_bfcl_where_nothing_is_to_be_called() -> None:
    assert format_of(bfcl(None)) == format_of(BFCL_TURNS) == "bfcl"
    found = read_record(bfcl(None))
    assert found.messages[1:] == (Message("assistant", NO_FUNCTION),)
    assert len(found.tools) == 1


BFCL_TURNS = {
    "question": [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}], [{"role": "user", "content": "c"}]],
    "involved_classes": ["MathAPI"],
    "excluded_function": ["power"],
    "ground_truth": [["add(1, b=2)", "root(x=-4)"], [], ["add(a=[1],b='x')"]],
}  # fmt: skip


def math_functions(folder: Path) -> Path:
    def function(name: str, *names: str) -> dict[str, Any]:
        properties = {one: {"type": "float"} for one in names}
        parameters = {"type": "dict", "properties": properties, "required": list(names)}
        response = {"type": "dict", "properties": {"result": {"type": "float"}}}
        return {"name": name, "description": "", "parameters": parameters, "response": response}

    functions = [function("add", "a", "b"), function("root", "x"), function("power", "x")]
    path = folder / "multi_turn_func_doc.json"
    path.write_text(json.dumps({"math_api": functions}))
    return path


def test_bfcl_of_several_turns(tmp_path: Path) -> None:
    found = read_record(BFCL_TURNS, "bfcl", Reading(definitions=math_functions(tmp_path)))
    assert found.messages == (
        Message("user", "a"),
        Message("assistant", "", (Call("add", {"a": 1, "b": 2}), Call("root", {"x": -4}))),
        Message("user", "b"),
        Message("assistant", MORE_NEEDED, trained=False),
        Message("user", "c"),
        Message("assistant", "", (Call("add", {"a": [1], "b": "x"}),)),
    )
    assert [tool["function"]["name"] for tool in found.tools] == ["add", "root"]
    assert found.tools[0]["function"]["return"] == result({"result": "number"})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"involved_classes": ["X"]}, "has no functions of X"),
        ({"ground_truth": [["power(x=1)"], [], []]}, "no definition of the function power that it calls"),
        (
            {"ground_truth": [["add(1, 2, 3)"], [], []]},
            "the arguments of add.* are not those of the function",
        ),
        ({"ground_truth": [["add(a=f())"], [], []]}, "the arguments of add.* are not those of the function"),
        ({"ground_truth": [["add"], [], []]}, "'add' is no call"),
        ({"missed_function": {"1": ["add"]}}, "functions that are added during a conversation"),
        ({"ground_truth": [[]]}, "it is not as the format bfcl has it"),
    ],
)
def test_bfcl_of_several_turns_that_is_of_no_use(
    tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConversationError, match=problem):
        read_record(BFCL_TURNS | change, "bfcl", Reading(definitions=math_functions(tmp_path)))
    with pytest.raises(ConversationError, match="defined in a file of their own: name it in `definitions`"):
        read_record(BFCL_TURNS)
