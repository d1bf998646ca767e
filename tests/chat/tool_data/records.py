"""Records of tool-call sets, written by hand."""

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


