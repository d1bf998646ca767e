"""Definitions of tools: other spellings of JSON schema put right, and files of definitions beside the records."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from modelyard.data.bytestream import ByteStream
from modelyard.errors import UserError, missing_path

TYPE_NAMES = {
    "str": "string", "string": "string", "text": "string", "char": "string", "date": "string", "file": "string",
    "enum": "string",
    "int": "integer", "integer": "integer", "long": "integer",
    "float": "number", "double": "number", "number": "number",
    "bool": "boolean", "boolean": "boolean",
    "list": "array", "array": "array", "tuple": "array",
    "dict": "object", "object": "object", "hashmap": "object",
    "null": "null",
}  # fmt: skip
"""Names of types as these sets have them, in small letters → JSON schema's."""


def tool(name: str, description: str, parameters: Any, result: Any = None) -> dict[str, Any]:
    """A definition as OpenAI's interface has it, with `return` (transformers' name for it) where the result is described."""
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": {**function, "return": result} if result else function}


def properties_schema(properties: Mapping[str, Any], required: list[str] | None = None) -> dict[str, Any]:
    """The schema of an object with these properties; `required` is left out where None."""
    found: dict[str, Any] = {
        "type": "object",
        "properties": {name: json_schema(value) for name, value in properties.items()},
    }
    return found if required is None else {**found, "required": required}


def json_schema(schema: Any) -> Any:
    """A schema with the names of its types put right, at any depth: `dict` is `object`, `float` is `number`. A type that
    JSON schema has no word for (`any`) is left out, which allows all. Keys keep their order."""
    if not isinstance(schema, Mapping):
        return schema
    found: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "type" and isinstance(value, str):
            if known := TYPE_NAMES.get(value.lower().split(" ")[0]):
                found[key] = known
        elif key in ("properties", "$defs", "definitions") and isinstance(value, Mapping):
            found[key] = {name: json_schema(inner) for name, inner in value.items()}
        elif key in ("items", "additionalProperties", "not"):
            found[key] = json_schema(value)
        elif key in ("anyOf", "oneOf", "allOf", "prefixItems") and isinstance(value, list):
            found[key] = [json_schema(inner) for inner in value]
        else:
            found[key] = value
    return found


@lru_cache(maxsize=8)
def load_definitions(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Definitions by the group they are in: of a JSON object of lists its keys, of a folder of JSON (or JSON lines) files
    their names, of a plain list "". Raises UserError.
    """
    if not path.exists():
        raise UserError(f"definitions: {missing_path(path)}")
    files = [path] if path.is_file() else sorted(path.glob("*.json*"))
    found: dict[str, list[dict[str, Any]]] = {}
    for file in files:
        with ByteStream(file, file.suffix[1:]) as stream:
            content = _parsed(file, stream.read())
        if isinstance(content, Mapping) and "name" in content:
            content = [content]
        groups = content if isinstance(content, Mapping) else {"" if path.is_file() else _stem(file): content}
        for group, tools in groups.items():
            if not isinstance(tools, list) or not all(
                isinstance(one, Mapping) and "name" in one for one in tools
            ):
                raise UserError(f"definitions: {file} holds no lists of definitions with names")
            found[group] = [dict(one) for one in tools]
    return found


def _parsed(file: Path, content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:
        try:
            return [json.loads(line) for line in content.splitlines() if line.strip()]
        except ValueError:
            raise UserError(f"definitions: {file} is neither JSON nor JSON lines ({error})") from None


def _stem(file: Path) -> str:
    return file.name.split(".")[0]
