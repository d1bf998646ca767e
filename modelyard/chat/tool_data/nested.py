"""Calls that use results of calls before them: as turns, each with its result, or as one expression."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelyard.chat.conversation import Call, ConversationError, Message
from modelyard.chat.expression import Inner, write_arguments, write_expression


@dataclass(frozen=True)
class Result:
    """Stands in arguments for what an earlier call gives."""

    label: str
    path: tuple[str | int, ...] = ()
    """Where in the result; nothing: the whole of it."""


@dataclass(frozen=True)
class Step:
    """A call of a chain."""

    label: str
    """Other steps know its result by it."""
    name: str
    arguments: Mapping[str, Any]
    """JSON values and `Result`, at any depth."""
    definition: Mapping[str, Any]
    """OpenAI's `function`: its parameters, and in `return` what its result is."""


def answer(steps: Sequence[Step], key: str, *, expression: bool = False) -> list[Message]:
    """The messages that make the calls: those that need no result at once, then, with the results, those that need them.

    Where the set has no results they are made up: values of the types that the definitions have, the same for the same
    `key`, so that a call that uses one can only have it from there. With `expression` one message, calls inside calls;
    where that would make a call twice, or a name cannot stand in an expression, turns all the same.
    Raises ConversationError where a call uses a result that there is not yet.
    """
    known: set[str] = set()
    for step in steps:
        if early := [result for result in _results(step.arguments) if result.label not in known]:
            raise ConversationError(
                f"the call of {step.name} uses a result, {early[0].label}, that no call before it gives"
            )
        known.add(step.label)
    uses = Counter(result.label for step in steps for result in _results(step.arguments))
    if expression and uses and max(uses.values()) == 1 and (message := _as_expression(steps, uses)):
        return [message]
    return _as_turns(steps, key)


def _results(value: Any) -> Iterator[Result]:
    if isinstance(value, Result):
        yield value
    elif isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _results(inner)


def _replaced(value: Any, of: Mapping[Result, Any]) -> Any:
    if isinstance(value, Result):
        return of[value]
    if isinstance(value, Mapping):
        return {key: _replaced(inner, of) for key, inner in value.items()}
    return [_replaced(inner, of) for inner in value] if isinstance(value, list) else value


def _as_expression(steps: Sequence[Step], uses: Counter[str]) -> Message | None:
    inner: dict[str, Inner] = {}
    calls = []
    for step in steps:
        own = {
            result: Inner(inner[result.label].name, inner[result.label].arguments, result.path)
            for result in _results(step.arguments)
        }
        arguments = _replaced(step.arguments, own)
        inner[step.label] = Inner(step.name, arguments)
        if uses[step.label]:
            continue
        try:
            write_expression(step.name, arguments)
        except ValueError:
            return None
        calls.append(Call(step.name, write_arguments(arguments) if own else arguments))
    return Message("assistant", "", tuple(calls))


def _as_turns(steps: Sequence[Step], key: str) -> list[Message]:
    depth: dict[str, int] = {}
    for step in steps:
        depth[step.label] = 1 + max((depth[result.label] for result in _results(step.arguments)), default=-1)
    wanted = _wanted(steps)
    values: dict[Result, Any] = {}
    messages = []
    last = max(depth.values(), default=-1)
    for level in range(last + 1):
        now = [step for step in steps if depth[step.label] == level]
        calls = tuple(Call(step.name, _replaced(step.arguments, values)) for step in now)
        messages.append(Message("assistant", "", calls))
        if level == last:
            break
        for step in now:
            result = _made_up(step, wanted.get(step.label, {}), f"{key} {step.label}")
            for path in wanted.get(step.label, {}):
                values[Result(step.label, path)] = _at(result, path)
            messages.append(Message("tool", result))
    return messages


def _wanted(steps: Sequence[Step]) -> dict[str, dict[tuple[str | int, ...], Any]]:
    """Of each result what of it is used, with the schema of the argument it is used for."""
    found: dict[str, dict[tuple[str | int, ...], Any]] = {}
    for step in steps:
        properties = (step.definition.get("parameters") or {}).get("properties") or {}
        for name, value in step.arguments.items():
            for result in _results(value):
                schema = properties.get(name) if isinstance(value, Result) else None
                found.setdefault(result.label, {}).setdefault(result.path, schema)
    return found


def _made_up(step: Step, wanted: Mapping[tuple[str | int, ...], Any], key: str) -> Any:
    described = step.definition.get("return") or {}
    result = _value(described, "result", key) if described.get("type") else {}
    if not isinstance(result, dict) and any(wanted):
        result = {}  # the set takes a part of it by name, whatever the definition says
    for path, schema in wanted.items():
        if path:
            declared = _schema_at(described, path)
            own = declared if isinstance(declared, Mapping) and "type" in declared else schema
            names = [step for step in path if isinstance(step, str)]
            _put(result, path, _value(own or {}, names[-1] if names else "result", f"{key} {path}"))
    return result


def _schema_at(schema: Any, path: tuple[str | int, ...]) -> Any:
    for step in path:
        if not isinstance(schema, Mapping):
            return None
        schema = schema.get("items") if isinstance(step, int) else (schema.get("properties") or {}).get(step)
    return schema


def _at(value: Any, path: tuple[str | int, ...]) -> Any:
    for step in path:
        value = value[step]
    return value


def _put(result: Any, path: tuple[str | int, ...], value: Any) -> None:
    """Put a value into a result, with all that has to be there around it."""
    for step, following in zip(path, [*path[1:], None]):
        if isinstance(step, int):
            result.extend({} for _ in range(step + 1 - len(result)))
        held = result[step] if isinstance(step, int) else result.get(step)
        if following is None:
            result[step] = value
        elif not isinstance(held, list if isinstance(following, int) else dict):
            result[step] = [] if isinstance(following, int) else {}
        result = result[step]


def _value(schema: Mapping[str, Any], name: str, key: str) -> Any:
    """A value of a schema that nobody could guess."""
    number = int(hashlib.sha256(f"{key} {name}".encode()).hexdigest()[:6], 16)
    if allowed := schema.get("enum"):
        return allowed[number % len(allowed)]
    match schema.get("type"):
        case "object":
            properties = schema.get("properties") or {}
            return {inner: _value(given, inner, f"{key} {name}") for inner, given in properties.items()}
        case "array":
            return [_value(schema.get("items") or {}, name, key)]
        case "integer":
            return 1000 + number % 9000
        case "number":
            return (1000 + number % 9000) / 100
        case "boolean":
            return number % 2 == 0
        case _:
            return f"{name.replace(' ', '_')}_{number:06x}"
