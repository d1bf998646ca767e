"""Tokenisation equals transformers', special-token strings stay text, the begin and end tokens are the folder's."""

from __future__ import annotations

import gzip
import importlib.util
import json
import pickle
import shutil
import subprocess
import sys

import pytest
from tokenizers import Tokenizer as Backend

from modelyard.data.tokenizer import (
    document_frame,
    load_tokenizer,
    looks_like_path,
    replace_surrogates,
    separator_notice,
)
from modelyard.errors import UserError


def real_texts(shared_data) -> list[str]:
    """Text in many languages and code, some tens of kilobytes."""
    texts = [
        "",
        " ",
        "\n",
        "  leading",
        "trailing \n",
        "<|end_of_text|></s><s><|endoftext|><|im_end|> x",
        "a\u2028b\x85c",
    ]
    for name, key, count in [("text/udhr_langid", "text", 53), ("code/code_permissive", "text", 20)]:
        with gzip.open(shared_data / f"{name}.jsonl.gz", "rt", encoding="utf-8", newline="\n") as file:
            texts += [json.loads(line)[key][:1500] for _, line in zip(range(count), file)]
    return texts


@pytest.mark.parametrize("name", ["llama3", "qwen2.5", "gpt2", "mistral-v0.3", "gpt-neox-20b", "llama2"])
def test_ids_equal_transformers(shared_data, name):
    if name == "llama2" and not importlib.util.find_spec("sentencepiece"):
        pytest.skip("needs sentencepiece")
    from transformers import AutoTokenizer

    folder = shared_data / "tokenizers" / name
    reference = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ours = load_tokenizer(folder)
    texts = real_texts(shared_data)
    for parse in (False, True):
        want = reference(texts, add_special_tokens=False, split_special_tokens=not parse)["input_ids"]
        for offsets in (False, True):
            assert [e.ids for e in ours.encode_batch(texts, parse_special=parse, offsets=offsets)] == want
    assert ours.vocab_size == len(reference)
    assert (ours.bos and ours.bos.text) == reference.bos_token
    assert (ours.eos and ours.eos.text) == reference.eos_token
    assert (ours.eos and ours.eos.id) == reference.eos_token_id


def test_small_real_weights_tokenizer(shared_data):
    from transformers import AutoTokenizer

    folder = shared_data / "weights" / "stories260K" / "hf"
    reference, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    text = "Once upon a time, there was a little girl named Lily. ☃"
    assert ours.encode(text) == reference(text, add_special_tokens=False)["input_ids"]
    assert ours.decode(ours.encode(text)) == reference.decode(ours.encode(text))


def test_special_strings_are_text_unless_parsed(shared_data):
    tokenizer = load_tokenizer(shared_data / "tokenizers" / "llama3")
    text = "a<|end_of_text|>b"
    assert tokenizer.encode(text, parse_special=True) == [64, 128001, 65]
    plain = tokenizer.encode(text)
    assert 128001 not in plain
    assert tokenizer.decode(plain) == text
    assert tokenizer.encode(text, parse_special=True) == [64, 128001, 65]  # the mode does not stick


def test_no_transformers_and_no_torch_are_imported(tokenizer_folder):
    code = (
        f"import sys; from modelyard.data.tokenizer import load_tokenizer; load_tokenizer({str(tokenizer_folder)!r})\n"
        "assert not {'transformers', 'torch', 'datasets'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_truncation_padding_and_dropout_are_switched_off(tokenizer_folder, tmp_path):
    backend = Backend.from_file(str(tokenizer_folder / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.model.dropout = 0.5
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "the ship sails over a wide sea and the ship sails"
    plain = load_tokenizer(tokenizer_folder).encode(text)
    assert 4 < len(plain) < 64
    assert [load_tokenizer(tmp_path).encode(text) for _ in range(3)] == [plain] * 3


def test_pickled_tokenizer_gives_the_same(tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    assert pickle.loads(pickle.dumps(tokenizer)).encode("a wide sea") == tokenizer.encode("a wide sea")


def test_fingerprint_is_the_files_sha256(tokenizer_folder, tmp_path):
    import hashlib

    content = (tokenizer_folder / "tokenizer.json").read_bytes()
    assert load_tokenizer(tokenizer_folder).fingerprint == hashlib.sha256(content).hexdigest()


def test_files_carry_the_licence(shared_data):
    names = set(load_tokenizer(shared_data / "tokenizers" / "llama3").files())
    assert {"tokenizer.json", "tokenizer_config.json", "LICENSE", "NOTICE", "USE_POLICY.md"} == names


@pytest.mark.parametrize(
    ("config", "special_map", "expected"),
    [
        ({"bos_token": "<|begin_of_text|>"}, None, ("<|begin_of_text|>", None)),
        ({"eos_token": {"content": "<|end_of_text|>", "lstrip": False}}, None, (None, "<|end_of_text|>")),
        ({}, {"eos_token": {"content": "<|end_of_text|>"}}, (None, "<|end_of_text|>")),
        ({"eos_token": None}, {"eos_token": "<|end_of_text|>"}, (None, None)),
        (None, None, (None, None)),
    ],
)
def test_special_tokens_from_either_file(tokenizer_folder, tmp_path, config, special_map, expected):
    shutil.copy(tokenizer_folder / "tokenizer.json", tmp_path)
    for name, document in (("tokenizer_config.json", config), ("special_tokens_map.json", special_map)):
        if document is not None:
            (tmp_path / name).write_text(json.dumps(document))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos and tokenizer.bos.text, tokenizer.eos and tokenizer.eos.text) == expected


def frame_of(tokenizer, **options):
    return document_frame(
        tokenizer, **({"bos_token": None, "eos_token": None, "add_bos": "auto", "add_eos": "auto"} | options)
    )


def test_document_frame(shared_data):
    llama3 = load_tokenizer(shared_data / "tokenizers" / "llama3")
    frame = frame_of(llama3)
    assert (frame.bos.id, frame.eos.id) == (128000, 128009)
    assert 'tokenizer.eos_token: "<|end_of_text|>"' in separator_notice(llama3, frame)
    named = frame_of(llama3, eos_token="<|end_of_text|>")
    assert named.eos.id == 128001
    assert separator_notice(llama3, named) is None
    assert frame_of(llama3, add_bos=False, add_eos=False) == type(frame)(None, None)
    with pytest.raises(
        UserError,
        match=r"eos_token '<\|end_of_txt\|>' is not in the vocabulary; did you mean '<\|end_of_text\|>'",
    ):
        frame_of(llama3, eos_token="<|end_of_txt|>")
    qwen = load_tokenizer(shared_data / "tokenizers" / "qwen2.5")
    assert frame_of(qwen).bos is None
    with pytest.raises(UserError, match="add_bos is true, but"):
        frame_of(qwen, add_bos=True)


@pytest.mark.parametrize(
    ("text", "clean"),
    [("a\ud800b", "a\ufffdb"), ("\udfff", "\ufffd"), ("é🚢", "é🚢"), ("\ud83d\ude80", "\ufffd\ufffd")],
)
def test_replace_surrogates(text, clean):
    assert replace_surrogates(text) == clean


@pytest.mark.parametrize(
    "name", ["./x", "../x", "/x", "~/x", "a/b/c", "x.jsonl", "data/x.parquet", "a b", "x.jsonl.gz"]
)
def test_paths_are_never_hub_names(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert looks_like_path(name)


def test_hub_names_and_existing_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not looks_like_path("gpt2")
    assert not looks_like_path("HuggingFaceFW/fineweb-edu")
    (tmp_path / "data").mkdir()
    assert looks_like_path("data/missing")


@pytest.mark.parametrize(
    ("content", "message"),
    [({}, "neither tokenizer.json nor tokenizer.model"), ({"tokenizer.json": "{"}, "is not a tokenizer")],
)
def test_damaged_folders(tmp_path, content, message):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


def test_missing_folder_names_the_nearest(tokenizer_folder):
    with pytest.raises(UserError, match=r"nearest there: .*tokenizer"):
        load_tokenizer(tokenizer_folder.parent / (tokenizer_folder.name + "x"))


def test_unreachable_hub_name_is_one_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="could not be fetched from the Hub") as caught:
        load_tokenizer("no-such-org/no-such-tokenizer")
    assert len(caught.value.problems) == 1


@pytest.mark.skipif(bool(importlib.util.find_spec("sentencepiece")), reason="sentencepiece is installed")
def test_sentencepiece_alone_says_what_to_install(shared_data):
    with pytest.raises(UserError, match=r"pip install 'modelyard\[sentencepiece\]'"):
        load_tokenizer(shared_data / "tokenizers" / "llama2")
