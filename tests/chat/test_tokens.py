"""Tokens of conversations: cut segment by segment, each with its kind, special tokens only where the format has them."""

from __future__ import annotations

import random
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelyard.chat.conversation import ConversationError, read_conversation
from modelyard.chat.families import QWEN, Family, Llama3, Vicuna
from modelyard.chat.format import family_from
from modelyard.chat.segments import Kind, Segment, kind_of, lane_value, role_of, trained
from modelyard.chat.tokens import tokenize_conversation, tokenize_segments, untrained_reason
from modelyard.data.tokenizer import Tokenizer, load_tokenizer
from tests.chat.conversations import conversation

FAMILIES: dict[str, Family] = {"llama3": Llama3(), "qwen2.5": QWEN}


@pytest.fixture(scope="module", params=list(FAMILIES))
def chosen(request: pytest.FixtureRequest, shared_data: Path) -> tuple[Family, Tokenizer]:
    return FAMILIES[request.param], load_tokenizer(shared_data / "tokenizers" / request.param)


def test_a_byte_says_kind_role_and_whether_it_is_left_out() -> None:
    values = {
        lane_value(Segment("", kind, role, trained=t))
        for kind in Kind
        for role in ("user", None)
        for t in (True, False)
    }
    assert len(values) == len(Kind) * 4
    value = lane_value(Segment("", Kind.TOOL_CALL, "assistant", trained=False))
    assert (kind_of(value), role_of(value)) == (Kind.TOOL_CALL, "assistant")
    assert role_of(lane_value(Segment("", Kind.BEGIN))) is None


def test_golden_ids(shared_data: Path) -> None:
    """Llama 3's ids of an exchange, as its reference implementation prints them (begin, header, user, header, two newlines)."""
    tokenizer = load_tokenizer(shared_data / "tokenizers" / "llama3")
    talk = read_conversation([{"role": "system", "content": ""}, {"role": "user", "content": "hello"}])
    found = tokenize_conversation(talk, Llama3(), tokenizer, answer=True)
    tail = [128006, 882, 128007, 271, 15339, 128009, 128006, 78191, 128007, 271]
    assert found.ids[0] == 128000
    assert found.ids[-len(tail) :].tolist() == tail
    assert list(found.ids).count(128000) == 1


def test_no_content_can_end_its_message(chosen: tuple[Family, Tokenizer]) -> None:
    """Strings of special tokens in what people say are text: ids of special tokens stand where the format has them."""
    family, tokenizer = chosen
    rng = random.Random(3)
    specials = {
        token_id for token_id, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special
    }
    read = 0
    for _ in range(200):
        messages, tools = conversation(rng)
        try:
            segments = family.render(read_conversation(messages, tools))
        except ConversationError:
            continue
        found = tokenize_segments(segments, tokenizer)
        read += 1
        assert len(found.ids) == len(found.kinds)
        wanted = [tokenizer.backend.token_to_id(s.text) for s in segments if s.special]
        assert [i for i in found.ids if i in specials] == [i for i in wanted if i in specials]
        # Put together again it is the text.
        text = "".join(s.text for s in segments)
        assert tokenizer.decode(found.ids) in (text, unicodedata.normalize("NFC", text))
    assert read > 80


def test_a_prompt_is_a_beginning_whatever_the_answer_begins_with(chosen: tuple[Family, Tokenizer]) -> None:
    family, tokenizer = chosen
    for answer in ("\n\nyes", " yes", "1", "😀", "\t", "'s", "<|im_end|>"):
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
        prompt = tokenize_conversation(read_conversation(messages[:1]), family, tokenizer, answer=True)
        whole = tokenize_conversation(read_conversation(messages), family, tokenizer)
        assert np.array_equal(whole.ids[: len(prompt.ids)], prompt.ids)
        assert not trained(whole.kinds)[: len(prompt.ids)].any()
        assert trained(whole.kinds)[len(prompt.ids)]


SENTINELS = [
    {"role": "system", "content": "alpha"},
    {"role": "user", "content": "bravo"},
    {"role": "assistant", "content": "charlie"},
    {"role": "user", "content": "delta"},
    {"role": "assistant", "tool_calls": [{"function": {"name": "echo", "arguments": {"x": "foxtrot"}}}]},
    {"role": "tool", "content": "golf"},
    {"role": "assistant", "content": "hotel", "weight": 0},
    {"role": "user", "content": "india"},
    {"role": "assistant", "content": "juliett"},
]  # fmt: skip


def test_trained_text_is_what_the_assistant_said(chosen: tuple[Family, Tokenizer]) -> None:
    family, tokenizer = chosen
    found = tokenize_conversation(read_conversation(SENTINELS), family, tokenizer)
    text = tokenizer.decode(found.ids[trained(found.kinds)])
    assert [word for word in ("charlie", "echo", "foxtrot", "juliett") if word not in text] == []
    assert [
        w for w in ("alpha", "bravo", "delta", "golf", "hotel", "india", "assistant", "user") if w in text
    ] == []
    # Three answers, each with the token that ends it.
    ends = trained(found.kinds) & ((found.kinds & 7) == Kind.TERMINATOR)
    assert ends.sum() == 3
    assert untrained_reason(found) is None


def test_what_is_no_use_is_named(chosen: tuple[Family, Tokenizer]) -> None:
    family, tokenizer = chosen

    def reason(messages: Any) -> str | None:
        return untrained_reason(tokenize_conversation(read_conversation(messages), family, tokenizer))

    user = {"role": "user", "content": "x"}
    assert "no token of it is trained on" in (reason([user]) or "")
    assert "no token of it is trained on" in (
        reason([user, {"role": "assistant", "content": "y", "weight": 0}]) or ""
    )
    segments = [
        s
        for s in family.render(read_conversation(SENTINELS))
        if s.kind != Kind.TERMINATOR or s.role != "assistant"
    ]
    assert "does not end in a token that ends it" in (
        untrained_reason(tokenize_segments(segments, tokenizer)) or ""
    )


def test_a_vocabulary_without_the_formats_tokens_is_refused(shared_data: Path) -> None:
    tokenizer = load_tokenizer(shared_data / "tokenizers" / "gpt2")
    talk = read_conversation(SENTINELS[1:3])
    with pytest.raises(
        ConversationError, match=r"has no token '<\|begin_of_text\|>', which this chat format is made of"
    ):
        tokenize_conversation(talk, Llama3(), tokenizer)
    found = tokenize_conversation(talk, Vicuna(), tokenizer)
    assert tokenizer.decode(found.ids[trained(found.kinds)]) == " charlie<|endoftext|>"


@pytest.mark.parametrize("name", list(FAMILIES))
def test_ids_are_those_of_the_whole_text(name: str, shared_data: Path) -> None:
    """Cutting at the edges of segments changes nothing, whatever stands there: text beside calls, calls and results side by
    side, white space at the beginning of what somebody says."""
    from transformers import AutoTokenizer

    folder = shared_data / "tokenizers" / name
    tokenizer, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    tools = [{"type": "function", "function": {"name": "w", "parameters": {}}}]
    one: dict[str, Any] = {"type": "function", "function": {"name": "w", "arguments": {"a": 1}}}
    result = {"role": "tool", "content": "r"}
    talks: list[list[dict[str, Any]]] = [
        [
            {"role": "user", "content": text},
            {"role": "assistant", "content": "yes. "},
            {"role": "user", "content": text},
        ]
        for text in ("\nfoo", "  foo", "foo\n\n", "1", "\n", "'s")
    ]
    talks.append(
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [one]}, result]
    )
    if name == "qwen2.5":
        talks += [
            [
                {"role": "user", "content": "x"},
                {"role": "assistant", "content": text, "tool_calls": calls},
                result,
                result,
            ]
            for text, calls in (("Let me look.", [one]), ("", [one, one]), ("a\n", [one, one]))
        ]
    family = family_from({}, tokenizer)
    for talk in talks:
        expected = theirs.apply_chat_template(talk, tools=tools, return_dict=False)
        assert (
            tokenize_conversation(read_conversation(talk, tools), family, tokenizer).ids.tolist() == expected
        ), talk
