"""Files of tool calls → OpenAI messages, and what became of them; the real sets."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from modelyard.chat.conversation import (
    Call,
    Conversation,
    Message,
    as_record,
)
from modelyard.chat.expression import has_calls, read_arguments
from modelyard.chat.families import QWEN, Llama3
from modelyard.chat.formats import Reading, read_record
from modelyard.chat.segments import text_of
from modelyard.chat.tool_data.convert import (
    Counts,
    convert_file,
    distinct_tools,
    kind_of,
    read_file,
    with_tools,
)
from modelyard.errors import UserError
from tests.chat.tool_data.records import EXPRESSION, SEAL
from tests.conftest import ROOT


def test_kinds() -> None:
    user, tool = Message("user", "x"), Message("tool", "y")
    call = Message("assistant", "", (Call("f", {}),))
    two = Message("assistant", "", (Call("f", {}), Call("f", {})))
    nested = Message("assistant", "", (Call("f", "x=g()"),))
    assert kind_of(Conversation((user, Message("assistant", "y")))) == "no call"
    assert kind_of(Conversation((user, call, tool, user, call))) == "single"
    assert kind_of(Conversation((user, call, tool, user, two))) == "parallel"
    assert kind_of(Conversation((user, two, tool, tool, call))) == "multi-step"
    assert kind_of(Conversation((user, call, tool, call, user, nested))) == "nested"


def test_questions_that_need_no_tool_although_there_are_some() -> None:
    tools = [{"name": name} for name in "abcdef"]
    talks = [Conversation((Message("user", str(n)), Message("assistant", "y"))) for n in range(40)]
    found = list(with_tools(talks, tools, seed=1))
    assert [one.messages for one in found] == [one.messages for one in talks]
    assert {len(one.tools) for one in found} == {1, 2, 3}
    assert len(distinct_tools(found)) == 6
    assert list(with_tools(talks[:7], tools, seed=1)) == found[:7]
    assert list(with_tools(talks, tools, seed=2)) != found
    assert next(with_tools([found[0]], tools[:1])) == found[0]  # it has tools of its own


def test_a_file_and_what_became_of_it(tmp_path: Path) -> None:
    wrong = json.loads(json.dumps(SEAL))
    wrong["calling"][2]["parameters"] = {"zone": 1}
    path = tmp_path / "seal.json"
    path.write_text(json.dumps([SEAL, SEAL | {"calling": []}, wrong, {"text": "x"}]))
    counts = Counts()
    found = list(convert_file(path, counts=counts, valid_only=True))
    assert found == [as_record(read_record(SEAL))]
    assert (counts.records, counts.conversations, counts.calls, counts.valid, counts.left_out) == (
        4,
        2,
        6,
        5,
        1,
    )
    assert counts.kinds == {"multi-step": 2}
    assert counts.problems == {"unknown argument": 1}
    assert counts.refused["it calls nothing"] == 1
    assert counts.refused.total() == 2
    path.write_text(json.dumps(SEAL) + "\n\nx\n")
    with pytest.raises(UserError, match="line 3: no JSON"):
        list(convert_file(path))
    path.write_text("3\n")
    with pytest.raises(UserError, match="line 1: b'3' is no JSON object"):
        list(convert_file(path))


def test_the_example_program(tmp_path: Path) -> None:
    path, output = tmp_path / "seal.jsonl", tmp_path / "out.jsonl"
    path.write_text(json.dumps(SEAL) + "\n" + json.dumps(SEAL | {"calling": []}) + "\n")
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "2 + 2?", "answer": "4"}\n' * 3)
    command = [sys.executable, ROOT / "examples/tools/convert.py"]
    options = ["--nested", "expression", "--questions", questions]
    settings: dict[str, Any] = {"capture_output": True, "text": True, "check": False}
    settings["env"] = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, path, output, *options], **settings)
    assert done.returncode == 0, done.stderr
    first, second = map(json.loads, output.read_text().splitlines())
    assert first == as_record(read_record(SEAL, None, EXPRESSION))
    assert second["messages"][1] == {"role": "assistant", "content": "4"}
    assert second["tools"]
    assert "  that fit their definitions     100.00%\n" in done.stdout
    assert "refused     1  it calls nothing\n" in done.stdout
    assert done.stdout.endswith(f"{output}: 2 conversations, 1 of them questions answered without tools\n")
    done = subprocess.run([*command, tmp_path / "nope", output], **settings)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


REAL = {
    # conversations, refused, calls, of them fitting; with nested calls as turns
    "api_bank_dialogues": (171, 1, 313, 0),
    "bfcl_v4_irrelevance": (191, 0, 0, 0),
    "bfcl_v4_live_parallel": (11, 0, 29, 29),
    "bfcl_v4_live_parallel_multiple": (18, 0, 40, 39),
    "bfcl_v4_live_simple": (206, 0, 206, 205),
    "bfcl_v4_multi_turn_base": (159, 0, 890, 889),
    "bfcl_v4_multi_turn_miss_param": (164, 0, 929, 928),
    "bfcl_v4_multiple": (159, 0, 159, 159),
    "bfcl_v4_parallel": (161, 0, 441, 441),
    "bfcl_v4_parallel_multiple": (164, 0, 492, 489),
    "bfcl_v4_simple_python": (332, 0, 332, 332),
    "glaive_toolcall_en": (238, 0, 168, 167),
    "nestful": (237, 16, 630, 523),
    "seal_tools": (1095, 0, 2826, 2720),
    "sgd_dialogues": (560, 0, 1613, 1613),
    "toolalpaca_eval_simulated": (60, 9, 75, 73),
}


def real(
    shared_data: Path, name: str, nested: Any = "turns", counts: Counts | None = None
) -> list[Conversation]:
    folder = shared_data / "tools"
    files = {"nestful": "nestful_spec.json.gz", "bfcl_v4_multi": "bfcl_v4_multi_turn_func_doc.json"}
    own = next((folder / file for prefix, file in files.items() if name.startswith(prefix)), None)
    return list(read_file(folder / f"{name}.jsonl.gz", None, Reading(nested, own), counts))


@pytest.mark.parametrize("name", REAL)
def test_all_of_the_real_sets(shared_data: Path, name: str) -> None:
    counts = Counts()
    found = real(shared_data, name, counts=counts)
    assert (counts.conversations, counts.refused.total(), counts.calls, counts.valid) == REAL[name]
    for one in found:
        assert one.messages[-1].role == "assistant"
        assert one.tools or not any(message.calls for message in one.messages)
        QWEN.render(one)


def test_nested_calls_of_the_real_sets_as_expressions(shared_data: Path) -> None:
    """As turns and as an expression the same calls are made, and every expression is read again."""
    for name, expected in (("seal_tools", 43), ("nestful", 179), ("toolalpaca_eval_simulated", 8)):
        nested = 0
        for turns, one in zip(real(shared_data, name), real(shared_data, name, "expression"), strict=True):
            texts = [c for m in one.messages for c in m.calls if isinstance(c.arguments, str)]
            nested += bool(texts)
            assert all(has_calls(read_arguments(str(call.arguments))) for call in texts)
            calls = [call for message in turns.messages for call in message.calls]
            if texts:
                written = json.dumps([[c.name, c.arguments] for m in one.messages for c in m.calls])
                assert sum(
                    written.count(f"{name}(") + written.count(f'["{name}"')
                    for name in {c.name for c in calls}
                ) >= len(calls)
        assert nested == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_the_text_is_that_of_the_shipped_templates(shared_data: Path, name: str) -> None:
    from transformers import AutoTokenizer

    families = {
        "llama3": Llama3(),
        "qwen2.5": dataclasses.replace(QWEN, default_system="You are a helpful assistant."),
    }
    compared = 0
    for short, family in families.items():
        template = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / short)
        for one in real(shared_data, name, "expression"):
            record = as_record(one)
            messages = [
                {key: value for key, value in m.items() if key != "weight"} for m in record["messages"]
            ]
            calls = [m.calls for m in one.messages if m.calls]
            if short == "llama3":
                if any(len(several) > 1 for several in calls):
                    continue  # its template refuses several calls at once
                if any(isinstance(call.arguments, str) for several in calls for call in several):
                    continue  # and has no place for an expression
                if any(m.calls and m.content.strip() for m in one.messages):
                    continue  # and drops text beside a call
            else:
                # Its template writes Python's spelling of a result that is not text.
                messages = [
                    m | {"content": json.dumps(m["content"], ensure_ascii=False)}
                    if m["role"] == "tool" and not isinstance(m["content"], str) else m
                    for m in messages
                ]  # fmt: skip
            expected = template.apply_chat_template(messages, tools=record.get("tools"), tokenize=False)
            assert text_of(family.render(one)) == expected
            compared += 1
    assert compared >= REAL[name][0]
