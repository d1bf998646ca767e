"""Conversations to answers: the tokens that training had, and an end where the model ends."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modelyard.chat.conversation import Conversation, ConversationError, Message, read_conversation
from modelyard.chat.families import QWEN, ChatML, Family, Llama3, Vicuna
from modelyard.chat.format import chat_family
from modelyard.chat.segments import trained
from modelyard.chat.tokens import tokenize_conversation
from modelyard.data.tokenizer import load_tokenizer
from modelyard.errors import UserError
from modelyard.generate.chat import ChatModel
from modelyard.generate.sample import SamplingOptions
from modelyard.model.formats import load_decoder, open_huggingface
from tests.chat.conversations import conversation
from tests.generate.chat_models import says, write_model
from tests.model.families import ours, reference_model

GREEDY = SamplingOptions(max_new_tokens=30, temperature=0)
HELLO = Conversation((Message("user", "hello"),))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def load(folder: Path, family: Family) -> ChatModel:
    opened = open_huggingface(folder)
    decoder = load_decoder(opened.weights, opened.architecture, where=folder)
    return ChatModel(decoder, load_tokenizer(folder), family)


@pytest.mark.parametrize("family", [Llama3(), QWEN, ChatML()], ids=lambda family: family.name)
def test_before_every_answer_it_reads_what_training_had_there(folder: Path, family: Family) -> None:
    model, rng, compared = load(folder, family), random.Random(5), 0
    special = range(256, 256 + 10)
    for _ in range(300):
        messages, tools = conversation(rng)
        talk = read_conversation(messages, tools)
        try:
            whole = tokenize_conversation(talk, family, model.tokenizer)
        except ConversationError:
            continue
        for number, message in enumerate(talk.messages):
            before = Conversation(talk.messages[:number], talk.tools)
            if message.role != "assistant" or number == 0:
                continue
            prompt = model.prompt_ids(before)
            assert prompt == whole.ids[: len(prompt)].tolist()
            assert trained(whole.kinds)[len(prompt)]
            assert prompt.count(256) == (family.name == "llama3")  # begin-of-sequence
            compared += 1
        # What people say has no special tokens, whatever it says.
        wanted = [model.tokenizer.backend.token_to_id(s.text) for s in family.render(talk) if s.special]
        assert [i for i in whole.ids.tolist() if i in special] == [i for i in wanted if i in special]
    assert compared > 40


@pytest.mark.parametrize("name", ["llama3", pytest.param("qwen2.5", marks=pytest.mark.slow)])
def test_prompts_are_those_of_the_shipped_template(name: str, shared_data: Path) -> None:
    """Against transformers: the same ids, where nothing in the text is a special token's name."""
    folder = shared_data / "tokenizers" / name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Wie heißt der Ort? 😀"},
        {"role": "assistant", "content": "", "tool_calls": [
            {"type": "function", "function": {"name": "place", "arguments": {"near": [1.5, None], "deep": {"ü": True}}}}]},
        {"role": "tool", "content": '{"name": "Ulm"}'},
        {"role": "assistant", "content": "Ulm."},
        {"role": "user", "content": "Und 2024?"},
    ]  # fmt: skip
    tools = [{"type": "function", "function": {"name": "place", "parameters": {"type": "object"}}}]
    expected = tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=True, return_dict=False
    )
    family, own = chat_family(folder), load_tokenizer(folder)
    found = tokenize_conversation(read_conversation(messages, tools), family, own, answer=True)
    assert found.ids.tolist() == expected


def test_real_weights_answer_as_in_transformers(shared_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(shared_data / "weights" / "stories260K" / "hf", folder)
    talk = Conversation((Message("system", "Once upon a time"), Message("user", "there was a boat")))
    model = load(folder, Vicuna(end="</s>"))
    free = model.answer(talk, GREEDY)
    stop = free.token_ids[12]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [stop]}))
    model = load(folder, Vicuna(end="</s>"))
    assert model.stop_ids == {stop, 2}
    answer = model.answer(talk, GREEDY)
    reference = AutoModelForCausalLM.from_pretrained(folder)
    prompt = torch.tensor([model.prompt_ids(talk)])
    expected = reference.generate(prompt, max_new_tokens=30, do_sample=False, eos_token_id=[stop, 2])[0]
    assert answer.token_ids == expected[prompt.shape[1] :].tolist()
    assert (answer.stopped, answer.token_ids[-1], len(answer.token_ids) <= 13) == (True, stop, True)
    assert not free.stopped
    assert len(free.token_ids) == 30
    # The text is that of the tokens, but for the one that ended it.
    whole = AutoTokenizer.from_pretrained(folder).decode([*prompt[0].tolist(), *answer.token_ids[:-1]])
    assert whole.endswith(answer.text)
    assert answer.message == Message("assistant", answer.text.removeprefix(" "))


@pytest.mark.parametrize(
    ("family", "written", "text", "stopped"),
    [
        (Llama3(), "Fine.<|eot_id|>never", "Fine.", True),
        (Llama3(), "<|python_tag|>print(1)<|eom_id|>", "<|python_tag|>print(1)", True),
        (Llama3(), "Fine.<|end_of_text|>", "Fine.", True),
        (Llama3(), "Fine.<|im_end|> 😀", "Fine.<|im_end|> 😀", False),
        (QWEN, "Fine.<|im_end|>never", "Fine.", True),
        (QWEN, "Fine.<|endoftext|>never", "Fine.", True),
        # What ends a text of the model ends its answers too: the tokenizer's end of text here.
        (QWEN, "Fine.<|end_of_text|>never", "Fine.", True),
        (QWEN, "<|im_end|>", "", True),
    ],
)  # fmt: skip
def test_what_ends_an_answer(
    folder: Path, monkeypatch: pytest.MonkeyPatch, family: Family, written: str, text: str, stopped: bool
) -> None:
    says(monkeypatch, folder, written, written)
    model = load(folder, family)
    answer = model.answer(HELLO, GREEDY)
    assert (answer.text, answer.stopped) == (text, stopped)
    assert model.tokenizer.decode(answer.token_ids) == written.removesuffix("never")
    pieces = list(model.stream(HELLO, GREEDY))
    assert model.finish(pieces) == answer
    assert not any("\ufffd" in piece.text for piece in pieces)


def test_calls_are_read_from_what_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, folder, 'Wait.\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call><|im_end|>')
    answer = load(folder, QWEN).answer(HELLO, SamplingOptions(max_new_tokens=100))
    assert answer.message.content == "Wait."
    assert [(call.name, call.arguments) for call in answer.message.calls] == [("now", {})]


def test_a_conversation_that_is_too_long_is_refused_and_an_answer_ends_with_the_last_position(
    folder: Path,
) -> None:
    model = load(folder, ChatML())
    assert model.model.architecture.max_position_embeddings == 256
    frame = len(model.prompt_ids(Conversation((Message("user", ""),))))
    for length in (256 - frame, 300):
        too_long = Conversation((Message("user", "x" * length),))
        tokens = frame + length
        with pytest.raises(
            UserError,
            match=f"^the conversation has {tokens} tokens, and the model was made for 256, answer included$",
        ):
            model.answer(too_long, GREEDY)
    last = model.answer(Conversation((Message("user", "x" * (256 - frame - 2)),)), GREEDY)
    assert len(last.token_ids) == 2


def test_a_tokenizer_of_another_model(folder: Path) -> None:
    with pytest.raises(UserError, match="has 268 tokens, the model 97: it is another's"):
        ChatModel(ours(reference_model("llama-2")), load_tokenizer(folder), QWEN)
