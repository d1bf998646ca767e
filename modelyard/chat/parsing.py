"""What a model wrote → a message: the tool calls in it, in the forms that the families write."""

from __future__ import annotations

import builtins
import json
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from modelyard.chat.conversation import Call, Message
from modelyard.chat.expression import is_expression, read_arguments

PYTHON_TAG = "<|python_tag|>"
OPEN, CLOSE = "<tool_call>", "</tool_call>"
BUILTIN_TOOLS = ("brave_search", "wolfram_alpha", "code_interpreter")
"""Tools that Llama 3.1 knows by itself."""


def call_begins(text: str) -> int:
    """Where in an answer that is still being written a call may begin, in any form; its length: nowhere."""
    bare, begun = '{"name"', text.lstrip()
    if begun and (bare.startswith(begun) or begun.startswith(bare)):
        return 0
    places = [len(text)]
    for mark in (PYTHON_TAG, OPEN):
        places += [place for place in (text.find(mark),) if place >= 0]
        places += [len(text) - size for size in range(1, len(mark)) if text.endswith(mark[:size])]
    return min(places)


def plain_message(text: str) -> Message:
    return Message("assistant", text)


def hermes_message(text: str) -> Message:
    """Text, then `<tool_call>` blocks to the end, as Qwen 2.5 and Hermes write them. What is not whole is text."""
    place = text.find(OPEN)
    while place >= 0:
        if calls := _blocks(text, place):
            return Message("assistant", text[:place].removesuffix("\n"), calls)
        place = text.find(OPEN, place + 1)
    return plain_message(text)


def _blocks(text: str, place: int) -> tuple[Call, ...]:
    """The calls of the blocks from `place` to the end of the text; none where anything else is there."""
    calls: list[Call] = []
    while place < len(text):
        if not text.startswith(OPEN, place):
            return ()
        begin = place + len(OPEN)
        begin += len(text) - begin - len(text[begin:].lstrip())
        try:
            value, end = _DECODER.raw_decode(text, begin)
        except (ValueError, RecursionError):
            return ()
        call, rest = _json_call(value, ("arguments",)), text[end:].lstrip()
        if call is None or not rest.startswith(CLOSE):
            return ()
        calls.append(call)
        rest = rest.removeprefix(CLOSE).lstrip()
        place = len(text) - len(rest)
    return tuple(calls)


_DECODER = json.JSONDecoder(parse_constant=lambda text: _refuse(text), parse_float=lambda text: _finite(text))


def llama_message(text: str, builtin: Collection[str] | None = None) -> Message:
    """The forms of Llama 3.1: JSON alone, or after `<|python_tag|>` JSON, a call of a tool that the model knows, an
    expression, or code. `builtin` are the tools of `Llama3.builtin_tools`; None: no code mode.

    Source: Meta's model card of Llama 3.1 (prompt format), and the template in the tokenizer's configuration.
    """
    if not text.startswith(PYTHON_TAG):
        call = _json_call(_json(text), ("parameters", "arguments"))
        return Message("assistant", "", (call,)) if call else plain_message(text)
    said = text.removeprefix(PYTHON_TAG)
    return Message("assistant", "", _tagged(said, builtin)) if said.strip() else plain_message(text)


def _tagged(said: str, builtin: Collection[str] | None) -> tuple[Call, ...]:
    value = _json(said)
    listed = value if isinstance(value, list) else [value]
    calls = [call for one in listed if (call := _json_call(one, ("parameters", "arguments")))]
    if calls and len(calls) == len(listed):
        return tuple(calls)
    if call := _builtin_call(said.strip(), builtin or BUILTIN_TOOLS):
        return (call,)
    if "code_interpreter" not in (builtin or ()) and (call := _expression(said.strip())):
        return (call,)
    return (Call("code_interpreter", {"code": said}),)


def _json(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError):
        return None


def _refuse(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


def _finite(text: str) -> float:
    if math.isinf(number := float(text)):
        _refuse(text)
    return number


def _json_call(value: Any, keys: tuple[str, ...]) -> Call | None:
    """`{"name": …, "arguments": …}`, its arguments an object, that object's JSON text, or an expression."""
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        return None
    key = next((key for key in keys if key in value), None)
    if key is None or set(value) - {"name", key, "type"} or value.get("type", "function") != "function":
        return None
    arguments = value[key]
    if isinstance(arguments, str) and not is_expression(arguments):
        arguments = _json(arguments)
    return Call(value["name"], arguments) if isinstance(arguments, dict | str) else None


def _builtin_call(said: str, builtin: Collection[str]) -> Call | None:
    """`name.call(key="value", …)`: quotes inside a value are written as they are."""
    match = re.fullmatch(r"(\w+)\.call\((.*)\)", said, re.DOTALL)
    if match is None or match[1] not in builtin:
        return None
    if not match[2]:
        return Call(match[1], {})
    pieces = re.split(r'(?:^|", )(\w+)="', match[2])
    if pieces[0] or not pieces[-1].endswith('"'):
        return None
    pieces[-1] = pieces[-1].removesuffix('"')
    return Call(match[1], dict(zip(pieces[1::2], pieces[2::2], strict=True)))


def _expression(said: str) -> Call | None:
    """`f(x=g(y=1))`: a call of a tool with calls in it, or in Python's spelling; not one of a function of Python's own."""
    match = re.fullmatch(r"([\w.]+)\((.*)\)", said, re.DOTALL)
    if match is None or hasattr(builtins, match[1]):
        return None
    if is_expression(match[2]):
        return Call(match[1], match[2])
    try:
        return Call(match[1], read_arguments(match[2], positional=()))
    except ValueError:
        return None
