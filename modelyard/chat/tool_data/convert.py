"""Files of conversations → OpenAI messages, with a count of what came out and what of it fits its definitions."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from modelyard.chat.conversation import Conversation, ConversationError, as_record
from modelyard.chat.formats import AS_IT_COMES, Format, Reading, format_of, read_records
from modelyard.chat.schema import Reason, find_problem
from modelyard.data.bytestream import ByteStream
from modelyard.errors import UserError, missing_path

Kind = Literal["no call", "single", "parallel", "multi-step", "nested"]
KINDS: tuple[Kind, ...] = ("no call", "single", "parallel", "multi-step", "nested")


@dataclass
class Counts:
    """What became of a file."""

    records: int = 0
    conversations: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    """Conversations that are of no use, by reason."""
    kinds: Counter[Kind] = field(default_factory=Counter)
    """Conversations by `kind_of`."""
    calls: int = 0
    valid: int = 0
    """Calls that fit the definition of their tool."""
    problems: Counter[Reason] = field(default_factory=Counter)
    """Why the others do not."""
    unchecked: int = 0
    """Calls of api_bank without definitions: those made from the calls themselves say nothing about them."""
    left_out: int = 0
    """Conversations with a call that does not fit, left out of what came out."""


def convert_file(
    path: Path,
    format: Format | None = None,
    reading: Reading = AS_IT_COMES,
    counts: Counts | None = None,
    *,
    valid_only: bool = False,
) -> Iterator[dict[str, Any]]:
    """The conversations of a file (JSON lines, or one JSON list; plain, .gz or .zst) as OpenAI messages with tools.

    Args:
        format: how its records are; None: told by their columns.
        reading: what the format leaves open.
        counts: is added to.
        valid_only: leave out conversations with a call that does not fit the definition of its tool.

    Raises:
        UserError: the file is not there, damaged or not JSON.
    """
    for conversation in read_file(path, format, reading, counts, valid_only=valid_only):
        yield as_record(conversation)


def read_file(
    path: Path,
    format: Format | None = None,
    reading: Reading = AS_IT_COMES,
    counts: Counts | None = None,
    *,
    valid_only: bool = False,
) -> Iterator[Conversation]:
    """`convert_file`, as conversations."""
    counts = Counts() if counts is None else counts
    for record in _records(path):
        counts.records += 1
        checked = reading.definitions is not None or (format or format_of(record)) != "api_bank"
        for found in read_records(record, format, reading):
            if isinstance(found, ConversationError):
                counts.refused[str(found)] += 1
                continue
            counts.conversations += 1
            counts.kinds[kind_of(found)] += 1
            calls = [call for message in found.messages for call in message.calls]
            counts.calls += len(calls)
            if not checked:
                counts.unchecked += len(calls)
                yield found
                continue
            problems = [find_problem(call, found.tools) for call in calls]
            bad = [problem.reason for problem in problems if problem is not None]
            counts.valid += len(calls) - len(bad)
            counts.problems.update(bad)
            if bad and valid_only:
                counts.left_out += 1
                continue
            yield found


def kind_of(conversation: Conversation) -> Kind:
    """The most involved of: a call in a call (as an expression), calls one after the other for one question, several at once,
    single calls, none."""
    found: set[Kind] = set()
    in_a_row = 0
    for message in conversation.messages:
        if message.role == "user":
            in_a_row = 0
        if not message.calls:
            continue
        in_a_row += 1
        found.add("parallel" if len(message.calls) > 1 else "single")
        if in_a_row > 1:
            found.add("multi-step")
        if any(isinstance(call.arguments, str) for call in message.calls):
            found.add("nested")
    return max(found, key=KINDS.index, default="no call")


def with_tools(
    conversations: Iterable[Conversation], tools: Sequence[Any], *, most: int = 3, seed: int = 0
) -> Iterator[Conversation]:
    """Easy negatives: questions answered without tools although there are some. Each conversation that has none gets one to
    `most` of `tools`; which, depends on `seed` and its number alone.
    """
    for number, conversation in enumerate(conversations):
        if conversation.tools:
            yield conversation
            continue
        rng = random.Random(f"tools {seed} {number}")
        chosen = rng.sample(range(len(tools)), min(rng.randint(1, most), len(tools)))
        yield replace(conversation, tools=tuple(tools[index] for index in chosen))


def distinct_tools(conversations: Iterable[Conversation]) -> list[Any]:
    """Every definition once, in the order of their first use."""
    return list({json.dumps(tool): tool for one in conversations for tool in one.tools}.values())


def _records(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise UserError(missing_path(path))
    with ByteStream(path, path.suffix[1:]) as stream:
        content = stream.read()
    try:
        if content.lstrip()[:1] == b"[":
            yield from json.loads(content)
            return
    except ValueError as error:
        raise UserError(f"{path} begins like a JSON list and is none ({error})") from None
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: no JSON ({error})") from None
            if not isinstance(record, dict):
                raise UserError(f"{path}, line {number}: {line[:40]!r} is no JSON object")
            yield record
