"""Ids by way of pieces are the tokenizer's own ids, on any text, with any tokenizer that is taken; others are left alone."""

from __future__ import annotations

import gzip
import json
import pickle
import random
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import regex
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from modelyard.data import pieces as module
from modelyard.data.pieces import LLAMA_3, QWEN_2, Pieces
from modelyard.data.tokenizer import load_tokenizer

from .conftest import sentence

ALPHABET = (
    "  \t\n\r aabbSsTtRrEeVvMmLlDd''’019½²Ⅷ.,!?-_#<|>ſßKéÅİıñ中文字かな한글éê🚢👩‍🔬\u00a0\u2003\u3000\u200b\u0085\u2028\u2029\x0b\x0c\x00"
    "\u0378\U0001faa8\U00032000אبд३"
)


def texts(count: int, seed: int = 0) -> list[str]:
    source = random.Random(seed)
    made = ["".join(source.choices(ALPHABET, k=source.randrange(0, 60))) for _ in range(count)]
    return [
        *made,
        *(sentence(i) for i in range(50)),
        "",
        " ",
        "\n\n  \n",
        "   a",
        "I'LL we'Ve can'T x'ſ",
        "a" * 500,
    ]


def trained(cut: pre_tokenizers.PreTokenizer, normalizer=None) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = cut
    if normalizer is not None:
        backend.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    backend.train_from_iterator(texts(300, seed=1), trainer)
    backend.encode_special_tokens = True
    return backend


def split(expression: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(expression), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def own_ids(backend: Tokenizer, given: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in backend.encode_batch(given, add_special_tokens=False)]


def made(backend: Tokenizer) -> Pieces | None:
    return Pieces.of(backend, lambda given: backend.encode_batch_fast(list(given), add_special_tokens=False))


BACKENDS = {
    "llama 3": lambda: trained(split(LLAMA_3)),
    "qwen 2": lambda: trained(split(QWEN_2), normalizers.NFC()),
    "gpt 2": lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=False)),
}


@pytest.mark.parametrize("name", BACKENDS)
def test_same_ids_as_the_tokenizer(name, monkeypatch):
    backend = BACKENDS[name]()
    monkeypatch.setattr(module, "MOST_PIECES", 700)  # so that some pieces are not kept
    fast = made(backend)
    assert fast is not None
    for seed in range(3):
        given = texts(800, seed)
        found = fast.encode(given)
        assert all(ids.dtype == np.uint32 for ids in found)
        assert [ids.tolist() for ids in found] == own_ids(backend, given)
    assert len(fast._ids) == 700


def test_every_character_that_is_taken_is_cut_alike():
    """The two programs need not follow the same version of Unicode."""
    backend = BACKENDS["llama 3"]()
    fast = made(backend)
    source = random.Random(5)
    characters = [chr(code) for code in range(0x80, 0x1200) if not 0xD800 <= code < 0xE000]
    given = [
        f"a{c}{d}'{c}1 {d}{c}\n{c} b" for c, d in zip(characters, source.sample(characters, len(characters)))
    ]
    assert [ids.tolist() for ids in fast.encode(given)] == own_ids(backend, given)
    assert len(fast._same) > 3500
    unassigned = {c for c in characters if unicodedata.category(c) == "Cn"}
    assert unassigned <= fast._other


def test_texts_with_added_strings_go_through_the_tokenizer():
    backend = BACKENDS["llama 3"]()
    backend.add_tokens([AddedToken("ship sails", special=False, normalized=False)])
    backend.add_special_tokens(["<|turn|>"])
    given = ["the ship sails over", "ship  sails", "<|turn|> is text here <|end|>"]
    found = [ids.tolist() for ids in made(backend).encode(given)]
    assert found == own_ids(backend, given)
    added = backend.token_to_id("ship sails")
    assert [added in ids for ids in found] == [True, False, False]
    assert backend.token_to_id("<|turn|>") not in found[2]


def test_composed_and_decomposed_letters():
    backend = BACKENDS["qwen 2"]()
    given = ["café", "cafe\u0301", "A\u030a \u212b"]
    found = [ids.tolist() for ids in made(backend).encode(given)]
    assert found == own_ids(backend, given)
    assert found[0] == found[1]


def test_a_character_that_is_cut_otherwise_is_left_to_the_tokenizer(monkeypatch):
    backend = BACKENDS["llama 3"]()
    ours = SimpleNamespace(compile=lambda expression: regex.compile("t|" + expression))
    monkeypatch.setattr(module, "regex", ours)
    fast = made(backend)
    given = ["times over", "the wide sea"]
    assert [ids.tolist() for ids in fast.encode(given)] == own_ids(backend, given)
    assert fast._other == {"t"}
    fast._same.add("t")
    assert [ids.tolist() for ids in fast.encode(given)] != own_ids(backend, given)  # what the check prevents


@pytest.mark.parametrize(
    "other",
    [
        lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda: trained(split(LLAMA_3.replace("1,3", "1,2"))),
        lambda: trained(split(LLAMA_3), normalizers.NFKC()),
        lambda: trained(pre_tokenizers.Whitespace()),
        lambda: Tokenizer(models.BPE()),
    ],
)
def test_other_tokenizers_are_left_alone(other):
    assert made(other()) is None


@pytest.mark.parametrize("name", ["llama3", "qwen2.5", "gpt2", "gpt-neox-20b"])
def test_real_tokenizers_on_real_texts(shared_data: Path, name: str):
    tokenizer = load_tokenizer(shared_data / "tokenizers" / name)
    given = texts(100)
    for file in ("udhr_langid", "wikipedia_sample"):
        with gzip.open(shared_data / "text" / f"{file}.jsonl.gz", "rt", encoding="utf-8") as lines:
            given += [json.loads(line)["text"][:2000] for _, line in zip(range(60), lines)]
    assert tokenizer.pieces is not None
    expected = [encoding.ids for encoding in tokenizer.encode_batch(given)]
    assert [ids.tolist() for ids in tokenizer.encode_ids(given)] == expected
    if name == "llama3":
        again = pickle.loads(pickle.dumps(tokenizer))
        assert [ids.tolist() for ids in again.encode_ids(given[:150])] == expected[:150]


def test_sentencepiece_goes_the_slow_way(shared_data: Path):
    pytest.importorskip("sentencepiece")
    tokenizer = load_tokenizer(shared_data / "tokenizers" / "llama2")
    assert tokenizer.pieces is None
    assert tokenizer.encode_ids(["a ship"])[0].tolist() == tokenizer.encode("a ship")
