"""A tokenizer's own template: its parts found exactly, equal to those of the family written by hand, or refused."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest

from modelyard.chat.conversation import ConversationError, read_conversation
from modelyard.chat.families import QWEN, ChatML, Family, Llama3
from modelyard.chat.segments import Kind, text_of
from modelyard.chat.template import Template, template_of
from modelyard.errors import UserError
from tests.chat.conversations import conversation
from tests.chat.test_families import trained_text

FAMILIES: dict[str, Family] = {
    "llama3": Llama3(),
    "qwen2.5": dataclasses.replace(QWEN, default_system="You are a helpful assistant."),
}


@pytest.mark.parametrize("name", list(FAMILIES))
def test_the_parts_are_those_of_the_family(shared_data: Path, name: str) -> None:
    template, family = template_of(shared_data / "tokenizers" / name), FAMILIES[name]
    rng, compared = random.Random(5), 0
    for _ in range(250):
        talk = read_conversation(*conversation(rng))
        try:
            ours, theirs = family.render(talk), template.render(talk)
        except ConversationError:
            continue
        compared += 1
        assert text_of(theirs) == text_of(ours)
        assert "".join(trained_text(theirs)) == "".join(trained_text(ours))
    assert compared > 60


def test_dates_and_stops(shared_data: Path) -> None:
    template = template_of(shared_data / "tokenizers" / "llama3")
    assert "Today Date: 26 Jul 2024" in text_of(
        template.render(read_conversation([{"role": "user", "content": "x"}]))
    )


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIALS = ("<|im_start|>", "<|im_end|>", "</s>")
TALK = read_conversation(
    [
        {"role": "user", "content": "one <|im_end|>"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four\n"},
    ]
)


def made(source: str) -> Template:
    return Template("a tokenizer", source, SPECIALS, {"eos_token": "</s>"})


def test_chatml_written_as_a_template() -> None:
    theirs, ours = made(CHATML).render(TALK), ChatML().render(TALK)
    assert text_of(theirs) == text_of(ours)
    assert trained_text(theirs) == ["two", "<|im_end|>", "four\n", "<|im_end|>"]
    # What a user says holds no special token, although it reads like one.
    assert [s.special for s in theirs if s.text == "one <|im_end|>"] == [False]
    assert theirs[-1].kind == Kind.SEPARATOR


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (CHATML.replace("m.content", "m.content | upper"), "is not written as it is"),
        (CHATML.replace("<|im_end|>", ""), "it ends an answer in no special token"),
        (CHATML.replace("{% endfor %}", "{% if loop.last and m.role == 'assistant' %}!{% endif %}{% endfor %}"),
         "the prompt for message 2 is not the beginning of the text"),
        (CHATML.replace("assistant\n'", "assistant\n<think>'"), "is not the beginning of the text"),
        ("{% for m in messages %}{{ m.content | length }}{{ m.content }}</s>{% endfor %}", "depends on what"),
        ("{{ raise_exception('never') }}", "refuses it: never"),
    ],
    ids=["changed contents", "no end", "other endings", "another prompt", "lengths", "refused"],
)  # fmt: skip
def test_what_cannot_be_found_exactly_is_refused(source: str, reason: str) -> None:
    with pytest.raises(ConversationError, match=reason):
        made(source).render(TALK)


def test_a_template_that_is_no_jinja_is_named() -> None:
    with pytest.raises(UserError, match="the chat template of a tokenizer, line 1: "):
        made("{% for %}").render(TALK)


def test_marks_of_answers_are_read_over() -> None:
    """Templates that are made for training mark what is generated; their text is that of the others."""
    marked = CHATML.replace("m.content", "m.content }}{% generation %}{% endgeneration %}{{ ''")
    assert marked != CHATML
    assert made(marked).render(TALK) == made(CHATML).render(TALK)


def test_where_a_template_is_found(tmp_path: Path) -> None:
    config = {
        "eos_token": {"content": "</s>"},
        "added_tokens_decoder": {"7": {"content": "<|im_end|>", "special": True}},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="has no chat template; name a family"):
        template_of(tmp_path)
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": CHATML}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": named}))
    found = template_of(tmp_path)
    assert (found.source, found.specials, found.stops) == (CHATML, ("</s>", "<|im_end|>"), ("</s>",))
    (tmp_path / "chat_template.jinja").write_text("other")
    assert template_of(tmp_path).source == "other"
