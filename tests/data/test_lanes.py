"""What is trained on is made of the lanes when data are read; no store is made again for it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modelyard.chat.segments import Kind, Segment, lane_value, trained
from modelyard.config.batch import BatchConfig
from modelyard.config.data import BlendedDataset, MemmapDataset, RandomDataset, SamplingConfig
from modelyard.config.prepare import PrepareConfig
from modelyard.data.lanes import NO_KIND, not_targets
from modelyard.data.prepare import prepare
from modelyard.data.store import TokenStore
from modelyard.data.stream import DataStream
from modelyard.data.tokenizer import load_tokenizer
from modelyard.errors import UserError

USER = {"role": "user", "content": "how wide?"}
ANSWER = {"role": "assistant", "content": "42"}


def value(kind: Kind, role: Any = "assistant", trained: bool = True) -> int:
    return lane_value(Segment("", kind, role, trained=trained))


def test_lanes_by_hand() -> None:
    first = [value(Kind.BEGIN, None), value(Kind.CONTENT, "user"), value(Kind.TERMINATOR, "user")]
    answer = [value(Kind.HEADER), value(Kind.CONTENT), value(Kind.TERMINATOR), value(Kind.SEPARATOR)]
    called = [value(Kind.HEADER), value(Kind.TOOL_CALL), value(Kind.TERMINATOR)]
    result = [value(Kind.HEADER, "tool"), value(Kind.TOOL_RESULT, "tool"), value(Kind.TERMINATOR, "tool")]
    left_out = [value(Kind.HEADER), value(Kind.CONTENT, trained=False), value(Kind.TERMINATOR, trained=False)]
    kinds = np.array([*first, *answer, *called, *result, *left_out], np.uint8)
    assert trained(kinds).astype(int).tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0]
    assert np.flatnonzero(trained(kinds, "last_answer")).tolist() == [8, 9]
    assert trained(kinds, "all").all()
    assert not trained(np.array(first, np.uint8), "last_answer").any()


@pytest.fixture
def store(chat_tokenizers: dict[str, Path], write_jsonl: Callable[..., Path], tmp_path: Path) -> Path:
    """40 conversations of one to three answers, the last of them of a single user turn and a long answer."""
    talks = [
        [
            entry
            for turn in range(1 + i % 3)
            for entry in (USER, {"role": "assistant", "content": f"{i}-{turn}"})
        ]
        for i in range(39)
    ]
    talks.append([USER, {"role": "assistant", "content": "wide " * 100}])
    document = {
        "output_path": str(tmp_path / "out"),
        "dataset": {
            "path": str(write_jsonl([{"messages": talk} for talk in talks])),
            "conversations": {"family": "qwen2.5", "system": ""},
        },
        "tokenizer": {"path": str(chat_tokenizers["qwen2.5"])},
    }
    prepare(PrepareConfig.model_validate(document), report=lambda line: None, terminal=False)
    return tmp_path / "out" / "data"


def stream(store: Path, **options: Any) -> DataStream:
    batch = BatchConfig(
        **{"batch_size": 2, "sequence_length": 700, "cross_document_attention": False} | options
    )
    config = MemmapDataset(type="memmap", path=store)
    return DataStream(config, name="talks", sampling=SamplingConfig(), batch=batch, vocab_size=290)


def targets(found: DataStream, store: Path) -> list[str]:
    """What is trained on in one pass, as text, in alphabetical order."""
    tokenizer = load_tokenizer(store / "tokenizer")
    texts = []
    for batch in found.one_pass():
        for in_loss, run in groupby(batch.labels.flatten().tolist(), lambda label: label != -100):
            if in_loss:
                texts.append(tokenizer.decode(list(run)))
    return sorted(texts)


def test_every_policy_reads_the_same_store(store: Path) -> None:
    answers = [f"{i}-{turn}<|im_end|>" for i in range(39) for turn in range(1 + i % 3)]
    last = [f"{i}-{i % 3}<|im_end|>" for i in range(39)]
    long = "wide " * 100 + "<|im_end|>"
    assert targets(stream(store), store) == sorted([*answers, long])
    assert targets(stream(store, loss_lane="last_answer"), store) == sorted([*last, long])
    everything = stream(store, loss_lane="all")
    tokens = sum(batch.num_targets for batch in everything.one_pass())
    assert tokens == TokenStore(store).num_tokens - 40  # all but the first of each
    prints = {stream(store, loss_lane=lane).fingerprint for lane in ("sft", "last_answer", "all")}
    assert len(prints) == 3


def test_conversations_are_never_cut(store: Path) -> None:
    """`truncate_documents` is for texts, whatever it says."""
    with pytest.raises(
        UserError, match=r"1 of 40 documents are longer than a row .* document 39 of .*overlong"
    ):
        stream(store, sequence_length=100)
    dropped = stream(store, sequence_length=100, overlong="drop", truncate_documents=True)
    assert "1 of 40 documents are longer than a row and left out" in dropped.describe()[0]
    assert not any("wide wide" in text for text in targets(dropped, store))
    split = stream(store, sequence_length=100, overlong="split")
    assert "".join(text for text in targets(split, store) if "wide" in text).count("wide") == 100
    assert sum(text.endswith("<|im_end|>") for text in targets(split, store)) == 39 // 3 * 6 + 1


def test_a_batch_says_what_its_targets_are(store: Path) -> None:
    for batch in stream(store).one_pass():
        assert batch.kinds is not None
        chosen = batch.labels != -100
        kinds = batch.kinds[chosen].numpy()
        assert set((kinds & 7).tolist()) == {Kind.CONTENT, Kind.TERMINATOR}
        ends = batch.labels[chosen][torch.from_numpy(kinds & 7 == Kind.TERMINATOR)]
        assert set(ends.tolist()) == {
            load_tokenizer(store / "tokenizer").special_token("<|im_end|>", "end").id
        }
        padding = batch.kinds[0, batch.input_ids[0].nonzero().max() + 1 :]
        assert set(padding.tolist()) <= {NO_KIND}
        part = batch.rows(0, 1)
        assert part.kinds is not None
        assert part.kinds.tolist() == batch.kinds[:1].tolist()
    texts = DataStream(
        RandomDataset(type="random", num_documents=5),
        name="texts",
        sampling=SamplingConfig(),
        batch=BatchConfig(batch_size=2, sequence_length=10),
        vocab_size=290,
    )
    assert texts.batch(0).kinds is None


def test_a_word_where_conversations_see_one_another(store: Path) -> None:
    (warning,) = stream(store, cross_document_attention=True).describe()[1:]
    assert warning.startswith(
        "warning: talks: the conversations of a row see one another; batch.cross_document"
    )
    assert len(stream(store).describe()) == 1


def test_a_stretch_of_a_conversation_knows_the_last_answer(store: Path) -> None:
    from modelyard.data.datasets import StoredDataset

    dataset = StoredDataset(store)
    whole = not_targets(dataset, 2, 0, int(dataset.lengths(2, 3)[0]), spans=False, lane="last_answer")
    assert whole is not None
    for begin, end in ((0, 10), (5, 30), (30, len(whole))):
        part = not_targets(dataset, 2, begin, end, spans=False, lane="last_answer")
        assert part is not None
        assert part.tolist() == whole[begin:end].tolist()


def test_the_last_of_two_answers_that_touch() -> None:
    """A format need not write anything between them."""
    kinds = np.array(
        [value(Kind.CONTENT), value(Kind.TERMINATOR), value(Kind.CONTENT), value(Kind.TERMINATOR)], np.uint8
    )
    assert trained(kinds, "last_answer").tolist() == [False, False, True, True]


def test_a_blend_has_the_tokenizer_of_its_conversations_and_one_chat_format(
    store: Path, chat_tokenizers: dict[str, Path], write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    def other(name: str, **dataset: Any) -> Path:
        document = {
            "output_path": str(tmp_path / name),
            "dataset": {
                "path": str(write_jsonl([{"text": "a b", "messages": [USER, ANSWER]}] * 5, f"{name}.jsonl")),
                **dataset,
            },
            "tokenizer": {"path": str(chat_tokenizers["qwen2.5"])},
        }
        prepare(PrepareConfig.model_validate(document), report=lambda line: None, terminal=False)
        return tmp_path / name / "data"

    def blend(*stores: Path) -> DataStream:
        parts = [MemmapDataset(type="memmap", path=path) for path in stores]
        config = BlendedDataset(type="blended", datasets=parts, weights=[1.0] * len(parts))
        batch = BatchConfig(batch_size=2, sequence_length=700, cross_document_attention=False)
        return DataStream(config, name="all", sampling=SamplingConfig(), batch=batch, vocab_size=290)

    assert blend(other("texts"), store).tokenizer_folder == store / "tokenizer"
    with pytest.raises(UserError, match=r"all: .* are conversations in different chat formats"):
        blend(store, other("talks", conversations={"system": "another"}))
