"""Conversations in stores: every record as its chat format writes it, what each token is beside it, and what comes of bad ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from modelyard.chat.conversation import read_conversation
from modelyard.chat.families import FAMILIES, QWEN, Llama3
from modelyard.chat.format import chat_family
from modelyard.chat.shipped import chat_template
from modelyard.chat.tokens import tokenize_conversation
from modelyard.config.prepare import PrepareConfig
from modelyard.data.prepare import prepare
from modelyard.data.store import TokenStore
from modelyard.data.tokenizer import load_tokenizer
from modelyard.errors import UserError

WriteJsonl = Callable[..., Path]

USER = {"role": "user", "content": "how wide?"}
ANSWER = {"role": "assistant", "content": "42 times"}
TALK = [USER, ANSWER]


def make(
    tmp_path: Path,
    source: Path,
    tokenizer: Path,
    *,
    said: list[str] | None = None,
    workers: int = 1,
    **options: Any,
) -> TokenStore:
    document = {
        "output_path": str(tmp_path / "out"),
        "dataset": {"path": str(source), "conversations": options, **options.pop("dataset", {})},
        "tokenizer": {"path": str(tokenizer)},
        "tokenize_workers": workers,
    }
    lines = said if said is not None else []
    prepare(PrepareConfig.model_validate(document), report=lines.append, terminal=False)
    store = TokenStore(tmp_path / "out" / "data")
    assert store.verify() == []
    return store


@pytest.mark.parametrize("name", ["llama3", "qwen2.5", "chatml", "vicuna"])
def test_each_record_is_what_its_format_writes(
    name: str, chat_tokenizers: dict[str, Path], write_jsonl: WriteJsonl, tmp_path: Path
) -> None:
    talks = [[{"role": "user", "content": f"{i} " * i}, ANSWER] * (1 + i % 3) for i in range(1, 40)]
    source = write_jsonl([{"messages": talk} for talk in talks])
    said: list[str] = []
    store = make(tmp_path, source, chat_tokenizers[name], family=name, said=said)
    tokenizer = load_tokenizer(chat_tokenizers[name])
    assert store.num_documents == len(talks)
    answers = 0
    for number, talk in enumerate(talks):
        expected = tokenize_conversation(read_conversation(talk), FAMILIES[name], tokenizer)
        assert store.document(number).tolist() == expected.ids.tolist()
        assert store.lane("kind", number).tolist() == expected.kinds.tolist()
        answers += len(talk) // 2
    assert f"{answers:,} answers are trained on" in said[-2]
    # What they were written in goes along with the tokenizer.
    assert chat_family(store.path / "tokenizer") == FAMILIES[name]
    assert store.manifest["chat"]["family"] == name
    assert (store.path / "tokenizer" / "chat_template.jinja").read_text() == chat_template(FAMILIES[name])


def test_the_workers_change_nothing(
    chat_tokenizers: dict[str, Path], write_jsonl: WriteJsonl, tmp_path: Path, small_parts: None
) -> None:
    source = write_jsonl([{"messages": [{"role": "user", "content": str(i)}, ANSWER]} for i in range(200)])
    sums = []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        make(folder, source, chat_tokenizers["llama3"], workers=workers)
        files = sorted(path for path in folder.rglob("*.bin"))
        sums.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in files])
    assert sums[0] == sums[1]


def test_a_word_on_which_format_was_found(
    chat_tokenizers: dict[str, Path], write_jsonl: WriteJsonl, tmp_path: Path
) -> None:
    said: list[str] = []
    make(tmp_path, write_jsonl([{"messages": TALK}]), chat_tokenizers["qwen2.5"], said=said)
    assert said[0] == (
        "note: conversations are written in the format qwen2.5 (dataset.conversations.family: auto)"
    )
    with pytest.raises(UserError, match=r"conversations: .* has no chat template.*family: llama3 \| qwen2.5"):
        make(tmp_path / "2", write_jsonl([{"messages": TALK}]), chat_tokenizers["vicuna"])
    with pytest.raises(
        UserError, match=r"has no token '<\|start_header_id\|>', which the chat format llama3"
    ):
        make(tmp_path / "3", write_jsonl([{"messages": TALK}]), chat_tokenizers["qwen2.5"], family="llama3")


def test_settings_of_the_format_reach_the_text(
    chat_tokenizers: dict[str, Path], write_jsonl: WriteJsonl, tmp_path: Path
) -> None:
    source = write_jsonl([{"messages": TALK}])
    settings = {"date": "1 Jan 2026", "knowledge_date": "May 1789", "system": "sail"}
    store = make(tmp_path, source, chat_tokenizers["llama3"], **settings)
    text = load_tokenizer(chat_tokenizers["llama3"]).decode(store.document(0))
    assert "Cutting Knowledge Date: May 1789\nToday Date: 1 Jan 2026\n\nsail<|eot_id|>" in text
    assert chat_family(store.path / "tokenizer") == Llama3(
        date="1 Jan 2026", knowledge_date="May 1789", default_system="sail"
    )
    store = make(tmp_path / "qwen", source, chat_tokenizers["qwen2.5"], system="sail")
    text = load_tokenizer(chat_tokenizers["qwen2.5"]).decode(store.document(0))
    assert text.startswith("<|im_start|>system\nsail<|im_end|>\n")
    with pytest.raises(UserError, match=r"the chat format qwen2.5 has no knowledge_date"):
        make(tmp_path / "no", source, chat_tokenizers["qwen2.5"], knowledge_date="May 1789")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"dataset": {"field": "text", "conversations": {}}},
            "field: for texts; the records are conversations",
        ),
        (
            {"dataset": {"conversations": {"family": "chatml", "date": "x"}}},
            "date: the format chatml has none",
        ),
        (
            {"dataset": {"conversations": {"family": "vicuna", "builtin_tools": []}}},
            "only with family llama3",
        ),
        (
            {"tokenizer": {"path": "t", "add_bos": True}, "dataset": {"conversations": {}}},
            "tokenizer.add_bos: the",
        ),
    ],
)
def test_keys_that_do_not_go_together(options: dict[str, Any], reason: str) -> None:
    document: dict[str, Any] = {"output_path": "o", "tokenizer": {"path": "t"}, **options}
    document["dataset"] = {"path": "p", **document["dataset"]}
    with pytest.raises(ValidationError, match=reason):
        PrepareConfig.model_validate(document)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"messages": [USER, {"role": "assistent", "content": "x"}]}, "message 2: role is 'assistent'"),
    ({"messages": [USER]}, "no token of it is trained on"),
    ({"messages": [USER, {**ANSWER, "weight": 0}]}, "no token of it is trained on"),
    ({"text": "plain"}, "it is a text, no conversation: leave dataset.conversations out"),
    ({"messages": []}, "there are no messages"),
]


@pytest.mark.parametrize(("record", "reason"), BAD, ids=["role", "no answer", "weight 0", "text", "empty"])
def test_a_record_that_cannot_be_used_is_named(
    record: dict[str, Any],
    reason: str,
    chat_tokenizers: dict[str, Path],
    write_jsonl: WriteJsonl,
    tmp_path: Path,
) -> None:
    records = [{"messages": TALK}] * 5 + [record] + [{"messages": TALK}] * 3 + [record]
    source = write_jsonl(records)
    with pytest.raises(UserError, match=rf"texts.jsonl: record 6: {reason}.*nor can these after it: the 4\."):
        make(tmp_path, source, chat_tokenizers["llama3"])
    assert not (tmp_path / "out").exists()
    said: list[str] = []
    store = make(tmp_path, source, chat_tokenizers["llama3"], unusable="drop", said=said)
    assert store.num_documents == 8
    assert any("2 conversations left out that cannot be used" in line for line in said)


def test_unknown_formats_and_columns_by_other_names(
    chat_tokenizers: dict[str, Path], write_jsonl: WriteJsonl, tmp_path: Path
) -> None:
    source = write_jsonl([{"chat": TALK, "messages": "something else", "id": 7}])
    with pytest.raises(
        UserError, match=r"there is no 'mesages'; there are auto, messages.* did you mean 'messages'"
    ):
        make(tmp_path, source, chat_tokenizers["llama3"], format="mesages")
    with pytest.raises(UserError, match=r"record 1: no field 'chatt'; .* did you mean 'chat'"):
        make(tmp_path, source, chat_tokenizers["llama3"], columns={"messages": "chatt"})
    store = make(
        tmp_path,
        source,
        chat_tokenizers["llama3"],
        columns={"messages": "chat"},
        dataset={"conversations": {"columns": {"messages": "chat"}}, "columns": ["id"]},
    )
    assert store.num_documents == 1
    assert pq.read_table(store.path / "columns.parquet").to_pylist() == [{"id": "7"}]


TOOLS = [
    {"type": "function", "function": {"name": "a", "parameters": {"properties": {"x": {"type": "string"}}}}},
    {"type": "function", "function": {"name": "b", "parameters": {"properties": {"y": {"enum": [None, 1]}}}}},
]
CALLING = [
    USER,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "b", "arguments": '{"y": null}'}}],
    },
    {"role": "tool", "content": "one"},
    ANSWER,
]


def test_tables_that_have_filled_in_keys_are_refused_and_json_text_is_not(
    chat_tokenizers: dict[str, Path], write_jsonl: WriteJsonl, tmp_path: Path
) -> None:
    lines = make(tmp_path, write_jsonl([{"messages": CALLING, "tools": TOOLS}]), chat_tokenizers["qwen2.5"])
    table = pa.table({"messages": [CALLING], "tools": [TOOLS]})
    pq.write_table(table, tmp_path / "filled.parquet")
    with pytest.raises(UserError, match="column 'tools' is a structure, where the table has given"):
        make(tmp_path / "2", tmp_path / "filled.parquet", chat_tokenizers["qwen2.5"])
    # A message here has the keys of all messages, with nulls: those are no part of it.
    pq.write_table(pa.table({"messages": [CALLING], "tools": [json.dumps(TOOLS)]}), tmp_path / "text.parquet")
    table = make(tmp_path / "3", tmp_path / "text.parquet", chat_tokenizers["qwen2.5"])
    assert np.array_equal(table.document(0), lines.document(0))
    assert '"y": {"enum": [null, 1]}' in load_tokenizer(chat_tokenizers["qwen2.5"]).decode(lines.document(0))


def test_arguments_as_structures_are_refused(chat_tokenizers: dict[str, Path], tmp_path: Path) -> None:
    calls = [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "b", "arguments": {"y": 1}}}]}]
    pq.write_table(pa.table({"messages": [calls]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="column 'messages' holds arguments as a structure"):
        make(tmp_path, tmp_path / "x.parquet", chat_tokenizers["qwen2.5"])


def test_a_model_trained_here_is_prepared_for_in_its_own_format(
    chat_tokenizers: dict[str, Path], write_jsonl: WriteJsonl, tmp_path: Path
) -> None:
    source = write_jsonl([{"messages": TALK}])
    first = make(tmp_path, source, chat_tokenizers["qwen2.5"], system="sail")
    again = make(tmp_path / "again", source, first.path / "tokenizer")
    assert np.array_equal(first.document(0), again.document(0))
    assert chat_family(again.path / "tokenizer") == chat_family(first.path / "tokenizer")
    assert chat_family(first.path / "tokenizer") != QWEN


def test_pitfalls_of_chats_written_as_texts_with_spans_are_counted(
    chat_tokenizers: dict[str, Path], write_jsonl: WriteJsonl, tmp_path: Path
) -> None:
    head = "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
    call = "<|python_tag|>f()<|eom_id|>"
    texts = [
        ("<|begin_of_text|><|begin_of_text|>" + head + "yes<|eot_id|>", [[0, 33 + len(head)]]),  # twice
        (head + "yes<|eot_id|>" + head, [[0, len(head) - 1], [len(head) + 13, 2 * len(head) + 12]]),
        (head + call + "yes<|eot_id|>", [[0, len(head) + len(call) - 1]]),
        ("<|begin_of_text|>" + head + call + "yes<|eot_id|>", [[0, 16 + len(head)]]),  # nothing is wrong
    ]
    source = write_jsonl([{"text": text, "spans": spans} for text, spans in texts])
    said: list[str] = []
    document = {
        "output_path": str(tmp_path / "out"),
        "dataset": {"path": str(source), "loss_masking_spans": "spans"},
        "tokenizer": {"path": str(chat_tokenizers["llama3"]), "add_eos": False},
    }
    prepare(PrepareConfig.model_validate(document), report=said.append, terminal=False)
    assert (
        "1 texts begin with the begin token twice; 1 texts whose end is masked (a conversation that ends on a user's turn?); "
        "1 texts with tool calls that are masked, though other turns are trained on"
    ) in said


def test_silent_answers_and_calls_that_do_not_fit_are_counted(
    chat_tokenizers: dict[str, Path], write_jsonl: WriteJsonl, tmp_path: Path
) -> None:
    def talk(name: str) -> dict[str, Any]:
        call = {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": {}}}]}
        return {"messages": [USER, call, {"role": "tool", "content": "x"}, ANSWER], "tools": TOOLS}

    records = [talk("a"), talk("a"), talk("aa"), {"messages": [USER, {"role": "assistant", "content": ""}]}]
    said: list[str] = []
    make(tmp_path, write_jsonl(records), chat_tokenizers["qwen2.5"], said=said)
    assert (
        "1 answers that say nothing (their end alone is trained on); 1 of 3 calls do not fit the definitions of their tools"
        in said
    )


def test_tags_of_calls_are_text_for_other_programs(chat_tokenizers: dict[str, Path]) -> None:
    """As in Qwen's tokenizer: transformers leaves special tokens out of what it shows, and finds them in what users write."""
    added = json.loads((chat_tokenizers["qwen2.5"] / "tokenizer.json").read_text())["added_tokens"]
    assert [token["content"] for token in added if not token["special"]] == ["<tool_call>", "</tool_call>"]
