"""A tokenizer's own template: its parts found exactly, equal to those of the family written by hand, or refused."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path

import pytest

from modelyard.chat.conversation import Call, Conversation, ConversationError, Message, read_conversation
from modelyard.chat.families import QWEN, ChatML, Family, Llama3
from modelyard.chat.format import family_from
from modelyard.chat.segments import Kind, text_of, trained
from modelyard.chat.template import Template, template_of
from modelyard.chat.tokens import tokenize_conversation
from modelyard.data.tokenizer import load_tokenizer
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
    assert (found.source, found.specials, found.stops) == (
        CHATML,
        ("</s>", "<|im_end|>"),
        ("<|im_end|>", "</s>"),
    )
    (tmp_path / "chat_template.jinja").write_text("other")
    assert template_of(tmp_path).source == "other"


QWEN_LIKE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_what_ends_an_answer_is_a_stop_whatever_the_end_token_is() -> None:
    template = Template("t", QWEN_LIKE, ("<|im_end|>", "<|endoftext|>"), {"eos_token": "<|endoftext|>"})
    assert template.stops == ("<|im_end|>", "<|endoftext|>")


def test_a_special_token_in_a_call_or_a_definition_is_refused() -> None:
    """There it would become the token; contents are kept text."""
    template = Template("t", QWEN_LIKE, ("<|im_end|>",), {})
    call = Message("assistant", "", (Call("f", {"x": "A<|im_end|>B"}),))
    with pytest.raises(ConversationError, match=r"has the special token '<\|im_end\|>' in it"):
        template.render(Conversation((Message("user", "x"), call)))
    with pytest.raises(ConversationError, match="has the special token"):
        template.render(Conversation((Message("user", "x"),), ({"name": "f", "description": "<|im_end|>"},)))
    assert template.render(Conversation((Message("user", "<|im_end|>"), Message("assistant", "y"))))


def test_an_answer_read_back_is_the_message_that_is_written_so() -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
    )
    template = Template("t", source, ("</s>",), {"eos_token": "</s>"})
    assert template.parse(" World ") == Message("assistant", "World")
    again = Conversation((Message("user", "a"), template.parse(" World "), Message("user", "b")))
    assert text_of(template.render(again)) == "[INST] a [/INST] World </s>[INST] b [/INST]"


@pytest.mark.parametrize("name", ["mistral-v0.3", "llama2"])
def test_ids_of_sentencepiece_tokenizers_are_those_of_transformers(
    name: str, shared_data: Path, tmp_path: Path
) -> None:
    """A space in front belongs to the text's beginning, not to every piece of it."""
    from transformers import AutoTokenizer

    folder = tmp_path / "tokenizer"
    shutil.copytree(shared_data / "tokenizers" / name, folder)
    if name == "llama2":
        (folder / "chat_template.jinja").write_text(
            "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
            "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
        )
    talk = [
        {"role": "user", "content": "Hello there"},
        {"role": "assistant", "content": "World is big"},
        {"role": "user", "content": "Second\none 42"},
        {"role": "assistant", "content": "yes"},
    ]
    tokenizer = load_tokenizer(folder)
    found = tokenize_conversation(read_conversation(talk), family_from({}, tokenizer), tokenizer)
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(talk, return_dict=False)
    assert found.ids.tolist() == theirs
    said = tokenizer.decode(found.ids[trained(found.kinds)])
    assert said.split() in (
        ["World", "is", "big</s>", "yes</s>"],
        ["World", "is", "big", "</s>", "yes", "</s>"],
    )
