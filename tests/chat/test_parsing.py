"""What a model wrote is read as what it would be written from."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from modelyard.chat.conversation import Call, Conversation, ConversationError, Message, read_conversation
from modelyard.chat.families import FAMILIES, QWEN, ChatML, Family, Llama3, Vicuna
from modelyard.chat.schema import call_problem
from modelyard.chat.segments import Kind, text_of
from modelyard.chat.template import template_of
from tests.chat.conversations import ARGUMENTS, conversation

CODE_MODE = Llama3(builtin_tools=("brave_search", "wolfram_alpha", "code_interpreter"))
USER = Message("user", "x")


def written(message: Message, family: Family) -> str:
    """The answer's text as the model would have to write it, without what ends it."""
    prompt = family.render(Conversation((USER,)), answer=True)
    segments = family.render(Conversation((USER, message)))[len(prompt) :]
    return text_of([s for s in segments if s.kind not in (Kind.TERMINATOR, Kind.SEPARATOR)])


def called(*calls: Call, content: str = "") -> Message:
    return Message("assistant", content, calls)


WEATHER = Call("weather", {"city": "Zürich </tool_call>", "days": 2})


@pytest.mark.parametrize(
    ("family", "message", "text"),
    [
        (QWEN, called(WEATHER), '<tool_call>\n{"name": "weather", "arguments": '
         '{"city": "Zürich </tool_call>", "days": 2}}\n</tool_call>'),
        (QWEN, called(Call("now", {}), content="Wait."), 'Wait.\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'),
        (QWEN, called(Call("now", {}), Call("now", {}), content="a <tool_call> b\n"),
         "a <tool_call> b\n\n" + "\n".join(['<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'] * 2)),
        (QWEN, called(Call("f", "x=g(y=1)")), '<tool_call>\n{"name": "f", "arguments": "x=g(y=1)"}\n</tool_call>'),
        (Llama3(), called(Call("now", {})), '{"name": "now", "parameters": {}}'),
        (Llama3(), called(WEATHER, Call("now", {})), '<|python_tag|>[{"name": "weather", "parameters": '
         '{"city": "Zürich </tool_call>", "days": 2}}, {"name": "now", "parameters": {}}]'),
        (Llama3(), called(Call("f", "x=g(y=[1, 2]), z='()'")), "<|python_tag|>f(x=g(y=[1, 2]), z='()')"),
        (Llama3(), called(Call("f", {}), Call("g", "h()")), '<|python_tag|>[{"name": "f", "parameters": {}}, '
         '{"name": "g", "parameters": "h()"}]'),
        (CODE_MODE, called(Call("brave_search", {"query": 'a "b", c=d'})), '<|python_tag|>brave_search.call(query="a "b", c=d")'),
        (CODE_MODE, called(Call("wolfram_alpha", {"query": "1\n+1", "unit": ""})),
         '<|python_tag|>wolfram_alpha.call(query="1\n+1", unit="")'),
        (CODE_MODE, called(Call("brave_search", {})), "<|python_tag|>brave_search.call()"),
        (CODE_MODE, called(Call("weather", {"n": 1})), '{"name": "weather", "parameters": {"n": 1}}'),
        (Vicuna(), Message("assistant", " two spaces"), "  two spaces"),
        (ChatML(), Message("assistant", "<tool_call>\n{}"), "<tool_call>\n{}"),
    ],
)  # fmt: skip
def test_what_is_written_is_read_again(family: Family, message: Message, text: str) -> None:
    assert written(message, family) == text
    assert family.parse(text) == message


@pytest.mark.parametrize(
    ("family", "text", "calls"),
    [
        # Meta's own forms, which its template does not write.
        (CODE_MODE, "<|python_tag|>import math\nprint(math.pi)", [Call("code_interpreter", {"code": "import math\nprint(math.pi)"})]),
        (CODE_MODE, "<|python_tag|>print(1)", [Call("code_interpreter", {"code": "print(1)"})]),
        (Llama3(), "<|python_tag|>print(math.sqrt(4))", [Call("code_interpreter", {"code": "print(math.sqrt(4))"})]),
        (Llama3(), "<|python_tag|>weather(city='Rome', days=2)", [Call("weather", {"city": "Rome", "days": 2})]),
        (Llama3(), "<|python_tag|>a(x=b()) + c()", [Call("code_interpreter", {"code": "a(x=b()) + c()"})]),
        (Llama3(), "<|python_tag|>x = 1", [Call("code_interpreter", {"code": "x = 1"})]),
        (Llama3(), '<|python_tag|>{"type": "function", "name": "f", "parameters": {"a": 1}}', [Call("f", {"a": 1})]),
        (Llama3(), '\n {"name": "f", "parameters": {"a": 1}} ', [Call("f", {"a": 1})]),
        (Llama3(), '{"name": "f", "arguments": {"a": 1}}', [Call("f", {"a": 1})]),
        (Llama3(), '<|python_tag|>brave_search.call(query="x")', [Call("brave_search", {"query": "x"})]),
        # As OpenAI's interface has arguments: as text.
        (QWEN, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>\n', [Call("f", {"a": 1})]),
    ],
)  # fmt: skip
def test_other_forms_of_calls(family: Family, text: str, calls: list[Call]) -> None:
    assert family.parse(text) == called(*calls)


ONE = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


@pytest.mark.parametrize(
    "text",
    [
        "", "hello", ONE[:-1], ONE[: ONE.index("}}")], "<tool_call>", "<tool_call>\n</tool_call>", ONE + " and more",
        ONE.replace('"name"', '"tool"'), ONE.replace('{"a": 1}', "[1]"), ONE.replace('"f"', "7"), ONE.replace('{"a": 1}', '"a"'),
        ONE + "\n<tool_call>\n{", "<tool_call>" + "[" * 100_000, ONE.replace("1", "9" * 5000),
        '{"name": "f", "parameters": {"a": 1}', 'Sure: {"name": "f", "parameters": {}}', '{"name": "f"}', '{"a": 1}', "[1, 2]",
        '{"name": "f", "parameters": {}, "why": "x"}', '{"name": "f", "parameters": null}',
        '{"type": "thought", "name": "f", "parameters": {}}', "<|python_tag|>", "[" * 100_000, "null",
    ],
)  # fmt: skip
def test_what_is_malformed_or_cut_off_is_text(text: str) -> None:
    for family in (QWEN, Llama3(), CODE_MODE, ChatML()):
        assert family.parse(text) == Message("assistant", text), family.name


def test_a_list_that_is_cut_off_is_code() -> None:
    """Everything after `<|python_tag|>` is for the interpreter."""
    text = '[{"name": "f", "parameters": {}}, {"name'
    assert Llama3().parse(f"<|python_tag|>{text}") == called(Call("code_interpreter", {"code": text}))


def test_parse_is_the_inverse_of_render_for_conversations_that_nobody_would_write() -> None:
    rng, read = random.Random(7), dict.fromkeys(FAMILIES, 0)
    for _ in range(1500):
        messages, tools = conversation(rng)
        for message in read_conversation(messages, tools).messages:
            for name, family in FAMILIES.items():
                if message.role != "assistant":
                    continue
                try:
                    text = written(message, family)
                except ConversationError:
                    continue
                if name == "llama3" and text.startswith("<|python_tag|>") and not message.calls:
                    continue  # said as text, which only its tokens tell from the token
                wanted = message.content.strip() if name == "llama3" else message.content
                assert family.parse(text) == Message("assistant", wanted, message.calls), (name, text)
                read[name] += 1
    assert min(read.values()) > 1000


def test_arguments_keep_their_order_and_kind() -> None:
    for arguments in ARGUMENTS:
        for family in (QWEN, Llama3()):
            (call,) = family.parse(written(called(Call("f", arguments)), family)).calls
            assert json.dumps(call.arguments) == json.dumps(arguments)


HERMES_TEMPLATE = """\
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>
{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.mark.parametrize(
    ("template", "reads"),
    [
        (HERMES_TEMPLATE, "hermes"),
        (HERMES_TEMPLATE.replace("<tool_call>\n", "").replace("\n</tool_call>", "").replace("arguments\"", "parameters\""),
         "llama"),
        (HERMES_TEMPLATE.replace("m.tool_calls or []", "[]"), "neither"),
        ("{% if true %}{{ raise_exception('no') }}{% endif %}", "neither"),
    ],
)  # fmt: skip
def test_a_template_reads_the_calls_that_it_writes(tmp_path: Path, template: str, reads: str) -> None:
    config: dict[str, Any] = {"eos_token": "<|im_end|>", "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    family = template_of(tmp_path)
    answers = {"hermes": ONE, "llama": '{"name": "f", "parameters": {"a": 1}}', "plain": "neither"}
    for kind, text in answers.items():
        calls = (Call("f", {"a": 1}),) if kind == reads else ()
        assert family.parse(text) == (called(*calls) if calls else Message("assistant", text))


@pytest.mark.parametrize("name", ["llama3", "qwen2.5"])
def test_shipped_templates_read_as_their_families(name: str, shared_data: Path) -> None:
    template = template_of(shared_data / "tokenizers" / name)
    for arguments in ARGUMENTS:
        text = written(called(Call("weather", arguments)), FAMILIES[name])
        assert template.parse(text) == called(Call("weather", arguments))


HOSTILE = (
    '{"name": "f", "parameters": {"x": 1e999}}',
    '{"name": "f", "parameters": {"x": NaN}}',
    "<|python_tag|>f(x=" + "-" * 1500 + "1)",
    "<|python_tag|>f(x=0x" + "f" * 4000 + ")",
    "<|python_tag|>f(x=g()" + ".a" * 1500 + ")",
    '<tool_call>\n{"name": "f", "arguments": {"x": -Infinity}}\n</tool_call>',
    "[" * 100_000,
)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_nothing_that_a_model_writes_is_an_error(text: str) -> None:
    """And what is made of it can be written as JSON."""
    for family in (*FAMILIES.values(), Llama3(builtin_tools=("code_interpreter",))):
        message = family.parse(text)
        for call in message.calls:
            json.dumps(call.arguments, allow_nan=False)
            call_problem(call, [{"name": "f", "parameters": {"properties": {"x": {"multipleOf": 0.01}}}}])
