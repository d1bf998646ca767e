"""The Berkeley function-calling leaderboard, version 4: single, several and parallel calls, questions that no function
answers, conversations of several turns.

Source: Patil et al. 2025, https://github.com/ShishirPatil/gorilla. `ground_truth` beside each record holds, for every argument,
the values that count as right; the first is taken, and an argument whose first is "" is left out, which counts as right.
The set has no results of calls and no words of the assistant's: what it says here where it calls nothing is of this reader.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelyard.chat.conversation import Call, Conversation, ConversationError, Message, read_conversation
from modelyard.chat.expression import has_calls, read_call
from modelyard.chat.tool_data.definitions import json_schema, load_definitions, tool

NO_FUNCTION = "None of the functions that I can call answers this."
"""Said to a question that no function answers."""
MORE_NEEDED = "I need to know more before I can do this."
"""Said, and not trained on, where a turn calls nothing: the next one gives what was missing."""

_GROUPS = {
    "GorillaFileSystem": "gorilla_file_system",
    "MathAPI": "math_api",
    "MessageAPI": "message_api",
    "TwitterAPI": "posting_api",
    "TicketAPI": "ticket_api",
    "TradingBot": "trading_bot",
    "TravelAPI": "travel_booking",
    "VehicleControlAPI": "vehicle_control",
}
"""`involved_classes` of conversations of several turns → the file (or key) of their definitions."""


def read(record: Mapping[str, Any], *, definitions: Path | None = None) -> Conversation:
    """The conversation of a record. Raises ConversationError; UserError for `definitions`, the set's folder or file
    `multi_turn_func_doc`, which conversations of several turns need.
    """
    if "involved_classes" in record:
        return _turns(record, definitions)
    turns = record["question"]
    if len(turns) != 1:
        raise ConversationError(
            "it has several turns, but not the classes (involved_classes) whose functions it calls"
        )
    asked = read_conversation(turns[0]).messages
    tools = tuple(_tool(function) for function in record["function"])
    calls = tuple(_call(name, given) for one in record.get("ground_truth", ()) for name, given in one.items())
    said = Message("assistant", "", calls) if calls else Message("assistant", NO_FUNCTION)
    return Conversation((*asked, said), tools)


def _call(name: str, given: Mapping[str, Any]) -> Call:
    return Call(name, _first(given))


def _first(given: Mapping[str, Any]) -> dict[str, Any]:
    """The first of the values of each argument; without those that may be, and first are, left out."""
    chosen = {}
    for name, values in given.items():
        value = (
            values[0] if isinstance(values, list) and values else values
        )  # an empty list is itself the right one
        if not (isinstance(values, list) and value == ""):
            chosen[name] = _inside(value)
    return chosen


def _inside(value: Any) -> Any:
    """In an object every value is again a list of those that are right."""
    if isinstance(value, Mapping):
        return _first(value)
    return [_inside(inner) for inner in value] if isinstance(value, list) else value


def _tool(function: Mapping[str, Any]) -> dict[str, Any]:
    return tool(
        function["name"],
        function.get("description", ""),
        json_schema(function.get("parameters", {})),
        json_schema(function.get("response")),
    )


def _turns(record: Mapping[str, Any], definitions: Path | None) -> Conversation:
    if definitions is None:
        raise ConversationError(
            "its functions are defined in a file of their own: name it in `definitions` (multi_turn_func_doc)"
        )
    if record.get("missed_function"):
        raise ConversationError(
            "functions that are added during a conversation (missed_function) cannot be told"
        )
    known = load_definitions(definitions)
    left_out = record.get("excluded_function", ())
    functions: dict[str, Mapping[str, Any]] = {}
    for name in record["involved_classes"]:
        if _GROUPS.get(name) not in known:
            raise ConversationError(f"{definitions} has no functions of {name}")
        functions |= {one["name"]: one for one in known[_GROUPS[name]] if one["name"] not in left_out}
    messages: list[Message] = []
    for asked, answered in zip(record["question"], record["ground_truth"], strict=True):
        messages += read_conversation(asked).messages if asked else ()
        calls = tuple(_written_call(text, functions) for text in answered)
        messages.append(
            Message("assistant", "", calls) if calls else Message("assistant", MORE_NEEDED, trained=False)
        )
    return Conversation(tuple(messages), tuple(map(_tool, functions.values())))


def _written_call(text: str, functions: Mapping[str, Mapping[str, Any]]) -> Call:
    try:
        name, given = read_call(text)
    except ValueError as error:
        raise ConversationError(str(error)) from None
    if name not in functions:
        raise ConversationError(f"there is no definition of the function {name} that it calls")
    names = list(functions[name]["parameters"]["properties"])
    numbered = [key for key in given if key.isdecimal()]
    if has_calls(given) or len(numbered) > len(names):
        raise ConversationError(f"the arguments of {text} are not those of the function")
    return Call(name, {names[int(key)] if key in numbered else key: value for key, value in given.items()})
