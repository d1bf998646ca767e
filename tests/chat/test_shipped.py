"""Templates for other programs write what our renderer writes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from modelyard.chat.conversation import Conversation, ConversationError, Message, read_conversation
from modelyard.chat.families import FAMILIES, QWEN, ChatML, Family, Llama3, Vicuna
from modelyard.chat.format import family_from
from modelyard.chat.segments import text_of
from modelyard.chat.shipped import chat_template
from modelyard.chat.template import Template
from modelyard.data.tokenizer import load_tokenizer
from tests.chat.conversations import conversation

CHOSEN: dict[str, Family] = {
    "llama3": Llama3(),
    "llama3 with settings": Llama3(date="1 Jan 2026", knowledge_date='"May"', default_system="sail {{ 1 }}"),
    "llama3 with tools in the system turn": Llama3(tools_in_user_message=False),
    "llama3 with built-in tools": Llama3(builtin_tools=("weather", "code_interpreter")),
    "qwen2.5": QWEN,
    "qwen without a sentence": ChatML("qwen2.5", None, hermes=True),
    "chatml": ChatML(),
    "vicuna": Vicuna(),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_the_template_writes_what_the_family_writes(name: str) -> None:
    family, rng, same, refused = CHOSEN[name], random.Random(11), 0, 0
    source = chat_template(family)
    assert source is not None
    template = Template(name, source, (), {})
    for _ in range(600):
        messages, tools = conversation(rng)
        if name == "vicuna" or name == "chatml":
            tools = None
            messages = [m for m in messages if m["role"] in ("user", "assistant") and not m.get("tool_calls")]
            messages = messages or [{"role": "user", "content": "x"}]
        talk, answer = read_conversation(messages, tools), rng.random() < 0.5
        try:
            text = text_of(family.render(talk, answer=answer))
        except ConversationError:
            refused += 1
            continue
        assert template.text(talk.messages, talk.tools, answer=answer) == text
        same += 1
    assert same > (100 if name == "vicuna" else 250)


def test_what_has_no_place_is_refused_there_too() -> None:
    def text(family: Family, conversation: Conversation) -> str:
        source = chat_template(family)
        assert source is not None
        return Template("t", source, (), {}).text(conversation.messages, conversation.tools)

    asked, tool = Message("user", "?"), {"name": "f"}
    with pytest.raises(ConversationError, match="must be the user message"):
        text(Llama3(), Conversation((Message("assistant", "!"),), (tool,)))
    with pytest.raises(ConversationError, match="plain ChatML has no place for tools"):
        text(ChatML(), Conversation((asked,), (tool,)))
    with pytest.raises(ConversationError, match="take turns"):
        text(Vicuna(), Conversation((asked, asked)))


def test_a_tokenizer_s_own_template_needs_none() -> None:
    assert chat_template(Template("t", "", (), {})) is None
    assert all(chat_template(family) for family in FAMILIES.values())


def test_a_tokenizer_s_own_template_says_the_system_message_it_is_given() -> None:
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    family = Template("t", source, ("<|im_end|>",), {}, default_system='be "kind"')
    shipped = chat_template(family)
    assert shipped is not None
    other = Template("t", shipped, ("<|im_end|>",), {})
    for messages in ([Message("user", "x")], [Message("system", "s"), Message("user", "x")]):
        talk = Conversation(tuple(messages))
        assert other.text(talk.messages, answer=True) == text_of(family.render(talk, answer=True))


@pytest.mark.parametrize("name", ["llama3", "qwen2.5", "chatml"])
def test_the_template_is_found_again_as_its_family(
    name: str, chat_tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    """A folder that another program has made of ours, without our file, still means the same format."""
    import shutil

    folder = tmp_path / "tokenizer"
    shutil.copytree(chat_tokenizers[name], folder)
    source = chat_template(FAMILIES[name])
    assert source is not None
    (folder / "chat_template.jinja").write_text(source)
    assert family_from({}, load_tokenizer(folder)) == FAMILIES[name]


def test_transformers_reads_it(chat_tokenizers: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    from transformers import AutoTokenizer

    rng = random.Random(5)
    for name in ("llama3", "qwen2.5"):
        folder = tmp_path / name
        shutil.copytree(chat_tokenizers[name], folder)
        source = chat_template(FAMILIES[name])
        assert source is not None
        (folder / "chat_template.jinja").write_text(source)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        for _ in range(40):
            messages, tools = conversation(rng)
            try:
                text = text_of(FAMILIES[name].render(read_conversation(messages, tools), answer=True))
            except ConversationError:
                continue
            assert (
                tokenizer.apply_chat_template(messages, tools, tokenize=False, add_generation_prompt=True)
                == text
            )
