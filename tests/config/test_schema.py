"""The JSON schema knows every key of the guides and of the examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from modelyard.config.loader import load_config
from modelyard.config.neighbours import NO_EFFECT, NOT_BUILT
from modelyard.config.schema import json_schema
from tests.conftest import ROOT

SCHEMAS = {kind: json_schema(kind) for kind in ("train", "prepare")}


def resolve(schema: dict[str, Any], node: dict[str, Any]) -> list[dict[str, Any]]:
    """The alternatives of a schema node, references followed."""
    if "$ref" in node:
        return resolve(schema, schema["$defs"][node["$ref"].rpartition("/")[2]])
    alternatives = node.get("anyOf") or node.get("oneOf")
    if alternatives:
        return [found for alternative in alternatives for found in resolve(schema, alternative)]
    return [node]


def unknown_keys(schema: dict[str, Any], node: dict[str, Any], value: Any, path: str = "") -> list[str]:
    """Keys of `value` that no alternative of the schema allows."""
    nodes = resolve(schema, node)
    if isinstance(value, list):
        items = [found["items"] for found in nodes if "items" in found]
        return (
            [key for entry in value for key in unknown_keys(schema, {"anyOf": items}, entry, path)]
            if items
            else []
        )
    if not isinstance(value, dict):
        return []
    unknown = []
    for key, below in value.items():
        known = [found["properties"][key] for found in nodes if key in found.get("properties", {})]
        known += [
            found["additionalProperties"]
            for found in nodes
            if isinstance(found.get("additionalProperties"), dict)
        ]
        here = f"{path}.{key}".lstrip(".")
        unknown += unknown_keys(schema, {"anyOf": known}, below, here) if known else [here]
    return unknown


GUIDES = [
    ("llama-3.1-8b-train", "llama-3.1-8b-architecture-part"),
    ("llama-3.1-8b-continue",),
    ("llama-3.1-8b-sft",),
    ("qwen-2.5-7b-train", "qwen-2.5-7b-architecture-part"),
    ("sft-prepare",),
]


@pytest.mark.parametrize("names", GUIDES)
def test_the_guides(shared: Path, names: tuple[str, ...]) -> None:
    loaded = load_config([shared / "configs" / f"{name}.yaml" for name in names])
    schema = SCHEMAS[loaded.kind]
    assert unknown_keys(schema, schema, loaded.document) == []


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_the_examples(path: Path) -> None:
    loaded = load_config([path])
    schema = SCHEMAS[loaded.kind]
    assert unknown_keys(schema, schema, loaded.document) == []


def test_what_the_schema_would_mark() -> None:
    schema = SCHEMAS["train"]
    assert unknown_keys(schema, schema, {"training": {"train_itres": 5, "evaluators": {"x": {"intervl": 1}}}}) == [
        "training.train_itres", "training.evaluators.x.intervl",
    ]  # fmt: skip


def test_neighbours_are_in_it() -> None:
    schema = SCHEMAS["train"]
    for row in (*NO_EFFECT, *NOT_BUILT):
        value: Any = None
        for part in reversed(row.path):
            value = {part: value}
        assert unknown_keys(schema, schema, value) == []


@pytest.mark.parametrize("kind", ["train", "prepare"])
def test_every_key_is_described(kind: str) -> None:
    schema = SCHEMAS[kind]
    json.dumps(schema)
    for definition in [schema, *schema["$defs"].values()]:
        for key, value in definition.get("properties", {}).items():
            if value.get("additionalProperties") is False or "$ref" in value:
                continue  # a section made of neighbours alone, or one that describes itself
            assert value.get("description"), key


def test_train_and_prepare_are_closed() -> None:
    assert SCHEMAS["train"]["additionalProperties"] is False
    assert SCHEMAS["train"]["$defs"]["BatchConfig"]["required"] == ["batch_size"]
    assert SCHEMAS["train"]["title"] == "Modelyard train configuration"
    assert SCHEMAS["prepare"]["required"] == ["output_path", "dataset", "tokenizer"]
