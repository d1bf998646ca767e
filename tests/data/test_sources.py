"""Every kind of source gives its texts in order, whatever the chunk size; bad records are named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from modelyard.config.prepare import PrepareDatasetConfig
from modelyard.data import sources
from modelyard.data.fields import Fields
from modelyard.data.sources import RecordError, open_source
from modelyard.data.tokenizer_training import source_texts
from modelyard.errors import UserError

from .conftest import sentence

TEXTS = [sentence(i) + ("\u2028line\u0085break" if i % 11 == 0 else "") for i in range(60)]
RECORDS = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]


def config(path: Path | str, **options: Any) -> PrepareDatasetConfig:
    return PrepareDatasetConfig.model_validate({"path": str(path), **options})


def texts(path: Path | str, **options: Any) -> list[str]:
    return list(source_texts(open_source(config(path, **options), [])))


def records(path: Path | str, **options: Any) -> list[tuple[str, Any, tuple[str | None, ...]] | None]:
    """Text, spans and columns of each record."""
    source = open_source(config(path, **options), [])
    found = [record for chunk in source.chunks() for record in source.read(chunk)]
    return [record and (record.text, record.spans, record.columns) for record in found]


@pytest.fixture(params=[1 << 20, 200, 7])
def chunk_bytes(request, monkeypatch):
    """The usual chunk, one of a few records, and one smaller than a record."""
    monkeypatch.setattr(sources, "CHUNK_BYTES", request.param)
    return request.param


@pytest.mark.parametrize("name", ["texts.jsonl", "texts.jsonl.gz", "texts.jsonl.zst"])
def test_jsonl(chunk_bytes, write_jsonl, name):
    path = write_jsonl(RECORDS, name)
    assert texts(path) == TEXTS
    source = open_source(config(path), [])
    chunks = list(source.chunks())
    assert sum(chunk.weight for chunk in chunks) == source.total == path.stat().st_size
    assert len(chunks) > 1 or chunk_bytes == 1 << 20


@pytest.mark.parametrize("ending", ["", "\n"])
@pytest.mark.parametrize("packed", [False, True])
def test_jsonl_without_last_line_end_and_with_empty_lines(chunk_bytes, tmp_path, ending, packed):
    data = ("\ufeff" + '{"text": "a"}\n\n{"text": "b"}\r\n  \n{"text": "c"}' + ending).encode()
    path = tmp_path / ("x.jsonl.gz" if packed else "x.jsonl")
    path.write_bytes(gzip.compress(data) if packed else data)
    assert texts(path) == ["a", "b", "c"]
    assert [record[0] for record in records(path)] == ["a", "", "b", "", "c"]


def test_multi_member_gzip_and_multi_frame_zstd(chunk_bytes, tmp_path):
    lines = [json.dumps(record).encode() + b"\n" for record in RECORDS]
    halves = [b"".join(lines[:30]), b"".join(lines[30:])]
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(gzip.compress(half) for half in halves))
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(zstandard.compress(half) for half in halves))
    assert texts(tmp_path / "a.jsonl.gz") == texts(tmp_path / "a.jsonl.zst") == TEXTS


@pytest.mark.parametrize("name", ["texts.jsonl.gz", "texts.jsonl.zst"])
def test_compressed_file_cut_short(write_jsonl, name):
    path = write_jsonl(RECORDS, name)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=rf"{name} is damaged or cut short"):
        texts(path)


def test_parquet_with_row_groups(chunk_bytes, tmp_path):
    table = pa.table({"text": TEXTS, "id": range(60), "spans": [[[0, 1]]] * 60})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=23)
    found = records(tmp_path / "x.parquet", loss_masking_spans="spans", columns=["id"])
    assert [record[0] for record in found] == TEXTS
    assert found[5] == (TEXTS[5], [[0, 1]], ("5",))


def test_parquet_rows_asked_for_out_of_order(tmp_path):
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "x.parquet", row_group_size=25)
    reader = sources.ParquetReader(tmp_path / "x.parquet", Fields("text", None, ()))
    expect = [(text,) for text in TEXTS]
    assert reader.rows(0, 3, 5) == expect[3:5]
    assert reader.rows(0, 20, 25) == expect[20:25]
    assert reader.rows(0, 0, 4) == expect[:4]
    assert reader.rows(2, 1, 9) == expect[51:59]
    assert [rows for rows, _ in reader.groups()] == [25, 25, 10]


@pytest.mark.parametrize(
    "kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_all_string_types(tmp_path, kind):
    path = tmp_path / "x.arrow"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, pa.schema([("text", kind)])) as writer:
        writer.write(pa.record_batch([pa.array(TEXTS).cast(kind)], names=["text"]))
    assert texts(path) == TEXTS


@pytest.mark.parametrize("opener", [pa.ipc.new_stream, pa.ipc.new_file])
def test_arrow(chunk_bytes, tmp_path, opener):
    table = pa.table({"text": TEXTS})
    with pa.OSFile(str(tmp_path / "x.arrow"), "wb") as file, opener(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=17)
    assert texts(tmp_path / "x.arrow") == TEXTS


def test_saved_datasets(chunk_bytes, tmp_path):
    datasets = pytest.importorskip("datasets")
    whole = datasets.Dataset.from_list(RECORDS)
    whole.save_to_disk(tmp_path / "one", num_shards=3)
    assert texts(tmp_path / "one") == TEXTS
    whole.select(range(40, 10, -1)).save_to_disk(tmp_path / "selected")
    assert texts(tmp_path / "selected") == TEXTS[40:10:-1]
    splits = datasets.DatasetDict({"train": whole.select(range(50)), "test": whole.select(range(50, 60))})
    splits.save_to_disk(tmp_path / "dict")
    assert texts(tmp_path / "dict") == TEXTS[:50]
    assert texts(tmp_path / "dict", split="test") == TEXTS[50:]
    with pytest.raises(UserError, match="has test, train; did you mean 'test'"):
        texts(tmp_path / "dict", split="tests")
    next((tmp_path / "one").glob("*-00001-*")).unlink()
    with pytest.raises(UserError, match=r"00001-of-00003\.arrow is missing, but"):
        texts(tmp_path / "one")


@pytest.mark.parametrize("packed", [False, True])
def test_text_files(chunk_bytes, tmp_path, packed):
    text = "first line\n still first\n\n\n  second é\r\n \r\nthird"
    path = tmp_path / ("x.txt.zst" if packed else "x.txt")
    path.write_bytes(zstandard.compress(text.encode()) if packed else text.encode())
    assert texts(path) == [text]
    assert texts(path, sample_by="line") == ["first line", " still first", "  second é", " ", "third"]
    assert texts(path, sample_by="paragraph") == ["first line\n still first", "  second é\r", "third"]


def test_folder_of_mixed_files_in_name_order(write_jsonl, tmp_path):
    write_jsonl(RECORDS[:10], "in/b.jsonl")
    write_jsonl(RECORDS[10:20], "in/a/z.jsonl.gz")
    pq.write_table(pa.table({"text": TEXTS[20:30]}), tmp_path / "in" / "c.parquet")
    (tmp_path / "in" / "d.txt").write_text("a text file")
    (tmp_path / "in" / ".hidden.txt").write_text("no")
    (tmp_path / "in" / "readme.md").write_text("no")
    assert texts(tmp_path / "in") == TEXTS[10:20] + TEXTS[:10] + TEXTS[20:30] + ["a text file"]
    assert texts(tmp_path / "in", data_files="*.parquet") == TEXTS[20:30]
    assert texts(tmp_path / "in", data_files=["b.jsonl", "./c.parquet"]) == TEXTS[:10] + TEXTS[20:30]
    assert texts(tmp_path / "in", data_directory="a") == TEXTS[10:20]
    with pytest.raises(UserError, match=r"'c.parqet' matches no file in .*; did you mean 'c.parquet'"):
        texts(tmp_path / "in", data_files="c.parqet")
    with pytest.raises(UserError, match=r"data_directory: .*/b does not exist"):
        texts(tmp_path / "in", data_directory="b")


def test_exclude_by_name_path_or_pattern(tmp_path):
    for name in ("a.py", "b_test.py", "test/c.py", "lib/test/d.py", "lib/e.py", "lib/gen/f.py", "gen/g.py"):
        path = tmp_path / "code" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    options = {"extensions": [".py"], "exclude": ["test", "*_test.py", "lib/gen"]}
    assert texts(tmp_path / "code", **options) == ["a.py", "gen/g.py", "lib/e.py"]
    with pytest.raises(UserError, match="exclude chooses files of a folder"):
        texts(tmp_path / "code" / "a.py", exclude=["b"])
    with pytest.raises(UserError, match=r"dataset\.exclude is for a local folder; no/such is not here"):
        texts("no/such", exclude=["b"])


def test_files_named_for_splits(write_jsonl, tmp_path):
    write_jsonl(RECORDS[:10], "in/train-00000-of-00001.jsonl")
    write_jsonl(RECORDS[10:20], "in/test-00000-of-00001.jsonl")
    notices: list[str] = []
    assert list(source_texts(open_source(config(tmp_path / "in"), notices))) == TEXTS[:10]
    assert (
        "1 of 2 files are of other splits than 'train' by their names (test-00000-of-00001.jsonl)"
        in notices[0]
    )
    assert texts(tmp_path / "in", split="test") == TEXTS[10:20]
    with pytest.raises(UserError, match=r"split 'dev': by their names, the files in .* are of: test, train"):
        texts(tmp_path / "in", split="dev")


def test_source_files(chunk_bytes, tmp_path):
    root = tmp_path / "code"
    for name, content in {
        "b.py": "print('b')\n",
        "a/x.py": "# SPDX-License-Identifier: BSD-2-Clause\nx = 1\n",
        "a/binary.py": b"\xff\xfe\x00",
        "a/long.py": "x" * 300,
        "a/empty.py": "",
        "a/note.md": "no",
        ".git/z.py": "no",
        "LICENSE": "Permission is hereby granted, free of charge, to any person … without restriction, including",
        "a/COPYING.txt": "GNU GENERAL PUBLIC LICENSE Version 3, 29 June 2007",
        "a/y.pyi": "y: int\n",
    }.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert records(root, extensions=[".py", "pyi"], max_file_bytes=200) == [
        None,
        ("# SPDX-License-Identifier: BSD-2-Clause\nx = 1\n", None, ("a/x.py", "BSD-2-Clause")),
        ("y: int\n", None, ("a/y.pyi", "GPL-3.0")),
        ("print('b')\n", None, ("b.py", "MIT")),
    ]
    assert [r[0][:1] for r in records(root, extensions=[".py"], min_file_bytes=13, columns=[])] == [
        "x",
        "#",
    ]
    with pytest.raises(UserError, match=r"no file ends in \.rs and has 1 to 1,000,000 bytes"):
        records(root, extensions=["rs"])
    with pytest.raises(UserError, match=r"has 1 to 2 bytes \(5 files of other sizes\)"):
        records(root, extensions=["py"], max_file_bytes=2)
    with pytest.raises(UserError, match="source files have path, license"):
        records(root, extensions=["py"], columns=["stars"])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"txt": "x", "id": 1}, "no field 'text'; the record has 'txt', 'id'; did you mean 'txt'?"),
        ({"text": None, "id": 1}, "field 'text' is null; the record has 'text', 'id'"),
        ({"text": 5}, "field 'text' is int, not text; the record has 'text'"),
        ({"text": ["a"]}, "field 'text' is list, not text"),
        ({}, "no field 'text'; the record has nothing"),
        ([1, 2], "a JSON list, not an object with fields"),
    ],
)
@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
def test_bad_records_are_named(chunk_bytes, write_jsonl, name, bad, message):
    path = write_jsonl([*RECORDS[:30], bad, *RECORDS[31:]], name)
    with pytest.raises(UserError) as caught:
        texts(path)
    assert caught.value.problems[0].startswith(f"{path}: record 31: {message}")
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', r"record 2: not JSON \(Unterminated string"),
        (b'[{"text": "a"},', r"record 2: not JSON .*; the file is one JSON array\? write one record a line"),
        (b'{"text": "\xff"}', r"record 2: not UTF-8 \(invalid start byte at byte 10 of the record\)"),
    ],
)
def test_lines_that_are_no_records(tmp_path, line, message):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "a"}\n' + line + b"\n")
    with pytest.raises(UserError, match=message):
        texts(tmp_path / "x.jsonl")


def test_bad_rows_and_columns(tmp_path):
    pq.write_table(
        pa.table({"text": [*TEXTS[:5], None], "number": range(6)}), tmp_path / "x.parquet", row_group_size=2
    )
    with pytest.raises(UserError, match=r"x.parquet: record 6: field 'text' is null; the record has 'text'"):
        texts(tmp_path / "x.parquet")
    with pytest.raises(
        UserError, match=r"x.parquet: no column 'txt'; it has 'text', 'number'; did you mean 'text'\?"
    ):
        texts(tmp_path / "x.parquet", field="txt")
    with pytest.raises(UserError, match="column 'number' holds int64, not text"):
        texts(tmp_path / "x.parquet", field="number")


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow"])
def test_files_that_are_something_else(tmp_path, name):
    (tmp_path / name).write_bytes(b"ARROW1 nonsense")
    with pytest.raises(UserError, match=f"{name} is not an? (Parquet|Arrow) file, or a damaged one"):
        texts(tmp_path / name)


def test_missing_paths_are_never_hub_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    for name in ("./texts.jsonl", "texts.jsonl", "/none/x", "corpus/part", "~/no-such-folder-here"):
        with pytest.raises(UserError, match="does not exist"):
            texts(name)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("x.jsonl", {"split": "test"}, "is one file, without splits"),
        ("x.jsonl", {"split": "train[:10%]"}, "slices are for Hub datasets"),
        ("x.jsonl", {"config_name": "en"}, "config_name 'en' is for Hub datasets"),
        ("x.jsonl", {"extensions": [".py"]}, "is for a folder of source files"),
        ("x.jsonl", {"data_files": "y"}, "chooses files of a folder"),
        ("x.csv", {}, "no reader for this file name; known are .jsonl"),
        ("x.txt", {"columns": ["id"]}, "have no columns, so no id"),
        ("folder", {}, r"holds no data files .* set dataset.extensions: \[.csv\]"),
    ],
)
def test_impossible_wishes(tmp_path, name, options, message):
    for file in ("x.jsonl", "x.csv", "x.txt", "folder/y.csv"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("{}\n")
    with pytest.raises(UserError, match=message):
        texts(tmp_path / name, **options)


def test_hub_datasets(monkeypatch, chunk_bytes):
    datasets = pytest.importorskip("datasets")
    asked = {}

    def load_dataset(path, name=None, **options):
        asked.update(options, path=path, name=name)
        return datasets.Dataset.from_list(RECORDS).select(range(10, 30))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = texts("org/name", config_name="en", split="train[10:30]", data_files="*.parquet")
    assert found == TEXTS[10:30]
    assert asked == {
        "path": "org/name",
        "name": "en",
        "data_dir": None,
        "data_files": "*.parquet",
        "split": "train[10:30]",
    }
    assert records("org/name", columns=["id"])[0] == (TEXTS[10], None, ("10",))
    with pytest.raises(UserError, match="org/name: no column 'body'; it has 'id', 'text'"):
        texts("org/name", field="body")


def test_unreachable_and_script_only_hub_datasets(monkeypatch):
    datasets = pytest.importorskip("datasets")
    with pytest.raises(
        UserError, match="dataset 'no/such' is not a path here and could not be loaded"
    ) as caught:
        texts("no/such")
    assert len(caught.value.problems) == 1

    def load_dataset(*_, **__):
        raise RuntimeError("Dataset scripts are no longer supported, but found x.py")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match="exists only as a script"):
        texts("org/scripted")


def test_trust_remote_code_is_noted(write_jsonl):
    notices: list[str] = []
    open_source(config(write_jsonl(RECORDS), trust_remote_code=True), notices)
    assert notices == ["dataset.trust_remote_code: has no effect; `datasets` no longer runs dataset scripts"]


def test_record_error_travels_between_processes():
    import pickle

    error = pickle.loads(pickle.dumps(RecordError(3, "why")))
    assert (error.index, error.reason) == (3, "why")


def test_a_long_line_is_read_once(tmp_path, monkeypatch):
    """A line of a thousand chunks: each chunk but the first looks at its own stretch of the file only."""
    monkeypatch.setattr(sources, "CHUNK_BYTES", 100)
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"text": "y" * 100_000}) + "\n" + json.dumps({"text": "z"}) + "\n")
    assert [len(text) for text in texts(path)] == [100_000, 1]
    lengths = [len(sources._lines_between(path, begin, begin + 100)) for begin in range(0, 100_000, 100)]
    assert lengths[0] == 100_013
    assert sum(lengths[1:]) == 0
