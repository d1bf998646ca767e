"""`modelyard inspect` as a user calls it: what it shows of stores and configs, and which status it ends with."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelyard.cli import main
from modelyard.data.store import StoreWriter
from modelyard.data.tokenizer import load_tokenizer
from modelyard.data.tokenizer_training import train_tokenizer
from tests.config.helpers import TINY
from tests.conftest import ROOT
from tests.data.conftest import sentence
from tests.data.foreign_writers import write_file, write_pair

BOS, EOS = 0, 1

Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer of 300 tokens: <|begin_of_text|> is 0, <|end_of_text|> is 1."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer((sentence(i) for i in range(200)), folder, vocab_size=300)
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs `modelyard inspect` in `tmp_path`; returns the exit status and what was printed."""
    monkeypatch.chdir(tmp_path)
    for name in ("COLUMNS", "FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)

    def inspect(*words: object) -> tuple[int, str]:
        status = main(["inspect", *map(str, words)])
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return inspect


def values_of(run: Run, *words: object) -> tuple[int, dict[str, Any]]:
    status, out = run(*words, "--json")
    return status, json.loads(out)


def make_store(
    path: Path,
    tokenizer: Path | None,
    documents: Sequence[Sequence[int]],
    masks: Sequence[Sequence[int]] | None = None,
    *,
    vocab_size: int = 300,
    fingerprint: str | None = None,
) -> Path:
    """A store as `prepare` would make it of these tokens."""
    opened = load_tokenizer(tokenizer) if tokenizer else None
    description = {
        "tokenizer": {
            "fingerprint": fingerprint or (opened.fingerprint if opened else None),
            "bos": {"token": "<|begin_of_text|>", "id": BOS},
            "eos": {"token": "<|end_of_text|>", "id": EOS},
        }
    }
    with StoreWriter(
        path,
        vocab_size=vocab_size,
        lanes={"loss_mask": "uint8"} if masks else None,
        tokenizer_files=opened.files() if opened else None,
        description=description,
    ) as writer:
        for number, document in enumerate(documents):
            lanes = {"loss_mask": np.array(masks[number], np.uint8)} if masks else None
            writer.append(np.array(document, np.int64), lanes)
    return path


def text(tokenizer: Path, number: int) -> list[int]:
    return [BOS, *load_tokenizer(tokenizer).encode(sentence(number)), EOS]


@pytest.fixture
def good(tmp_path: Path, tokenizer_folder: Path) -> Path:
    """Ten documents, of each the first half masked."""
    documents = [text(tokenizer_folder, number) for number in range(10)]
    masks = [[int(place < len(d) // 2) for place in range(len(d))] for d in documents]
    return make_store(tmp_path / "good", tokenizer_folder, documents, masks)


# Stores


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


# Configs


def config(folder: Path, **datasets: str) -> Path:
    """TINY with a vocabulary of 300 and rows of 7 tokens, documents whole and isolated, masks used."""
    listed = ", ".join(f"{name}: {dataset}" for name, dataset in datasets.items())
    content = TINY.replace(
        "data: {datasets: {training: {type: random}}}", f"data: {{datasets: {{{listed}}}}}"
    )
    content = content.replace("vocab_size: 512", "vocab_size: 300").replace(
        "batch: {sequence_length: 64, batch_size: 4}",
        "batch: {sequence_length: 7, batch_size: 2, truncate_documents: no, cross_document_attention: no, use_loss_masking_spans: yes}",
    )
    path = folder / "train.yaml"
    path.write_text(content)
    return path


def memmap(name: str) -> str:
    return f"{{type: memmap, path: {name}}}"


def small(path: Path, tokenizer: Path | None = None) -> Path:
    """Documents of 5, 4, 3 and 9 tokens. In rows of 8: 5 + 3, 4 and padding; the one of 9 is left out."""
    documents = [[0, 5, 6, 7, 1], [0, 8, 9, 1], [0, 10, 1], [0, *range(20, 27), 1]]
    masks = [[1, 1, 0, 0, 0], [1, 1, 1, 0], [1, 0, 0], [0] * 9]
    return make_store(path, tokenizer, documents, masks)


def test_figures_of_a_packed_config(run: Run, tmp_path: Path, tokenizer_folder: Path) -> None:
    small(tmp_path / "s", tokenizer_folder)
    config(tmp_path, training=memmap("s"))
    status, values = values_of(run, "train.yaml")
    assert status == 0
    (facts,) = values["datasets"]["training"]
    assert facts["rows_measured"] == 2
    assert facts["fill"] == 12 / 16
    # Targets: three of the first document, one of the second, two of the third; over 2 rows of 7 positions.
    assert facts["trained_share"] == pytest.approx(6 / 14)
    assert (facts["over_long_documents"], facts["over_long_tokens"]) == (1, 9)
    assert facts["masked_tokens"] == 6
    rows = sorted(values["batch"]["rows"], key=lambda row: row["padding"])
    assert [(row["targets"], row["padding"]) for row in rows] == [(5, 0), (1, 4)]
    assert sorted(rows[0]["documents"]) == [0, 2]
    assert rows[1]["documents"] == [1]
    assert rows[1]["segments"] == [0, 4]
    assert values["warnings"] == [
        "s: 1 documents with 9 tokens (42.9%) are longer than a row and left out: raise batch.sequence_length, or write "
        "batch.truncate_documents: yes"
    ]


def test_a_batch_row_by_row_is_what_training_gets(run: Run, tmp_path: Path, tokenizer_folder: Path) -> None:
    from modelyard.config.loader import load_config
    from modelyard.train.build import open_stream

    small(tmp_path / "s")
    path = config(tmp_path, training=memmap("s"))
    status, out = run("train.yaml", "--iteration", 3)
    assert status == 0
    loaded = load_config([path])
    assert loaded.architecture is not None
    batch = open_stream(loaded.train, "training", loaded.architecture).batch(3)
    assert out.count("│") > 5
    lines = [line for line in out.splitlines() if line.startswith("⟦⟨") or "× padding" in line]
    # What is printed, read back: tokens, and in brackets those that are no target.
    for row, shown in enumerate(re.split("\n(?=row )", out[out.index("\nrow ") + 1 :])):
        ids, targets, inside = [], [], False
        for mark, number in re.findall(r"([⟦⟧])|⟨(\d+)⟩", shown):
            if mark:
                inside = mark == "⟦"
            else:
                ids.append(int(number))
                targets.append(not inside)
        length = min(len(ids), 7)
        assert batch.input_ids[row, :length].tolist() == ids[:length]
        assert batch.input_ids[row, length:].tolist() == [0] * (7 - length)
        expected = [i for i, is_target in zip(ids, targets) if is_target]
        assert batch.labels[row][batch.labels[row] != -100].tolist() == expected
    assert len(lines) == 4
    assert "positions 0–3 · 1 trained" in out
    assert "attention segments begin at 0, 4" in out


def test_documents_that_are_cut(run: Run, tmp_path: Path) -> None:
    make_store(tmp_path / "s", None, [range(2, 32)])
    config(tmp_path, training=memmap("s"))
    words = [
        "batch.truncate_documents=yes",
        "batch.use_loss_masking_spans=no",
        "data.sampling.shuffle=disabled",
        "batch.cross_document_attention=yes",
    ]
    status, out = run("train.yaml", *words)
    assert status == 0
    assert "document 0 of s · 8 tokens (tokens 0–7 of 30) · positions 0–6 · 7 trained" in out
    assert "document 0 of s · 8 tokens (tokens 7–14 of 30) · positions 0–6 · 7 trained" in out
    assert "⟦⟨2⟩⟧⟨3⟩│⟨4⟩│⟨5⟩│⟨6⟩│⟨7⟩│⟨8⟩│⟨9⟩\n" in out
    assert "they are cut into rows, nothing is lost" in out


def test_the_last_token_of_a_full_row_where_it_is_masked(run: Run, tmp_path: Path) -> None:
    """No position has it as input or as target, and it is shown as what it is."""
    make_store(tmp_path / "s", None, [range(2, 10)], [[0] * 7 + [1]])
    config(tmp_path, training=memmap("s"))
    status, out = run("train.yaml")
    assert status == 0
    assert "⟦⟨2⟩⟧⟨3⟩│⟨4⟩│⟨5⟩│⟨6⟩│⟨7⟩│⟨8⟩⟦⟨9⟩⟧\n" in out


def test_shares_of_a_blend(run: Run, tmp_path: Path) -> None:
    for name, length in (("a", 4), ("b", 8)):
        make_store(tmp_path / name, None, [[0] * length] * 40)
    blend = f"{{type: blended, weights: [1, 3], datasets: [{memmap('a')}, {memmap('b')}]}}"
    config(tmp_path, training=blend)
    _, values = values_of(run, "train.yaml", "batch.use_loss_masking_spans=no", "batch.batch_size=8")
    one, other = values["datasets"]["training"]
    assert [f["share_wanted"] for f in (one, other)] == [0.25, 0.75]
    assert [f["share_got"] for f in (one, other)] == [0.25, 0.75]
    assert [f["fill"] for f in (one, other)] == [1.0, 1.0]
    assert [f["trained_share"] for f in (one, other)] == [6 / 7, 1.0]


def test_evaluators_data_is_shown_too(run: Run, tmp_path: Path) -> None:
    small(tmp_path / "s")
    small(tmp_path / "v")
    config(tmp_path, training=memmap("s"), held_out=memmap("v"))
    evaluator = "training.evaluators={loss: {interval: 5, evaluator: {type: loss, dataset_name: held_out}}}"
    _, values = values_of(run, "train.yaml", evaluator)
    assert list(values["datasets"]) == ["training", "held_out"]
    assert values["datasets"]["held_out"][0]["fill"] == 12 / 16


# Faults of configs


def test_data_of_another_vocabulary_is_shown_all_the_same(run: Run, tmp_path: Path) -> None:
    small(tmp_path / "s")
    config(tmp_path, training=memmap("s"))
    status, out = run("train.yaml", "model.base_model.vocab_size=20")
    assert status == 1
    assert (
        "fault: data.datasets.training: s was prepared with a tokenizer of 300 tokens, the model has vocab_size 20"
        in out
    )
    assert (
        "fault: s: 1 of 4 documents have token ids beyond the vocabulary of the model (20 tokens): up to 26"
        in out
    )
    assert "row 1:" in out


def test_a_batch_without_a_target(run: Run, tmp_path: Path) -> None:
    make_store(tmp_path / "s", None, [[0, n, 1, 1, 1, 1, 1, 1] for n in range(5, 9)], [[1] * 8] * 4)
    config(tmp_path, training=memmap("s"))
    status, out = run("train.yaml")
    assert status == 1
    assert "fault: data.datasets.training: batch 0 has no token to train on" in out
    assert "fault: data.datasets.training: batch 1 has no token to train on" in out
    assert "fault: s: none of the 4 rows measured has a token to train on" in out


def test_a_mask_that_is_not_used_and_one_that_is_not_there(run: Run, tmp_path: Path) -> None:
    small(tmp_path / "s")
    make_store(tmp_path / "plain", None, [[0, 5, 1]])
    config(tmp_path, training=memmap("s"))
    status, out = run("train.yaml", "batch.use_loss_masking_spans=no")
    assert status == 0
    assert "warning: s has a loss mask that is not used" in out
    status, out = run("train.yaml", "data.datasets.training.path=plain")
    assert status == 1
    assert "fault: data.datasets.training: plain has no loss mask" in out


def test_no_document_fits(run: Run, tmp_path: Path) -> None:
    make_store(tmp_path / "s", None, [[0] * 20])
    config(tmp_path, training=memmap("s"))
    status, out = run("train.yaml", "batch.use_loss_masking_spans=no")
    assert status == 1
    assert "no document fits in a row of sequence_length + 1 = 8 tokens" in out


def test_tokenizers_that_differ(run: Run, tmp_path: Path, tokenizer_folder: Path) -> None:
    small(tmp_path / "a", tokenizer_folder)
    folder = tmp_path / "other"
    shutil.copytree(tokenizer_folder, folder)
    document = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(document, indent=4))
    small(tmp_path / "b", folder)
    blend = f"{{type: blended, weights: [1, 1], datasets: [{memmap('a')}, {memmap('b')}]}}"
    config(tmp_path, training=blend)
    assert run("train.yaml")[0] == 0  # written differently, the same tokenizer
    vocabulary = document["model"]["vocab"]
    last, before = sorted(vocabulary, key=vocabulary.__getitem__)[-1:-3:-1]
    vocabulary[last], vocabulary[before] = vocabulary[before], vocabulary[last]
    (folder / "tokenizer.json").write_text(json.dumps(document))
    shutil.rmtree(tmp_path / "b")
    small(tmp_path / "b", folder)
    status, out = run("train.yaml")
    assert status == 1
    assert "fault: b was made with another tokenizer than a (" in out
    assert re.search(r"is token (299 in one and 298|298 in one and 299) in the other\)", out)


def test_the_tokenizer_of_the_pretrained_model(run: Run, tmp_path: Path, tokenizer_folder: Path) -> None:
    small(tmp_path / "s", tokenizer_folder)
    config(tmp_path, training=memmap("s"))
    model = tmp_path / "model"
    shutil.copytree(tokenizer_folder, model)
    words = ["pretrained.path=model", "pretrained.load_config=none"]
    assert "another tokenizer" not in run("train.yaml", *words)[1]
    document = json.loads((model / "tokenizer.json").read_text())
    vocabulary = document["model"]["vocab"]
    last, before = sorted(vocabulary, key=vocabulary.__getitem__)[-1:-3:-1]
    vocabulary[last], vocabulary[before] = vocabulary[before], vocabulary[last]
    (model / "tokenizer.json").write_text(json.dumps(document))
    status, out = run("train.yaml", *words)
    assert status == 1
    assert "fault: s was made with another tokenizer than model has (" in out
    _, out = run("train.yaml", *words, "pretrained.model_weights=no")
    assert "warning: s was made with another tokenizer than model has" in out


def test_random_tokens_have_no_text(run: Run, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    status, values = values_of(run, "tiny.yaml", "--rows", 1)
    assert status == 0
    (facts,) = values["datasets"]["training"]
    assert (facts["documents"], facts["scanned_tokens"], facts["fill"]) == (1_000_000, 0, 1.0)
    assert facts["trained_share"] == 1.0
    assert values["warnings"] == ["there is no tokenizer with the data, so tokens are shown as numbers"]


def test_bad_iterations_and_configs(run: Run, tmp_path: Path) -> None:
    small(tmp_path / "s")
    config(tmp_path, training=memmap("s"))
    status, out = run("train.yaml", "--iteration", 100)
    assert (status, "the run has 100, and the first batch is number 0" in out) == (2, True)
    status, out = run("train.yaml", "batch.sequence_lenght=3")
    assert (status, "did you mean 'sequence_length'" in out) == (2, True)
    status, out = run("train.yaml", "data.datasets.training.path=gone")
    assert status == 1
    assert re.search(r"^fault: .*data\.datasets\.training: gone does not exist", out, re.MULTILINE)
    assert out.endswith("1 fault\n")


# Pages and colours


def test_data_cannot_act_upon_terminal_or_page(
    run: Run, tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nasty = "<script>alert(1)</script>\x1b[31m&amp;\u202e[bold]x[/bold]"
    document = [BOS, *load_tokenizer(tokenizer_folder).encode(nasty), EOS]
    make_store(tmp_path / "s", tokenizer_folder, [document])
    monkeypatch.setenv("COLUMNS", "140")
    _, out = run("s")
    shown = out.replace("│", "")
    assert "<script>alert(1)</script>␛[31m&amp;\\u202e[bold]x[/bold]<|end_of_text|>" in shown
    assert "\x1b" not in out
    status, out = run("s", "--html", "page.html")
    assert (status, out) == (0, "nothing wrong was found\nwrote page.html\n")
    page = Path("page.html").read_text()
    plain = re.sub(r"</?b[^>]*>", "", page)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;␛[31m&amp;amp;\\u202e[bold]x[/bold]" in plain
    assert "alert(1)</script>" not in plain
    assert "\x1b" not in page


def test_kinds_on_the_page(run: Run, tmp_path: Path, tokenizer_folder: Path) -> None:
    make_store(tmp_path / "s", tokenizer_folder, [[0, 67, 67, 1], [0, 0, 5, 1]], [[1, 1, 0, 0], [1, 1, 0, 0]])
    letter = load_tokenizer(tokenizer_folder).decode([67])
    status, out = run("s", "--document", 0, "--html", "p.html")
    assert status == 1
    assert "fault: s: 1 of 2 documents begin with begin-of-sequence twice" in out
    page = Path("p.html").read_text()
    assert (
        '<b class="m s" data-i="0" title="0">&lt;|begin_of_text|&gt;</b>'
        f'<b class="m o" data-i="67" title="67">{letter}</b><b class="t" data-i="67" title="67">{letter}</b>'
        '<b class="t o s" data-i="1" title="1">&lt;|end_of_text|&gt;</b>'
    ) in page
    assert "<strong>Fault:</strong> s: 1 of 2 documents begin" in page
    Path("mine.html").write_text("mine")
    assert run("s", "--html", "mine.html")[0] == 2
    assert Path("mine.html").read_text() == "mine"


def test_colours_where_they_are_wanted(run: Run, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    _, out = run("good", "--document", 1)
    assert "\x1b[" in out
    assert "⟦" not in out
    monkeypatch.setenv("NO_COLOR", "1")
    _, out = run("good", "--document", 1)
    assert "\x1b[" not in out
    assert "⟦<|begin_of_text|>" in out


def test_stores_and_configs_are_inspected_without_torch(tmp_path: Path) -> None:
    small(tmp_path / "s")
    config(tmp_path, training=memmap("s"))
    code = (
        "import sys\nfrom modelyard.cli import main\n"
        "assert main(['inspect', 's']) == 0\nassert main(['inspect', 'train.yaml']) == 0\n"
        "print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )  # fmt: skip
    assert done.stdout.endswith("set()\n"), done.stderr


# Narrow screens


@pytest.mark.parametrize("columns", ["60", "80", None])
def test_figures_are_never_broken(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: str | None
) -> None:
    """Whatever fits not is written below one another, and without a screen all of it is a line."""
    name = "a-dataset-with-a-name-of-forty-characters"
    make_store(tmp_path / name, None, [[0, *range(2, 102), 1]] * 12_345)
    config(tmp_path, training=memmap(name))
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    _, out = run("train.yaml", "batch.use_loss_masking_spans=no", "batch.sequence_length=127", "--rows", 1)
    table = out[out.index("\ndataset training") : out.index("\nMeasured over")]
    if columns:
        assert table.splitlines()[2:6] == [
            f"  dataset {name}", "    documents  12,345", "    tokens     1,259,190", "    median     102"
        ]  # fmt: skip
    else:
        assert re.search(rf"^{name} +12,345 +1,259,190 +102 +102 ", table, re.MULTILINE)


def test_the_histogram_agrees_with_the_table(run: Run, tmp_path: Path) -> None:
    """Rows have room for 8 tokens: of 5, 6, 8, 9, 10 and 20 three are longer, all of them in buckets that are marked."""
    make_store(tmp_path / "s", None, [[0] * length for length in (5, 6, 8, 9, 10, 20)])
    config(tmp_path, training=memmap("s"))
    words = ["train.yaml", "batch.use_loss_masking_spans=no"]
    _, out = run(*words)
    bars = re.findall(r"^ +(\S+) [█▏▎▍▌▋▊▉]+ (\d+)(  \*)?$", out, re.MULTILINE)
    assert bars == [("4–7", "2", ""), ("8", "1", ""), ("9–15", "2", "  *"), ("16–31", "1", "  *")]
    assert values_of(run, *words)[1]["datasets"]["training"][0]["over_long_documents"] == 3


def test_masks_wanted_where_there_are_any(run: Run, tmp_path: Path) -> None:
    make_store(tmp_path / "plain", None, [[0, 5, 1]])
    small(tmp_path / "s")
    config(tmp_path, training=memmap("plain"))
    said = "No dataset has a loss mask: every token is trained on (batch.use_loss_masking_spans: auto)."
    auto = "batch.use_loss_masking_spans=auto"
    _, out = run("train.yaml", auto)
    assert said in " ".join(out.split())
    _, out = run("train.yaml", auto, "data.datasets.training.path=s")
    assert said not in " ".join(out.split())


def test_a_page_over_somebody_elses_file(run: Run, good: Path) -> None:
    Path("keep.txt").write_text("mine")
    status, out = run("good", "--html", "keep.txt")
    assert (status, "name another file with --html" in out, "--output" in out) == (2, True, False)
