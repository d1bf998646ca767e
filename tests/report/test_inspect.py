"""`modelyard inspect STORE` as a user calls it: what it shows, and which status it ends with."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from modelyard.cli import main
from modelyard.data.tokenizer import load_tokenizer
from tests.data.conftest import sentence
from tests.data.foreign_writers import write_file, write_pair
from tests.report.inspecting import BOS, EOS, Run, config, make_store, text, values_of


def test_a_store_shown_without_colour(run: Run, tmp_path: Path, tokenizer_folder: Path) -> None:
    encode = load_tokenizer(tokenizer_folder).encode
    prompt, answer = encode("the ship"), encode(" sails\nover 🚢")
    document = [BOS, *prompt, *answer, EOS]
    mask = [1] * (1 + len(prompt)) + [0] * (len(answer) + 1)
    make_store(tmp_path / "s", tokenizer_folder, [document], [mask])
    status, out = run("s")
    assert status == 0
    assert f"── document 0 · {len(document)} tokens · {len(answer) + 1} trained ─" in out
    shown = out[out.index("⟦") : out.index("<|end_of_text|>", out.index("⟦"))].replace("│", "")
    assert shown == "⟦<|begin_of_text|>the ship⟧ sails⏎\nover 🚢"
    assert "\x1b" not in out
    assert out.rstrip().endswith("nothing wrong was found")
    # Every token is there, in order.
    groups = re.findall(r"⟨([\d+]+)⟩", run("s", "--ids")[1])
    assert [int(number) for group in groups for number in group.split("+")] == document


def test_figures_of_a_store(run: Run, good: Path, tokenizer_folder: Path) -> None:
    lengths = sorted(len(text(tokenizer_folder, number)) for number in range(10))
    status, values = values_of(run, "good")
    (store,) = values["stores"]
    assert status == 0
    assert (store["documents"], store["tokens"]) == (10, sum(lengths))
    assert store["trained_share"] == 1 - sum(length // 2 for length in lengths) / sum(lengths)
    assert store["length_quantiles"]["median"] == lengths[4]
    assert store["length_quantiles"]["longest"] == lengths[-1]
    assert sum(count for _, _, count in store["length_histogram"]) == 10
    assert store["fingerprint"] in run("good")[1]


def test_which_documents_are_shown(run: Run, good: Path) -> None:
    def shown(*words: object) -> list[int]:
        return [int(n) for n in re.findall(r"^── document (\d+)", run("good", *words)[1], re.MULTILINE)]

    assert shown()[0] == 0
    assert len(set(shown("--documents", 5))) == 5
    assert shown("--documents", 4) == shown("--documents", 4)
    assert shown("--documents", 4) != shown("--documents", 4, "--seed", 1)
    assert len(set(shown("--documents", 99))) == 10
    assert shown("--documents", 0) == []
    assert shown("--document", 7) == [7]
    status, out = run("good", "--document", 10)
    assert status == 2
    assert out == "error: --document 10: good has 10 documents, numbered from 0\n"


def test_long_documents_are_shown_by_their_ends(run: Run, tmp_path: Path) -> None:
    make_store(tmp_path / "s", None, [range(2, 102)])
    status, out = run("s", "--tokens", 6)
    assert status == 0
    assert "⟨2⟩│⟨3⟩│⟨4⟩│⟨5⟩│ … 94 tokens … │⟨100⟩│⟨101⟩" in out
    assert "there is no tokenizer with the data" in out


def test_the_output_folder_of_prepare_and_what_it_was_made_from(run: Run, tokenizer_folder: Path) -> None:
    Path("texts.jsonl").write_text("".join(json.dumps({"text": sentence(n)}) + "\n" for n in range(20)))
    Path("prepare.yaml").write_text(
        f"output_path: out\ndataset: {{path: texts.jsonl, field: text}}\ntokenizer: {{path: {tokenizer_folder}}}\n"
        "splits: {training: 0.5, validation: 0.5}\n"
    )
    assert run("prepare.yaml") == (
        2,
        "error: prepare.yaml is a preparation config: run it first, then inspect out\n",
    )
    assert main(["prepare", "prepare.yaml"]) == 0
    status, out = run("out")
    assert status == 0
    assert "store out/training" in out
    assert "store out/validation" in out
    assert "splits   training 0.5, validation 0.5" in out
    assert "inspect what it made, out" in run("prepare.yaml")[1]
    status, out = run("out/fast_llm_config_training.yaml")
    assert status == 2
    assert "is a dataset file: inspect its store, out/training" in out


# Faults of stores


@pytest.mark.parametrize(
    ("documents", "masks", "fault"),
    [
        ([[0, 0, 5, 1], [0, 5, 1]], None, "1 of 2 documents begin with begin-of-sequence twice (the first is document 0 of s)"),
        ([[0, 5, 1], []], None, "1 of 2 documents are empty"),
        ([[0, 5, 1], [0, 6, 1]], [[1, 1, 1], [1, 1, 1]], "every one of 6 tokens is masked"),
        ([[0, 5, 1], [0, 6, 1]], [[1, 1, 1], [1, 0, 1]], "1 of 2 documents (50.0%) have nothing to train on"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_store(
    run: Run, tmp_path: Path, tokenizer_folder: Path, documents, masks, fault
) -> None:
    make_store(tmp_path / "s", tokenizer_folder, documents, masks)
    status, out = run("s")
    assert status == 1
    assert f"fault: s: {fault}" in out
    assert out.endswith("1 fault\n")
    assert "── document 0" in out  # all is shown before


@pytest.mark.parametrize(
    ("documents", "masks", "warning"),
    [
        ([[0, 5, 1, 1], [0, 6, 1]], None, "1 of 2 documents end with end-of-sequence twice"),
        ([[0, 5], [0, 6, 1]], None, "1 of 2 documents lack end-of-sequence"),
        ([[5, 1], [0, 6, 1]], None, "1 of 2 documents lack begin-of-sequence"),
        ([[0, 5, 0, 6, 1], [0, 6, 1]], None, "1 of 2 documents have begin-of-sequence in their middle"),
        ([[0, 5, 1], [0, 5, 1], [0, 6, 1], [0, 5, 1]], None, "2 of 4 documents (50.0%) are copies of another"),
        ([[0, 5, 1]] + [[0, n, 1] for n in (6, 7)], [[0, 1, 1]] + [[0, 0, 0]] * 2, "1 of 3 documents (33.3%) have nothing"),
    ],
)  # fmt: skip
def test_what_is_odd_in_a_store(
    run: Run, tmp_path: Path, tokenizer_folder: Path, documents, masks, warning
) -> None:
    make_store(tmp_path / "s", tokenizer_folder, documents, masks)
    status, out = run("s")
    assert status == 0
    assert f"warning: s: {warning}" in out


def test_tokens_beyond_the_vocabulary_of_the_store(run: Run, tmp_path: Path, tokenizer_folder: Path) -> None:
    make_store(tmp_path / "s", tokenizer_folder, [[0, 5, 1], [0, 299, 1]])
    tokens = np.fromfile(tmp_path / "s" / "tokens_00000.bin", np.uint16)
    tokens[4] = 300  # a bit flipped after it was written: the size is right
    tokens.tofile(tmp_path / "s" / "tokens_00000.bin")
    status, out = run("s")
    assert status == 1
    assert (
        "fault: s: 1 of 2 documents have token ids beyond the vocabulary of the store (300 tokens): up to 300 "
        "(the first is document 1 of s)" in out
    )
    status, out = run("s", "--verify")
    assert "does not have the checksum" in out


def test_another_tokenizer_than_the_store_was_made_with(
    run: Run, tmp_path: Path, tokenizer_folder: Path
) -> None:
    make_store(tmp_path / "s", tokenizer_folder, [[0, 5, 1]], fingerprint="0" * 64)
    status, out = run("s")
    assert status == 1
    assert (
        "fault: s/tokenizer is not the tokenizer that the store was made with (manifest.json has sha256 000000000000…"
        in out
    )
    make_store(tmp_path / "t", tokenizer_folder, [[0, 5, 1]], vocab_size=200)
    status, out = run("t")
    assert status == 1
    assert "fault: t/tokenizer has 300 tokens, the store was made for 200" in out


def test_a_store_that_cannot_be_opened(run: Run, good: Path) -> None:
    tokens = good / "tokens_00000.bin"
    tokens.write_bytes(tokens.read_bytes()[:-1])
    status, out = run("good")
    assert status == 2
    assert "tokens_00000.bin" in out


@pytest.mark.parametrize("masked", [False, True])
def test_what_other_programs_prepared(run: Run, tmp_path: Path, masked: bool) -> None:
    documents = [[5, 6, 7], [8], [9, 10, 11, 250], [5, 6, 7]]
    spans = [[(0, 1)], [], [(1, 1), (3, 3)], [(1, 1)]] if masked else None
    half_open = [[(a, b + 1) for a, b in of_one] for of_one in spans] if spans else None
    write_pair(tmp_path / "shard_0_0", documents, version=3, dtype="uint16", spans=spans)
    write_file(tmp_path / "f.fast_llm_dataset", documents, spans=half_open)
    write_file(tmp_path / "no_ending", documents, spans=half_open)
    names = ("shard_0_0", "shard_0_0.idx", "shard_0_0.bin", "f.fast_llm_dataset", "no_ending")
    for name in names:
        status, values = values_of(run, name)
        (store,) = values["stores"]
        assert (status, store["path"], store["documents"], store["tokens"]) == (0, name, 4, 11)
        assert (store["vocab_size"], store["tokenizer"], store["largest_token"]) == (None, None, 250)
        assert store["length_quantiles"]["longest"] == 4
        assert store["masked_tokens"] == (5 if masked else None)
        assert any(f"{name}: 1 of 4 documents" in line for line in values["warnings"])
    status, out = run("shard_0_0", "--document", 2, "--ids", "--verify")
    assert status == 0
    assert "11 (uint16, prepared by another program)" in out
    assert "unknown, the largest id met is 250" in out
    assert "in 2 files" in out
    assert "has no checksums" in out
    assert f"── document 2 · 4 tokens{' · 2 trained' if masked else ''}" in out
    assert [int(n) for n in re.findall(r"⟨(\d+)⟩", out)] == [9, 10, 11, 250]


def test_what_other_programs_prepared_and_is_damaged(run: Run, tmp_path: Path) -> None:
    write_pair(tmp_path / "p", [[1, 2], [3]])
    (tmp_path / "f.fast_llm_dataset").write_bytes(b"")
    (tmp_path / "p.bin").unlink()
    (tmp_path / "train.idx").write_bytes(b"")
    (tmp_path / "train.bin").write_bytes(b"")
    for words, said in (
        (("p",), "p.bin is missing, and p.idx is of no use without it"),
        (("p.idx",), "p.bin is missing, and p.idx is of no use without it"),
        (("f.fast_llm_dataset",), "f.fast_llm_dataset begins with b''"),
        (("p", "more"), "p is inspected alone; what is 'more'?"),
        (("q",), "q does not exist"),
    ):
        status, out = run(*words)
        assert (status, out.startswith("error: "), out.count("\n")) == (2, True, 1), out
        assert said in out
    config(tmp_path, training="{type: random}")  # train.yaml, beside a train.idx
    assert "14 an iteration" in run("train.yaml")[1]


def test_nothing_to_inspect(run: Run, tmp_path: Path) -> None:
    for words, said in (
        ((), "nothing to inspect: name a store, checkpoint or config, as in `modelyard inspect train.yaml`"),
        (("gone",), "gone does not exist"),
        ((".",), ". is no token store (manifest.json), no checkpoint"),
        ((".", "more"), ". is inspected alone; what is 'more'?"),
        ((".", "--rows", "-1"), "'-1' is not a whole number"),
    ):
        status, out = run(*words)
        assert (status, out.startswith("error: ")) == (2, True)
        assert said in out
