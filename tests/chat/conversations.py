"""Conversations that nobody would write, as OpenAI messages: for tests of formats."""

from __future__ import annotations

import random
from typing import Any

WORDS = (
    "hi", "", "  x ", "\n\nfoo", "ünï😀", "<|eot_id|>", "<|im_end|>", "<|im_start|>assistant\n", "a\nb ", '{"a":1}',
    "</tool_call>", "<|python_tag|>", "0.10", "\u2028", "e\u0301", "\t", "<tools>", "ASSISTANT:",
)  # fmt: skip
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Ünï <x> 'quoted' & \"more\"",
            "parameters": {"type": "object", "properties": {"days": {"type": "integer", "default": 1.0}}},
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {}}},
]
ARGUMENTS: tuple[Any, ...] = (
    {}, {"a": 1}, {"a": 1.0, "b": None}, {"x": "<'&\"ü"}, {"deep": [1, {"b": [True, False]}]}, {"1e5": 1e5, "z": 0, "a": 2},
)  # fmt: skip


def text(rng: random.Random) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(0, 3)))


def call(rng: random.Random) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {"name": rng.choice(("weather", "now")), "arguments": rng.choice(ARGUMENTS)},
    }


def conversation(rng: random.Random) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """(messages, tools): any order of roles, calls alone and several at once."""
    messages: list[dict[str, Any]] = []
    if rng.random() < 0.4:
        messages.append({"role": "system", "content": text(rng)})
    for _ in range(rng.randint(1, 6)):
        role = rng.choice(("user", "user", "assistant", "assistant", "tool", "call", "calls", "system"))
        if role == "call":
            content = rng.choice(("", text(rng)))
            messages.append({"role": "assistant", "content": content, "tool_calls": [call(rng)]})
        elif role == "calls":
            calls = [call(rng) for _ in range(rng.randint(2, 3))]
            messages.append({"role": "assistant", "content": "", "tool_calls": calls})
        else:
            messages.append({"role": role, "content": text(rng)})
    return messages, TOOLS if rng.random() < 0.4 else None
