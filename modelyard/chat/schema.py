"""Whether a call fits the definition of its tool: by the definition's JSON schema, without executing anything.

Arguments are held to JSON Schema 2020-12. Two things are stricter than the standard, as a function is: an argument that the
definition does not name is refused unless the definition says `additionalProperties`, and arguments are always an object.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from jsonschema import Draft202012Validator, validators
from jsonschema.exceptions import SchemaError, ValidationError, best_match
from referencing import Registry
from referencing.exceptions import Unresolvable

from modelyard.chat.conversation import Call, Conversation
from modelyard.chat.expression import Inner, has_calls, read_arguments
from modelyard.chat.tool_data.definitions import TYPE_NAMES
from modelyard.errors import did_you_mean

Reason = Literal[
    "no tools are given", "unknown tool", "bad definition", "no arguments object", "missing argument", "unknown argument",
    "wrong type", "value that is not allowed", "other",
]  # fmt: skip
"""Why a call does not fit, in classes that can be counted."""
_LONGEST = 60
"""Characters of a value in a message."""


class Problem(NamedTuple):
    reason: Reason
    text: str
    """One line for people."""


class Validity(NamedTuple):
    """How many calls fit the definitions of their tools."""

    valid: int
    calls: int
    problems: Counter[Reason]


def call_problem(call: Call, tools: Sequence[Any]) -> str | None:
    """Why a call does not fit any of the `tools` that are given, as one line; None where it does.

    `tools` are OpenAI's (`{"type": "function", "function": {…}}`) or bare definitions (`{"name", "description",
    "parameters"}`). Of a call that is an expression every call in it is checked, and of arguments that are results of calls
    only that they are there.
    """
    problem = find_problem(call, tools)
    return None if problem is None else problem.text


def validity(conversations: Iterable[Conversation]) -> Validity:
    """(calls that fit, calls, problems by reason) of conversations."""
    valid, calls, problems = 0, 0, Counter[Reason]()
    for conversation in conversations:
        for message in conversation.messages:
            for call in message.calls:
                calls += 1
                if problem := find_problem(call, conversation.tools):
                    problems[problem.reason] += 1
                else:
                    valid += 1
    return Validity(valid, calls, problems)


def find_problem(call: Call, tools: Sequence[Any]) -> Problem | None:
    """`call_problem` with the class of the reason."""
    if not tools:
        return Problem("no tools are given", f"'{call.name}' is called, but no tools are given")
    definitions = {str(tool.get("name")): tool for tool in map(_bare, tools)}
    arguments = call.arguments
    if isinstance(arguments, str):
        definition = definitions.get(call.name)
        try:
            arguments = read_arguments(arguments, _names(definition) if definition else ())
        except ValueError as error:
            return Problem("no arguments object", f"the arguments of {call.name} are no JSON object: {error}")
    return _problem(call.name, arguments, definitions)


def _bare(tool: Any) -> Mapping[str, Any]:
    inner = tool.get("function") if isinstance(tool, Mapping) else None
    found = inner if isinstance(inner, Mapping) else tool
    return found if isinstance(found, Mapping) else {}


def _names(definition: Mapping[str, Any]) -> list[str]:
    schema = definition.get("parameters")
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    return list(properties) if isinstance(properties, Mapping) else []


def _problem(name: str, arguments: Any, definitions: Mapping[str, Mapping[str, Any]]) -> Problem | None:
    definition = definitions.get(name)
    if definition is None:
        hint = did_you_mean(name, definitions) or f"; there are {_listed(definitions)}"
        return Problem("unknown tool", f"'{name}' is no tool{hint}")
    if not isinstance(arguments, Mapping):
        return Problem(
            "no arguments object", f"the arguments of {name} are {_shown(arguments)}, not an object"
        )
    schema = definition.get("parameters") or {}
    try:
        validator = _validator(json.dumps(schema))
    except SchemaError as error:
        return _no_schema(name, error)
    if unknown := _unknown(arguments, schema):
        hint = did_you_mean(unknown, schema["properties"]) or f"; there are {_listed(schema['properties'])}"
        return Problem("unknown argument", f"'{unknown}' is no argument of {name}{hint}")
    try:
        # What a result will be is not known: what is said about it, or about something that has it inside, is left out.
        worst = best_match(
            error
            for error in validator.iter_errors(arguments)
            if not has_calls(error.instance) or error.validator in ("required", "additionalProperties")
        )
    except (Unresolvable, RecursionError, re.error, OverflowError, ValueError) as broken:
        return Problem("bad definition", f"parameters of {name} cannot be checked: {_line(str(broken))}")
    if worst is not None:
        return _explained(name, worst)
    for key, value in arguments.items():
        for inner in _inner(value):
            called = inner.arguments
            if inner_definition := definitions.get(inner.name):
                names = _names(inner_definition)
                # Arguments without a name, which the expression has by number.
                called = {
                    names[int(given)] if given.isdecimal() and int(given) < len(names) else given: found
                    for given, found in called.items()
                }
            if problem := _problem(inner.name, called, definitions):
                return Problem(problem.reason, f"in argument {key} of {name}: {problem.text}")
    return None


def _inner(value: Any) -> list[Inner]:
    if isinstance(value, Inner):
        return [value]
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return [found for one in values for found in _inner(one)]


def _bounded(name: str) -> Any:
    """A keyword's check where it is cheap: definitions are data, and some of them take for ever on some values (a pattern as
    `^(a+)+$`, a thousand objects that must differ)."""
    check = Draft202012Validator.VALIDATORS[name]

    def checked(validator: Any, rule: Any, instance: Any, schema: Any) -> Any:
        if isinstance(instance, list) and len(instance) > _MOST_COMPARED:
            return ()
        return check(validator, rule, instance, schema) or ()

    return checked


def _unchecked(validator: Any, rule: Any, instance: Any, schema: Any) -> tuple[()]:
    return ()


_MOST_COMPARED = 200
"""Elements of a list that are held against each other."""
_Checker = validators.extend(
    Draft202012Validator,
    # Patterns are not checked: Python's regular expressions cannot be stopped.
    {"pattern": _unchecked, "uniqueItems": _bounded("uniqueItems")},
)


@lru_cache(maxsize=4096)
def _validator(schema: str) -> Draft202012Validator:
    """Of a schema's JSON text. Raises SchemaError where it is none."""
    document = json.loads(schema)
    Draft202012Validator.check_schema(document)
    # An empty registry: what a schema refers to outside itself is not fetched.
    return _Checker(document, registry=Registry())


def _unknown(arguments: Mapping[str, Any], schema: Any) -> str | None:
    """The first argument that a function with these parameters would not take."""
    if not isinstance(schema, Mapping) or not isinstance(schema.get("properties"), Mapping):
        return None
    if schema.keys() & {"additionalProperties", "patternProperties", "$ref", "allOf", "anyOf", "oneOf"}:
        return None  # the schema says itself what else there may be
    return next((name for name in arguments if name not in schema["properties"]), None)


def _no_schema(name: str, error: SchemaError) -> Problem:
    at = "".join(f".{step}" for step in error.absolute_path)
    why = _line(error.message)
    if error.absolute_path and error.absolute_path[-1] == "type":
        meant = TYPE_NAMES.get(str(error.instance).lower())
        why = f"{_shown(error.instance)} is none of its types" + (
            f"; did you mean '{meant}'?" if meant else ""
        )
    return Problem("bad definition", f"parameters{at} of {name} is no JSON schema: {why}")


def _explained(name: str, error: ValidationError) -> Problem:
    where = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in error.absolute_path)
    what = f"argument {where[1:]} of {name}" if where else f"the arguments of {name}"
    rule: Any = error.validator_value
    schema: Any = error.schema
    if error.validator == "required" and isinstance(error.instance, Mapping):
        missing = [key for key in rule if key not in error.instance]
        given = [key for key in error.instance if key not in schema.get("properties", {})]
        hint = f" (given: '{given[0]}')" if given else ""
        inside = f" of {where[1:]}" if where else ""
        return Problem("missing argument", f"'{missing[0]}'{inside} is missing in the call of {name}{hint}")
    if error.validator == "type":
        wanted = rule if isinstance(rule, str) else " or ".join(map(str, rule))
        return Problem("wrong type", f"{what} is {_shown(error.instance)}, not of type {wanted}")
    if error.validator in ("enum", "const"):
        allowed = rule if error.validator == "enum" else [rule]
        hint = did_you_mean(str(error.instance), map(str, allowed))
        values = ", ".join(map(_shown, allowed[:8])) + (", …" if len(allowed) > 8 else "")
        return Problem(
            "value that is not allowed", f"{what} is {_shown(error.instance)}, not one of {values}{hint}"
        )
    if error.validator == "additionalProperties":
        return Problem("unknown argument", f"{what}: {_line(error.message)}")
    return Problem("other", f"{what}: {_line(error.message)}")


def _shown(value: Any) -> str:
    return _line(json.dumps(value, ensure_ascii=False, default=str), _LONGEST)


def _listed(names: Iterable[str]) -> str:
    return _line(", ".join(names) or "none", 3 * _LONGEST)


def _line(text: str, longest: int = 3 * _LONGEST) -> str:
    line = " ".join(text.split())
    return line if len(line) <= longest else line[: longest - 1] + "…"
