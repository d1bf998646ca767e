"""Plain values with origins: merging and moving."""

from __future__ import annotations

from modelyard.config.document import Document
from modelyard.config.yaml import parse_override, parse_yaml


def merged(*texts: str) -> Document:
    result = Document({}, {}, "none")
    for number, text in enumerate(texts, start=1):
        result.merge(parse_yaml(text, f"{number}.yaml"))
    return result


def test_later_leaves_win_and_keep_their_place() -> None:
    document = merged("a: {b: 1, c: 2}\n", "a:\n  c: 3\n  d: 4\n")
    assert document.values == {"a": {"b": 1, "c": 3, "d": 4}}
    assert document.origin(("a", "b")) == "1.yaml:1"
    assert document.origin(("a", "c")) == "2.yaml:2"


def test_merging_leaves_the_sources_alone() -> None:
    first, second = parse_yaml("a: {b: [1]}\n", "1"), parse_yaml("a: {c: 1}\n", "2")
    result = Document({}, {}, "none")
    result.merge(first)
    result.merge(second)
    result.values["a"]["b"].append(2)
    assert first.values == {"a": {"b": [1]}}
    assert second.values == {"a": {"c": 1}}


def test_lists_are_replaced_and_a_section_replaces_a_value() -> None:
    document = merged("a: [1, 2]\nb: 1\nc: {d: 1}\n", "a: [3]\nb: {e: 1}\nc: null\n")
    assert document.values == {"a": [3], "b": {"e": 1}, "c": None}


def test_an_override_names_an_item_of_a_list_by_its_number() -> None:
    document = merged("a: {list: [{x: 1}, {x: 2}]}\n")
    document.merge(parse_override("a.list.1.x=5", 1))
    assert document.values == {"a": {"list": [{"x": 1}, {"x": 5}]}}
    assert document.origin(("a", "list", 1, "x")) == "override 1"
    assert document.origin(("a", "list", 0, "x")) == "1.yaml:1"


def test_a_dataset_of_another_type_replaces_the_whole() -> None:
    first = "data: {datasets: {training: {type: file, path: a}, validation: {type: file, path: b}}}\n"
    document = merged(first, "data: {datasets: {training: {type: random}, validation: {path: c}}}\n")
    assert document.values["data"]["datasets"] == {
        "training": {"type": "random"},
        "validation": {"type": "file", "path": "c"},
    }
    rotary = merged("rotary: {type: llama3, theta: 5}\n", "rotary: {type: default}\n")
    assert rotary.values == {"rotary": {"type": "default", "theta": 5}}


def test_moving_takes_origins_along_and_clears_empty_sections() -> None:
    document = parse_yaml("a:\n  b:\n    c: 1\nd: 2\n", "x")
    document.move(("a", "b"), ("e", "f"))
    assert document.values == {"d": 2, "e": {"f": {"c": 1}}}
    assert document.origin(("e", "f", "c")) == "x:3"
    assert document.origin(("e", "f")) == "x:2"
    assert not document.has(("a",))
