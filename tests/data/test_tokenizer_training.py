"""A trained tokenizer is lossless, repeatable, and one that transformers loads."""

from __future__ import annotations

import resource

import pytest

from modelyard.config.prepare import PrepareConfig
from modelyard.data.tokenizer import load_tokenizer
from modelyard.data.tokenizer_training import run_tokenizer_train, train_tokenizer
from modelyard.errors import UserError

from .conftest import sentence

TEXTS = [sentence(i) for i in range(100)]


def test_ids_are_special_tokens_bytes_merges(tokenizer_folder):
    vocabulary = load_tokenizer(tokenizer_folder).backend.get_vocab()
    assert vocabulary["<|begin_of_text|>"] == 0
    assert vocabulary["<|end_of_text|>"] == 1
    by_id = sorted(vocabulary, key=vocabulary.get)
    assert all(len(token) == 1 for token in by_id[2:258])
    assert all(len(token) > 1 for token in by_id[258:])
    assert "Ġs" in by_id


def test_transformers_loads_it_and_agrees(tokenizer_folder):
    from transformers import AutoTokenizer

    reference, ours = AutoTokenizer.from_pretrained(tokenizer_folder), load_tokenizer(tokenizer_folder)
    assert (reference.bos_token_id, reference.eos_token_id, len(reference)) == (0, 1, 300)
    for text in ["the naïve ship 🚢 42424\n\n  x\ttabs", "\x00\x7f", "<|end_of_text|>"]:
        assert reference(text, add_special_tokens=False, split_special_tokens=True)[
            "input_ids"
        ] == ours.encode(text)
        assert ours.decode(ours.encode(text)) == text
        assert reference.decode(ours.encode(text)) == text
    assert reference("the sea")["input_ids"] == [0, *ours.encode("the sea")]


def test_repeatable(tmp_path):
    for name in ("a", "b"):
        train_tokenizer(iter(TEXTS), tmp_path / name, vocab_size=330)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_digits_go_in_threes_and_words_do_not_merge_over_spaces(tmp_path):
    train_tokenizer(["12345678 a b a b a b"] * 50, tmp_path, vocab_size=400)
    tokens = load_tokenizer(tmp_path).encode_batch(["12345678 a b"], offsets=True)[0].tokens
    assert tokens == ["123", "456", "78", "Ġa", "Ġb"]


def test_problems_are_one_line(tmp_path, tokenizer_folder):
    with pytest.raises(UserError, match="vocab_size 257 is below 258"):
        train_tokenizer(TEXTS, tmp_path, vocab_size=257)
    with pytest.raises(UserError, match="no text"):
        train_tokenizer([], tmp_path, vocab_size=300)
    with pytest.raises(UserError, match="already"):
        train_tokenizer(TEXTS, tokenizer_folder, vocab_size=300)
    assert list(tmp_path.iterdir()) == []


def test_verb_reads_the_configs_source(tmp_path, write_jsonl, capsys):
    config = PrepareConfig.model_validate(
        {
            "output_path": "unused",
            "dataset": {"path": str(write_jsonl([{"body": text} for text in TEXTS])), "field": "body"},
            "tokenizer": {"path": str(tmp_path / "made")},
        }
    )
    assert run_tokenizer_train(config, vocab_size=100_000) == 0
    tokenizer = load_tokenizer(tmp_path / "made")
    printed = capsys.readouterr().out
    assert f"the texts gave {tokenizer.vocab_size:,} tokens, not 100,000" in printed
    assert tokenizer.encode_batch(["the ship"], offsets=True)[0].tokens == ["the", "Ġship"]
    bad = config.model_copy(update={"dataset": config.dataset.model_copy(update={"field": "text"})})
    with pytest.raises(UserError, match=r"texts\.jsonl: record 1: no field 'text'; the record has 'body'"):
        run_tokenizer_train(bad, vocab_size=300, output=tmp_path / "other")


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    """The two small files fit, tokenizer.json does not."""
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes.txt").write_text("mine")
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        for folder in (tmp_path / "made" / "deep", tmp_path / "there"):
            with pytest.raises(UserError, match=r"File too large \(.*\) while writing .*/tokenizer\.json"):
                train_tokenizer(TEXTS, folder, vocab_size=300)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == [
        "there",
        "there/notes.txt",
    ]
