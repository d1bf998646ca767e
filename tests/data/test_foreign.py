"""What other programs prepared is read as our own is, and what is wrong with it is said when it is opened."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter

from modelyard.cli import main
from modelyard.config.batch import BatchConfig
from modelyard.config.data import DatasetConfig, SamplingConfig
from modelyard.data import foreign, foreign_file
from modelyard.data import stream as stream_module
from modelyard.data.foreign_file import open_store
from modelyard.data.stream import DataStream, ids_outside_vocabulary
from modelyard.errors import UserError
from tests.config.helpers import TINY

from .foreign_writers import write_file, write_pair
from .in_memory import write_store

DOCUMENTS = [[5, 6, 7], [8], [9, 10, 11, 12], [100, 101]]
SPANS = [[(0, 1)], [], [(1, 1), (3, 3)], [(1, 1)]]  # both inclusive
MASKS = [[1, 1, 0], [0], [0, 1, 0, 1], [0, 1]]


def many(count: int) -> list[list[int]]:
    random = np.random.default_rng(1)
    return [random.integers(0, 250, random.integers(1, 12)).tolist() for _ in range(count)]


def half_open(spans: list[list[tuple[int, int]]]) -> list[list[tuple[int, int]]]:
    return [[(first, last + 1) for first, last in of_one] for of_one in spans]


def check(store, documents: list[list[int]]) -> None:
    assert store.num_documents == len(documents)
    assert store.num_tokens == sum(map(len, documents))
    assert [store.document(i).tolist() for i in range(len(documents))] == documents
    starts = [0, *np.cumsum([len(document) for document in documents]).tolist()]
    assert [store.offset(i) for i in range(len(documents) + 1)] == starts
    assert store.lengths(0, len(documents)).tolist() == [len(document) for document in documents]
    long = max(range(len(documents)), key=lambda i: len(documents[i]))
    assert store.document(long, 1, 3).tolist() == documents[long][1:3]
    assert store.lengths(1, 3).tolist() == [len(documents[1]), len(documents[2])]


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint16", "int32", "int64"])
def test_every_integer_type(tmp_path, dtype):
    check(open_store(write_pair(tmp_path / "p", DOCUMENTS, dtype=dtype)), DOCUMENTS)
    check(open_store(write_file(tmp_path / "f.fast_llm_dataset", DOCUMENTS, dtype=dtype)), DOCUMENTS)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_versions_of_the_pair(tmp_path, version, monkeypatch):
    monkeypatch.setattr(foreign, "_STEP", 512)
    documents = many(1500)
    prefix = write_pair(tmp_path / "shard_0_0", documents, version=version, dtype="int16")
    for name in (prefix, tmp_path / "shard_0_0.bin", tmp_path / "shard_0_0.idx"):
        check(open_store(name), documents)
    store = open_store(prefix)
    assert (store.lanes, store.lane("loss_mask", 0), store.vocab_size) == ((), None, None)
    check(pickle.loads(pickle.dumps(store)), documents)


def test_documents_of_several_sequences(tmp_path, monkeypatch):
    """Megatron's own: a document may be several sequences; one of them here has none."""
    monkeypatch.setattr(foreign, "_STEP", 2)
    prefix = write_pair(tmp_path / "p", DOCUMENTS, documents=[0, 2, 2, 3, 4])
    check(open_store(prefix), [[5, 6, 7, 8], [], [9, 10, 11, 12], [100, 101]])


def test_spans_become_the_loss_mask(tmp_path, monkeypatch):
    monkeypatch.setattr(foreign, "_STEP", 512)
    monkeypatch.setattr(foreign_file, "_STEP", 500)
    stores = [
        open_store(write_pair(tmp_path / f"v{version}", DOCUMENTS * 200, version=version, spans=SPANS * 200))
        for version in (2, 3)
    ]
    stores.append(open_store(write_file(tmp_path / "f", DOCUMENTS * 200, spans=half_open(SPANS * 200))))
    for store in stores:
        check(store, DOCUMENTS * 200)
        assert store.lanes == ("loss_mask",)
        assert [store.lane("loss_mask", i).tolist() for i in range(800)] == MASKS * 200
        assert store.lane("loss_mask", 798, 1, 4).tolist() == [1, 0, 1]
        assert store.lane("loss_mask", 796, 2).tolist() == [0]


def test_single_file(tmp_path, monkeypatch):
    monkeypatch.setattr(foreign_file, "_STEP", 100)
    documents = many(700)
    check(open_store(write_file(tmp_path / "shard_0_0.fast_llm_dataset", documents)), documents)


def config(**values):
    return TypeAdapter(DatasetConfig).validate_python(values)


def stream(dataset, **batch) -> DataStream:
    shape = {"sequence_length": 16, "batch_size": 4} | batch
    return DataStream(
        dataset, name="training", sampling=SamplingConfig(), batch=BatchConfig(**shape), vocab_size=300
    )


@pytest.mark.parametrize("truncate", [True, False])
def test_batches_are_those_of_our_own_store(tmp_path, truncate):
    """Only the key of the order may differ, so it is read as stored."""
    documents = many(900)
    spans = [[(0, len(document) // 2)] for document in documents]
    masks = [[i <= len(document) // 2 for i in range(len(document))] for document in documents]
    paths = [
        write_store(tmp_path / "ours", documents, vocab_size=300, masks=masks),
        write_pair(tmp_path / "theirs", documents, version=3, dtype="int16", spans=spans),
        write_file(tmp_path / "file", documents, dtype="int16", spans=half_open(spans)),
    ]
    batches = []
    for path in paths:
        dataset = config(
            type="sampled", dataset={"type": "memmap", "path": path}, sampling={"shuffle": "disabled"}
        )
        made = stream(dataset, truncate_documents=truncate, use_loss_masking_spans=True)
        batches.append([made.batch(index) for index in range(60)])
    for ours, *others in zip(*batches, strict=True):
        for other in others:
            assert ours.input_ids.equal(other.input_ids)
            assert ours.labels.equal(other.labels)
            assert ours.cu_seqlens.equal(other.cu_seqlens)


def test_shuffled_epoch_has_every_document_once(tmp_path):
    documents = [[i % 251] * (1 + i % 9) for i in range(700)]
    path = write_pair(tmp_path / "p", documents, version=2)
    made = stream(config(type="memmap", path=path), truncate_documents=False)
    rows = round(made.statistics()["datasets"][0]["rows_per_epoch"])
    read = [piece.document for _, pieces in made.pieces(0, rows) for piece in pieces]
    assert sorted(read) == list(range(700))
    assert read != sorted(read)
    assert (
        made.batch(0).input_ids.tolist()
        != stream(
            config(type="sampled", dataset={"type": "memmap", "path": path}, sampling={"seed": 1}),
            truncate_documents=False,
        )
        .batch(0)
        .input_ids.tolist()
    )


def test_fingerprint_follows_tokens_index_and_spans(tmp_path):
    def of(name: str, sequences, **options) -> str:
        return open_store(write_pair(tmp_path / name, sequences, **options)).fingerprint

    same = of("a", DOCUMENTS, version=2, spans=SPANS)
    assert same == of("b", DOCUMENTS, version=2, spans=SPANS)
    others = {
        of("c", [*DOCUMENTS[:3], [100, 102]], version=2, spans=SPANS),
        of("d", [*DOCUMENTS[:2], [9, 10, 11], [12, 100, 101]], version=2, spans=[[], [], [], []]),
        of("e", DOCUMENTS, version=2, spans=[*SPANS[:3], [(0, 1)]]),
        of("f", DOCUMENTS, version=2),
        of("g", DOCUMENTS, version=1, dtype="int64"),
        of("h", DOCUMENTS, documents=[0, 1, 2, 4]),
    }
    assert len(others | {same}) == 7


def test_fingerprint_of_a_large_file_samples_it(tmp_path):
    documents = [np.arange(1000) % 7] * 400
    first = open_store(write_pair(tmp_path / "p", documents)).fingerprint
    data = bytearray((tmp_path / "p.bin").read_bytes())
    data[:4] = b"\1\0\0\0"
    (tmp_path / "p.bin").write_bytes(data)
    assert open_store(tmp_path / "p").fingerprint != first


@pytest.mark.parametrize("value", [300, 5_000_000_000, -4])
def test_tokens_outside_the_vocabulary_are_found_in_the_batch(tmp_path, value):
    path = write_pair(tmp_path / "p", [*DOCUMENTS, [1, value]], dtype="int64")
    with pytest.raises(UserError, match=rf"token {value} in document 4 of {path} is (outside|negative)"):
        stream(config(type="memmap", path=path)).batch(0)


@pytest.mark.parametrize("write", [write_pair, write_file])
@pytest.mark.parametrize(
    ("dtype", "value", "said"),
    [
        ("int16", 299, None),
        ("int16", 300, "is outside the model's vocabulary of 300: was the data prepared"),
        ("uint16", 65535, "is outside the model's vocabulary of 300"),
        ("int64", 5_000_000_000, "is outside"),
        ("int32", -4, "is negative"),
    ],
)
def test_ids_that_are_no_tokens_are_found_before_any_batch(tmp_path, monkeypatch, write, dtype, value, said):
    monkeypatch.setattr(foreign, "_TOKENS_AT_ONCE", 64)
    documents = [*many(700), [7, value, 8], *many(20), [value]]
    path = write(tmp_path / "p", documents, dtype=dtype)
    streams = [stream(config(type="memmap", path=path))] * 2
    problems = ids_outside_vocabulary(streams)
    assert len(problems) == (said is not None)
    if said:
        assert problems[0].startswith(f"token {value} in document 700 of {path} {said}")


def test_only_the_documents_that_are_read_are_checked(tmp_path, monkeypatch):
    """An empty document stands before the bad one; the slice of the other half has nothing wrong."""
    path = write_pair(tmp_path / "p", [*DOCUMENTS, [300]], documents=[0, 1, 2, 3, 4, 4, 5])
    good = write_pair(tmp_path / "good", DOCUMENTS)
    memmap = {"type": "memmap", "path": path}
    halves = [
        stream(config(type="slice", dataset=memmap, begin=begin, end=begin + 0.5)) for begin in (0, 0.5)
    ]
    assert ids_outside_vocabulary(halves[:1]) == []
    (line,) = ids_outside_vocabulary(halves)
    assert line.startswith(f"token 300 in document 5 of {path} is outside")
    both = config(type="concatenated", datasets=[{"type": "memmap", "path": good}, memmap])
    assert ids_outside_vocabulary([stream(both)]) == [line]
    monkeypatch.setattr(stream_module, "CHECKSUM_LIMIT", 4 * 11)
    assert ids_outside_vocabulary(halves) == [line]  # 11 tokens of 4 bytes in both halves together
    monkeypatch.setattr(stream_module, "CHECKSUM_LIMIT", 4 * 11 - 1)
    assert ids_outside_vocabulary(halves) == []


def test_bytes_that_cannot_be_outside_are_not_read(tmp_path, monkeypatch):
    store = open_store(write_pair(tmp_path / "p", DOCUMENTS, dtype="uint8"))
    monkeypatch.setattr(store, "_tokens", None)
    assert store.outside_vocabulary(256, 0, 4) is None


def test_training_and_validation_name_the_id_and_write_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = write_pair(tmp_path / "p", [[1, 2, 3] * 50, [4, 600]])
    (tmp_path / "train.yaml").write_text(
        TINY.replace("training: {type: random}", f"training: {{type: memmap, path: {path}}}")
    )
    line = f"token 600 in document 1 of {path} is outside the model's vocabulary of 512"
    before = sorted(tmp_path.rglob("*"))
    for verb in ("train", "validate"):
        assert main([verb, "train.yaml"]) == 2
        said = [line_ for line_ in capsys.readouterr().err.splitlines() if line in line_]
        assert len(said) == 1
        assert said[0].startswith("error: ")
        assert sorted(tmp_path.rglob("*")) == before


def test_folder_of_pairs(tmp_path):
    for name in ("b", "a", "c.d"):
        write_pair(tmp_path / name, [[ord(name[0])] * 3] * 2)
    made = stream(config(type="concatenated_memmap", path=tmp_path))
    assert [made.datasets[0].document(i)[0] for i in range(6)] == [97, 97, 98, 98, 99, 99]
    (tmp_path / "index.txt").write_text("c.d\nb\n")
    made = stream(config(type="concatenated_memmap", path=tmp_path))
    assert [made.datasets[0].document(i)[0] for i in range(4)] == [99, 99, 98, 98]
    (tmp_path / "index.txt").write_text("")
    for path, message in ((tmp_path, "index.txt names no"), (tmp_path / "x", "there is no 'x'")):
        with pytest.raises(UserError, match=message):
            stream(config(type="concatenated_memmap", path=path))


def test_dataset_files_of_both_dialects(tmp_path):
    (tmp_path / "sub").mkdir()
    write_pair(tmp_path / "sub" / "shard_0_0", DOCUMENTS)
    write_file(tmp_path / "sub" / "shard_0_1.fast_llm_dataset", DOCUMENTS)
    older = tmp_path / "sub" / "fast_llm_config_training.yaml"
    older.write_text(
        "begin: 0.0\ndataset: {num_documents: 4, num_tokens: 10, path: shard_0_0, type: memmap}\nend: 0.5\ntype: slice\n"
    )
    newest = tmp_path / "sub" / "newest.yaml"
    newest.write_text(
        "config: {type: memmap, path: shard_0_1.fast_llm_dataset}\nmetadata: {num_tokens: 10}\n"
    )
    assert stream(config(type="file", path=older)).datasets[0].num_documents == 2
    assert stream(config(type="file", path=newest)).datasets[0].num_tokens == 10
    newest.write_text("config: {type: memmap, pth: x}\nmetadata: {}\n")
    with pytest.raises(UserError, match="pth"):
        stream(config(type="file", path=newest))


def changed(file: Path, at: int, data: bytes) -> None:
    content = bytearray(file.read_bytes())
    content[at : at + len(data)] = data
    file.write_bytes(content)


INDEX_DAMAGE = {
    "magic": (0, b"TNTIDX", "begins with b'TNTIDX"),
    "version": (9, b"\4", "is of version 4; versions 1, 2 and 3 are known"),
    "flag": (17, b"\7", r"says \[7, 0\] where a yes or no"),
    "preference": (18, b"\1", "has preference spans .* not supported yet"),
    "float32": (19, b"\6", "has dtype code 6 .floating-point numbers"),
    "dtype": (19, b"\x09", "has dtype code 9; known are 1 uint8"),
    "width": (19, b"\3", "begins at byte 12; by the sizes before it, it begins at 6"),
    "count": (20, b"\5", r"has \d+ bytes, and needs \d+ for 5 sequences|5 document entries"),
    "none": (20, bytes(16), "holds no documents"),
    "size": (36, b"\4", "begins at byte 12; by the sizes before it, it begins at 16"),
    "negative size": (36, b"\xff\xff\xff\xff", "says that sequence 0 has -1 tokens"),
    "pointer": (60, b"\x0d", "says that sequence 1 begins at byte 13"),
    "negative count": (84, b"\xff\xff\xff\xff", "has -1 spans for document 0"),
    "fewer spans": (84, b"\0", "has 172 bytes, not the 164 of 4 sequences and 3 spans"),
    "span end": (104, b"\3", "document 0 has a masked span of tokens 0 to 3, but 3 tokens"),
    "span begin": (100, b"\xff\xff\xff\xff", "document 0 has a masked span of tokens -1 to 1"),
    "documents": (132, b"\3", "says that document 0 begins with sequence 3; expected are rising"),
}


@pytest.mark.parametrize("name", INDEX_DAMAGE)
def test_damaged_index_is_one_line(tmp_path, name):
    at, data, message = INDEX_DAMAGE[name]
    write_pair(tmp_path / "p", DOCUMENTS, version=3, spans=SPANS)
    changed(tmp_path / "p.idx", at, data)
    with pytest.raises(UserError, match=message) as caught:
        open_store(tmp_path / "p")
    assert len(caught.value.problems) == 1
    assert str(tmp_path / "p") in caught.value.problems[0]


def test_missing_and_torn_files_of_a_pair(tmp_path):
    write_pair(tmp_path / "p", DOCUMENTS, version=3, spans=SPANS)
    for ending, message in (("bin", "p.bin has 39 bytes, not the 40"), ("idx", r"p.idx has \d+ bytes")):
        file = tmp_path / f"p.{ending}"
        whole = file.read_bytes()
        file.write_bytes(whole[:-1])
        with pytest.raises(UserError, match=message):
            open_store(tmp_path / "p")
        file.write_bytes(whole + b"x")
        with pytest.raises(UserError, match=rf"p\.{ending} has \d+ bytes, not the \d+"):
            open_store(tmp_path / "p")
        file.write_bytes(b"")
        with pytest.raises(UserError, match=rf"p\.{ending} has 0 bytes"):
            open_store(tmp_path / "p")
        file.unlink()
        with pytest.raises(UserError, match=rf"p\.{ending} is missing, and .* is of no use without it"):
            open_store(tmp_path / "p")
        file.write_bytes(whole)
    for length in range(len((tmp_path / "p.idx").read_bytes())):
        whole = (tmp_path / "p.idx").read_bytes()
        (tmp_path / "p.idx").write_bytes(whole[:length])
        with pytest.raises(UserError):
            open_store(tmp_path / "p")
        (tmp_path / "p.idx").write_bytes(whole)
    check(open_store(tmp_path / "p"), DOCUMENTS)


def test_multimodal_pair_is_refused_by_name(tmp_path):
    write_pair(tmp_path / "p", DOCUMENTS)
    index = tmp_path / "p.idx"
    index.write_bytes(index.read_bytes() + bytes(4))
    with pytest.raises(UserError, match="a multimodal data set"):
        open_store(tmp_path / "p")


def test_every_changed_byte_of_an_index_is_found_or_harmless(tmp_path):
    """No traceback, and no document outside the file, whichever byte is another."""
    write_pair(tmp_path / "p", DOCUMENTS, version=3, spans=SPANS)
    write_file(tmp_path / "f", DOCUMENTS, spans=half_open(SPANS))
    for file, path in ((tmp_path / "p.idx", tmp_path / "p"), (tmp_path / "f", tmp_path / "f")):
        whole = file.read_bytes()
        for at in range(len(whole)):
            changed(file, at, bytes([whole[at] ^ 0x15]))
            try:
                store = open_store(path)
            except UserError as error:
                problems = error.problems
            else:
                problems = [""]
                assert sum(len(store.document(i)) for i in range(store.num_documents)) == store.num_tokens
            assert len(problems) == 1
            file.write_bytes(whole)


def test_torn_single_file(tmp_path):
    path = write_file(tmp_path / "f", DOCUMENTS, spans=half_open(SPANS))
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError) as caught:
            open_store(path)
        assert str(path) in str(caught.value)
    path.write_bytes(whole + b"x")
    with pytest.raises(UserError, match="that it says itself"):
        open_store(path)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"chosen_spans": {"type": "range", "begin": 1, "end": 2}}, r"'chosen_spans' \(preference spans\)"),
        ({"image_patches": {"type": "patch", "begin": 1, "end": 2}}, r"'image_patches' \(images\)"),
        ({"novelty": {"type": "x", "begin": 1, "end": 2}}, "a section 'novelty', which is not supported"),
        ({"type": "other"}, "'other', not tokens|no 'tokens'"),
        ({"tokens": None}, "has no 'tokens' in its description"),
    ],
)
def test_sections_that_are_not_supported_are_named(tmp_path, more, message):
    path = write_file(tmp_path / "f", DOCUMENTS, more=more)
    with pytest.raises(UserError, match=message):
        open_store(path)


def test_files_of_another_kind(tmp_path):
    (tmp_path / "f").write_text("hello")
    with pytest.raises(UserError, match="begins with b'hello', not with b'fast_llm_prepared_dataset'"):
        open_store(tmp_path / "f")
    with pytest.raises(UserError, match="does not exist"):
        open_store(tmp_path / "nothing")
