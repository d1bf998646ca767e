"""The store reads back what was written, is complete or absent, and says which file is torn."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from modelyard.data.store import StoreWriter, TokenStore, token_type
from modelyard.errors import UserError

DOCS = Path(__file__).parents[2] / "docs"


def documents(count: int, vocab_size: int = 300, longest: int = 9) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, vocab_size, random.integers(1, longest)) for _ in range(count)]


def write(path: Path, docs: list[np.ndarray], **options) -> TokenStore:
    with StoreWriter(path, vocab_size=300, **options) as writer:
        for document in docs:
            writer.append(document)
    return TokenStore(path)


@pytest.mark.parametrize(
    ("size", "name"), [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")]
)
def test_narrowest_type(size, name):
    assert token_type(size) == name


def test_round_trip_over_shards_and_offset_blocks(tmp_path):
    docs = documents(600)
    store = write(tmp_path / "store", docs, tokens_per_shard=100)
    assert len(store.manifest["shards"]) > 20
    assert max(shard["tokens"] for shard in store.manifest["shards"]) <= 100
    assert store.num_documents == 600
    assert store.dtype == np.uint16
    starts = np.concatenate(([0], np.cumsum([len(d) for d in docs])))
    assert store.num_tokens == starts[-1]
    for index in (0, 1, 255, 256, 257, 511, 512, 599):
        assert store.offset(index) == starts[index]
        assert store.document(index).tolist() == docs[index].tolist()
    assert store.offset(600) == store.num_tokens
    assert [store.document(i).tolist() for i in range(600)] == [d.tolist() for d in docs]
    assert store.lengths(250, 260).tolist() == [len(d) for d in docs[250:260]]
    stream = np.concatenate(docs)
    assert store.tokens(5, 1234).tolist() == stream[5:1234].tolist()
    assert store.tokens(0, store.num_tokens).tolist() == stream.tolist()
    assert store.tokens(store.num_tokens, store.num_tokens).tolist() == []
    long = int(np.argmax([len(d) for d in docs]))
    assert store.document(long, 2, 5).tolist() == docs[long][2:5].tolist()
    assert store.verify() == []


def test_extend_writes_the_same_bytes_as_append(tmp_path):
    docs = documents(700)
    write(tmp_path / "one", docs, tokens_per_shard=333)
    with StoreWriter(tmp_path / "two", vocab_size=300, tokens_per_shard=333) as writer:
        for begin, end in [(0, 1), (1, 300), (300, 300), (300, 700)]:
            part = docs[begin:end]
            tokens = np.concatenate([*part, np.zeros(0, np.int64)])
            writer.extend(np.array([len(d) for d in part], np.int64), tokens)
    files = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "two").iterdir())
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_document_longer_than_a_shard_has_one_of_its_own(tmp_path):
    docs = [np.arange(3), np.arange(50), np.arange(4)]
    store = write(tmp_path / "store", docs, tokens_per_shard=10)
    assert [shard["tokens"] for shard in store.manifest["shards"]] == [3, 50, 4]
    assert store.document(1).tolist() == list(range(50))


def test_lanes(tmp_path):
    with StoreWriter(
        tmp_path / "s", vocab_size=10, lanes={"loss_mask": "uint8", "weight": "float32"}
    ) as writer:
        writer.append(
            np.array([1, 2, 3]), {"loss_mask": np.array([1, 0, 1]), "weight": np.array([0.5, 1, 2])}
        )
        writer.append(np.array([4]), {"loss_mask": np.array([0]), "weight": np.array([3.0])})
    store = TokenStore(tmp_path / "s")
    assert store.lanes == ("loss_mask", "weight")
    assert store.lane("loss_mask", 0).tolist() == [1, 0, 1]
    assert store.lane("weight", 0, 1).tolist() == [1.0, 2.0]
    assert store.lane("weight", 1).dtype == np.float32
    assert store.lane("other", 0) is None
    assert (tmp_path / "s" / "loss_mask_00000.bin").stat().st_size == 4


def test_lanes_must_match(tmp_path):
    with pytest.raises(ValueError, match="lanes"), StoreWriter(tmp_path / "s", vocab_size=10) as writer:
        writer.append(np.array([1]), {"loss_mask": np.array([1])})
    assert list(tmp_path.iterdir()) == []


def test_wider_dtype_on_request_and_never_a_narrower(tmp_path):
    assert write(tmp_path / "wide", [np.arange(9)], dtype="uint32").document(0).dtype == np.uint32
    with pytest.raises(UserError, match="uint8 cannot hold a vocabulary of 300"):
        write(tmp_path / "narrow", [np.arange(9)], dtype="uint8")


def test_token_outside_the_vocabulary_is_refused(tmp_path):
    with pytest.raises(ValueError, match="vocabulary of 300"):
        write(tmp_path / "store", [np.array([299, 300])])


def test_an_error_leaves_nothing(tmp_path):
    def failing():
        yield np.arange(5)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write(tmp_path / "s", failing())
    assert list(tmp_path.iterdir()) == []


def test_no_tokens_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no tokens"):
        write(tmp_path / "store", [])
    assert list(tmp_path.iterdir()) == []


def test_existing_store_is_not_written_over(tmp_path):
    write(tmp_path / "store", [np.arange(3)])
    with pytest.raises(UserError, match="already exists"):
        write(tmp_path / "store", [np.arange(4)])
    assert TokenStore(tmp_path / "store").num_tokens == 3


def test_tokenizer_files_are_copied_and_listed(tmp_path):
    store = write(tmp_path / "store", [np.arange(3)], tokenizer_files={"tokenizer.json": b"{}"})
    assert (tmp_path / "store" / "tokenizer" / "tokenizer.json").read_text() == "{}"
    assert store.manifest["files"]["tokenizer/tokenizer.json"]["bytes"] == 2


@pytest.mark.parametrize("name", ["tokens_00001.bin", "lengths.bin", "offsets.bin"])
def test_torn_missing_and_empty_files_are_named(tmp_path, name):
    write(tmp_path / "store", documents(50), tokens_per_shard=100)
    file = tmp_path / "store" / name
    whole = file.read_bytes()
    for content, message in [
        (whole[:-1], "torn"),
        (b"", "0 bytes"),
        (whole + b"x", "torn"),
        (None, "missing"),
    ]:
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(UserError, match=message) as caught:
            TokenStore(tmp_path / "store")
        assert len(caught.value.problems) == 1
        assert str(file) in caught.value.problems[0]
        file.write_bytes(whole)
    TokenStore(tmp_path / "store")


def test_damaged_manifests_are_one_line(tmp_path):
    write(tmp_path / "store", documents(5))
    file = tmp_path / "store" / "manifest.json"
    whole = json.loads(file.read_text())
    for content in ["", "{", "[]", json.dumps(whole)[:-20], json.dumps(whole | {"version": 2})]:
        file.write_text(content)
        with pytest.raises(UserError) as caught:
            TokenStore(tmp_path / "store")
        assert len(caught.value.problems) == 1
    for key in ["dtype", "files", "shards", "lanes"]:
        file.write_text(json.dumps({k: v for k, v in whole.items() if k != key}))
        with pytest.raises(UserError, match=key):
            TokenStore(tmp_path / "store")
    file.write_text(json.dumps(whole | {"documents": 6}))
    with pytest.raises(UserError, match=r"lengths\.bin"):
        TokenStore(tmp_path / "store")


def test_missing_and_unfinished_stores(tmp_path):
    (tmp_path / "store.tmp").mkdir()
    for path in (tmp_path / "store", tmp_path / "store" / "training"):
        with pytest.raises(UserError, match=r"store\.tmp is an unfinished one"):
            TokenStore(path)
    with pytest.raises(UserError, match=r"no manifest\.json"):
        TokenStore(tmp_path)


def test_verify_finds_a_changed_byte(tmp_path):
    store = write(tmp_path / "store", documents(50))
    file = tmp_path / "store" / "tokens_00000.bin"
    data = bytearray(file.read_bytes())
    data[10] ^= 1
    file.write_bytes(data)
    assert TokenStore(tmp_path / "store").fingerprint == store.fingerprint
    (problem,) = store.verify()
    assert "tokens_00000.bin" in problem
    assert "checksum" in problem


def test_fingerprint_follows_the_content(tmp_path):
    first = write(tmp_path / "a", [np.arange(5)], description={"note": "one"})
    same = write(tmp_path / "b", [np.arange(5)], description={"note": "two"})
    other = write(tmp_path / "c", [np.arange(2), np.arange(3)])
    assert first.fingerprint == same.fingerprint != other.fingerprint


def test_pickled_store_opens_again(tmp_path):
    store = write(tmp_path / "store", [np.arange(5)])
    assert pickle.loads(pickle.dumps(store)).document(0).tolist() == [0, 1, 2, 3, 4]


def test_documented_numpy_snippet(tmp_path):
    docs = documents(600)
    write(tmp_path / "store", docs, tokens_per_shard=500)
    (snippet,) = re.findall(r"```python\n(.*?)```", (DOCS / "token-store.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(snippet, names)
    for index in (0, 255, 256, 300, 599):
        assert names["read_document"](tmp_path / "store", index).tolist() == docs[index].tolist()
    assert "modelyard" not in snippet
