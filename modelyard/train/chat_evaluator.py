"""Answers to conversations that the model was not trained on: whether they end, and whether the calls in them are calls."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelyard.chat.conversation import (
    Conversation,
    ConversationError,
    Message,
    as_message,
    read_conversation,
)
from modelyard.chat.format import chat_family
from modelyard.chat.formats import read_record
from modelyard.chat.schema import call_problem
from modelyard.chat.segments import text_of
from modelyard.chat.tokens import tokenize_conversation
from modelyard.config.architecture import Architecture
from modelyard.config.training import ChatEvaluatorConfig
from modelyard.data.bytestream import ByteStream
from modelyard.data.tokenizer import load_tokenizer
from modelyard.errors import UserError
from modelyard.generate.chat import Answer, ChatModel, room
from modelyard.generate.sample import SamplingOptions, Speaker
from modelyard.generate.text import refuse_another_tokenizer


@dataclass(frozen=True)
class Question:
    """A conversation up to an answer, and the answer that it has in the data, if it has one."""

    conversation: Conversation
    reference: Message | None


class ChatEvaluator:
    """The questions of one evaluator, read and checked before the run begins."""

    def __init__(
        self, name: str, settings: ChatEvaluatorConfig, tokenizer_folder: Path, architecture: Architecture
    ):
        """Raises UserError where the file or a conversation in it cannot be used, and where the tokenizer has no chat format."""
        self._name, self._settings = name, settings
        self._tokenizer, self._family = load_tokenizer(tokenizer_folder), chat_family(tokenizer_folder)
        refuse_another_tokenizer(tokenizer_folder, self._tokenizer.vocab_size, architecture.vocab_size)
        self._questions = []
        for place, question in _questions(name, settings):
            with _named(place):
                prompt = tokenize_conversation(
                    question.conversation, self._family, self._tokenizer, answer=True
                )
                room(architecture, len(prompt.ids))
            self._questions.append(question)
        if not self._questions:
            raise UserError(f"evaluator {name}: {settings.path} has no conversations")

    def record(
        self,
        speaker: Speaker,
        iteration: int,
        *,
        say: Callable[[str], None],
        stop: Callable[[], bool],
    ) -> dict[str, Any] | None:
        """Answer every question; the record for the metrics, None where it was told to `stop`."""
        settings, name = self._settings, self._name
        model = ChatModel(speaker, self._tokenizer, self._family)
        samples = []
        for index, question in enumerate(self._questions):
            if stop():
                return None
            options = SamplingOptions(
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                top_k=settings.top_k,
                top_p=settings.top_p,
                seed=settings.seed + index,
            )
            answer = model.answer(question.conversation, options)
            samples.append(self._sample(question, answer))
            asked = _line(question.conversation.messages[-1])
            say(f"{name} at iteration {iteration}: {_short(asked)} → {_short(samples[-1]['text'])}")
        stopped = sum(sample["stopped"] for sample in samples)
        said = f"evaluator {name} at iteration {iteration}: {stopped} of {len(samples)} answers ended by themselves"
        record = {"iteration": iteration, "evaluator": name, "stopped": stopped / len(samples)}
        if any(question.conversation.tools for question in self._questions):
            calling = [sample["calls"] for sample in samples if sample["calls"]]
            valid = sum(all(call["problem"] is None for call in calls) for calls in calling)
            record["calls"] = len(calling)
            if calling:
                record["valid_calls"] = valid / len(calling)
            said += f", {len(calling)} call tools, {valid} of them as these are defined"
        say(said)
        return {**record, "samples": samples}

    def _sample(self, question: Question, answer: Answer) -> dict[str, Any]:
        conversation, message = question.conversation, answer.message
        calls = [
            {
                "name": call.name,
                "arguments": call.arguments,
                "problem": call_problem(call, conversation.tools),
            }
            for call in message.calls
        ]
        text = answer.text if answer.stopped else f"{answer.text} […]"
        text += "".join(f"\n[{call['problem']}]" for call in calls if call["problem"])
        return {
            "prompt": "\n".join(_line(message) for message in conversation.messages),
            "text": text,
            "messages": [as_message(message) for message in conversation.messages],
            "answer": answer.text,
            "calls": calls,
            "reference": self._written(question),
            "stopped": answer.stopped,
        }

    def _written(self, question: Question) -> str | None:
        """The reference as the format writes it, what ends it included."""
        if question.reference is None:
            return None
        before = question.conversation
        prompt = self._family.render(before, answer=True)
        whole = self._family.render(Conversation((*before.messages, question.reference), before.tools))
        return text_of(whole[len(prompt) :])


@contextmanager
def _named(place: str) -> Iterator[None]:
    """What is wrong with a conversation is said with its place."""
    try:
        yield
    except (ConversationError, UserError) as error:
        raise UserError(f"{place}: {error}") from None


def _questions(name: str, settings: ChatEvaluatorConfig) -> Iterator[tuple[str, Question]]:
    """Each conversation with its place, for messages."""
    for number, messages in enumerate(settings.conversations or [], 1):
        place = f"training.evaluators.{name}.evaluator.conversations, number {number}"
        with _named(place):
            question = _question(read_conversation(messages))
        yield place, question
    if settings.path is not None:
        for number, line in _lines(settings.path, settings.limit):
            place = f"{settings.path}, line {number}"
            with _named(place):
                question = _from_file(line)
            yield place, question


def _lines(path: Path, limit: int | None) -> Iterator[tuple[int, bytes]]:
    """The first lines of a file that are not empty, with their numbers."""
    compression = {".gz": "gz", ".zst": "zst"}.get(path.suffix, "")
    begun, number, found = b"", 0, 0
    with ByteStream(path, compression) as stream:
        while limit is None or found < limit:
            block = stream.read(1 << 20)
            *lines, begun = (begun + block).split(b"\n") if block else (begun, b"")
            for line in lines:
                number += 1
                if line.strip() and (limit is None or found < limit):
                    found += 1
                    yield number, line
            if not block:
                return


def _from_file(line: bytes) -> Question:
    """The last answer and what follows it are left out, whatever stands there."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ConversationError(f"it is no JSON ({error})") from None
    if not isinstance(record, dict):
        raise ConversationError("it is no JSON object")
    conversation = read_record(record)
    places = [n for n, message in enumerate(conversation.messages) if message.role == "assistant"]
    if not places:
        raise ConversationError("it has no message of the assistant")
    return _question(Conversation(conversation.messages[: places[-1] + 1], conversation.tools))


def _question(conversation: Conversation) -> Question:
    """A conversation whose last message is an answer, or which waits for one."""
    *before, last = conversation.messages
    if last.role != "assistant":
        return Question(conversation, None)
    if not before:
        raise ConversationError("there is nothing before the answer")
    return Question(Conversation(tuple(before), conversation.tools), last)


def _line(message: Message) -> str:
    content = (
        message.content
        if isinstance(message.content, str)
        else json.dumps(message.content, ensure_ascii=False)
    )
    calls = [f"{call.name}({json.dumps(call.arguments, ensure_ascii=False)})" for call in message.calls]
    return f"{message.role}: {' '.join(filter(None, [content, *calls]))}"


def _short(text: str) -> str:
    return repr(text if len(text) <= 200 else text[:200] + "…")
