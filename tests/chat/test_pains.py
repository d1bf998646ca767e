"""The ways in which fine-tuning goes wrong elsewhere without a word, each closed: docs/fine-tuning.md has the table of them.

Tests are numbered as there. What another file shows better stands in the table alone.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modelyard.chat.conversation import Conversation, ConversationError, Message, read_conversation
from modelyard.chat.families import FAMILIES, QWEN, Family, Llama3
from modelyard.chat.format import family_from
from modelyard.chat.formats import read_record
from modelyard.chat.segments import Kind, Segment, kind_of, role_of, text_of, trained
from modelyard.chat.template import Template
from modelyard.chat.tokens import tokenize_conversation, tokenize_segments, untrained_reason
from modelyard.config.batch import BatchConfig
from modelyard.config.data import MemmapDataset, SamplingConfig
from modelyard.config.prepare import PrepareConfig
from modelyard.data.prepare import prepare
from modelyard.data.store import TokenStore
from modelyard.data.stream import DataStream
from modelyard.data.tokenizer import Tokenizer, load_tokenizer
from modelyard.errors import UserError
from modelyard.loss.cross_entropy import linear_cross_entropy
from tests.chat.conversations import conversation

TOOL: dict[str, Any] = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"mark": "CALL"}}}
TOOL_TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "SYSTEM"},
    {"role": "user", "content": "USER one"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "RESULT"},
    {"role": "assistant", "content": "ANSWER one"},
    {"role": "user", "content": "USER two"},
    {"role": "assistant", "content": "ANSWER two"},
]
BOTH: dict[str, Family] = {"llama3": Llama3(), "qwen2.5": QWEN}


@pytest.fixture(params=BOTH)
def chosen(request: pytest.FixtureRequest, chat_tokenizers: dict[str, Path]) -> tuple[Family, Tokenizer]:
    return BOTH[request.param], load_tokenizer(chat_tokenizers[request.param])


def prepared(folder: Path, records: list[Any], tokenizer: Path, **options: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    document = {
        "output_path": str(folder / "out"),
        "dataset": {"path": str(folder / "records.jsonl"), "conversations": options},
        "tokenizer": {"path": str(tokenizer)},
        "tokenize_workers": 1,
    }
    prepare(PrepareConfig.model_validate(document), report=lambda line: None, terminal=False)
    return folder / "out" / "data"


def opened(store: Path, **options: Any) -> DataStream:
    batch = BatchConfig(
        **{"batch_size": 4, "sequence_length": 256, "cross_document_attention": False} | options
    )
    dataset = MemmapDataset(type="memmap", path=store)
    return DataStream(dataset, name="talks", sampling=SamplingConfig(), batch=batch, vocab_size=290)


# 1 --- the mask is lost between stages


def test_01_the_mask_survives_from_the_record_to_the_batch(
    chosen: tuple[Family, Tokenizer], tmp_path: Path
) -> None:
    """The trained tokens of every conversation, as the renderer has them and as batches have them: the same, each once."""
    family, tokenizer = chosen
    rng = random.Random(1)
    records, expected = [], Counter[tuple[int, ...]]()
    while len(records) < 60:
        messages, tools = conversation(rng)
        try:
            found = tokenize_conversation(read_conversation(messages, tools), family, tokenizer)
        except ConversationError:
            continue
        if untrained_reason(found) or len(found.ids) > 1500:
            continue
        records.append({"messages": messages, "tools": tools})
        expected[tuple(found.ids[trained(found.kinds)].tolist())] += 1
    stream = opened(prepared(tmp_path, records, tokenizer.folder), sequence_length=1600)
    seen = Counter[tuple[int, ...]]()
    for batch in stream.one_pass():
        for labels, edges in zip(batch.labels.tolist(), batch.cu_seqlens.tolist()):
            for begin, end in pairwise(edges):
                if answer := tuple(label for label in labels[begin:end] if label != -100):
                    seen[answer] += 1
    assert seen == expected


# 2 --- the token that ends an answer is not trained on


def test_02_every_trained_answer_ends_in_a_trained_terminator() -> None:
    rng = random.Random(2)
    for family in FAMILIES.values():
        for _ in range(100):
            messages, tools = conversation(rng)
            try:
                segments = family.render(read_conversation(messages, tools))
            except ConversationError:
                continue
            for before, segment in pairwise(segments):
                if before.role == "assistant" and before.kind in (Kind.CONTENT, Kind.TOOL_CALL):
                    assert segment.role == "assistant"
                    assert segment.kind in (Kind.CONTENT, Kind.TOOL_CALL, Kind.TERMINATOR)


def test_02_a_format_that_does_not_end_its_answers_is_refused(chat_tokenizers: dict[str, Path]) -> None:
    endless = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    talk = read_conversation(TOOL_TALK[1:2] + TOOL_TALK[4:5])
    with pytest.raises(ConversationError, match="the model would never stop"):
        Template("endless", endless, ("<|im_end|>",), {}).render(talk)
    tokenizer = load_tokenizer(chat_tokenizers["chatml"])
    left_off = [Segment("assistant: ", Kind.HEADER, "assistant"), Segment("yes", Kind.CONTENT, "assistant")]
    assert untrained_reason(tokenize_segments(left_off, tokenizer)) == (
        "an answer that is trained on does not end in a token that ends it"
    )


# 3 --- what tools say is trained on


@pytest.mark.parametrize("name", BOTH)
def test_03_what_is_trained_on_is_what_the_assistant_said(
    name: str, chat_tokenizers: dict[str, Path]
) -> None:
    tokenizer = load_tokenizer(chat_tokenizers[name])
    found = tokenize_conversation(read_conversation(TOOL_TALK, [TOOL]), BOTH[name], tokenizer)
    text = tokenizer.decode(found.ids[trained(found.kinds)])
    assert all(mark in text for mark in ("CALL", "ANSWER one", "ANSWER two"))
    assert not any(mark in text for mark in ("SYSTEM", "USER", "RESULT", "ipython", "tool_response"))


# 4 --- the prompt's tokens are not the beginning of the conversation's


@pytest.mark.parametrize("content", ["\nx", " x", "\n\n", "7", "😀", "e\u0301", "\u200b", "", "'s", "\t}"])
def test_04_the_prompt_is_the_beginning_whatever_the_answer_begins_with(
    content: str, chosen: tuple[Family, Tokenizer]
) -> None:
    family, tokenizer = chosen
    asked = read_conversation([{"role": "user", "content": content}])
    prompt = tokenize_conversation(asked, family, tokenizer, answer=True)
    whole = tokenize_conversation(
        Conversation((*asked.messages, Message("assistant", content))), family, tokenizer
    )
    assert whole.ids[: len(prompt.ids)].tolist() == prompt.ids.tolist()
    assert not trained(whole.kinds)[: len(prompt.ids)].any()


# 5 --- two begin tokens, or another prompt in use than in training


def test_05_one_begin_token_for_llama_and_none_for_qwen(
    chat_tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    records = [{"messages": TOOL_TALK[1:2] + TOOL_TALK[4:5]}] * 3
    for name, begins in (("llama3", 1), ("qwen2.5", 0)):
        store = TokenStore(prepared(tmp_path / name, records, chat_tokenizers[name]))
        for number in range(3):
            ids = store.document(number).tolist()
            assert ids.count(0) == begins
            assert (ids[0] == 0) == bool(begins)
            assert 1 not in ids  # nor does a document's end follow the conversation's


# 6 --- tests/model/test_decoder.py: packed documents are computed as if alone, no gradient crosses, in every backend


def test_06_no_batch_of_conversations_is_without_boundaries(
    chat_tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    records = [{"messages": TOOL_TALK[1:2] + TOOL_TALK[4:5]}] * 12
    stream = opened(prepared(tmp_path, records, chat_tokenizers["llama3"]))
    length = len(TokenStore(stream.datasets[0].store.path).document(0))  # type: ignore[attr-defined]
    batch = stream.batch(0)
    starts = list(range(0, 256, length))[: 257 // length]
    filled = len(starts) * length
    edges = [*starts, *([filled] if filled < 256 else []), 256]
    assert batch.cu_seqlens[0].tolist() == edges
    assert batch.positions[0, :length].tolist() == list(range(length))
    assert batch.positions[0, length] == 0


# 7 --- the first token of a document is predicted from the one before


def test_07_the_first_token_of_a_document_is_no_target() -> None:
    from modelyard.data.layout import lay_out
    from tests.data.in_memory import InMemory

    dataset = InMemory([np.array([1, 2, 3]), np.array([4, 5])])
    pieces = [(0, 0, 3), (1, 0, 2)]
    row: Any = (dataset, pieces)
    layout = lay_out([row], sequence_length=4, vocab_size=9, isolate=True, mask=False)
    # shifted: position p has token p + 1 as its label
    assert layout.labels.tolist() == [[2, 3, -100, 5]]
    assert layout.positions.tolist() == [[0, 1, 2, 0]]


# 8 --- tests/train/test_fine_tuning.py: one batch of 8 = eight of 1 = two processes


# 9 --- conversations are cut without a word


def test_09_nothing_is_cut_and_what_is_too_long_is_named(
    chat_tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    long = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "sea " * 300}]
    store = prepared(
        tmp_path,
        [{"messages": TOOL_TALK[1:2] + TOOL_TALK[4:5]}, {"messages": long}],
        chat_tokenizers["llama3"],
    )
    with pytest.raises(
        UserError, match=r"1 of 2 documents are longer than a row .*: document 1 of .*drop \| split"
    ):
        opened(store)
    for options in ({"overlong": "drop"}, {"overlong": "split"}, {"sequence_length": 2000}):
        rows = opened(store, **options)
        ends = [label for batch in rows.one_pass() for label in batch.labels.flatten().tolist() if label == 4]
        assert len(ends) == (
            1 if options.get("overlong") == "drop" else 2
        )  # every answer that is read has its end


# 10 --- examples without anything to train on


def test_10_a_batch_without_targets_has_no_loss_and_no_gradient() -> None:
    hidden = torch.randn(6, 8, requires_grad=True)
    weight = torch.randn(20, 8, requires_grad=True)
    for implementation in ("fused", "torch"):
        loss = linear_cross_entropy(hidden, weight, torch.full((6,), -100), implementation=implementation)
        assert loss.item() == 0.0
        gradients = torch.autograd.grad(loss, (hidden, weight))
        assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)


def test_10_a_conversation_without_anything_to_train_on_is_refused(
    chat_tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    record = {"messages": [TOOL_TALK[1], {**TOOL_TALK[4], "weight": 0}]}
    with pytest.raises(UserError, match=r"records.jsonl: record 2: no token of it is trained on"):
        prepared(tmp_path, [{"messages": TOOL_TALK[1:2] + TOOL_TALK[4:5]}, record], chat_tokenizers["llama3"])


# 11 --- nulls in tools and arguments


@pytest.mark.parametrize("name", BOTH)
def test_11_tools_and_arguments_are_written_as_they_came(name: str) -> None:
    tools = [
        {
            "type": "function",
            "function": {"name": "weather", "parameters": {"properties": {"b": {}, "a": {}}}},
        },
        {
            "type": "function",
            "function": {"name": "now", "strict": True, "parameters": {"properties": {"z": {}}}},
        },
    ]
    arguments = {"z": None, "a": 1.0, "m": {"k": [True, "ü"]}}
    texts = []
    for given in (arguments, json.dumps(arguments)):
        call = {"function": {"name": "now", "arguments": given}}
        talk = [TOOL_TALK[1], {"role": "assistant", "content": None, "tool_calls": [call]}]
        texts.append(text_of(BOTH[name].render(read_record({"messages": talk, "tools": tools}))))
    assert texts[0] == texts[1]
    indent = 4 if name == "llama3" else None
    for tool in tools:
        assert json.dumps(tool, indent=indent) in texts[0]
    assert json.dumps(arguments, ensure_ascii=False) in texts[0]


# 14, 15 --- what is exported is not what was trained: tests/train/test_fine_tuning.py and tests/chat/test_shipped.py


# 16 --- keys with a typing error


def test_16_a_misspelt_key_is_named_with_the_nearest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from modelyard.cli import main

    (tmp_path / "p.yaml").write_text(
        "output_path: o\ndataset:\n  path: d.jsonl\n  conversations:\n    famly: llama3\ntokenizer: {path: t}\n"
    )
    assert main(["prepare", str(tmp_path / "p.yaml")]) == 2
    said = capsys.readouterr().err
    assert "p.yaml:5" in said
    assert "did you mean 'family'" in said


# 18 --- a changed template, and data prepared with the old one


def test_18_another_template_is_another_preparation(chat_tokenizers: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    from modelyard.chat.shipped import chat_template

    folder = tmp_path / "tokenizer"
    shutil.copytree(chat_tokenizers["chatml"], folder)
    for number, system in enumerate(("one", "two")):
        source = chat_template(replace(FAMILIES["chatml"], default_system=system))  # type: ignore[type-var]
        assert source is not None
        (folder / "chat_template.jinja").write_text(source)
        if number:
            with pytest.raises(UserError, match=r"made from something else .*tokenizer.chat_template.jinja"):
                prepared(tmp_path, [{"messages": TOOL_TALK[1:2] + TOOL_TALK[4:5]}], folder)
            break
        store = prepared(tmp_path, [{"messages": TOOL_TALK[1:2] + TOOL_TALK[4:5]}], folder)
        assert "<|im_start|>system\none<|im_end|>" in load_tokenizer(folder).decode(
            TokenStore(store).document(0)
        )


# 19 --- the date of the day in the data


def test_19_no_format_reads_the_clock(
    chat_tokenizers: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    monkeypatch.setattr(time, "time", lambda: pytest.fail("the clock was read"))
    talk = read_conversation(TOOL_TALK[1:2])
    assert "Today Date: 26 Jul 2024" in text_of(Llama3().render(talk))
    clock = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    assert text_of(Template("t", clock, (), {}).render(talk)).startswith("26 Jul 2024")
    folder = chat_tokenizers["llama3"]
    dated = family_from({"family": "llama3", "date": "24 Dec 2030"}, load_tokenizer(folder))
    assert "Today Date: 24 Dec 2030" in text_of(dated.render(talk))


# 22 --- special tokens in what people write


@pytest.mark.parametrize("name", BOTH)
def test_22_what_people_write_makes_no_special_token(name: str, chat_tokenizers: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(chat_tokenizers[name])
    specials = [
        token.content for token in tokenizer.backend.get_added_tokens_decoder().values() if token.special
    ]
    plain = [{"role": role, "content": "x"} for role in ("system", "user", "assistant", "user")]
    attack = [{**message, "content": "".join(specials)} for message in plain]

    def special_ids(messages: list[dict[str, str]]) -> list[tuple[int, Kind, str | None]]:
        found = tokenize_conversation(read_conversation(messages), BOTH[name], tokenizer)
        known = {tokenizer.backend.token_to_id(token) for token in specials}
        return [
            (number, kind_of(value), role_of(value))
            for number, value in zip(found.ids.tolist(), found.kinds.tolist(), strict=True)
            if number in known
        ]

    assert special_ids(attack) == special_ids(plain)
