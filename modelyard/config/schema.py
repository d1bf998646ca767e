"""The JSON schema of a configuration, so that editors complete and check the YAML."""

from __future__ import annotations

from typing import Any

from modelyard.config.document import KeyPath
from modelyard.config.neighbours import NO_EFFECT, NOT_BUILT
from modelyard.config.prepare import PrepareConfig
from modelyard.config.train import TrainConfig

_JSON_TYPES = {int: "integer", float: "number", bool: "boolean", str: "string", dict: "object"}


def json_schema(kind: str = "train") -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a `train` or `prepare` configuration."""
    if kind == "prepare":
        schema = PrepareConfig.model_json_schema()
    else:
        schema = TrainConfig.model_json_schema()
        for row in NO_EFFECT:
            description = f"Accepted, without effect here: {row.why}."
            _add(schema, row.path, {"type": [_JSON_TYPES[row.kind], "null"], "description": description})
        for feature in NOT_BUILT:
            description = f"Only with the value that switches it off: {feature.instead}."
            _add(schema, feature.path, {"enum": list(feature.harmless), "description": description})
    draft = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return draft | schema | {"title": f"Modelyard {kind} configuration"}


def _add(schema: dict[str, Any], path: KeyPath, value: dict[str, Any]) -> None:
    """Write one key into the schema, making the sections that consist of such keys alone."""
    section = schema
    for part in path[:-1]:
        properties = section.setdefault("properties", {})
        below = properties.setdefault(str(part), {"type": "object", "additionalProperties": False})
        section = _definition(schema, below)
    section.setdefault("properties", {})[str(path[-1])] = value


def _definition(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    for candidate in (node, *node.get("anyOf", ()), *node.get("allOf", ())):
        if "$ref" in candidate:
            definition: dict[str, Any] = schema["$defs"][candidate["$ref"].rpartition("/")[2]]
            return definition
    return node
