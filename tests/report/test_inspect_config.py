"""`modelyard inspect CONFIG` as a user calls it: the data of a run, and a batch as the model gets it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.config.helpers import TINY
from tests.report.inspecting import Run, config, make_store, memmap, small, values_of


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
