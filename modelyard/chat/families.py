"""Chat formats: how a conversation of each family is written. The text is that of the family's own template wherever that
can render the conversation; a test holds the two together.

A family is a function from a conversation to segments. `answer=True` ends with the header of an answer to be written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from modelyard.chat.conversation import Conversation, ConversationError, Message, Role
from modelyard.chat.parsing import hermes_message, llama_message, plain_message
from modelyard.chat.segments import Kind, Segment, joined


class Family(Protocol):
    """A chat format."""

    @property
    def name(self) -> str: ...

    def render(self, conversation: Conversation, *, answer: bool = False) -> list[Segment]:
        """The conversation as segments. Raises ConversationError where the format cannot hold it."""
        ...

    @property
    def stops(self) -> tuple[str, ...]:
        """Tokens that end an answer."""
        ...

    def parse(self, text: str) -> Message:
        """The message of an answer that a model wrote, from its text with special tokens written out, without the stop.

        The inverse of `render`. A call that is malformed or cut off is content like any other text.
        """
        ...


def as_json(value: Any, indent: int | None = None) -> str:
    """JSON as chat templates write it."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def tool_text(content: Any) -> str:
    """A tool's result where the template wants text."""
    return content if isinstance(content, str) else as_json(content)


@dataclass(frozen=True)
class Llama3:
    """Llama 3.1: a system turn with dates, tools in the first user turn, `ipython` for results.

    Source: the template in the tokenizer's configuration. What that refuses and this writes: several calls at once, as a
    JSON list after `<|python_tag|>`, and a call that is an expression after it as it is. What that drops silently is
    refused: text beside a call.
    """

    name: str = "llama3"
    date: str = "26 Jul 2024"
    """`Today Date` of the system turn: the template's own default, so that data does not change with the day."""
    knowledge_date: str = "December 2023"
    tools_in_user_message: bool = True
    default_system: str = ""
    """Said where a conversation has no system message of its own."""
    builtin_tools: tuple[str, ...] | None = None
    """Tools that the model knows by itself (brave_search, wolfram_alpha, code_interpreter); None: no code mode."""

    @property
    def stops(self) -> tuple[str, ...]:
        return ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")

    def parse(self, text: str) -> Message:
        return llama_message(text, self.builtin_tools)

    def render(self, conversation: Conversation, *, answer: bool = False) -> list[Segment]:
        return list(self._segments(conversation, answer))

    def _segments(self, conversation: Conversation, answer: bool) -> Iterator[Segment]:
        messages, tools = list(conversation.messages), conversation.tools
        system = self.default_system
        if messages[0].role == "system":
            system = messages.pop(0).content.strip()
        yield Segment("<|begin_of_text|>", Kind.BEGIN, special=True)
        yield from self._turn("system", self._system(system, tools))
        if tools and self.tools_in_user_message:
            if not messages or messages[0].role != "user":
                raise ConversationError(
                    "tools are told in the first message after the system's, which must be the user's"
                )
            first = messages.pop(0)
            yield from self._turn("user", LLAMA_TOOLS + _listed(tools) + first.content.strip())
        for message in messages:
            yield from self._message(message)
        if answer:
            yield from self._header("assistant")

    def _system(self, system: str, tools: tuple[Any, ...]) -> str:
        text = "Environment: ipython\n" if tools or self.builtin_tools is not None else ""
        if self.builtin_tools is not None:
            known = [name for name in self.builtin_tools if name != "code_interpreter"]
            text += f"Tools: {', '.join(known)}\n\n"
        text += f"Cutting Knowledge Date: {self.knowledge_date}\nToday Date: {self.date}\n\n"
        if tools and not self.tools_in_user_message:
            text += LLAMA_SYSTEM_TOOLS + _listed(tools)
        return text + system

    def _header(self, role: Role) -> Iterator[Segment]:
        yield Segment("<|start_header_id|>", Kind.HEADER, role, special=True)
        yield Segment("ipython" if role == "tool" else role, Kind.HEADER, role)
        yield Segment("<|end_header_id|>", Kind.HEADER, role, special=True)
        yield Segment("\n\n", Kind.HEADER, role)

    def _turn(
        self, role: Role, text: str, kind: Kind = Kind.CONTENT, *, trained: bool = True
    ) -> Iterator[Segment]:
        yield from self._header(role)
        yield Segment(text, kind, role, trained=trained)
        yield Segment("<|eot_id|>", Kind.TERMINATOR, role, special=True, trained=trained)

    def _message(self, message: Message) -> Iterator[Segment]:
        if message.role == "tool":
            yield from self._turn("tool", as_json(message.content), Kind.TOOL_RESULT)
        elif not message.calls:
            yield from self._turn(message.role, message.content.strip(), trained=message.trained)
        else:
            if message.content.strip():
                raise ConversationError(
                    "Llama 3.1's format has no place for text beside a tool call; make it a message of its own, or leave it out"
                )
            yield from self._header("assistant")
            yield from self._calls(message)

    def _calls(self, message: Message) -> Iterator[Segment]:
        calls, trained = message.calls, message.trained
        tag = Segment("<|python_tag|>", Kind.TOOL_CALL, "assistant", special=True, trained=trained)
        if len(calls) > 1:
            yield tag
            text = as_json([{"name": call.name, "parameters": call.arguments} for call in calls])
        elif isinstance(calls[0].arguments, Mapping) and calls[0].name in (self.builtin_tools or ()):
            yield tag
            given = ", ".join(f'{name}="{value}"' for name, value in calls[0].arguments.items())
            text = f"{calls[0].name}.call({given})"
        elif isinstance(calls[0].arguments, str):
            yield tag
            text = f"{calls[0].name}({calls[0].arguments})"
        else:
            text = f'{{"name": "{calls[0].name}", "parameters": {as_json(calls[0].arguments)}}}'
        yield Segment(text, Kind.TOOL_CALL, "assistant", trained=trained)
        end = "<|eot_id|>" if self.builtin_tools is None else "<|eom_id|>"
        yield Segment(end, Kind.TERMINATOR, "assistant", special=True, trained=trained)


_LLAMA_FORM = (
    'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
    "Do not use variables.\n\n"
)
LLAMA_TOOLS = (
    "Given the following functions, please respond with a JSON for a function call "
    f"with its proper arguments that best answers the given prompt.\n\n{_LLAMA_FORM}"
)
LLAMA_SYSTEM_TOOLS = (
    "You have access to the following functions. To call a function, please respond with JSON for a function call."
    f"{_LLAMA_FORM}"
)


def _listed(tools: tuple[Any, ...]) -> str:
    return "".join(as_json(tool, indent=4) + "\n\n" for tool in tools)


@dataclass(frozen=True)
class ChatML:
    """ChatML: `<|im_start|>role`, text, `<|im_end|>`; with `hermes` tools as Qwen 2.5 and Hermes write them."""

    name: str = "chatml"
    default_system: str | None = None
    """Said where a conversation has no system message of its own; None: nothing."""
    hermes: bool = False

    @property
    def stops(self) -> tuple[str, ...]:
        return ("<|im_end|>", "<|endoftext|>")

    def parse(self, text: str) -> Message:
        return hermes_message(text) if self.hermes else plain_message(text)

    def render(self, conversation: Conversation, *, answer: bool = False) -> list[Segment]:
        return joined(self._segments(conversation, answer))

    def _segments(self, conversation: Conversation, answer: bool) -> Iterator[Segment]:
        messages = list(conversation.messages)
        system = self.default_system
        if messages[0].role == "system":
            system = messages.pop(0).content
        if conversation.tools:
            if not self.hermes:
                raise ConversationError("plain ChatML has no place for tools; use the family qwen2.5")
            system = (system or "") + hermes_tools(conversation.tools)
        if system is not None:
            yield from self._turn("system", system)
        for index, message in enumerate(messages):
            if message.role == "tool":
                before = messages[index - 1].role if index else None
                after = messages[index + 1].role if index + 1 < len(messages) else None
                yield from self._result(message, first=before != "tool", last=after != "tool")
            elif message.calls:
                yield from self._calls(message)
            else:
                yield from self._turn(message.role, message.content, trained=message.trained)
        if answer:
            yield from self._header("assistant")

    def _header(self, role: Role, written: str | None = None) -> Iterator[Segment]:
        yield Segment("<|im_start|>", Kind.HEADER, role, special=True)
        yield Segment(f"{written or role}\n", Kind.HEADER, role)

    def _end(self, role: Role, *, trained: bool = True) -> Iterator[Segment]:
        yield Segment("<|im_end|>", Kind.TERMINATOR, role, special=True, trained=trained)
        yield Segment("\n", Kind.SEPARATOR, role)

    def _turn(self, role: Role, text: str, *, trained: bool = True) -> Iterator[Segment]:
        yield from self._header(role)
        yield Segment(text, Kind.CONTENT, role, trained=trained)
        yield from self._end(role, trained=trained)

    def _result(self, message: Message, *, first: bool, last: bool) -> Iterator[Segment]:
        if not self.hermes:
            raise ConversationError("plain ChatML has no place for a tool's result; use the family qwen2.5")
        if first:
            yield from self._header("tool", "user")
        text = f"<tool_response>\n{tool_text(message.content)}\n</tool_response>"
        yield Segment(text if first else f"\n{text}", Kind.TOOL_RESULT, "tool")
        if last:
            yield from self._end("tool")

    def _calls(self, message: Message) -> Iterator[Segment]:
        if not self.hermes:
            raise ConversationError("plain ChatML has no place for tool calls; use the family qwen2.5")
        trained = message.trained

        def said(text: str, kind: Kind = Kind.TOOL_CALL, *, special: bool = False) -> Segment:
            return Segment(text, kind, "assistant", special=special, trained=trained)

        yield from self._header("assistant")
        if message.content:
            yield said(f"{message.content}\n", Kind.CONTENT)
        for number, call in enumerate(message.calls):
            if number:
                yield said("\n")
            yield said("<tool_call>", special=True)
            yield said(f'\n{{"name": "{call.name}", "arguments": {as_json(call.arguments)}}}\n')
            yield said("</tool_call>", special=True)
        yield from self._end("assistant", trained=trained)


def hermes_tools(tools: tuple[Any, ...]) -> str:
    listed = "".join(f"\n{as_json(tool)}" for tool in tools)
    return (
        "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        f"You are provided with function signatures within <tools></tools> XML tags:\n<tools>{listed}\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within <tool_call></tool_call> "
        'XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    )


@dataclass(frozen=True)
class Vicuna:
    """Vicuna 1.1: one line of turns, each answer ended by a token; no tools.

    Source: FastChat's conversation template `vicuna_v1.1`; GPT-2's vocabulary ends in `<|endoftext|>`.
    """

    name: str = "vicuna"
    default_system: str = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    end: str = "<|endoftext|>"

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.end,)

    def parse(self, text: str) -> Message:
        return plain_message(text.removeprefix(" "))

    def render(self, conversation: Conversation, *, answer: bool = False) -> list[Segment]:
        return list(self._segments(conversation, answer))

    def _segments(self, conversation: Conversation, answer: bool) -> Iterator[Segment]:
        messages, system = list(conversation.messages), self.default_system
        if messages[0].role == "system":
            system = messages.pop(0).content
        if conversation.tools or any(message.calls or message.role == "tool" for message in messages):
            raise ConversationError("Vicuna's format has no place for tools")
        roles = [message.role for message in messages]
        if roles != [("user", "assistant")[n % 2] for n in range(len(roles))]:
            raise ConversationError("in Vicuna's format user and assistant take turns, and the user begins")
        yield Segment(f"{system} ", Kind.CONTENT, "system")
        for message in messages:
            if message.role == "user":
                yield Segment("USER:", Kind.HEADER, "user")
                yield Segment(f" {message.content}", Kind.CONTENT, "user")
                yield Segment(" ", Kind.SEPARATOR)
            else:
                yield Segment("ASSISTANT:", Kind.HEADER, "assistant")
                yield Segment(f" {message.content}", Kind.CONTENT, "assistant", trained=message.trained)
                yield Segment(self.end, Kind.TERMINATOR, "assistant", special=True, trained=message.trained)
        if answer:
            yield Segment("ASSISTANT:", Kind.HEADER, "assistant")


QWEN = ChatML("qwen2.5", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.", hermes=True)
FAMILIES: dict[str, Family] = {family.name: family for family in (Llama3(), QWEN, ChatML(), Vicuna())}
