"""YAML as people write it, with lines."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from modelyard.config.yaml import parse_override, parse_scalar, parse_yaml, read_yaml
from modelyard.errors import UserError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-06", 1e-6),
        ("1e-4", 1e-4),
        ("6.0e-04", 6e-4),
        ("1.0E+2", 100.0),
        ("1e5", 1e5),
        (".5", 0.5),
        ("5.", 5.0),
        ("-.inf", -math.inf),
        ("100_000", 100_000),
        ("1_000_000.5", 1_000_000.5),
        ("-3", -3),
        ("+3", 3),
        ("0", 0),
        ("0x10", 16),
        ("yes", True),
        ("On", True),
        ("NO", False),
        ("off", False),
        ("true", True),
        ("~", None),
        ("null", None),
        ("", None),
    ],
)
def test_words_and_numbers_are_what_people_mean(text: str, value: object) -> None:
    parsed = parse_scalar(text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    "text",
    ["y", "n", "1:30", "2024-01-01", "007", "1.2.3", "_1", "e5", "inf", "nan", "1e", "yEs", "0b", "-", "."],
)
def test_other_words_stay_text(text: str) -> None:
    assert parse_scalar(text) == text


def test_values_and_lines_of_every_key() -> None:
    document = parse_yaml("# head\na: 1e-06\nb:\n  c: 'yes'\n  d:\n    - 100_000\n    - {e: off}\n", "x.yaml")
    assert document.values == {"a": 1e-6, "b": {"c": "yes", "d": [100_000, {"e": False}]}}
    assert document.origin(("a",)) == "x.yaml:2"
    assert document.origin(("b", "c")) == "x.yaml:4"
    assert document.origin(("b", "d", 1, "e")) == "x.yaml:7"
    assert document.origin(("b", "missing")) == "x.yaml:3"
    assert document.origin(("missing",)) == "x.yaml"


def test_anchors_and_merge_keys() -> None:
    document = parse_yaml("base: &base {a: 1, b: 2}\nuse:\n  <<: *base\n  b: 3\nlist: [*base]\n", "x.yaml")
    assert document.values["use"] == {"b": 3, "a": 1}
    assert document.values["list"] == [{"a": 1, "b": 2}]
    assert document.origin(("use", "a")) == "x.yaml:1"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a:\n\tb: 1\n", "x.yaml:2: not valid YAML: a tab; YAML is indented with spaces"),
        ("a: b: c\n", "x.yaml:1: not valid YAML: a second `:` in one line, or a line indented too far"),
        ("a: 1\na: 2\n", "x.yaml:2: 'a' is given twice (first in line 1)"),
        ("a: [1, 2\nb: 3\n", "x.yaml:2: not valid YAML:"),
        ("a: 1\n---\nb: 2\n", "x.yaml:2: not valid YAML: a second document (`---`) in one file"),
        ("", "x.yaml is empty"),
        ("# only a comment\n", "x.yaml is empty"),
        ("- a\n- b\n", "x.yaml:1: found a list, but a configuration is made of `key: value` sections"),
        ("hello\n", "x.yaml:1: found a single value"),
        ("a: !!python/name:os.system x\n", "x.yaml:1: tags (`!...`) are not read"),
        ("? [a, b]\n: 1\n", "x.yaml:1: a key must be a word"),
        ("a: &a [*a]\n", "x.yaml:1: an alias (`*name`) that contains itself"),
    ],
)
def test_what_cannot_be_read_is_one_clear_line(text: str, problem: str) -> None:
    with pytest.raises(UserError) as raised:
        parse_yaml(text, "x.yaml")
    assert len(raised.value.problems) == 1
    assert raised.value.problems[0].startswith(problem)


def test_all_repeated_keys_at_once() -> None:
    with pytest.raises(UserError) as raised:
        parse_yaml("a: 1\na: 2\nb: {c: 1, c: 2}\n", "x.yaml")
    assert raised.value.problems == [
        "x.yaml:2: 'a' is given twice (first in line 1)",
        "x.yaml:3: 'c' is given twice (first in line 3)",
    ]


def test_folders_missing_files_and_other_bytes(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text("a: 1\n")
    (tmp_path / "bytes.yaml").write_bytes(b"a: \xff\xfe\n")
    for path, problem in (
        (tmp_path, f"{tmp_path} is a folder, not a YAML file"),
        (tmp_path / "bytes.yaml", f"{tmp_path}/bytes.yaml is not a text file (byte 3 is not UTF-8)"),
    ):
        with pytest.raises(UserError) as raised:
            read_yaml(path)
        assert raised.value.problems == [problem]
    with pytest.raises(UserError, match=r"trian.yaml does not exist .* nearest there: .*/train.yaml"):
        read_yaml(tmp_path / "trian.yaml")


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbfa: 1\r\n")
    assert read_yaml(tmp_path / "a.yaml").values == {"a": 1}


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a.b=1e-4", {"a": {"b": 1e-4}}),
        ("a=100_000", {"a": 100_000}),
        ("a=no", {"a": False}),
        ("a='no'", {"a": "no"}),
        ("a=", {"a": None}),
        ("a.b=[1, 2]", {"a": {"b": [1, 2]}}),
        ("a={b: yes}", {"a": {"b": True}}),
        ("a=x=y", {"a": "x=y"}),
        ("a=/some/path.yaml", {"a": "/some/path.yaml"}),
    ],
)
def test_overrides_are_read_as_in_a_file(text: str, values: object) -> None:
    document = parse_override(text, 2)
    assert document.values == values
    assert document.origin(("a",)) == "override 2"


@pytest.mark.parametrize("text", ["a", "=1", "a..b=1", ".a=1", "a.=1"])
def test_what_is_not_an_override(text: str) -> None:
    with pytest.raises(UserError, match=r"override 1: .* is not KEY=VALUE"):
        parse_override(text, 1)


def test_bad_yaml_in_an_override() -> None:
    with pytest.raises(UserError, match=r"override 3 \(a.b\):1: not valid YAML"):
        parse_override("a.b=[1, 2", 3)
