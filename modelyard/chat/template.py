"""A tokenizer's own chat template as a family: what each part of its text is, found exactly or not used at all."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from modelyard.chat.conversation import Call, Conversation, ConversationError, Message
from modelyard.chat.parsing import hermes_message, llama_message, plain_message
from modelyard.chat.segments import Kind, Segment, joined, text_of
from modelyard.errors import UserError

_MARK = "\ue000{}\ue001"
"""Stands for the content of one message: characters of no language, which no template changes."""


@dataclass(frozen=True)
class Template:
    """A chat template in jinja, as transformers renders it.

    The text of every message is found by a second rendering with marks in its place, the answers by the prompts for them
    (`add_generation_prompt`), which have to be the beginning of the whole. A template for which that does not hold, or whose
    answers end in no special token, is refused, with the reason.
    """

    name: str
    source: str
    specials: tuple[str, ...]
    """Special tokens of the vocabulary."""
    variables: Mapping[str, Any]
    """`bos_token`, `eos_token` and the like."""
    date: datetime = datetime(2024, 7, 26)
    """What `strftime_now` shows."""
    default_system: str | None = None
    """Said where a conversation has no system message of its own; None: what the template says then."""

    @property
    def stops(self) -> tuple[str, ...]:
        return self._stops

    @cached_property
    def _stops(self) -> tuple[str, ...]:
        """What ends its answers, and the vocabulary's end token."""
        found: dict[str, None] = {}
        asked, call = Message("user", "x"), Message("assistant", "", (Call("probe", {"key": 1}),))
        for answer in (Message("assistant", "y"), call):
            with suppress(ConversationError):
                segments = self.render(Conversation((asked, answer)))
                found |= {s.text: None for s in segments if s.kind == Kind.TERMINATOR}
        return tuple(dict.fromkeys(filter(None, [*found, self.variables.get("eos_token")])))

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # jinja cannot be pickled

    @cached_property
    def _compiled(self) -> Any:
        from jinja2 import TemplateSyntaxError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _generation_tag()]
        )
        environment.filters["tojson"] = lambda value, indent=None, **_: json.dumps(
            value, ensure_ascii=False, indent=indent
        )
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = self.date.strftime
        try:
            return environment.from_string(self.source)
        except TemplateSyntaxError as error:
            raise UserError(
                f"the chat template of {self.name}, line {error.lineno}: {error.message}"
            ) from None

    def text(self, messages: Sequence[Message], tools: tuple[Any, ...] = (), *, answer: bool = False) -> str:
        """What the template makes of a conversation. Raises ConversationError where it refuses it."""
        from jinja2 import TemplateError

        try:
            return self._compiled.render(
                messages=[_as_openai(message) for message in messages],
                tools=list(tools) or None,
                add_generation_prompt=answer,
                **self.variables,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise ConversationError(f"the chat template of {self.name} refuses it: {error}") from None

    def render(self, conversation: Conversation, *, answer: bool = False) -> list[Segment]:
        messages, tools = conversation.messages, conversation.tools
        if self.default_system is not None and messages[0].role != "system":
            messages = (Message("system", self.default_system), *messages)
        self._refuse_specials(messages, tools)
        whole = self.text(messages, tools, answer=answer)
        contents = self._contents(messages, tools, whole, answer)
        answers = self._answers(messages, tools, whole)
        segments = joined(self._segments(messages, whole, contents, answers))
        assert text_of(segments) == whole
        return segments

    def _refuse_specials(self, messages: Sequence[Message], tools: tuple[Any, ...]) -> None:
        """Contents are found and kept text; in calls and definitions a special token's name would become the token."""
        calls = [[call.name, call.arguments] for message in messages for call in message.calls]
        written = json.dumps([calls, list(tools)], ensure_ascii=False) if calls or tools else ""
        if found := next((token for token in self.specials if token in written), None):
            raise ConversationError(
                self._inexact(f"a call or a definition of a tool has the special token '{found}' in it")
            )

    def parse(self, text: str) -> Message:
        before, after = self._around
        return self._parse(text.removeprefix(before).removesuffix(after))

    @cached_property
    def _around(self) -> tuple[str, str]:
        """What the template writes into every answer, before and after its content."""
        try:
            prompt = self.text([Message("user", "x")], answer=True)
            whole = self.text([Message("user", "x"), Message("assistant", _MARK.format(1))])
        except ConversationError:
            return "", ""
        before, mark, after = whole.removeprefix(prompt).partition(_MARK.format(1))
        if not mark or not whole.startswith(prompt):
            return "", ""
        text, special = next(self._cut(after), ("", True))
        return before, "" if special else text

    @cached_property
    def _parse(self) -> Callable[[str], Message]:
        """Calls are looked for in the form in which the template writes one, if it writes them at all."""
        asked = Message("user", "x")
        call = Message("assistant", "", (Call("probe", {"key": 1}),))
        try:
            before = self.text([asked], (), answer=True)
            written = self.text([asked, call], ()).removeprefix(before)
        except ConversationError:
            return plain_message
        if re.search(r'<tool_call>\s*\{"name": ?"probe"', written):
            return hermes_message
        if re.search(r'\{"name": ?"probe", ?"parameters"', written):
            return llama_message
        return plain_message

    def _contents(
        self, messages: Sequence[Message], tools: tuple[Any, ...], whole: str, answer: bool
    ) -> list[tuple[int, int, int]]:
        """Where each message's content stands: (begin, end, number of the message), in the order of the text."""
        marked = [
            replace(message, content=_MARK.format(number)) if message.content else message
            for number, message in enumerate(messages)
        ]
        pieces = re.split(r"\ue000(\d+)\ue001", self.text(marked, tools, answer=answer))
        found, place = [], len(pieces[0])
        if not whole.startswith(pieces[0]):
            raise ConversationError(self._inexact("its text depends on what messages say"))
        for number, literal in zip(map(int, pieces[1::2]), pieces[2::2], strict=True):
            content = messages[number].content
            content = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
            forms = (content, content.strip(), json.dumps(content, ensure_ascii=False))
            fitting = [
                form
                for form in dict.fromkeys(forms)
                if whole.startswith(form, place) and whole.startswith(literal, place + len(form))
            ]
            if not fitting:
                raise ConversationError(
                    self._inexact(
                        f"message {number + 1} is not written as it is, or its text depends on what it says"
                    )
                )
            found.append((place, place + len(fitting[0]), number))
            place += len(fitting[0]) + len(literal)
        if place != len(whole):
            raise ConversationError(self._inexact("its text depends on what messages say"))
        return found

    def _answers(
        self, messages: Sequence[Message], tools: tuple[Any, ...], whole: str
    ) -> list[tuple[int, int, Message]]:
        """Where each answer stands: (after its header, before what follows its turn, the message)."""
        found = []
        for number, message in enumerate(messages):
            if message.role != "assistant":
                continue
            prompt = self.text(messages[:number], tools, answer=True)
            turn = self.text(messages[: number + 1], tools)
            if not turn.startswith(prompt) or not whole.startswith(turn):
                raise ConversationError(
                    self._inexact(f"the prompt for message {number + 1} is not the beginning of the text")
                )
            found.append((len(prompt), len(turn), message))
        return found

    def _segments(
        self,
        messages: Sequence[Message],
        whole: str,
        contents: list[tuple[int, int, int]],
        answers: list[tuple[int, int, Message]],
    ) -> Iterator[Segment]:
        edges = {0, len(whole)}
        for begin, end, _ in (*contents, *answers):
            edges |= {begin, end}
        places = sorted(edges)
        ended: set[int] = set()
        for begin, end in itertools.pairwise(places):
            inside = next((a for a in answers if a[0] <= begin < a[1]), None)
            content = next((c for c in contents if c[0] <= begin < c[1]), None)
            if content is not None:
                message = messages[content[2]]
                kind = Kind.TOOL_RESULT if message.role == "tool" else Kind.CONTENT
                yield Segment(whole[begin:end], kind, message.role, trained=message.trained)
                continue
            for text, special in self._cut(whole[begin:end]):
                if inside is None:
                    yield Segment(text, Kind.HEADER, None, special=special)
                    continue
                message = inside[2]
                kind = Kind.TOOL_CALL
                if inside[0] in ended:
                    kind = Kind.SEPARATOR
                elif special and text in self._ends:
                    kind = Kind.TERMINATOR
                    ended.add(inside[0])
                elif not message.calls and (not message.content or not text.strip()):
                    kind = Kind.CONTENT  # a space beside the answer is the model's to say
                elif not message.calls:
                    raise ConversationError(
                        self._inexact(f"it writes {text!r} into an answer, or ends it in no special token")
                    )
                yield Segment(text, kind, "assistant", special=special, trained=message.trained)
        if missing := [message for begin, _, message in answers if begin not in ended and message.trained]:
            raise ConversationError(
                self._inexact(
                    f"it ends an answer in no special token ({missing[0].content[:30]!r}…): the model would never stop"
                )
            )

    @cached_property
    def _ends(self) -> frozenset[str]:
        """Special tokens that may end an answer."""
        names = ("eot", "eom", "im_end", "end_of_turn", "end_of_text", "endoftext", "eos", "|end|")
        return frozenset(
            token
            for token in self.specials
            if token == self.variables.get("eos_token") or any(name in token.lower() for name in names)
        )

    def _cut(self, text: str) -> Iterator[tuple[str, bool]]:
        """The text in pieces that are a special token or none."""
        if not self.specials:
            yield text, False
            return
        pattern = "|".join(map(re.escape, sorted(self.specials, key=len, reverse=True)))
        for number, piece in enumerate(re.split(f"({pattern})", text)):
            if piece:
                yield piece, bool(number % 2)

    def _inexact(self, reason: str) -> str:
        return (
            f"the chat template of {self.name} cannot be used for training: {reason}; name a family that fits "
            "(llama3, qwen2.5, chatml, vicuna)"
        )


def _generation_tag() -> Any:
    """The jinja extension for `{% generation %}`, by which transformers marks answers: here it is its body and nothing more."""
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012  # as jinja declares it

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Generation


def template_of(folder: Path) -> Template:
    """The chat template of a tokenizer's folder. Raises UserError where it has none."""
    config: dict[str, Any] = {}
    if (file := folder / "tokenizer_config.json").is_file():
        config = json.loads(file.read_text(encoding="utf-8"))
    source = config.get("chat_template")
    if isinstance(source, list):  # several, by name
        source = next((entry["template"] for entry in source if entry.get("name") == "default"), None)
    if (file := folder / "chat_template.jinja").is_file():
        source = file.read_text(encoding="utf-8")
    if not isinstance(source, str):
        raise UserError(f"{folder} has no chat template; name a family (llama3, qwen2.5, chatml, vicuna)")

    def content(token: Any) -> str | None:
        return token.get("content") if isinstance(token, Mapping) else token

    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    variables = {name: content(config[name]) or "" for name in names if name in config}
    added = list(config.get("added_tokens_decoder", {}).values())
    if (file := folder / "tokenizer.json").is_file():
        added += json.loads(file.read_text(encoding="utf-8")).get("added_tokens") or []
    specials = {token["content"] for token in added if token.get("special")} | set(
        filter(None, variables.values())
    )
    return Template(str(folder), source, tuple(sorted(specials)), variables)


def _raise(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _as_openai(message: Message) -> dict[str, Any]:
    found: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.calls:
        found["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.calls
        ]
    return found
