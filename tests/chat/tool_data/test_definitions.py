"""Definitions of tools: spellings put right, files of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelyard.chat.tool_data.definitions import json_schema, load_definitions
from modelyard.errors import UserError


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
