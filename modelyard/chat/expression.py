"""Calls inside calls, as an expression: `f(place=g(name='x')['id'], days=3)`.

A `Call` whose `arguments` are text is such an expression: the text is what stands between the parentheses, in Python's
spelling. Its values are JSON's, other calls, and what is taken of their results by name or number.
"""

from __future__ import annotations

import ast
import keyword
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Inner:
    """The result of a call where a value is expected."""

    name: str
    arguments: Mapping[str, Any]
    """JSON values and `Inner`, at any depth."""
    path: tuple[str | int, ...] = ()
    """What is taken of the result, from the outside in."""


def write_expression(name: str, arguments: Mapping[str, Any]) -> str:
    """`name(argument=value, …)`. Raises ValueError where the name cannot stand in an expression."""
    if not all(part.isidentifier() and not keyword.iskeyword(part) for part in name.split(".")):
        raise ValueError(f"'{name}' cannot stand in an expression")
    return f"{name}({write_arguments(arguments)})"


def write_arguments(arguments: Mapping[str, Any]) -> str:
    """What stands between the parentheses. Names that are none in Python come last, in `**{…}`."""
    plain = {
        key: value for key, value in arguments.items() if key.isidentifier() and not keyword.iskeyword(key)
    }
    other = {key: value for key, value in arguments.items() if key not in plain}
    pieces = [f"{key}={_written(value)}" for key, value in plain.items()]
    return ", ".join([*pieces, f"**{_written(other)}"] if other else pieces)


def _written(value: Any) -> str:
    if isinstance(value, Inner):
        return write_expression(value.name, value.arguments) + "".join(f"[{step!r}]" for step in value.path)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_written(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_written, value)) + "]"
    return repr(value)


def read_arguments(text: str, positional: Sequence[str] | None = None) -> dict[str, Any]:
    """The arguments of an expression, calls in them as `Inner`; `positional` names those without a name, in order (None:
    they are numbered, `"0"`, …).

    Raises ValueError where the text is anything else.
    """
    try:
        call = ast.parse(f"_({text})", mode="eval").body
    except (SyntaxError, RecursionError, MemoryError):  # a ValueError is one already
        raise ValueError("it is no expression") from None
    # `a)(b` or `a) + (b` between the parentheses would be another expression altogether.
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        raise ValueError("it is no expression")
    try:
        return _arguments(call, positional)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_call(text: str) -> tuple[str, dict[str, Any]]:
    """Name and arguments of `name(argument=value, …)`; arguments without a name are numbered (`"0"`, …).

    Raises ValueError where the text is anything else.
    """
    try:
        call = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError(f"'{text}' is no call") from None
    if not isinstance(call, ast.Call):
        raise ValueError(f"'{text}' is no call")
    try:
        return _name(call.func), _arguments(call)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def is_expression(text: str) -> bool:
    """Whether a text is arguments with a call in them."""
    try:
        return has_calls(read_arguments(text))
    except ValueError:
        return False


def has_calls(value: Any) -> bool:
    """Whether a call's result is anywhere in a value."""
    if isinstance(value, Mapping):
        return any(map(has_calls, value.values()))
    return any(map(has_calls, value)) if isinstance(value, list) else isinstance(value, Inner)


def _arguments(call: ast.Call, positional: Sequence[str] | None = None) -> dict[str, Any]:
    names = [str(number) for number in range(len(call.args))] if positional is None else positional
    if len(call.args) > len(names):
        raise ValueError("it has more arguments without a name than there are")
    found = {name: _value(node) for name, node in zip(names, call.args)}
    for argument in call.keywords:
        value = _value(argument.value)
        given = value if argument.arg is None else {argument.arg: value}
        if not isinstance(given, dict) or given.keys() & found.keys():
            raise ValueError("it gives an argument twice, or arguments without names")
        found |= given
    return found


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | None):
        if isinstance(node.value, int | float) and not abs(node.value) < 1e308:
            raise ValueError("it has a number that JSON does not hold")
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _value(node.operand)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return -value
    elif isinstance(node, ast.List | ast.Tuple):
        return [_value(element) for element in node.elts]
    elif isinstance(node, ast.Dict):
        keys = [_value(key) if key else None for key in node.keys]
        if all(isinstance(key, str) for key in keys):
            return dict(zip(keys, map(_value, node.values), strict=True))
    elif isinstance(node, ast.Call):
        return Inner(_name(node.func), _arguments(node))
    elif isinstance(node, ast.Subscript | ast.Attribute):
        inner = _value(node.value)
        step = node.attr if isinstance(node, ast.Attribute) else _value(node.slice)
        if isinstance(inner, Inner) and isinstance(step, str | int):
            return Inner(inner.name, inner.arguments, (*inner.path, step))
    raise ValueError(f"'{ast.unparse(node)}' is neither a JSON value nor a call")


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    raise ValueError(f"'{ast.unparse(node)}' is no name of a tool")
