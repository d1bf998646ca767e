"""Small models that know the tokens of chat formats, and answers that are said for them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from modelyard.data.tokenizer import load_tokenizer
from modelyard.generate import chat
from tests.model.families import reference_model

SPECIAL = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>",
    "<|python_tag|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>",
)  # fmt: skip
PLAIN = ("<tool_call>", "</tool_call>")
"""Added tokens that are none of the special ones, as Qwen 2.5 has them."""
VOCABULARY = 256 + len(SPECIAL) + len(PLAIN)


def write_tokenizer(folder: Path, *, eos: str = "<|end_of_text|>") -> None:
    """A tokenizer with a token for each byte and those of the chat formats."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    backend.add_tokens([AddedToken(token) for token in PLAIN])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos).save_pretrained(folder)


def write_model(folder: Path, *, chat: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A random model with that tokenizer, as transformers saves it; `chat` is what training wrote down of its format."""
    reference_model(
        "smollm2-tied", vocab_size=VOCABULARY, bos_token_id=256, eos_token_id=257, **changes
    ).save_pretrained(folder)
    write_tokenizer(folder)
    if chat is not None:
        (folder / "modelyard_chat.json").write_text(json.dumps(chat))
    return folder


def says(monkeypatch: pytest.MonkeyPatch, folder: Path, *answers: str) -> list[str]:
    """Have every model answer these, one after the other; what it reads each time is added to the list that is returned."""
    tokenizer, left, read = load_tokenizer(folder), list(answers), list[str]()

    def generate(_: Any, prompt: Sequence[int], options: Any, *, stop_ids: Any) -> Iterator[int]:
        read.append(tokenizer.decode(prompt))
        for token in tokenizer.encode(left.pop(0), parse_special=True)[: options.max_new_tokens]:
            yield token
            if token in stop_ids:
                return

    monkeypatch.setattr(chat, "generate", generate)
    return read


def interrupts_after(monkeypatch: pytest.MonkeyPatch, count: int, then: Callable[[], None]) -> None:
    """Do `then` in place of the token after `count` of them."""
    generate = chat.generate

    def interrupted(*arguments: Any, **options: Any) -> Iterator[int]:
        for number, token in enumerate(generate(*arguments, **options)):
            if number == count:
                then()
            yield token

    monkeypatch.setattr(chat, "generate", interrupted)
