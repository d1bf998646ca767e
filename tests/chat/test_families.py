"""The text of each family is that of the template which its tokenizer ships, and each piece of it is what it says it is."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelyard.chat.conversation import ConversationError, read_conversation
from modelyard.chat.families import QWEN, ChatML, Family, Llama3, Vicuna
from modelyard.chat.segments import Kind, Segment, lane_value, text_of, trained
from tests.chat.conversations import TOOLS, conversation

SHIPPED_QWEN = dataclasses.replace(QWEN, default_system="You are a helpful assistant.")
"""As the template of that tokenizer has it."""
FAMILIES: dict[str, Family] = {"llama3": Llama3(), "qwen2.5": SHIPPED_QWEN}


def trained_text(segments: list[Segment]) -> list[str]:
    """What is trained on, piece by piece."""
    values = np.array([lane_value(segment) for segment in segments], np.uint8)
    return [segment.text for segment, chosen in zip(segments, trained(values), strict=True) if chosen]


@pytest.fixture(scope="module")
def templates(shared_data: Path) -> dict[str, Any]:
    from transformers import AutoTokenizer

    return {name: AutoTokenizer.from_pretrained(shared_data / "tokenizers" / name) for name in FAMILIES}


def compare(templates: dict[str, Any], count: int, seed: int) -> None:
    rng, compared = random.Random(seed), 0
    for number in range(count):
        messages, tools = conversation(rng)
        for name, family in FAMILIES.items():
            try:
                expected = templates[name].apply_chat_template(messages, tools=tools, tokenize=False)
            except Exception:  # which errors a template raises is its own affair
                continue
            talk = read_conversation(messages, tools)
            first = next((m.role for m in talk.messages[talk.messages[0].role == "system" :]), "user")
            if name == "llama3" and tools and first != "user":
                with pytest.raises(ConversationError, match="which must be the user's"):
                    family.render(talk)  # the template makes it the user's
                continue
            if name == "llama3" and any(m.calls and m.content.strip() for m in talk.messages):
                with pytest.raises(ConversationError, match="no place for text beside a tool call"):
                    family.render(talk)  # the template drops it
                continue
            segments = family.render(talk)
            assert text_of(segments) == expected, (seed, number, name)
            compared += 1
            # The answers as they are written, and nothing else.
            llama = name == "llama3"
            answers = [
                m.content + ("\n" if m.calls else "")
                for m in talk.messages
                if m.role == "assistant" and not (m.calls and (llama or not m.content))
            ]
            written = [text.strip() if llama else text for text in answers]
            assert [s.text for s in segments if s.kind == Kind.CONTENT and s.role == "assistant"] == written
    assert compared > count


def test_the_text_is_that_of_the_shipped_template(templates: dict[str, Any]) -> None:
    compare(templates, 300, seed=0)


@pytest.mark.slow
def test_the_text_is_that_of_the_shipped_template_for_5000(templates: dict[str, Any]) -> None:
    compare(templates, 5000, seed=1)


SENTINELS = [
    {"role": "system", "content": "SYS"},
    {"role": "user", "content": "USR1"},
    {"role": "assistant", "content": "ANS1"},
    {"role": "user", "content": "USR2"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "CALL", "arguments": '{"a": 1}'}}],
    },
    {"role": "tool", "content": "RESULT"},
    {"role": "assistant", "content": "LEFT OUT", "weight": 0},
    {"role": "user", "content": "USR3"},
    {"role": "assistant", "content": "ANS2", "weight": 1},
]


def test_what_is_trained_on() -> None:
    talk = read_conversation(SENTINELS)
    assert trained_text(Llama3().render(talk)) == [
        "ANS1", "<|eot_id|>", '{"name": "CALL", "parameters": {"a": 1}}', "<|eot_id|>", "ANS2", "<|eot_id|>",
    ]  # fmt: skip
    assert trained_text(QWEN.render(talk)) == [
        "ANS1", "<|im_end|>",
        "<tool_call>", '\n{"name": "CALL", "arguments": {"a": 1}}\n', "</tool_call>", "<|im_end|>",
        "ANS2", "<|im_end|>",
    ]  # fmt: skip
    plain = read_conversation(
        [m for m in SENTINELS if m["role"] != "tool" and "tool_calls" not in m and m["content"] != "USR2"][:5]
    )
    with pytest.raises(ConversationError, match="take turns"):
        Vicuna().render(plain)


@pytest.mark.parametrize("family", [Llama3(), QWEN, ChatML(), Vicuna()], ids=lambda family: family.name)
def test_a_prompt_is_the_beginning_of_prompt_and_answer(family: Family) -> None:
    messages = [{"role": "user", "content": "\n one"}, {"role": "assistant", "content": " 2\n"}]
    prompt = family.render(read_conversation(messages[:1]), answer=True)
    whole = family.render(read_conversation(messages))
    assert whole[: len(prompt)] == prompt
    assert prompt[-1].kind == Kind.HEADER
    rest = whole[len(prompt) :]
    assert [s.kind for s in rest][:2] == [Kind.CONTENT, Kind.TERMINATOR]
    assert rest[1].text in family.stops


def test_vicuna() -> None:
    """FastChat's conversation template vicuna_v1.1, with GPT-2's end of text."""
    talk = read_conversation(
        [
            {"role": "user", "content": "Hello!"},
            {"role": "assistant", "content": "Hi."},
            {"role": "user", "content": "How are you?"},
        ]
    )
    segments = Vicuna().render(talk, answer=True)
    assert text_of(segments) == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
        "and polite answers to the user's questions. USER: Hello! ASSISTANT: Hi.<|endoftext|>USER: How are you? ASSISTANT:"
    )
    assert trained_text(segments) == [" Hi.", "<|endoftext|>"]


def test_several_calls_at_once_in_llamas_format() -> None:
    calls = [{"function": {"name": name, "arguments": {"n": n}}} for n, name in enumerate(("a", "b"))]
    talk = read_conversation([{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": calls}])
    assert trained_text(Llama3().render(talk)) == [
        "<|python_tag|>",
        '[{"name": "a", "parameters": {"n": 0}}, {"name": "b", "parameters": {"n": 1}}]',
        "<|eot_id|>",
    ]


def test_builtin_tools_of_llama() -> None:
    """Llama 3.1's prompt format: a known tool is called in code mode, and `<|eom_id|>` waits for its result."""
    family = Llama3(builtin_tools=("brave_search", "code_interpreter"))
    call = {"function": {"name": "brave_search", "arguments": {"query": "the weather"}}}
    talk = read_conversation([{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}])
    segments = family.render(talk)
    assert "Environment: ipython\nTools: brave_search\n\nCutting Knowledge Date: December 2023\n" in text_of(
        segments
    )
    assert trained_text(segments) == [
        "<|python_tag|>",
        'brave_search.call(query="the weather")',
        "<|eom_id|>",
    ]


def test_builtin_tools_are_those_of_the_template(templates: dict[str, Any]) -> None:
    family = Llama3(builtin_tools=("brave_search", "code_interpreter"))
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "x"},
        {
            "role": "assistant",
            "tool_calls": [{"function": {"name": "brave_search", "arguments": {"query": "y"}}}],
        },
        {"role": "ipython", "content": {"found": [1]}},
        {"role": "assistant", "content": "z"},
    ]
    for tools in (None, TOOLS):
        for inside in (True, False):
            expected = templates["llama3"].apply_chat_template(
                messages,
                tools=tools,
                tokenize=False,
                builtin_tools=["brave_search", "code_interpreter"],
                tools_in_user_message=inside,
            )
            found = dataclasses.replace(family, tools_in_user_message=inside)
            assert text_of(found.render(read_conversation(messages, tools))) == expected


@pytest.mark.parametrize("family", [ChatML(), Vicuna()], ids=lambda family: family.name)
def test_formats_without_tools_say_so(family: Family) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    user = {"role": "user", "content": "x"}
    for messages, tools in (
        ([user], TOOLS),
        ([user, call], None),
        ([user, {"role": "tool", "content": "y"}], None),
    ):
        with pytest.raises(ConversationError, match="has no place for"):
            family.render(read_conversation(messages, tools))
