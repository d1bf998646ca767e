"""Conversations as other people's files have them, as they come: a record → a conversation.

- `messages`: OpenAI's (`messages`, perhaps `tools`).
- `sharegpt`: `conversations` of `from` and `value`, perhaps `system` and `tools`; `function_call` and `observation` are calls
  and results in JSON.
- `alpaca`: `instruction`, perhaps `input` and `system`, and `output` or `response`.
- `pair`: `prompt` and `completion`, or `question` and `answer`: text, or messages.
- `seal_tools`, `bfcl`, `nestful`, `api_bank`, `toolalpaca`: public sets of tool calls (docs/tool-data.md).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from modelyard.chat.conversation import Conversation, ConversationError, read_conversation
from modelyard.chat.tool_data import api_bank, bfcl, nestful, seal_tools, toolalpaca
from modelyard.errors import did_you_mean

Format = Literal[
    "messages", "sharegpt", "alpaca", "pair", "seal_tools", "bfcl", "nestful", "api_bank", "toolalpaca"
]

_TELLING: dict[Format, tuple[tuple[str, ...], ...]] = {
    "messages": (("messages",),),
    "sharegpt": (("conversations",), ("conversation",)),
    "alpaca": (("instruction", "output"), ("instruction", "response")),
    "pair": (("prompt", "completion"), ("prompt", "response"), ("question", "answer")),
    "seal_tools": (("query", "calling", "tools"),),
    "bfcl": (("question", "function"), ("question", "involved_classes", "ground_truth")),
    "nestful": (("input", "output", "spec"),),
    "api_bank": (("turns",),),
    "toolalpaca": (("Documentation", "Instructions", "Golden_Answers"),),
}
"""Columns that a record of the format has: all of one of these."""
FORMATS: tuple[Format, ...] = get_args(Format)


_NAMES = sorted({column for ways in _TELLING.values() for columns in ways for column in columns})


def format_of(record: Mapping[str, Any]) -> Format | None:
    """The format of a record by its columns; None where it is of none."""
    return next((name for name in FORMATS if _has(record, name)), None)


@dataclass(frozen=True)
class Reading:
    """What is left open in some formats."""

    nested: Literal["turns", "expression"] = "turns"
    """Calls inside calls: each call and its result a turn, or one expression, `f(x=g(y=1))`. (seal_tools, nestful,
    toolalpaca)"""
    definitions: Path | None = None
    """Definitions of tools in a file (or folder) beside the records. (nestful, bfcl, api_bank)"""
    text_beside_calls: Literal["keep", "drop"] = "keep"
    """What the assistant says in a message that calls tools, which Llama 3.1's format has no place for. (all formats)"""


AS_IT_COMES = Reading()


def read_record(
    record: Mapping[str, Any], format: Format | None = None, reading: Reading = AS_IT_COMES
) -> Conversation:
    """The conversation of a record. Raises ConversationError, which says what is wrong with it."""
    found = list(read_records(record, format, reading))
    if len(found) != 1:
        raise ConversationError(
            f"it holds {len(found)} conversations: write them to a file of one each first (examples/tools/convert.py)"
        )
    if isinstance(found[0], ConversationError):
        raise found[0]
    return found[0]


def read_records(
    record: Mapping[str, Any], format: Format | None = None, reading: Reading = AS_IT_COMES
) -> Iterable[Conversation | ConversationError]:
    """The conversations of a record, one but for toolalpaca, where a record is an API with many questions; for each that is
    of no use, why."""
    try:
        chosen = format or format_of(record)
        if chosen is None:
            columns = ", ".join(map(str, record)) or "none"
            if "chosen" in record and "rejected" in record:
                raise ConversationError("it is a preference (chosen, rejected), which is not supported yet")
            if "text" in record:
                raise ConversationError(
                    "it is a text, no conversation: leave dataset.conversations out, and name its column with dataset.field"
                )
            near = next(filter(None, (did_you_mean(str(name), _NAMES) for name in record)), "")
            raise ConversationError(
                f"its columns ({columns}) are those of no format of conversations{near}: {_formats()}"
            )
        if not _has(record, chosen):
            raise ConversationError(f"it has not the columns of the format {chosen}: {_columns(chosen)}")
        if chosen == "toolalpaca":
            found: Iterable[Conversation | ConversationError] = toolalpaca.read(
                record, expression=reading.nested == "expression"
            )
        else:
            found = [_read_whole(record, chosen, reading)]
    except ConversationError as error:
        found = [error]
    for one in found:
        silent = reading.text_beside_calls == "drop" and isinstance(one, Conversation)
        yield _without_text_beside_calls(one) if silent and isinstance(one, Conversation) else one


def _read_whole(record: Mapping[str, Any], format: Format, reading: Reading) -> Conversation:
    try:
        return _READERS[format](record, reading)
    except RecursionError:
        raise ConversationError("it is nested too deeply") from None
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        if isinstance(error, ConversationError) or format not in _TOOL_SETS:
            raise
        # Records of these sets come from one place each; what is not as there is not worth a rule of its own.
        raise ConversationError(
            f"it is not as the format {format} has it ({type(error).__name__}: {error})"
        ) from None


def _without_text_beside_calls(conversation: Conversation) -> Conversation:
    messages = (
        replace(message, content="") if message.calls else message for message in conversation.messages
    )
    return replace(conversation, messages=tuple(messages))


def _has(record: Mapping[str, Any], format: Format) -> bool:
    return any(all(column in record for column in columns) for columns in _TELLING[format])


def _columns(format: Format) -> str:
    return " or ".join(" and ".join(columns) for columns in _TELLING[format])


def _formats() -> str:
    return "; ".join(f"{name} ({_columns(name)})" for name in FORMATS)


def _messages(record: Mapping[str, Any]) -> Conversation:
    messages = record["messages"]
    system = _system(record)
    if system and isinstance(messages, list):
        first = messages[0] if messages else None
        if isinstance(first, Mapping) and first.get("role") in ("system", "developer"):
            raise ConversationError(
                "it has a system message among its messages, and a column 'system' beside"
            )
        messages = [*system, *messages]
    return read_conversation(messages, record.get("tools"))


def _system(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The message that a column `system` is."""
    return [{"role": "system", "content": record["system"]}] if record.get("system") else []


_SPEAKERS = {
    "human": "user", "user": "user", "prompter": "user",
    "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool", "observation": "tool", "function_response": "tool", "ipython": "tool",
    "function_call": "call", "function-call": "call",
}  # fmt: skip


def _sharegpt(record: Mapping[str, Any]) -> Conversation:
    turns = record.get("conversations", record.get("conversation"))
    if not isinstance(turns, list):
        raise ConversationError("conversations is not a list")
    if turns and all(isinstance(turn, Mapping) and "role" in turn for turn in turns):
        return _messages({**record, "messages": turns})  # OpenAI's messages under ShareGPT's name
    messages = _system(record)
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
            raise ConversationError(f"turn {number} has not both 'from' and 'value'")
        role = _SPEAKERS.get(str(turn["from"]).lower())
        if role is None:
            raise ConversationError(
                f"turn {number} is from {turn['from']!r}, who is none of {', '.join(_SPEAKERS)}"
            )
        if role == "call":
            message = {"role": "assistant", "content": "", "tool_calls": _calls(turn["value"], number)}
        else:
            message = {"role": role, "content": turn["value"]}
        messages.append(message if turn.get("weight") is None else {**message, "weight": turn["weight"]})
    return read_conversation(messages, record.get("tools") or None)


def _calls(value: Any, number: int) -> list[Any]:
    """One call or several, as JSON text or objects."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ConversationError(f"turn {number} is a call that is no JSON ({error})") from None
    return value if isinstance(value, list) else [value]


def _alpaca(record: Mapping[str, Any]) -> Conversation:
    asked, more = record["instruction"], record.get("input") or ""
    if record.get("history"):
        raise ConversationError("its 'history' has no place in this format; write it as messages")
    if not isinstance(asked, str) or not isinstance(more, str):
        raise ConversationError("instruction and input are not both text")
    answer = record["output"] if "output" in record else record["response"]
    messages = _system(record)
    messages += [
        {"role": "user", "content": f"{asked}\n\n{more}" if more else asked},
        {"role": "assistant", "content": answer},
    ]
    return read_conversation(messages, record.get("tools") or None)


def _pair(record: Mapping[str, Any]) -> Conversation:
    names = next(columns for columns in _TELLING["pair"] if all(column in record for column in columns))
    asked, answer = (record[name] for name in names)
    if isinstance(asked, str) and isinstance(answer, str):
        said = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        return read_conversation([*_system(record), *said], record.get("tools") or None)
    if isinstance(asked, list) and isinstance(answer, list):
        # What is before the answer is told and not trained on.
        before = [
            {**message, "weight": 0}
            if isinstance(message, Mapping) and message.get("role") == "assistant"
            else message
            for message in asked
        ]
        return _messages({**record, "messages": [*before, *answer]})
    raise ConversationError(f"{names[0]} and {names[1]} are neither both text nor both messages")


_READERS: dict[Format, Callable[[Mapping[str, Any], Reading], Conversation]] = {
    "messages": lambda record, _: _messages(record),
    "sharegpt": lambda record, _: _sharegpt(record),
    "alpaca": lambda record, _: _alpaca(record),
    "pair": lambda record, _: _pair(record),
    "seal_tools": lambda record, how: seal_tools.read(record, expression=how.nested == "expression"),
    "bfcl": lambda record, how: bfcl.read(record, definitions=how.definitions),
    "nestful": lambda record, how: nestful.read(
        record, definitions=how.definitions, expression=how.nested == "expression"
    ),
    "api_bank": lambda record, how: api_bank.read(record, definitions=how.definitions),
}
_TOOL_SETS = ("seal_tools", "bfcl", "nestful", "api_bank")
