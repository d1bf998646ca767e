"""Records of other people's files, and what is wrong with one."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from modelyard.chat.conversation import Call, ConversationError, Message, as_record
from modelyard.chat.families import QWEN, Llama3
from modelyard.chat.formats import format_of, read_record
from modelyard.chat.segments import text_of

ASK, SAY = Message("user", "x"), Message("assistant", "y")


@pytest.mark.parametrize(
    ("record", "format", "messages"),
    [
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}, "messages", (ASK, SAY)),
        ({"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}, "sharegpt", (ASK, SAY)),
        ({"system": "s", "conversations": [{"from": "user", "value": "x"}]}, "sharegpt", (Message("system", "s"), ASK)),
        ({"instruction": "x", "output": "y"}, "alpaca", (ASK, SAY)),
        ({"instruction": "x", "input": "", "response": "y", "system": ""}, "alpaca", (ASK, SAY)),
        ({"instruction": "a", "input": "b", "output": "y"}, "alpaca", (Message("user", "a\n\nb"), SAY)),
        ({"prompt": "x", "completion": "y"}, "pair", (ASK, SAY)),
        ({"question": "x", "answer": "y"}, "pair", (ASK, SAY)),
        ({"prompt": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}, {"role": "user", "content": "x"}],
          "completion": [{"role": "assistant", "content": "y"}]}, "pair",
         (ASK, Message("assistant", "y", trained=False), ASK, SAY)),
    ],
)  # fmt: skip
def test_each_format_as_it_comes(record: dict[str, Any], format: str, messages: tuple[Message, ...]) -> None:
    assert format_of(record) == format
    assert read_record(record).messages == messages


def test_calls_and_results_of_sharegpt() -> None:
    turns = [
        {"from": "human", "value": "x"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
        {"from": "observation", "value": '{"b": 2}'},
        {
            "from": "function_call",
            "value": '[{"name": "f", "arguments": "{}"}, {"name": "g", "arguments": {}}]',
        },
    ]
    found = read_record({"conversations": turns, "tools": '[{"name": "f"}]'})
    assert found.tools == ({"name": "f"},)
    assert found.messages[1:] == (
        Message("assistant", "", (Call("f", {"a": 1}),)),
        Message("tool", '{"b": 2}'),
        Message("assistant", "", (Call("f", {}), Call("g", {}))),
    )


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (
            {"mesages": []},
            r"its columns \(mesages\) are those of no format of conversations; did you mean 'messages'\?: messages \(messages\)",
        ),
        ({"text": "x"}, "it is a text, no conversation: leave dataset.conversations out"),
        ({"prompt": "x", "chosen": "y", "rejected": "z"}, "it is a preference"),
        ({"conversations": "x"}, "conversations is not a list"),
        ({"conversations": [{"value": "x"}]}, "turn 1 has not both 'from' and 'value'"),
        (
            {"conversations": [{"from": "me", "value": "x"}]},
            "turn 1 is from 'me', who is none of human, user",
        ),
        ({"conversations": [{"from": "function_call", "value": "{"}]}, "turn 1 is a call that is no JSON"),
        (
            {"prompt": "x", "completion": ["y"]},
            "prompt and completion are neither both text nor both messages",
        ),
        ({"instruction": "x", "output": None}, "message 2: content is null, not text"),
    ],
)
def test_what_is_wrong_is_named(record: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConversationError, match=problem):
        read_record(record)


def test_a_format_that_was_asked_for() -> None:
    both = {"messages": [{"role": "user", "content": "x"}], "prompt": "a", "completion": "b"}
    assert read_record(both, "pair").messages[0] == Message("user", "a")
    with pytest.raises(
        ConversationError, match="it has not the columns of the format alpaca: instruction and output or"
    ):
        read_record(both, "alpaca")


@pytest.mark.parametrize(
    ("file", "records"),
    [("tools/glaive_toolcall_en", 238), ("instruct/gpteacher_roleplay", 1556), ("instruct/gsm8k_train", 7473),
     ("instruct/rasbt_instruction", 883)],
)  # fmt: skip
def test_real_files(shared_data: Path, file: str, records: int) -> None:
    """Every record of them is read and can be written in both families that know tools."""
    with gzip.open(shared_data / f"{file}.jsonl.gz", "rt", encoding="utf-8", newline="\n") as lines:
        found = [read_record(json.loads(line)) for line in lines]
    assert len(found) == records
    for talk in found[:: max(1, records // 300)]:
        for family in (Llama3(), QWEN):
            assert family.render(talk)


def test_tools_and_calls_survive_byte_for_byte() -> None:
    """posttraining-peers §4, row 11: no key is added, lost or moved, whatever another tool or call has."""
    tools = [
        {"type": "function", "function": {"name": "b", "parameters": {"type": "object", "properties": {
            "z": {"type": "string", "default": None}, "a": {"enum": [1, 1.0, "é\u2028"]}}, "required": []}}},
        {"type": "function", "strict": True, "function": {"description": "", "name": "a", "parameters": {}}},
    ]  # fmt: skip
    arguments = ['{"z": null, "a": 1.0}', '{"deep": {"y": [], "x": {}}, "n": 12345678901234567890}', "{}"]
    texts = []
    for given, listed in itertools.product(
        (arguments, list(map(json.loads, arguments))), (tools, json.dumps(tools))
    ):
        calls = [{"function": {"name": name, "arguments": one}} for name, one in zip("aba", given)]
        said = [{"role": "assistant", "tool_calls": [call]} for call in calls]
        record = {"messages": [{"role": "user", "content": "x"}, *said], "tools": listed}
        found = read_record(record)
        assert json.dumps(found.tools) == json.dumps(tools)
        texts.append((text_of(QWEN.render(found)), text_of(Llama3().render(found))))
        again = read_record(json.loads(json.dumps(as_record(found))))
        assert json.dumps(as_record(again)) == json.dumps(as_record(found))
    assert len(set(texts)) == 1  # as text or as object
    qwen, llama = texts[0]
    for tool in tools:
        assert f"\n{json.dumps(tool, ensure_ascii=False)}\n" in qwen
        assert f"\n\n{json.dumps(tool, ensure_ascii=False, indent=4)}\n\n" in llama
    for name, one in zip("aba", arguments):
        assert f'{{"name": "{name}", "arguments": {one}}}\n</tool_call>' in qwen
        assert f'{{"name": "{name}", "parameters": {one}}}<|eot_id|>' in llama


def test_what_stands_beside_the_messages_is_taken() -> None:
    tool, asked = {"name": "f"}, {"role": "user", "content": "q"}
    answer = {"role": "assistant", "content": "a"}
    for record in (
        {"system": "be", "prompt": "q", "completion": "a", "tools": [tool]},
        {"system": "be", "messages": [asked, answer], "tools": [tool]},
        {"system": "be", "prompt": [asked], "completion": [answer], "tools": [tool]},
        {"system": "be", "instruction": "q", "output": "a", "tools": [tool]},
    ):
        found = read_record(record)
        assert [(m.role, m.content) for m in found.messages] == [
            ("system", "be"),
            ("user", "q"),
            ("assistant", "a"),
        ]
        assert found.tools == (tool,)
    with pytest.raises(ConversationError, match="'system' beside"):
        read_record({"system": "be", "messages": [{"role": "system", "content": "x"}, asked, answer]})
    with pytest.raises(ConversationError, match="its 'history' has no place"):
        read_record({"instruction": "q", "output": "a", "history": [["x", "y"]]})
    with pytest.raises(ConversationError, match="instruction and input are not both text"):
        read_record({"instruction": None, "input": "x", "output": "a"})


def test_a_call_of_weight_0_is_left_out() -> None:
    turns = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {}}', "weight": 0},
    ]
    assert [message.trained for message in read_record({"conversations": turns}).messages] == [True, False]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"tool_calls": 5}, "tool_calls are 5, not a list"),
        ({"tool_calls": [{"name": "f", "arguments": "x=" + "-" * 1500 + "1"}]}, "arguments of the call of f"),
    ],
)
def test_broken_calls_are_named(message: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConversationError, match=reason):
        read_record({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", **message}]})
