"""The stream: a pure function of an index, whatever was read before, blended as the weights say."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pydantic import TypeAdapter

import modelyard.data.stream as stream_module
from modelyard.config.batch import BatchConfig
from modelyard.config.data import DatasetConfig, SamplingConfig
from modelyard.data.batch import Batch
from modelyard.data.store import TokenStore
from modelyard.data.stream import DataStream, prefetched
from modelyard.errors import UserError
from tests.data.in_memory import write_store

CONFIG: TypeAdapter[DatasetConfig] = TypeAdapter(DatasetConfig)


def open_stream(
    config: dict[str, Any],
    *,
    vocab_size: int = 1000,
    sampling: dict[str, Any] | None = None,
    total_rows=None,
    **batch,
) -> DataStream:
    return DataStream(
        CONFIG.validate_python(config),
        name="training",
        sampling=SamplingConfig(**(sampling or {})),
        batch=BatchConfig(**({"sequence_length": 16, "batch_size": 4} | batch)),
        vocab_size=vocab_size,
        total_rows=total_rows,
    )


def same(one: Batch, other: Batch) -> bool:
    return all(
        torch.equal(getattr(one, name), getattr(other, name))
        for name in ("input_ids", "labels", "positions", "cu_seqlens")
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    random = np.random.default_rng(0)
    documents = [random.integers(2, 500, length) for length in random.integers(1, 30, 400)]
    masks = [random.random(len(document)) < 0.3 for document in documents]
    return write_store(tmp_path_factory.mktemp("data") / "store", documents, masks=masks)


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> list[Path]:
    """Stores that hold one token each: 0, 1 and 2."""
    folder = tmp_path_factory.mktemp("others")
    return [write_store(folder / str(n), [np.full(17, n)] * (10 + n)) for n in range(3)]


SHAPES = [
    {},
    {"cross_document_attention": False, "use_loss_masking_spans": True},
    {"truncate_documents": False},
    {"truncate_documents": False, "cross_document_attention": False, "use_loss_masking_spans": True},
]


@pytest.mark.parametrize("shape", SHAPES)
def test_batch_is_a_function_of_its_index(store, shape):
    config = {"type": "memmap", "path": str(store)}
    stream = open_stream(config, **shape)
    batches = [stream.batch(index) for index in range(120)]  # several epochs
    again = open_stream(config, **shape)
    for index in (119, 0, 60, 61, 3):
        assert same(again.batch(index), batches[index])
    resumed = open_stream(config, **shape)
    resumed.load_state_dict(stream.state_dict())
    assert same(resumed.batch(100), batches[100])
    # Another batch size takes the same rows in other portions, and a process's share is a slice.
    wide = open_stream(config, **shape, batch_size=12)
    for part in range(3):
        assert same(wide.batch(5).rows(part * 4, part * 4 + 4), batches[15 + part])
    assert same(stream.rows(21, 23), batches[5].rows(1, 3))
    assert stream.fingerprint == again.fingerprint


def test_another_process_reads_the_same(store):
    code = (
        "import sys; from tests.data.test_stream import open_stream;"
        "s = open_stream({'type': 'memmap', 'path': sys.argv[1]}, truncate_documents=False);"
        "print(s.fingerprint, s.batch(7).input_ids.tolist())"
    )
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", code, str(store)], capture_output=True, text=True, check=True, cwd=root
    )
    stream = open_stream({"type": "memmap", "path": str(store)}, truncate_documents=False)
    assert run.stdout.strip() == f"{stream.fingerprint} {stream.batch(7).input_ids.tolist()}"


def test_seed_and_shuffle_change_the_order(store):
    config = {"type": "memmap", "path": str(store)}
    ids = {
        name: open_stream(config, sampling=sampling).batch(0).input_ids
        for name, sampling in {
            "default": {},
            "seed": {"seed": 1},
            "disabled": {"shuffle": "disabled"},
            "skip first": {"shuffle": "skip_first_epoch"},
        }.items()
    }
    assert torch.equal(ids["disabled"], ids["skip first"])
    assert not torch.equal(ids["default"], ids["seed"])
    assert not torch.equal(ids["default"], ids["disabled"])
    # As stored: the first 17 tokens of the store are the first row and its last target.
    assert ids["disabled"].flatten().tolist() == TokenStore(store).tokens(0, 64).tolist()


def test_full_knows_the_length_of_the_run(store):
    config = {"type": "memmap", "path": str(store)}
    one = open_stream(config, sampling={"shuffle": "full"})
    many = open_stream(config, sampling={"shuffle": "full"}, total_rows=2000)
    assert one.fingerprint != many.fingerprint
    assert one.fingerprint != open_stream(config).fingerprint


def test_blend_has_its_shares_at_any_prefix(others):
    weights = [0.7, 0.2, 0.1]
    stores = [{"type": "memmap", "path": str(path)} for path in others]
    stream = open_stream({"type": "blended", "datasets": stores, "weights": weights})
    drawn = stream.rows(0, 1000).input_ids[:, 0].numpy()
    for dataset, weight in enumerate(weights):
        taken = np.cumsum(drawn == dataset)
        assert np.abs(taken - weight * np.arange(1, 1001)).max() < 1
    facts = stream.statistics(1000)["datasets"]
    assert [f["share"] for f in facts] == weights
    assert facts[1]["epochs"] == pytest.approx(200 / (11 * 17 / 16))


def test_nested_blends_and_sampled(others, store):
    stores = [{"type": "memmap", "path": str(path)} for path in others]
    inner = {"type": "blended", "datasets": stores[1:], "weights": [1, 1]}
    config = {"type": "blended", "datasets": [stores[0], inner], "weights": [1, 1]}
    drawn = open_stream(config).rows(0, 400).input_ids[:, 0].bincount()
    assert drawn.tolist() == [200, 100, 100]

    plain = {"type": "memmap", "path": str(store)}
    seeded = {"type": "sampled", "dataset": plain, "sampling": {"seed": 5}}
    assert same(open_stream(seeded).batch(1), open_stream(plain, sampling={"seed": 5}).batch(1))
    # Keys that `sampled` does not name are inherited.
    unshuffled = open_stream(seeded, sampling={"shuffle": "disabled"})
    assert same(unshuffled.batch(0), open_stream(plain, sampling={"shuffle": "disabled"}).batch(0))


def test_the_same_data_twice_in_a_blend_has_two_orders(store):
    plain = {"type": "memmap", "path": str(store)}
    rows = (
        open_stream({"type": "blended", "datasets": [plain, plain], "weights": [1, 1]}).rows(0, 20).input_ids
    )
    assert not torch.equal(rows[0::2], rows[1::2])


def test_slice_of_a_blend_slices_what_is_blended(others):
    stores = [{"type": "memmap", "path": str(path)} for path in others[:2]]
    blend = {"type": "blended", "datasets": stores, "weights": [1, 3]}
    stream = open_stream({"type": "slice", "dataset": blend, "begin": 0.5})
    assert [f["documents"] for f in stream.statistics()["datasets"]] == [5, 5]
    assert [f["share"] for f in stream.statistics()["datasets"]] == [0.25, 0.75]


def test_dataset_files_are_relative_to_themselves(store, tmp_path):
    (tmp_path / "deep").mkdir()
    inner = {
        "type": "slice",
        "begin": 0.0,
        "end": 0.5,
        "dataset": {"type": "memmap", "path": "../store", "num_documents": 400},
    }
    (tmp_path / "store").symlink_to(store)
    (tmp_path / "deep" / "half.yaml").write_text(yaml.safe_dump(inner))
    (tmp_path / "all.yaml").write_text("type: file\npath: deep/half.yaml\n")
    stream = open_stream({"type": "file", "path": str(tmp_path / "all.yaml")})
    assert stream.statistics()["documents"] == 200


def test_problems_of_a_whole_tree_come_together(store, others, tmp_path):
    plain = [{"type": "memmap", "path": str(path)} for path in (store, *others, tmp_path / "nothing")]
    config = {"type": "blended", "datasets": plain, "weights": [1] * 5}
    with pytest.raises(UserError) as caught:
        open_stream(config, use_loss_masking_spans=True)
    assert len(caught.value.problems) == 4
    assert sum("has no loss mask" in line for line in caught.value.problems) == 3
    assert sum("does not exist" in line for line in caught.value.problems) == 1


def test_masks_where_there_are_some(store, others):
    """`auto`: a store with a mask as with `yes`, one without as with `no`, side by side in one dataset as well."""

    def labels(*paths, spans):
        parts = [{"type": "memmap", "path": str(path)} for path in paths]
        stream = open_stream(
            {"type": "concatenated", "datasets": parts},
            use_loss_masking_spans=spans,
            cross_document_attention=False,
        )
        return [label for batch in stream.one_pass() for label in batch.labels.flatten().tolist()]

    assert labels(store, spans="auto") == labels(store, spans=True) != labels(store, spans=False)
    assert labels(others[2], spans="auto") == labels(others[2], spans=False)
    both = labels(store, others[2], spans="auto")
    # Every document once: 12 documents of 17 tokens "2" without a mask, and the targets that the mask leaves.
    assert sum(label >= 0 for label in both) < sum(
        label >= 0 for label in labels(store, others[2], spans=False)
    )
    assert sum(label == 2 for label in both) >= 12 * 15


def test_vocabulary_too_small(store):
    with pytest.raises(UserError, match=rf"{store} was prepared with a tokenizer of 1,000 tokens"):
        open_stream({"type": "memmap", "path": str(store)}, vocab_size=300)


def test_one_pass_does_not_depend_on_the_batch_size(store):
    """Every document once: with documents isolated all tokens but the first of each piece are targets."""
    config = {"type": "memmap", "path": str(store)}
    counts = set()
    for size in (1, 4, 7, 1000):
        batches = list(open_stream(config, batch_size=size, micro_batch_size=1).one_pass())
        assert sum(map(len, batches)) == -(-TokenStore(store).num_tokens // 16)
        counts.add(sum(batch.num_targets for batch in batches))
    assert counts == {TokenStore(store).num_tokens - 1}


def test_shares_of_processes_are_the_batch(store):
    """Each process's rows, one behind the other; in one pass the last shares are filled up without any target."""
    stream = open_stream({"type": "memmap", "path": str(store)}, batch_size=12)
    for processes in (1, 2, 3):
        shares = [stream.batch(2, (part, processes)) for part in range(processes)]
        rows = torch.cat([share.input_ids for share in shares])
        assert torch.equal(rows, stream.batch(2).input_ids)
        with closing(prefetched(stream, range(2, 3), (processes - 1, processes))) as batches:
            assert same(next(batches)[0], shares[-1])
    whole = list(stream.one_pass())
    for part in range(3):
        own = list(stream.one_pass((part, 3)))
        assert [len(batch) for batch in own] == [4] * len(whole)
        for batch, mine in zip(whole, own, strict=True):
            there = batch.input_ids[4 * part : 4 * part + 4]
            assert torch.equal(mine.input_ids[: len(there)], there)
            assert int((mine.labels[len(there) :] >= 0).sum()) == 0
    targets = [sum(batch.num_targets for batch in stream.one_pass((part, 3))) for part in range(3)]
    assert len(whole[-1]) < 12
    assert sum(targets) == sum(batch.num_targets for batch in whole)


def test_one_pass_over_a_blend_is_refused(store):
    part = {"type": "memmap", "path": str(store)}
    with pytest.raises(UserError, match=r"blended: say how much of it is read \(evaluator.iterations\)"):
        next(open_stream({"type": "blended", "datasets": [part, part], "weights": [1, 2]}).one_pass())


def test_statistics_and_description(store):
    config = {"type": "memmap", "path": str(store)}
    cut = open_stream(config)
    facts = cut.statistics(400)
    tokens = facts["tokens"]
    assert facts["documents"] == 400
    assert facts["datasets"][0]["epochs"] == 400 * 16 / tokens
    assert cut.describe() == [
        f"training: {store}: 400 documents, {tokens:,} tokens, {tokens / 16:,.1f} rows an epoch"
    ]
    packed = open_stream(config, truncate_documents=False)
    facts = packed.statistics()["datasets"][0]
    lengths = np.array([len(d) for d in _documents(store)])
    assert facts["over_long_documents"] == np.count_nonzero(lengths > 17)
    assert facts["fill"] > 0.97
    assert f"{facts['over_long_documents']} of 400 documents are longer than a row" in packed.describe()[0]


def _documents(store: Path) -> list[np.ndarray]:
    opened = TokenStore(store)
    return [opened.document(index) for index in range(len(opened))]


def test_state_of_other_data_is_left_alone(store, others):
    state = open_stream({"type": "memmap", "path": str(others[0])}).state_dict()
    stream = open_stream({"type": "memmap", "path": str(store)})
    before = stream.batch(3)
    stream.load_state_dict({**state, "no such": [1, 2, 3]})
    assert same(stream.batch(3), before)


def test_random_dataset():
    config = {"type": "random", "num_documents": 20_000}
    stream = open_stream(config, vocab_size=50)
    ids = stream.batch(3).input_ids
    assert torch.equal(ids, open_stream(config, vocab_size=50).batch(3).input_ids)
    assert not torch.equal(ids, open_stream({**config, "name": "other"}, vocab_size=50).batch(3).input_ids)
    counts = stream.rows(0, 500).input_ids.flatten().bincount()
    assert len(counts) == 50
    assert counts.min() > 100  # 160 on average
    packed = open_stream({**config, "document_length": 4}, vocab_size=50, truncate_documents=False)
    assert packed.statistics()["datasets"][0]["fill"] == pytest.approx(16 / 17, rel=1e-3)


class Slow:
    """A stream that takes its time and fails at batch 3."""

    name = "slow"

    def __init__(self) -> None:
        self.made: list[int] = []

    def batch(self, index: int, share: tuple[int, int]) -> int:
        time.sleep(0.02)
        if index == 3:
            raise UserError("batch 3 cannot be read")
        self.made.append(index)
        return index


def test_prefetch_in_order_with_waits(store):
    stream = open_stream({"type": "memmap", "path": str(store)})
    with closing(prefetched(stream, range(5, 9))) as batches:
        found = list(batches)
    assert len(found) == 4
    assert all(same(batch, stream.batch(5 + n)) for n, (batch, _) in enumerate(found))
    assert all(wait >= 0 for _, wait in found)


def test_prefetch_hides_the_time_and_raises_in_place():
    batches = prefetched(Slow(), range(10))  # type: ignore[arg-type]
    _, first_wait = next(batches)
    assert first_wait >= 0.015
    time.sleep(0.1)  # two more are ready by now
    assert next(batches)[1] < 0.015
    assert next(batches)[0] == 2
    with pytest.raises(UserError, match="batch 3"):
        next(batches)


def test_prefetch_stops_when_closed():
    slow = Slow()
    batches = prefetched(slow, range(10, 1000), depth=1)  # type: ignore[arg-type]
    assert next(batches)[0] == 10
    batches.close()
    made = len(slow.made)
    assert made <= 4
    time.sleep(0.1)
    assert len(slow.made) == made


@pytest.mark.parametrize("isolate", [True, False])
def test_masks_and_boundaries_over_every_cut_of_two_epochs(store, isolate):
    # As stored, so that the whole stream can be written down: token, mask and document of every position.
    stored = TokenStore(store)
    tokens = np.tile(stored.tokens(0, stored.num_tokens).astype(np.int64), 3)
    masked = np.tile(np.concatenate([stored.lane("loss_mask", n) for n in range(len(stored))]), 3)
    document = np.tile(np.repeat(np.arange(len(stored)), stored.lengths(0, len(stored))), 3)
    stream = open_stream(
        {"type": "memmap", "path": str(store)},
        sampling={"shuffle": "disabled"},
        cross_document_attention=not isolate,
        use_loss_masking_spans=True,
    )
    count = 2 * stored.num_tokens // 16
    batch = stream.rows(0, count)
    length = count * 16
    assert batch.input_ids.flatten().tolist() == tokens[:length].tolist()
    expected = np.where(masked[1 : length + 1] == 1, -100, tokens[1 : length + 1])
    if isolate:
        expected = np.where(document[1 : length + 1] != document[:length], -100, expected)
    assert batch.labels.flatten().tolist() == expected.tolist()


def test_packed_epoch_trains_each_token_once(store):
    stream = open_stream(
        {"type": "memmap", "path": str(store)},
        truncate_documents=False,
        cross_document_attention=False,
        use_loss_masking_spans=True,
    )
    stored = TokenStore(store)
    rows = stream.rows(0, int(stream.statistics()["datasets"][0]["rows_per_epoch"]))
    # Every unmasked token but the first of each document that fits in a row is a target, once.
    expected = np.zeros(1000, dtype=np.int64)
    for index in range(len(stored)):
        tokens, mask = stored.document(index), stored.lane("loss_mask", index)
        if len(tokens) <= 17:
            expected += np.bincount(tokens[1:][mask[1:] == 0], minlength=1000)
    targets = rows.labels[rows.labels != -100].numpy()
    assert np.array_equal(np.bincount(targets, minlength=1000), expected)


def test_a_reader_that_hangs_does_not_keep_anybody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that does not answer: whoever closes goes on after a moment."""
    monkeypatch.setattr(stream_module, "_PATIENCE", 0.2)
    never = threading.Event()

    class Hanging:
        name = "hanging"

        def batch(self, index: int, share: Any) -> Any:
            if index == 2:
                never.wait()
            return index

    batches = prefetched(Hanging(), range(10))  # type: ignore[arg-type]
    assert next(batches)[0] == 0
    begin = time.monotonic()
    batches.close()
    assert time.monotonic() - begin < 5
    asked = []
    batches = prefetched(Hanging(), range(2, 10), give_up=lambda: asked.append(1) or len(asked) == 2)  # type: ignore[arg-type, func-returns-value]
    assert next(batches)[0] is None
    assert list(batches) == []
    never.set()
