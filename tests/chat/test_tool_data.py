"""Public sets of tool calls, record by record: what a conversation is made of, and what is refused."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from modelyard.chat.conversation import (
    Call,
    Conversation,
    ConversationError,
    Message,
    as_record,
    read_conversation,
)
from modelyard.chat.expression import has_calls, read_arguments
from modelyard.chat.families import QWEN, Llama3
from modelyard.chat.formats import FORMATS, Reading, format_of, read_record, read_records
from modelyard.chat.schema import call_problem
from modelyard.chat.segments import text_of
from modelyard.chat.tool_data.bfcl import MORE_NEEDED, NO_FUNCTION
from modelyard.chat.tool_data.convert import (
    Counts,
    convert_file,
    distinct_tools,
    kind_of,
    read_file,
    with_tools,
)
from modelyard.chat.tool_data.definitions import json_schema, load_definitions
from modelyard.errors import UserError
from tests.conftest import ROOT

EXPRESSION = Reading(nested="expression")


def calls_of(conversation: Conversation) -> list[list[tuple[str, Any]]]:
    """(name, arguments) of each message that calls."""
    return [[(call.name, call.arguments) for call in m.calls] for m in conversation.messages if m.calls]


def result(fields: dict[str, str]) -> dict[str, Any]:
    properties = {name: {"type": kind} for name, kind in fields.items()}
    return {"type": "object", "properties": properties}


# Seal-Tools ----------------------------------------------------------------------------------------------------------


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


def test_seal_tools_as_turns() -> None:
    found = read_record(SEAL)
    place = found.messages[2].content["place"]
    assert place.startswith("place_")
    assert found.messages == (
        Message("user", "q"),
        Message("assistant", "", (Call("find", {"name": "Oslo"}), Call("now", {}))),
        Message("tool", found.messages[2].content),
        Message("tool", found.messages[3].content),
        Message("assistant", "", (Call("weather", {"at": place, "days": 3}),)),
    )
    assert list(found.messages[2].content) == ["place", "height"]
    assert isinstance(found.messages[2].content["height"], int)
    assert list(found.messages[3].content) == ["time"]
    assert read_record(SEAL) == found  # what is made up is made up the same
    assert read_record({**SEAL, "query": "r"}).messages[2].content["place"] != place
    assert found.tools[1] == {
        "type": "function",
        "function": {
            "name": "weather", "description": "weather!",
            "parameters": {"type": "object", "properties": {"at": {"type": "string"}, "days": {"type": "integer"}},
                           "required": ["at"]},
            "return": result({"degrees": "number"}),
        },
    }  # fmt: skip


def test_seal_tools_as_an_expression() -> None:
    found = read_record(SEAL, "seal_tools", EXPRESSION)
    assert found.messages[1:] == (
        Message("assistant", "", (Call("weather", "at=find(name='Oslo')['place'], days=3"), Call("now", {}))),
    )
    assert all(call_problem(call, found.tools) is None for call in found.messages[1].calls)
    # A result that is used twice would be asked for twice.
    twice = json.loads(json.dumps(SEAL))
    twice["calling"][1]["parameters"]["days"] = "API_call_1"
    found = read_record(twice, "seal_tools", EXPRESSION)
    made_up = found.messages[2].content
    assert calls_of(found)[1] == [("weather", {"at": made_up["place"], "days": made_up["height"]})]
    # And a name that is none in Python cannot stand in one.
    unnamed = json.loads(json.dumps(SEAL).replace('"find"', '"find-it"'))
    assert calls_of(read_record(unnamed, "seal_tools", EXPRESSION))[0][0] == ("find-it", {"name": "Oslo"})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"calling": []}, "it calls nothing"),
        ({"tools": []}, "there is no definition of the tool find that it calls"),
        ({"calling": [{"api": "weather", "parameters": {"at": "API_call_9"}}]}, "an argument is API_call_9, which no call before"),
        ({"calling": [{"nope": 1}]}, r"it is not as the format seal_tools has it \(KeyError: 'api'\)"),
        ({"tools": [3]}, "it is not as the format seal_tools has it"),
        ({"calling": None}, "it is not as the format seal_tools has it"),
    ],
)  # fmt: skip
def test_seal_tools_that_are_of_no_use(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConversationError, match=problem):
        read_record({**SEAL, **change})


# BFCL ----------------------------------------------------------------------------------------------------------------


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


# NESTFUL -------------------------------------------------------------------------------------------------------------

NESTFUL = {
    "spec": "executable",
    "input": "q",
    "output": [
        {"name": "find", "arguments": {"query": "Oslo"}, "label": "var1"},
        {"name": "find", "arguments": {"query": "Rome"}, "label": "var2"},
        {
            "name": "fly",
            "arguments": {"origin": "$var1.id$", "to": ["$var2.places[0].the id$"]},
            "label": "var3",
        },
        {"name": "var_result", "arguments": {"flights": "$var3$"}},
    ],
}


@pytest.fixture
def nestful(tmp_path: Path) -> Path:
    tools = [
        {"name": "find", "description": "f", "host": "h",
         "query_parameters": {"query": {"type": "String", "required": True, "allowed_values": []},
                              "limit": {"type": "Number", "allowed_values": "1-100", "default_value": 3}},
         "output_parameters": {"id": {"type": "Number"}}},
        {"name": "fly", "description": "", "arguments": {"wrong": {}}},
        {"name": "fly", "description": "right",
         "path_parameters": {"origin": {"required": True, "allowed_values": ["a"]}}, "parameters": {"to": {"type": "array"}}},
    ]  # fmt: skip
    path = tmp_path / "nestful_spec.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"executable": tools}).encode()))
    return path


def test_nestful_as_turns(nestful: Path) -> None:
    found = read_record(NESTFUL, None, Reading(definitions=nestful))
    first, second = found.messages[2].content, found.messages[3].content
    assert calls_of(found) == [
        [("find", {"query": "Oslo"}), ("find", {"query": "Rome"})],
        [("fly", {"origin": first["id"], "to": [second["places"][0]["the id"]]})],
    ]
    assert isinstance(first["id"], float)  # as its definition has it, though the argument would be a text
    assert second["places"][0]["the id"].startswith("the_id_")
    assert [tool["function"]["name"] for tool in found.tools] == ["find", "fly"]
    assert found.tools[0]["function"]["parameters"] == {
        "type": "object",
        "properties": {"query": {"type": "string"}, "limit": {"type": "number", "default": 3}},
        "required": ["query"],
    }
    assert found.tools[0]["function"]["return"] == result({"id": "number"})
    assert found.tools[1]["function"]["description"] == "right"  # the one that takes the arguments
    assert list(found.tools[1]["function"]["parameters"]["properties"]) == ["to", "origin"]


def test_nestful_as_an_expression(nestful: Path) -> None:
    found = read_record(NESTFUL, None, Reading("expression", nestful))
    assert calls_of(found) == [
        [("fly", "origin=find(query='Oslo')['id'], to=[find(query='Rome')['places'][0]['the id']]")]
    ]
    # Both families hold it, and read it again.
    for family in (Llama3(), QWEN):
        segments = family.render(found)
        text = "".join(segment.text for segment in segments if segment.kind.name == "TOOL_CALL")
        assert family.parse(text) == found.messages[1]
    assert text_of(Llama3().render(found)).endswith(
        "<|python_tag|>fly(origin=find(query='Oslo')['id'], to=[find(query='Rome')['places'][0]['the id']])<|eot_id|>"
    )
    assert read_conversation(**as_record(found)) == found


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"query": "5 * $var1.id$"}, r"an argument computes with results \(5 \* \$var1.id\$\)"),
        ({"query": "$var9.id$"}, r"an argument is \$var9.id\$, which no call before it gives"),
    ],
)
def test_nestful_that_is_of_no_use(nestful: Path, arguments: dict[str, Any], problem: str) -> None:
    output = [NESTFUL["output"][0], {"name": "find", "arguments": arguments, "label": "var2"}]
    with pytest.raises(ConversationError, match=problem):
        read_record(NESTFUL | {"output": output}, None, Reading(definitions=nestful))
    with pytest.raises(ConversationError, match="no definitions of 'glaive', only of executable"):
        read_record(NESTFUL | {"spec": "glaive"}, None, Reading(definitions=nestful))
    with pytest.raises(ConversationError, match="no definition of the tool gone"):
        read_record(
            NESTFUL | {"output": [{"name": "gone", "arguments": {}}]}, None, Reading(definitions=nestful)
        )
    with pytest.raises(ConversationError, match="it calls nothing"):
        read_record(NESTFUL | {"output": NESTFUL["output"][-1:]}, None, Reading(definitions=nestful))
    with pytest.raises(ConversationError, match="name it in `definitions`"):
        read_record(NESTFUL)


# API-Bank ------------------------------------------------------------------------------------------------------------


def api(name: str, given: dict[str, str], taken: Any, output: Any) -> dict[str, Any]:
    return {
        "role": "API",
        "api_name": name,
        "param_dict": given,
        "result": {"input": taken, "output": output},
    }


API_BANK = {
    "turns": [
        {"role": "User", "text": "a"},
        {"role": "AI", "text": "b"},
        api("book", {"n": "2", "who": "['x']"}, {"n": 2, "who": ["x"]}, {"ok": True}),
        {"role": "AI", "text": "c"},
        {"role": "AI", "text": "d"},
        {"role": "User", "text": "e"},
        api("today", {}, None, "2023-03-31"),
        api("book", {"n": "3"}, {"other": 3}, "success"),
        {"role": "AI", "text": "f"},
        {"role": "User", "text": "bye"},
    ]
}


def test_api_bank() -> None:
    found = read_record(API_BANK)
    assert found.messages == (
        Message("user", "a"),
        Message("assistant", "b", (Call("book", {"n": 2, "who": ["x"]}),)),
        Message("tool", {"ok": True}),
        Message("assistant", "c\nd"),
        Message("user", "e"),
        Message("assistant", "", (Call("today", {}),)),
        Message("tool", "2023-03-31"),
        Message("assistant", "", (Call("book", {"n": "3"}),)),
        Message("tool", "success"),
        Message("assistant", "f"),
    )
    # Without definitions: what the calls tell, in all calls of it the same where it is required.
    book, today = (tool["function"]["parameters"] for tool in found.tools)
    assert book == {"type": "object", "properties": {"n": {}, "who": {"type": "array"}}, "required": ["n"]}
    assert today == {"type": "object", "properties": {}, "required": []}
    assert kind_of(found) == "multi-step"


def test_text_beside_calls_can_be_left_out() -> None:
    with pytest.raises(ConversationError, match="no place for text beside a tool call"):
        Llama3().render(read_record(API_BANK))
    found = read_record(API_BANK, None, Reading(text_beside_calls="drop"))
    assert found.messages[1] == Message("assistant", "", (Call("book", {"n": 2, "who": ["x"]}),))
    assert found.messages[3] == Message("assistant", "c\nd")
    Llama3().render(found)


def test_api_bank_with_definitions(tmp_path: Path) -> None:
    for name in ("book", "today"):
        definition = {"name": name, "description": "d", "input_parameters": {"n": {"type": "int"}}}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(definition) + "\n")
    found = read_record(API_BANK, None, Reading(definitions=tmp_path))
    assert found.tools[0]["function"] == {
        "name": "book",
        "description": "d",
        "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}},
    }
    gone = {"turns": [*API_BANK["turns"][:-1], api("gone", {}, {}, 1), API_BANK["turns"][3]]}
    with pytest.raises(ConversationError, match="no definition of the tool gone"):
        read_record(gone, None, Reading(definitions=tmp_path))


@pytest.mark.parametrize(
    ("turns", "problem"),
    [
        ([], "it has no turns"),
        ([{"role": "User", "text": "a"}], "the assistant says nothing"),
        ([{"role": "Bot", "text": "a"}], "turn 1 is of 'Bot', who is none of User, AI, API"),
        ([{"role": "API"}], "it is not as the format api_bank has it"),
    ],
)
def test_api_bank_that_is_of_no_use(turns: list[Any], problem: str) -> None:
    with pytest.raises(ConversationError, match=problem):
        read_record({"turns": turns})


# ToolAlpaca ----------------------------------------------------------------------------------------------------------


def action(name: str, arguments: str) -> dict[str, str]:
    return {"Action": name, "Action_Input": arguments}


ALPACA = {
    "Documentation": json.dumps({
        "paths": {
            "/search": {"get": {
                "operationId": "search", "description": "s",
                "parameters": [
                    {"name": "q", "required": True, "description": "what", "schema": {"type": "string"}},
                    {"name": "sex", "schema": {"type": "string", "enum": ["m", "f"]}},
                ],
                "responses": {"200": {"content": {"application/json": {"schema": result({"petId": "integer"})}}}},
            }},
            "/pet": {"post": {
                "operationId": "feed", "summary": "f",
                "requestBody": {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Food"}}}},
            }},
        },
        "components": {"schemas": {"Food": {**result({"petId": "integer", "g": "number"}), "required": ["petId"]}}},
    }),
    "Instructions": ["one", "two", "three", "four", "five", "six", "seven"],
    "Golden_Answers": [
        [action("search", '{"q": "", "sex": ""}')],
        [action("search", '{"q": "x"}'), action("search", '{"q": "y"}'), action("[Optional]feed", "{}")],
        [action("search", '{"q": "x"}'), action("feed", '{"petId": ${petId from search}, "g": 2}')],
        [action("getDetails", '{"Question":"Which?"}'), action("feed", '{"petId": ${petId from getDetails}}')],
        [action("feed", '{"petId": ${some pet}}')],
        [action("feed", '{"petId": ${petId from search}}')],
        [action("walk", "{}")],
    ],
}  # fmt: skip


def test_toolalpaca() -> None:
    one, two, three, four, *useless = read_records(ALPACA)
    assert isinstance(one, Conversation)
    assert isinstance(two, Conversation)
    assert isinstance(three, Conversation)
    assert isinstance(four, Conversation)
    assert calls_of(one) == [[("search", {"q": ""})]]  # "" of an optional argument is none
    assert calls_of(two) == [[("search", {"q": "x"}), ("search", {"q": "y"})]]
    assert calls_of(three) == [
        [("search", {"q": "x"})],
        [("feed", {"petId": three.messages[2].content["petId"], "g": 2})],
    ]
    assert isinstance(three.messages[2].content["petId"], int)
    assert four.messages == (Message("user", "four"), Message("assistant", "Which?"))
    assert list(map(str, useless)) == [
        'an argument stands for a value that the set does not have: {"petId": ${some pet}}',
        "an argument is petId of a result of search, which is not called before",
        "there is no definition of the tool walk that it calls",
    ]
    assert one.tools[0]["function"] == {
        "name": "search", "description": "s",
        "parameters": {
            "type": "object",
            "properties": {"q": {"type": "string", "description": "what"}, "sex": {"type": "string", "enum": ["m", "f"]}},
            "required": ["q"],
        },
        "return": result({"petId": "integer"}),
    }  # fmt: skip
    assert one.tools[1]["function"]["parameters"] == {
        **result({"petId": "integer", "g": "number"}),
        "required": ["petId"],
    }
    nested = list(read_records(ALPACA, None, EXPRESSION))[2]
    assert isinstance(nested, Conversation)
    assert calls_of(nested) == [[("feed", "petId=search(q='x')['petId'], g=2")]]
    with pytest.raises(
        ConversationError, match=r"it holds 7 conversations: .* \(examples/tools/convert.py\)"
    ):
        read_record(ALPACA)


def test_toolalpaca_without_its_document() -> None:
    (found,) = read_records(ALPACA | {"Documentation": "{"})
    assert str(found).startswith("its Documentation is no OpenAPI document in JSON")


# What is common to all -----------------------------------------------------------------------------------------------


def test_each_set_is_known_by_its_columns() -> None:
    records = {"seal_tools": SEAL, "nestful": NESTFUL, "api_bank": API_BANK, "toolalpaca": ALPACA}
    assert {name: format_of(record) for name, record in records.items()} == {name: name for name in records}
    assert format_of(bfcl(None)) == format_of(BFCL_TURNS) == "bfcl"
    assert {*records, "bfcl"} <= set(FORMATS)


def test_other_spellings_of_types() -> None:
    schema = {
        "type": "Dict",
        "properties": {
            "type": {"type": "String", "default": {"type": "dict"}},
            "any": {"type": "any", "description": "x"},
            "list": {"type": "list", "items": {"type": "int"}},
            "day": {"type": "Date (yyyy-mm-dd)"},
            "either": {"anyOf": [{"type": "float"}, {"type": "bool"}]},
        },
        "additionalProperties": {"type": "tuple"},
    }
    assert json_schema(schema) == {
        "type": "object",
        "properties": {
            "type": {"type": "string", "default": {"type": "dict"}},
            "any": {"description": "x"},
            "list": {"type": "array", "items": {"type": "integer"}},
            "day": {"type": "string"},
            "either": {"anyOf": [{"type": "number"}, {"type": "boolean"}]},
        },
        "additionalProperties": {"type": "array"},
    }


@pytest.mark.parametrize(
    ("content", "problem"), [("[1]", "no lists of definitions"), ("{", "neither JSON nor JSON lines")]
)
def test_files_that_define_nothing(tmp_path: Path, content: str, problem: str) -> None:
    path = tmp_path / "tools.json"
    with pytest.raises(UserError, match=r"definitions: .* does not exist"):
        load_definitions(path)
    path.write_text(content)
    with pytest.raises(UserError, match=problem):
        load_definitions(path)


def test_tools_and_calls_survive_byte_for_byte() -> None:
    """posttraining-peers §4, row 11: no key is added, lost or moved, whatever another tool or call has."""
    tools = [
        {"type": "function", "function": {"name": "b", "parameters": {"type": "object", "properties": {
            "z": {"type": "string", "default": None}, "a": {"enum": [1, 1.0, "é\u2028"]}}, "required": []}}},
        {"type": "function", "strict": True, "function": {"description": "", "name": "a", "parameters": {}}},
    ]  # fmt: skip
    arguments = ['{"z": null, "a": 1.0}', '{"deep": {"y": [], "x": {}}, "n": 12345678901234567890}', "{}"]
    texts = []
    for given, listed in itertools.product(
        (arguments, list(map(json.loads, arguments))), (tools, json.dumps(tools))
    ):
        calls = [{"function": {"name": name, "arguments": one}} for name, one in zip("aba", given)]
        said = [{"role": "assistant", "tool_calls": [call]} for call in calls]
        record = {"messages": [{"role": "user", "content": "x"}, *said], "tools": listed}
        found = read_record(record)
        assert json.dumps(found.tools) == json.dumps(tools)
        texts.append((text_of(QWEN.render(found)), text_of(Llama3().render(found))))
        again = read_record(json.loads(json.dumps(as_record(found))))
        assert json.dumps(as_record(again)) == json.dumps(as_record(found))
    assert len(set(texts)) == 1  # as text or as object
    qwen, llama = texts[0]
    for tool in tools:
        assert f"\n{json.dumps(tool, ensure_ascii=False)}\n" in qwen
        assert f"\n\n{json.dumps(tool, ensure_ascii=False, indent=4)}\n\n" in llama
    for name, one in zip("aba", arguments):
        assert f'{{"name": "{name}", "arguments": {one}}}\n</tool_call>' in qwen
        assert f'{{"name": "{name}", "parameters": {one}}}<|eot_id|>' in llama


def test_kinds() -> None:
    user, tool = Message("user", "x"), Message("tool", "y")
    call = Message("assistant", "", (Call("f", {}),))
    two = Message("assistant", "", (Call("f", {}), Call("f", {})))
    nested = Message("assistant", "", (Call("f", "x=g()"),))
    assert kind_of(Conversation((user, Message("assistant", "y")))) == "no call"
    assert kind_of(Conversation((user, call, tool, user, call))) == "single"
    assert kind_of(Conversation((user, call, tool, user, two))) == "parallel"
    assert kind_of(Conversation((user, two, tool, tool, call))) == "multi-step"
    assert kind_of(Conversation((user, call, tool, call, user, nested))) == "nested"


def test_questions_that_need_no_tool_although_there_are_some() -> None:
    tools = [{"name": name} for name in "abcdef"]
    talks = [Conversation((Message("user", str(n)), Message("assistant", "y"))) for n in range(40)]
    found = list(with_tools(talks, tools, seed=1))
    assert [one.messages for one in found] == [one.messages for one in talks]
    assert {len(one.tools) for one in found} == {1, 2, 3}
    assert len(distinct_tools(found)) == 6
    assert list(with_tools(talks[:7], tools, seed=1)) == found[:7]
    assert list(with_tools(talks, tools, seed=2)) != found
    assert next(with_tools([found[0]], tools[:1])) == found[0]  # it has tools of its own


def test_a_file_and_what_became_of_it(tmp_path: Path) -> None:
    wrong = json.loads(json.dumps(SEAL))
    wrong["calling"][2]["parameters"] = {"zone": 1}
    path = tmp_path / "seal.json"
    path.write_text(json.dumps([SEAL, SEAL | {"calling": []}, wrong, {"text": "x"}]))
    counts = Counts()
    found = list(convert_file(path, counts=counts, valid_only=True))
    assert found == [as_record(read_record(SEAL))]
    assert (counts.records, counts.conversations, counts.calls, counts.valid, counts.left_out) == (
        4,
        2,
        6,
        5,
        1,
    )
    assert counts.kinds == {"multi-step": 2}
    assert counts.problems == {"unknown argument": 1}
    assert counts.refused["it calls nothing"] == 1
    assert counts.refused.total() == 2
    path.write_text(json.dumps(SEAL) + "\n\nx\n")
    with pytest.raises(UserError, match="line 3: no JSON"):
        list(convert_file(path))
    path.write_text("3\n")
    with pytest.raises(UserError, match="line 1: b'3' is no JSON object"):
        list(convert_file(path))


def test_the_example_program(tmp_path: Path) -> None:
    path, output = tmp_path / "seal.jsonl", tmp_path / "out.jsonl"
    path.write_text(json.dumps(SEAL) + "\n" + json.dumps(SEAL | {"calling": []}) + "\n")
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "2 + 2?", "answer": "4"}\n' * 3)
    command = [sys.executable, ROOT / "examples/tools/convert.py"]
    options = ["--nested", "expression", "--questions", questions]
    done = subprocess.run([*command, path, output, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second = map(json.loads, output.read_text().splitlines())
    assert first == as_record(read_record(SEAL, None, EXPRESSION))
    assert second["messages"][1] == {"role": "assistant", "content": "4"}
    assert second["tools"]
    assert "  that fit their definitions     100.00%\n" in done.stdout
    assert "refused     1  it calls nothing\n" in done.stdout
    assert done.stdout.endswith(f"{output}: 2 conversations, 1 of them questions answered without tools\n")
    done = subprocess.run([*command, tmp_path / "nope", output], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


# The real files ------------------------------------------------------------------------------------------------------

REAL = {
    # conversations, refused, calls, of them fitting; with nested calls as turns
    "api_bank_dialogues": (171, 1, 313, 0),
    "bfcl_v4_irrelevance": (191, 0, 0, 0),
    "bfcl_v4_live_parallel": (11, 0, 29, 29),
    "bfcl_v4_live_parallel_multiple": (18, 0, 40, 39),
    "bfcl_v4_live_simple": (206, 0, 206, 205),
    "bfcl_v4_multi_turn_base": (159, 0, 890, 889),
    "bfcl_v4_multi_turn_miss_param": (164, 0, 929, 928),
    "bfcl_v4_multiple": (159, 0, 159, 159),
    "bfcl_v4_parallel": (161, 0, 441, 441),
    "bfcl_v4_parallel_multiple": (164, 0, 492, 489),
    "bfcl_v4_simple_python": (332, 0, 332, 332),
    "glaive_toolcall_en": (238, 0, 168, 167),
    "nestful": (237, 16, 630, 523),
    "seal_tools": (1095, 0, 2826, 2720),
    "sgd_dialogues": (560, 0, 1613, 1613),
    "toolalpaca_eval_simulated": (60, 9, 75, 73),
}


def real(
    shared_data: Path, name: str, nested: Any = "turns", counts: Counts | None = None
) -> list[Conversation]:
    folder = shared_data / "tools"
    files = {"nestful": "nestful_spec.json.gz", "bfcl_v4_multi": "bfcl_v4_multi_turn_func_doc.json"}
    own = next((folder / file for prefix, file in files.items() if name.startswith(prefix)), None)
    return list(read_file(folder / f"{name}.jsonl.gz", None, Reading(nested, own), counts))


@pytest.mark.parametrize("name", REAL)
def test_all_of_the_real_sets(shared_data: Path, name: str) -> None:
    counts = Counts()
    found = real(shared_data, name, counts=counts)
    assert (counts.conversations, counts.refused.total(), counts.calls, counts.valid) == REAL[name]
    for one in found:
        assert one.messages[-1].role == "assistant"
        assert one.tools or not any(message.calls for message in one.messages)
        QWEN.render(one)


def test_nested_calls_of_the_real_sets_as_expressions(shared_data: Path) -> None:
    """As turns and as an expression the same calls are made, and every expression is read again."""
    for name, expected in (("seal_tools", 43), ("nestful", 179), ("toolalpaca_eval_simulated", 8)):
        nested = 0
        for turns, one in zip(real(shared_data, name), real(shared_data, name, "expression"), strict=True):
            texts = [c for m in one.messages for c in m.calls if isinstance(c.arguments, str)]
            nested += bool(texts)
            assert all(has_calls(read_arguments(str(call.arguments))) for call in texts)
            calls = [call for message in turns.messages for call in message.calls]
            if texts:
                written = json.dumps([[c.name, c.arguments] for m in one.messages for c in m.calls])
                assert sum(
                    written.count(f"{name}(") + written.count(f'["{name}"')
                    for name in {c.name for c in calls}
                ) >= len(calls)
        assert nested == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_the_text_is_that_of_the_shipped_templates(shared_data: Path, name: str) -> None:
    from transformers import AutoTokenizer

    families = {
        "llama3": Llama3(),
        "qwen2.5": dataclasses.replace(QWEN, default_system="You are a helpful assistant."),
    }
    compared = 0
    for short, family in families.items():
        template = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / short)
        for one in real(shared_data, name, "expression"):
            record = as_record(one)
            messages = [
                {key: value for key, value in m.items() if key != "weight"} for m in record["messages"]
            ]
            calls = [m.calls for m in one.messages if m.calls]
            if short == "llama3":
                if any(len(several) > 1 for several in calls):
                    continue  # its template refuses several calls at once
                if any(isinstance(call.arguments, str) for several in calls for call in several):
                    continue  # and has no place for an expression
                if any(m.calls and m.content.strip() for m in one.messages):
                    continue  # and drops text beside a call
            else:
                # Its template writes Python's spelling of a result that is not text.
                messages = [
                    m | {"content": json.dumps(m["content"], ensure_ascii=False)}
                    if m["role"] == "tool" and not isinstance(m["content"], str) else m
                    for m in messages
                ]  # fmt: skip
            expected = template.apply_chat_template(messages, tools=record.get("tools"), tokenize=False)
            assert text_of(family.render(one)) == expected
            compared += 1
    assert compared >= REAL[name][0]
