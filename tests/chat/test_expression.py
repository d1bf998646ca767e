"""Calls inside calls as text, and back."""

from __future__ import annotations

import ast
from typing import Any

import pytest

from modelyard.chat.expression import (
    Inner,
    has_calls,
    is_expression,
    read_arguments,
    read_call,
    write_arguments,
    write_expression,
)

PLACE = Inner("geo.find", {"name": 'O\'Hare "x"\n'}, ("places", 0, "the id"))
WRITTEN = [
    ({}, ""),
    ({"a": 1, "b": -2.5, "c": None, "d": True}, "a=1, b=-2.5, c=None, d=True"),
    ({"x": Inner("g", {"y": 1})}, "x=g(y=1)"),
    (
        {"place": PLACE, "days": [3, {"k": Inner("h", {})}]},
        "place=geo.find(name='O\\'Hare \"x\"\\n')['places'][0]['the id'], days=[3, {'k': h()}]",
    ),
    ({"class": 1, "ok": 2, "X-Key": "é"}, "ok=2, **{'class': 1, 'X-Key': 'é'}"),
]


@pytest.mark.parametrize(("arguments", "text"), WRITTEN)
def test_written_and_read_again(arguments: dict[str, Any], text: str) -> None:
    assert write_arguments(arguments) == text
    assert read_arguments(text) == arguments
    assert write_expression("f", arguments) == f"f({text})"
    assert isinstance(ast.parse(f"f({text})", mode="eval").body, ast.Call)  # Python's own spelling


def test_other_spellings_that_a_model_may_choose() -> None:
    assert read_arguments("g(1).id.x, b=(1, 2)", ("a", "b")) == {
        "a": Inner("g", {"0": 1}, ("id", "x")),
        "b": [1, 2],
    }
    assert read_call(" cd(folder='x') ") == ("cd", {"folder": "x"})
    assert read_call("sort('a', 2)") == ("sort", {"0": "a", "1": 2})


@pytest.mark.parametrize(
    "text",
    ["a=", "1) + (2", "a)(b", "x=y", "x=1 + 2", "x=...", "x=b'y'", "x=[i for i in f()]", "x='y'.upper", "a=1, a=2",
     "**f()", "*f()", "x={1: 2}", "x=-'y'", "x=f'{g()}'", "x=lambda: f()", "x=g()[y]", "x={**g()}", "\0", "(" * 9999],
)  # fmt: skip
def test_what_is_no_arguments(text: str) -> None:
    with pytest.raises(ValueError):
        read_arguments(text)
    assert not is_expression(text)


def test_text_is_an_expression_where_it_calls() -> None:
    assert is_expression("x=[1, {'a': g()}]")
    assert not is_expression("x=1")
    assert not is_expression('{"a": "g(x)"}')
    assert has_calls([{"a": Inner("g", {})}])
    assert not has_calls({"a": ["g()"]})


def test_more_arguments_without_a_name_than_there_are() -> None:
    with pytest.raises(ValueError, match="more arguments without a name"):
        read_arguments("1, 2", ("a",))


@pytest.mark.parametrize("name", ["Real-Time_Search", "", "class", "a..b", "a b"])
def test_a_name_that_python_could_not_call(name: str) -> None:
    with pytest.raises(ValueError, match="cannot stand in an expression"):
        write_expression(name, {})
