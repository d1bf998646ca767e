"""Every kind of damage to prepared data is found before a token of it is trained on: one line that names the file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from modelyard.config.batch import BatchConfig
from modelyard.config.data import MemmapDataset, SamplingConfig
from modelyard.data.reading import FileArray
from modelyard.data.store import StoreWriter, TokenStore
from modelyard.data.stream import DataStream
from modelyard.errors import UserError

DOCUMENTS = [np.arange(1 + i % 9) + i % 90 for i in range(700)]
FILES = [
    "manifest.json",
    "lengths.bin",
    "offsets.bin",
    "tokens_00000.bin",
    "tokens_00001.bin",
    "loss_mask_00000.bin",
    "loss_mask_00001.bin",
    "columns.parquet",
    "tokenizer/tokenizer.json",
    "tokenizer/LICENSE",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "store"
    files = {"tokenizer.json": b'{"model": {}}', "LICENSE": b"free"}
    with StoreWriter(
        path, vocab_size=100, lanes={"loss_mask": "uint8"}, tokens_per_shard=2000, tokenizer_files=files
    ) as writer:
        for document in DOCUMENTS:
            writer.append(document, {"loss_mask": document % 2})
        (writer.temporary / "columns.parquet").write_bytes(b"PAR1 and so on")
        writer.include("columns.parquet")
    return path


@pytest.fixture
def store(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "store"))


def stream(path: Path, **batch) -> DataStream:
    shape = {"sequence_length": 32, "batch_size": 4} | batch
    return DataStream(
        MemmapDataset(type="memmap", path=path),
        name="training",
        sampling=SamplingConfig(),
        batch=BatchConfig(**shape),
        vocab_size=100,
    )


def test_the_list_of_files_is_complete(whole):
    assert sorted(FILES) == sorted(p.relative_to(whole).as_posix() for p in whole.rglob("*") if p.is_file())


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda data: data[:-1], ("torn", "cannot be read", "incomplete")),
        (lambda data: data[: len(data) // 2], ("torn", "cannot be read", "incomplete")),
        (lambda data: b"", ("0 bytes", "cannot be read")),
        (lambda data: data + b"\0", ("torn", "cannot be read")),
        (None, ("missing", "no manifest.json")),
    ],
    ids=["a byte short", "half", "empty", "a byte too many", "gone"],
)
def test_sizes_are_seen_when_it_is_opened(
    store, name, harm: Callable[[bytes], bytes] | None, words: tuple[str, ...]
):
    file = store / name
    data = file.read_bytes()
    file.unlink()
    if harm is not None:
        file.write_bytes(harm(data))
    if harm is not None and name == "manifest.json" and harm(data) == data[:-1]:
        stream(store)  # Only the line end is gone: all that it says is there.
        return
    with pytest.raises(UserError) as caught:
        stream(store)
    (line,) = caught.value.problems
    assert str(file if name != "manifest.json" or harm is not None else store) in line
    assert any(word in line for word in words)


@pytest.mark.parametrize("name", FILES[1:])
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_one_flipped_bit_is_seen_by_its_checksum(store, name, place):
    file = store / name
    data = bytearray(file.read_bytes())
    data[round(place * (len(data) - 1))] ^= 4
    file.write_bytes(data)
    opened = TokenStore(store)
    assert opened.damaged_files() == [f"{file} does not have the checksum that manifest.json has for it"]
    assert str(file) in opened.verify()[0]


def test_every_flipped_bit_of_a_manifest_is_seen_or_changes_no_token(store, whole):
    """The manifest is what all else is checked against. What is left unseen are names that nothing is read by."""
    file = store / "manifest.json"
    data = file.read_bytes()
    expected = TokenStore(whole)
    unseen = []
    for at in range(0, len(data), 3):
        file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        try:
            opened = TokenStore(store)
            problems = opened.damaged_files()
        except UserError as error:
            problems = error.problems
        if not problems:
            unseen.append(at)
            assert opened.document(650).tolist() == expected.document(650).tolist()
            assert opened.num_tokens == expected.num_tokens
    assert len(unseen) < 0.2 * len(data) / 3


def test_a_file_cut_while_it_is_in_use(store):
    """What a mapping answers with SIGBUS."""
    made = stream(store)
    made.batch(0)
    file = store / "tokens_00001.bin"
    with file.open("r+b") as shard:
        shard.truncate(100)
    message = r"tokens_00001\.bin has 100 bytes, and those up to .* are needed: it was cut short while in use"
    with pytest.raises(UserError, match=message):
        made.rows(0, 500)


def test_a_file_that_is_gone_before_it_is_first_read(store):
    made = stream(store)
    (store / "tokens_00000.bin").unlink()
    with pytest.raises(UserError, match=r"tokens_00000\.bin cannot be read \(No such file"):
        made.batch(0)


def test_more_files_than_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr("modelyard.data.reading.MOST_OPEN", 3)
    arrays = []
    for number in range(8):
        file = tmp_path / str(number)
        file.write_bytes(np.arange(number, number + 5, dtype="<u4").tobytes())
        arrays.append(FileArray(file, np.dtype("<u4"), 5))
    for _ in range(2):
        assert [array.read(1, 3).tolist() for array in arrays] == [[n + 1, n + 2] for n in range(8)]
        assert sum(array._file is not None for array in arrays) <= 3
    with pytest.raises(IndexError, match="2:6 of the 5 numbers"):
        arrays[0].read(2, 6)


def test_reads_of_more_than_one_call(tmp_path, monkeypatch):
    monkeypatch.setattr("modelyard.data.reading._LARGEST_READ", 7)
    (tmp_path / "f").write_bytes(b"xx" + np.arange(20, dtype="<u2").tobytes())
    array = FileArray(tmp_path / "f", np.dtype("<u2"), 20, at=2)
    assert array.read(3, 20).tolist() == list(range(3, 20))
    assert array.read(5, 5).tolist() == []


def test_manifest_of_other_counts(store):
    manifest = json.loads((store / "manifest.json").read_text())
    for key, message in (("documents", r"lengths\.bin should have 2804 bytes"), ("tokens", "do not add up")):
        (store / "manifest.json").write_text(json.dumps(manifest | {key: manifest[key] + 1}))
        with pytest.raises(UserError, match=message):
            stream(store)
