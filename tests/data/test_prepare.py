"""Prepared stores hold each document once, framed and masked as asked, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from modelyard.cli import main
from modelyard.config.prepare import PrepareConfig
from modelyard.data import columns, sources
from modelyard.data import prepare as prepare_module
from modelyard.data import ranks as ranks_module
from modelyard.data.prepare import prepare, run_prepare
from modelyard.data.splits import deal
from modelyard.data.store import TokenStore
from modelyard.data.tokenizer import load_tokenizer
from modelyard.errors import UserError

from .conftest import sentence

BOS, EOS = 0, 1
TEXTS = [sentence(i) for i in range(300)]


def config(tmp_path: Path, source: Path, tokenizer: Path | dict, **options: Any) -> PrepareConfig:
    dataset = {"path": str(source)} | options.pop("dataset", {})
    document = {
        "output_path": str(tmp_path / "out"),
        "dataset": dataset,
        "tokenizer": tokenizer if isinstance(tokenizer, dict) else {"path": str(tokenizer)},
        "tokenize_workers": 1,
    }
    return PrepareConfig.model_validate(document | options)


def silent(_: str) -> None:
    pass


def make(cfg: PrepareConfig, **options: Any) -> dict[str, Any]:
    return prepare(cfg, report=silent, terminal=False, **options)


def documents(path: Path) -> list[list[int]]:
    store = TokenStore(path)
    assert store.verify() == []
    return [store.document(i).tolist() for i in range(store.num_documents)]


def checksums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


@pytest.fixture
def texts_file(write_jsonl) -> Path:
    return write_jsonl([{"text": text, "id": i} for i, text in enumerate(TEXTS)])


def test_every_document_once_in_order(tmp_path, texts_file, tokenizer_folder):
    splits = {"training": 0.8, "validation": 0.15, "test": 0.05}
    summary = make(config(tmp_path, texts_file, tokenizer_folder, splits=splits))
    tokenizer = load_tokenizer(tokenizer_folder)
    expected = [[BOS, *tokenizer.encode(text), EOS] for text in TEXTS]
    # The texts repeat themselves, so that documents are followed by their numbers.
    choice = deal(0, 300, splits, 784569)
    for number, name in enumerate(splits):
        found = documents(tmp_path / "out" / name)
        assert found == [expected[i] for i in np.flatnonzero(choice == number)]
        assert summary["splits"][name]["documents"] == len(found) > 0
        dataset_file = yaml.safe_load((tmp_path / "out" / f"fast_llm_config_{name}.yaml").read_text())
        assert dataset_file == {
            "type": "memmap",
            "path": name,
            "num_documents": len(found),
            "num_tokens": sum(map(len, found)),
        }
    assert summary["documents"] == 300
    assert summary["tokens"] == sum(map(len, expected))
    store = TokenStore(tmp_path / "out" / "training")
    assert store.vocab_size == 300
    assert store.dtype == np.uint16
    assert store.manifest["tokenizer"] == {
        "fingerprint": tokenizer.fingerprint,
        "bos": {"token": "<|begin_of_text|>", "id": 0},
        "eos": {"token": "<|end_of_text|>", "id": 1},
    }
    assert load_tokenizer(store.path / "tokenizer").encode("a sea") == tokenizer.encode("a sea")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "texts.jsonl"]


def test_without_splits(tmp_path, texts_file, tokenizer_folder):
    make(config(tmp_path, texts_file, tokenizer_folder, tokens_per_shard=500))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "data",
        "fast_llm_config.yaml",
        "prepare.json",
    ]
    assert yaml.safe_load((tmp_path / "out" / "fast_llm_config.yaml").read_text())["path"] == "data"
    store = TokenStore(tmp_path / "out" / "data")
    assert len(store.manifest["shards"]) > 5
    assert max(shard["tokens"] for shard in store.manifest["shards"]) <= 500


@pytest.mark.parametrize("name", ["texts.jsonl", "texts.jsonl.gz", "texts.parquet"])
def test_same_bytes_for_any_number_of_workers(tmp_path, write_jsonl, tokenizer_folder, monkeypatch, name):
    monkeypatch.setattr(sources, "CHUNK_BYTES", 700)
    monkeypatch.setattr(ranks_module, "available_cores", lambda: 3)
    path = tmp_path / name
    records = [{"text": text, "spans": [[0, i % 3]], "id": str(i)} for i, text in enumerate(TEXTS)]
    if name.endswith(".parquet"):
        import pyarrow as pa

        pq.write_table(pa.Table.from_pylist(records), path, row_group_size=90)
    else:
        write_jsonl(records, name)
    found = []
    for workers in (1, 2, 3):
        cfg = config(
            tmp_path,
            path,
            tokenizer_folder,
            output_path=str(tmp_path / f"out{workers}"),
            tokenize_workers=workers,
            loading_workers=1,
            saving_workers=workers,
            tokens_per_shard=1000,
            splits={"training": 0.9, "validation": 0.1},
            dataset={"loss_masking_spans": "spans", "columns": ["id"]},
        )
        make(cfg)
        found.append(checksums(tmp_path / f"out{workers}"))
    assert found[0] == found[1] == found[2]
    assert len(found[0]) > 15


def test_chunking_does_not_show(tmp_path, texts_file, tokenizer_folder, monkeypatch):
    make(config(tmp_path, texts_file, tokenizer_folder))
    whole = checksums(tmp_path / "out")
    monkeypatch.setattr(sources, "CHUNK_BYTES", 333)
    make(config(tmp_path, texts_file, tokenizer_folder, output_path=str(tmp_path / "other")))
    assert checksums(tmp_path / "other") == whole


# begin and end tokens


FRAMED = ["plain", "<|begin_of_text|>begun", "ended<|end_of_text|>", "<|begin_of_text|>both<|end_of_text|>"]


def test_begin_and_end_are_never_doubled(tmp_path, write_jsonl, tokenizer_folder):
    source = write_jsonl([{"text": text} for text in [*FRAMED, "<|end_of_text|>", "<|begin_of_text|>"]])
    make(config(tmp_path, source, tokenizer_folder, dataset={"special_tokens": "parse"}))
    found = documents(tmp_path / "out" / "data")
    for document in found:
        assert (document[0], document[-1]) == (BOS, EOS)
        assert (document.count(BOS), document.count(EOS)) == (1, 1)
    tokenizer = load_tokenizer(tokenizer_folder)
    assert [tokenizer.decode(d[1:-1]) for d in found] == ["plain", "begun", "ended", "both", "", ""]


def test_special_strings_in_text_stay_text(tmp_path, write_jsonl, tokenizer_folder):
    make(config(tmp_path, write_jsonl([{"text": text} for text in FRAMED]), tokenizer_folder))
    found = documents(tmp_path / "out" / "data")
    tokenizer = load_tokenizer(tokenizer_folder)
    assert [tokenizer.decode(d[1:-1]) for d in found] == FRAMED
    assert all((d.count(BOS), d.count(EOS)) == (1, 1) for d in found)


def test_same_token_begins_and_ends(tmp_path, write_jsonl, tokenizer_folder):
    """As GPT-2: one token in both roles; a document of that token alone still has both ends."""
    tokenizer = {"path": str(tokenizer_folder), "bos_token": "<|end_of_text|>"}
    source = write_jsonl(
        [{"text": text} for text in ["a", "<|end_of_text|>", "<|end_of_text|>a<|end_of_text|>"]]
    )
    make(config(tmp_path, source, tokenizer, dataset={"special_tokens": "parse"}))
    a = load_tokenizer(tokenizer_folder).encode("a")
    assert documents(tmp_path / "out" / "data") == [[EOS, *a, EOS], [EOS, EOS], [EOS, *a, EOS]]


@pytest.mark.parametrize(
    ("options", "first", "last"),
    [
        ({"add_bos": False}, None, EOS),
        ({"add_eos": False}, BOS, None),
        ({"add_bos": False, "add_eos": False}, None, None),
        ({"eos_token": "!"}, BOS, "!"),
        ({"add_bos": True, "add_eos": True}, BOS, EOS),
    ],
)
def test_ends_are_config(tmp_path, write_jsonl, tokenizer_folder, options, first, last):
    make(config(tmp_path, write_jsonl([{"text": "sea"}]), {"path": str(tokenizer_folder), **options}))
    tokenizer = load_tokenizer(tokenizer_folder)
    if isinstance(last, str):
        last = tokenizer.special_token(last, "").id
    ids = tokenizer.encode("sea")
    expected = ([] if first is None else [first]) + ids + ([] if last is None else [last])
    assert documents(tmp_path / "out" / "data") == [expected]


def test_llama_3_separator(tmp_path, shared_data, write_jsonl):
    lines: list[str] = []
    folder = shared_data / "tokenizers" / "llama3"
    source = write_jsonl([{"text": "Hello<|eot_id|>"}])
    cfg = config(tmp_path, source, {"path": str(folder), "eos_token": "<|end_of_text|>"})
    prepare(cfg, report=lines.append, terminal=False)
    (document,) = documents(tmp_path / "out" / "data")
    assert (document[0], document[-1]) == (128000, 128001)
    assert 128009 not in document
    assert TokenStore(tmp_path / "out" / "data").dtype == np.uint32
    assert not [line for line in lines if line.startswith("note")]
    prepare(
        config(tmp_path, source, folder, output_path=str(tmp_path / "2")), report=lines.append, terminal=False
    )
    assert any("documents end with <|eot_id|>, this tokenizer's end of turn" in line for line in lines)


# spans


def masks(path: Path) -> list[list[int]]:
    store = TokenStore(path)
    return [store.lane("loss_mask", i).tolist() for i in range(store.num_documents)]


def test_spans_by_hand(tmp_path, write_jsonl, tokenizer_folder):
    # Digits are a token each here (no merges over "0-9" were learnt but "42"), so a character is a token.
    text = "135790"
    assert len(load_tokenizer(tokenizer_folder).encode(text)) == 6
    cases = {
        "none": ([], [0, 0, 0, 0, 0, 0, 0, 0]),
        "middle": ([[2, 3]], [0, 0, 0, 1, 1, 0, 0, 0]),
        "begin": ([[0, 0]], [1, 1, 0, 0, 0, 0, 0, 0]),
        "end": ([[5, 5]], [0, 0, 0, 0, 0, 0, 1, 1]),
        "all": ([[0, 5]], [1] * 8),
        "nested, unsorted, empty": ([[4, 4], [1, 3], [2, 2], [5, 4]], [0, 0, 1, 1, 1, 1, 0, 0]),
    }
    source = write_jsonl([{"text": text, "spans": spans} for spans, _ in cases.values()])
    make(config(tmp_path, source, tokenizer_folder, dataset={"loss_masking_spans": "spans"}))
    assert TokenStore(tmp_path / "out" / "data").lanes == ("loss_mask",)
    assert masks(tmp_path / "out" / "data") == [mask for _, mask in cases.values()]


def test_spans_do_not_change_the_tokens(tmp_path, write_jsonl, tokenizer_folder):
    rows = [{"text": text, "spans": [[1, 2], [len(text) - 2, len(text) - 1]]} for text in TEXTS]
    source = write_jsonl(rows)
    make(config(tmp_path, source, tokenizer_folder))
    make(
        config(
            tmp_path,
            source,
            tokenizer_folder,
            output_path=str(tmp_path / "spans"),
            dataset={"loss_masking_spans": "spans"},
        )
    )
    assert documents(tmp_path / "spans" / "data") == documents(tmp_path / "out" / "data")


def test_chat_text_with_spans_parses_special_tokens(tmp_path, write_jsonl, tokenizer_folder):
    text = "<|begin_of_text|>question<|end_of_text|>answer<|end_of_text|>"
    first_end = text.index("answer") - 1
    source = write_jsonl([{"text": text, "spans": [[0, first_end]]}])
    schema = {"type": "text_column", "input_column": "text", "loss_masking_spans_column": "spans"}
    make(config(tmp_path, source, tokenizer_folder, dataset={"source_schema": schema}))
    tokenizer = load_tokenizer(tokenizer_folder)
    question, answer = tokenizer.encode("question"), tokenizer.encode("answer")
    assert documents(tmp_path / "out" / "data") == [[BOS, *question, EOS, *answer, EOS]]
    assert masks(tmp_path / "out" / "data") == [[1] * (len(question) + 2) + [0] * (len(answer) + 1)]


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([[0, 3]], r"record 3: span \[0, 3\] lies beyond the text, whose last character is 2"),
        (None, "record 3: the spans are NoneType, not a list"),
    ],
)
def test_bad_spans_name_the_record(tmp_path, write_jsonl, tokenizer_folder, spans, message):
    source = write_jsonl([{"text": "abc", "spans": []}] * 2 + [{"text": "abc", "spans": spans}])
    with pytest.raises(UserError, match=message):
        make(config(tmp_path, source, tokenizer_folder, dataset={"loss_masking_spans": "spans"}))
    assert [path.name for path in tmp_path.iterdir()] == ["texts.jsonl"]


def test_guides_sft_config(tmp_path, shared, shared_data, monkeypatch, capsys):
    """sft-prepare.yaml as printed, on a small save_to_disk folder with its column names."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sft-tutorial").mkdir()
    (tmp_path / "sft-tutorial" / "Llama-3.1-8B").symlink_to(shared_data / "tokenizers" / "llama3")
    rows = []
    for i in range(30):
        head = f"<|start_header_id|>user<|end_header_id|>\n\n{TEXTS[i]}<|eot_id|>"
        rows.append({"text": head + f"yes, {i}.<|eot_id|>", "spans": [[0, len(head) - 1]]})
    datasets.Dataset.from_list(rows).save_to_disk("sft-tutorial/hf_dataset")
    document = yaml.safe_load((shared / "configs" / "sft-prepare.yaml").read_text())
    assert run_prepare(PrepareConfig.model_validate(document)) == 0
    printed = capsys.readouterr().out
    assert "loading_workers 32, tokenize_workers 32, saving_workers 32: this machine has" in printed
    assert "trust_remote_code: has no effect" in printed
    output = tmp_path / "sft-tutorial" / "tokenized" / "Llama-3.1-8B"
    counts = [
        yaml.safe_load((output / f"fast_llm_config_{n}.yaml").read_text()) for n in ("training", "validation")
    ]
    assert [c["num_documents"] for c in counts] == [29, 1]
    tokenizer = load_tokenizer("sft-tutorial/Llama-3.1-8B")
    seen = []
    for name in ("training", "validation"):
        store = TokenStore(output / name)
        for i in range(store.num_documents):
            tokens, mask = store.document(i), store.lane("loss_mask", i)
            assert tokens[0] == 128000
            assert tokens.tolist().count(128009) == 2
            trained = tokenizer.decode(tokens[mask == 0])
            assert trained.endswith(".<|eot_id|>")
            seen.append(trained)
    assert sorted(seen) == sorted(f"yes, {i}.<|eot_id|>" for i in range(30))


def test_documented_examples(tmp_path, write_jsonl, tokenizer_folder):
    page = (Path(__file__).parents[2] / "docs" / "data-preparation.md").read_text()
    first, *_ = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]
    PrepareConfig.model_validate(first)
    record = json.loads(re.search(r"```json\n(.*?)```", page, re.DOTALL)[1])
    make(config(tmp_path, write_jsonl([record]), tokenizer_folder, dataset={"loss_masking_spans": "spans"}))
    store, tokenizer = TokenStore(tmp_path / "out" / "data"), load_tokenizer(tokenizer_folder)
    assert tokenizer.decode(store.document(0)[store.lane("loss_mask", 0) == 0]) == " 42<|end_of_text|>"


# what is left out, and columns


def test_empty_documents_and_lone_surrogates_are_counted(tmp_path, write_jsonl, tokenizer_folder):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n{"text": ""}\n\n{"text": "x\\ud800y"}\n')
    lines: list[str] = []
    summary = prepare(config(tmp_path, path, tokenizer_folder), report=lines.append, terminal=False)
    assert (summary["documents"], summary["empty"], summary["repaired"]) == (2, 2, 1)
    assert "2 empty documents left out; 1 documents with lone surrogates (now U+FFFD)" in lines
    assert (
        load_tokenizer(tokenizer_folder).decode(documents(tmp_path / "out" / "data")[1][1:-1]) == "x\ufffdy"
    )


def test_columns_stay_beside_their_documents(tmp_path, tokenizer_folder, monkeypatch):
    monkeypatch.setattr(columns, "ROWS", 10)
    for i in range(60):
        path = tmp_path / "code" / f"d{i % 7}" / f"{i:03}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"x = {i}\n" if i % 9 else "")
    (tmp_path / "code" / "bad.py").write_bytes(b"\xff")
    (tmp_path / "code" / "LICENSE").write_text("Apache License\nVersion 2.0, January 2004")
    splits = {"training": 0.7, "validation": 0.3}
    options = {"extensions": [".py"], "min_file_bytes": 0}
    summary = make(config(tmp_path, tmp_path / "code", tokenizer_folder, splits=splits, dataset=options))
    assert (summary["documents"], summary["empty"], summary["unreadable"]) == (53, 7, 1)
    tokenizer, paths = load_tokenizer(tokenizer_folder), []
    for name in splits:
        table = pq.read_table(tmp_path / "out" / name / "columns.parquet").to_pylist()
        store = TokenStore(tmp_path / "out" / name)
        assert len(table) == store.num_documents
        assert "columns.parquet" in store.manifest["files"]
        for i, row in enumerate(table):
            assert tokenizer.decode(store.document(i)[1:-1]) == f"x = {int(Path(row['path']).stem)}\n"
            assert row["license"] == "Apache-2.0"
            paths.append(row["path"])
    assert len(set(paths)) == 53


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "no documents to prepare"),
        (["", ""], {}, r"no documents to prepare \(2 empty documents left out\)"),
        (["a"], {"splits": {"a": 0.5, "b": 0.5}}, r"1 documents cannot fill 2 splits; '(a|b)' is left empty"),
    ],
)
def test_too_little(tmp_path, write_jsonl, tokenizer_folder, texts, options, message):
    source = write_jsonl([{"text": text} for text in texts])
    with pytest.raises(UserError, match=message):
        make(config(tmp_path, source, tokenizer_folder, **options))
    assert [path.name for path in tmp_path.iterdir()] == ["texts.jsonl"]


# the output folder


def test_again_is_already_there_and_something_else_is_refused(
    tmp_path, texts_file, tokenizer_folder, monkeypatch
):
    monkeypatch.setattr(ranks_module, "available_cores", lambda: 2)
    cfg = config(tmp_path, texts_file, tokenizer_folder, splits={"training": 0.9, "validation": 0.1})
    first = make(cfg)
    before = checksums(tmp_path / "out")
    lines: list[str] = []
    again = prepare(cfg.model_copy(update={"tokenize_workers": 2}), report=lines.append)
    assert lines == [f"{tmp_path / 'out'} is already there, made from the same data with the same config"]
    assert again == first | {"already_there": True}
    other = config(tmp_path, texts_file, tokenizer_folder, splits={"training": 0.9, "validation": 0.2})
    with pytest.raises(UserError, match=r"made from something else \(config.splits.validation: 0.1 → 0.2\)"):
        make(other)
    assert checksums(tmp_path / "out") == before
    make(other, overwrite=True)
    assert checksums(tmp_path / "out") != before
    assert not make(cfg, overwrite=True)["already_there"]
    assert checksums(tmp_path / "out") == before
    texts_file.write_text(texts_file.read_text().replace("ship", "shop"))
    with pytest.raises(UserError, match=r"made from something else \(source.sha256"):
        make(cfg)


def test_both_missing_paths_at_once(tmp_path):
    with pytest.raises(UserError) as caught:
        make(config(tmp_path, tmp_path / "texts.jsonl", tmp_path / "tokenizer"))
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["tokenizer.path", "dataset"]


def test_foreign_output_folder(tmp_path, texts_file, tokenizer_folder):
    (tmp_path / "out").mkdir()
    make(config(tmp_path, texts_file, tokenizer_folder))  # an empty one is fine
    mine = tmp_path / "out" / "thesis.txt"
    mine.write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"holds other files \(thesis\.txt\)"):
            make(config(tmp_path, texts_file, tokenizer_folder), overwrite=overwrite)
    assert mine.read_text() == "years of work"
    (tmp_path / "out" / "prepare.json").write_text("{")
    with pytest.raises(UserError, match=r"holds other files \(data\)"):
        make(config(tmp_path, texts_file, tokenizer_folder), overwrite=True)


def test_damaged_output_is_not_already_there(tmp_path, texts_file, tokenizer_folder):
    make(config(tmp_path, texts_file, tokenizer_folder))
    (tmp_path / "out" / "data" / "lengths.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"lengths\.bin has 0 bytes"):
        make(config(tmp_path, texts_file, tokenizer_folder))


def test_two_at_once_are_refused(tmp_path, texts_file, tokenizer_folder):
    code = (
        "import sys; from pathlib import Path; from modelyard.data.output import output_folder\n"
        "with output_folder(Path(sys.argv[1]), {}): print('writing', flush=True); sys.stdin.read()"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "out")]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"writing\n"
        with pytest.raises(UserError, match="another prepare is writing"):
            make(config(tmp_path, texts_file, tokenizer_folder))
        other.kill()
    make(config(tmp_path, texts_file, tokenizer_folder))


RUN = """
import sys, yaml
from modelyard.config.prepare import PrepareConfig
from modelyard.data import sources, workers
from modelyard.data.prepare import run_prepare
from modelyard.errors import UserError
sources.CHUNK_BYTES = 2000
import modelyard.data.ranks as module
module.available_cores = lambda: 2
try:
    run_prepare(PrepareConfig.model_validate(yaml.safe_load(sys.argv[1])))
except UserError as error:
    sys.exit(str(error))
"""


def as_process(cfg: PrepareConfig, **options: Any) -> subprocess.Popen:
    text = json.dumps(cfg.model_dump(mode="json", exclude_unset=True))
    return subprocess.Popen(
        [sys.executable, "-c", RUN, text], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, **options
    )


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_killed_at_any_moment_leaves_nothing_readable(tmp_path, write_jsonl, tokenizer_folder, sign):
    source = write_jsonl([{"text": " ".join(TEXTS)}] * 1500)
    cfg = config(
        tmp_path,
        source,
        tokenizer_folder,
        tokenize_workers=2,
        tokens_per_shard=5000,
        splits={"a": 0.5, "b": 0.5},
    )
    for patience in (0.0, 0.1, 0.3):
        process = as_process(cfg)
        tokens = tmp_path / "out.tmp" / "a.tmp" / "tokens_00001.bin"
        deadline = time.monotonic() + 30
        while not tokens.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(patience)
        assert process.poll() is None, process.stderr.read()
        process.send_signal(sign)
        process.wait()
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.rglob("manifest.json"))
        assert (tmp_path / "out.tmp").exists() == (sign == signal.SIGKILL)
    small = write_jsonl([{"text": text} for text in TEXTS])
    make(config(tmp_path, small, tokenizer_folder, splits={"a": 0.5, "b": 0.5}))
    assert len(documents(tmp_path / "out" / "a") + documents(tmp_path / "out" / "b")) == 300
    assert not (tmp_path / "out.tmp").exists()


@pytest.mark.slow
def test_killed_anywhere_output_is_whole_or_absent(tmp_path, write_jsonl, tokenizer_folder):
    cfg = config(
        tmp_path, write_jsonl([{"text": text} for text in TEXTS]), tokenizer_folder, splits={"a": 9, "b": 1}
    )
    make(cfg)
    whole = checksums(tmp_path / "out")
    outcomes = set()
    for step in range(40):
        for leftover in ("out", "out.tmp"):
            shutil.rmtree(tmp_path / leftover, ignore_errors=True)
        process = as_process(cfg)
        while not (tmp_path / "out.tmp").exists() and process.poll() is None:
            time.sleep(0.001)
        time.sleep(step * 0.003)
        process.kill()
        process.wait()
        outcomes.add((tmp_path / "out").exists())
        if (tmp_path / "out").exists():
            assert checksums(tmp_path / "out") == whole
    assert outcomes == {False, True}


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path, write_jsonl, tokenizer_folder):
    source = write_jsonl([{"text": " ".join(TEXTS)}] * 300)

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    process = as_process(config(tmp_path, source, tokenizer_folder), preexec_fn=limit)
    _, error = process.communicate()
    assert process.returncode == 1
    (line,) = error.decode().splitlines()
    assert line.startswith(
        f"File too large (a limit on file size: ulimit -f) while writing {tmp_path / 'out'}"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["texts.jsonl"]


def test_disk_is_checked_before_starting(tmp_path, texts_file, tokenizer_folder, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(prepare_module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(
        UserError,
        match=r"has 1000 B free, and the tokens need about 7.1 KiB; dataset.disable_disk_space_check: true",
    ):
        make(config(tmp_path, texts_file, tokenizer_folder))
    make(config(tmp_path, texts_file, tokenizer_folder, dataset={"disable_disk_space_check": True}))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_input(tmp_path, write_jsonl, tokenizer_folder):
    """40 MB of text in little more memory than 2 MB (the interpreter and its libraries are most of it)."""

    def peak(copies: int) -> int:
        source = write_jsonl([{"text": " ".join(TEXTS[:100])}] * copies)
        cfg = config(tmp_path, source, tokenizer_folder, output_path=str(tmp_path / str(copies)))
        process = as_process(cfg)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status
        assert status == 0, process.stderr.read()
        return usage.ru_maxrss * 1024

    assert peak(10_000) - peak(500) < 15_000_000


def test_lines_without_a_terminal(tmp_path, texts_file, tokenizer_folder, monkeypatch):
    monkeypatch.setattr(sources, "CHUNK_BYTES", 2000)
    monkeypatch.setattr("modelyard.data.progress.LINE_SECONDS", 0.0)
    lines: list[str] = []
    prepare(config(tmp_path, texts_file, tokenizer_folder), report=lines.append, terminal=False)
    progress = [line for line in lines if "ETA" in line]
    assert len(progress) > 5
    assert progress[-1].startswith("prepare 100% | 300 documents | ")
    assert "tokens/s | ETA 0:00:00" in progress[-1]
    assert lines[-2].startswith("prepared 300 documents, ")
    assert lines[-1].startswith(f"{tmp_path / 'out' / 'fast_llm_config.yaml'}: 300 documents, ")


def test_output_that_cannot_be_made_is_one_line(tmp_path, texts_file, tokenizer_folder):
    for output in (texts_file, texts_file / "out"):
        with pytest.raises(UserError, match=r"output_path .* (is a file|cannot be made)") as caught:
            make(config(tmp_path, texts_file, tokenizer_folder, output_path=str(output)))
        assert len(caught.value.problems) == 1


def test_no_tokenizer_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The line of the config, the key, and what makes one."""
    (tmp_path / "texts.jsonl").write_text('{"text": "x"}\n')
    file = tmp_path / "prepare.yaml"
    file.write_text(
        f"output_path: {tmp_path / 'out'}\ndataset: {{path: {tmp_path / 'texts.jsonl'}}}\n"
        f"tokenizer:\n  path: {tmp_path / 'gone'}\n"
    )
    assert main(["prepare", str(file)]) == 2
    assert capsys.readouterr().err == (
        f"error: {file}:4: tokenizer.path: {tmp_path / 'gone'} does not exist (there is no 'gone' in {tmp_path}); "
        "`modelyard tokenizer train` makes one\n"
    )
