"""The newest dialect's batch, in tokens, as rows."""

from __future__ import annotations

import pytest

from tests.config.helpers import TINY
from tests.config.newest import SMALL, load_small, load_texts, problems_of_texts, small_problems


@pytest.mark.parametrize(
    ("overrides", "sequence_length", "micro_batch_size"),
    [
        ((), 256, 1),  # a row is the micro-batch
        (("data.maximum_document_length=64",), 64, 4),
        (("data.maximum_document_length=1000",), 256, 1),
        (("batch.sequence_length=128",), 128, 2),
        (("batch.sequence_length=64", "data.maximum_document_length=64"), 64, 4),
        (("data.micro_batch_size=512",), 512, 1),
        (("data.micro_batch_size=5.12e2",), 512, 1),
        (("data.maximum_document_length=64", "data.micro_batch_size=64"), 64, 1),
        (("batch.micro_batch_size=4",), 256, 4),  # the later word, in rows of the file's length
        (("batch.micro_batch_size=4", "data.micro_batch_size=512", "batch.sequence_length=256"), 256, 2),
    ],
)
def test_tokens_to_rows(overrides: tuple[str, ...], sequence_length: int, micro_batch_size: int) -> None:
    batch = load_small(*overrides).train.batch
    assert (batch.sequence_length, batch.micro_batch_size) == (sequence_length, micro_batch_size)
    assert batch.batch_size == 8


def test_its_default_is_2048_tokens() -> None:
    silent = SMALL.replace("micro_batch_size: 256, ", "")
    loaded = load_texts(silent)
    assert (loaded.train.batch.sequence_length, loaded.train.batch.micro_batch_size) == (2048, 1)
    assert loaded.notices[-1].endswith(
        "batch.cross_document_attention: no, batch.use_loss_masking_spans: auto, batch.micro_batch_size: 1"
    )
    short = load_texts(silent, overrides=("data.maximum_document_length=512",)).train.batch
    assert (short.sequence_length, short.micro_batch_size) == (512, 4)
    # Whatever the batch: what nobody wrote never makes an error.
    odd = load_texts(silent, overrides=("data.maximum_document_length=512", "batch.batch_size=6")).train.batch
    assert odd.micro_batch_size == 2


def test_an_older_batch_beside_a_newer_model() -> None:
    """Version 0.3 had `batch` as it is today: nothing of 0.4's holds."""
    text = SMALL.replace("micro_batch_size: 256, ", "").replace(
        "batch_size: 8", "batch_size: 8, sequence_length: 64"
    )
    batch = load_texts(text).train.batch
    assert (batch.sequence_length, batch.micro_rows()) == (64, 8)
    assert batch.cross_document_attention
    assert batch.use_loss_masking_spans is False
    note = (
        "a:3: batch is today's spelling: unlike in version 0.4 of the model's dialect, documents of a row see each other; "
        "write batch.cross_document_attention: yes or no"
    )
    assert note in load_texts(text).notices
    assert note not in load_texts(text, overrides=("batch.cross_document_attention=yes",)).notices


def test_tokens_over_a_file_of_the_older_dialect() -> None:
    """An override counts in the rows that the file has, and brings no default of its dialect."""
    for length, expected in (("sequence_length: 64, ", (64, 4)), ("", (2048, None))):
        text = TINY.replace("sequence_length: 64, ", f"{length}micro_batch_size: 1, ")
        if expected[1] is None:
            assert problems_of_texts(text, overrides=("data.micro_batch_size=256",)) == [
                "override 1: data.micro_batch_size = 256 tokens is no multiple of a row of 2048 tokens "
                "(batch.sequence_length, today's default); nearest that are: 2048"
            ]
            continue
        batch = load_texts(text, overrides=("data.micro_batch_size=256",)).train.batch
        assert (batch.sequence_length, batch.micro_batch_size) == expected
        assert batch.cross_document_attention


def test_the_batch_size_is_asked_for() -> None:
    text = SMALL.replace("batch: {batch_size: 8}\n", "")
    expected = (
        "a:2: batch.batch_size is missing: in the newest dialect the batch grows with the number of processes, here it never "
        "does; write batch: {batch_size: N}, the rows of 64 tokens in an optimizer step over all processes (12 for each "
        "process there was)"
    )
    overrides = ("data.maximum_document_length=64", "schedule.depth_first_micro_batches=3")
    assert problems_of_texts(text, overrides=overrides) == [expected]
    assert len(problems_of_texts(text.replace("micro_batch_size: 256, ", ""))) == 1


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (("data.micro_batch_size=-4",), "override 1: data.micro_batch_size = -4: expected a whole number of tokens, at least 1"),
        (("data.micro_batch_size=many",), "override 1: data.micro_batch_size = 'many': expected a whole number of tokens, at least 1"),
        (("data.maximum_document_length=yes",), "override 1: data.maximum_document_length = yes: expected a whole number of tokens, at least 1"),
        (
            ("batch.sequence_length=100",),
            "a:2: data.micro_batch_size = 256 tokens is no multiple of a row of 100 tokens (batch.sequence_length, override "
            "1); nearest that are: 200 and 300",
        ),
        (
            ("data.maximum_document_length=100",),
            "a:2: data.micro_batch_size = 256 tokens is no multiple of a row of 100 tokens (data.maximum_document_length, "
            "override 1); nearest that are: 200 and 300",
        ),
        (
            ("batch.sequence_length=512",),
            "a:2: data.micro_batch_size = 256 tokens is no multiple of a row of 512 tokens (batch.sequence_length, override "
            "1); nearest that are: 512",
        ),
        (
            ("batch.sequence_length=128", "data.maximum_document_length=64"),
            "override 2: data.maximum_document_length = 64 is below batch.sequence_length = 128 (override 1): documents are "
            "cut where rows end and nowhere else; write the same in both, or leave one out",
        ),
        (
            ("schedule.depth_first_micro_batches=3",),
            "override 1: schedule.depth_first_micro_batches: batch.batch_size 8 (a:3) is no multiple of 1 x 3 rows, so no "
            "number of processes makes it",
        ),
        (("schedule.breadth_first_micro_batches=0",), "override 1: schedule.breadth_first_micro_batches = 0: expected a whole number of micro-batches, at least 1"),
        (("schedule.micro_batch_splits=2",), "override 1: schedule.micro_batch_splits = 2: rows are not split along the sequence; use a smaller micro-batch"),
        (("batch.batch_size=null",), "override 1: batch.batch_size = null: expected a whole number"),
    ],
)  # fmt: skip
def test_what_is_refused(overrides: tuple[str, ...], problem: str) -> None:
    assert small_problems(*overrides) == [problem]


def test_micro_batches_follow_from_the_batch_size() -> None:
    loaded = load_small("schedule.depth_first_micro_batches=4", "schedule.breadth_first_micro_batches=2")
    assert loaded.train.batch == load_small().train.batch
    assert (
        "override 1: schedule.depth_first_micro_batches: 4 is left out: how many micro-batches there are follows from "
        "batch.batch_size 8 and batch.micro_batch_size" in loaded.notices
    )


def test_a_batch_in_two_dialects_is_refused() -> None:
    text = SMALL.replace("micro_batch_size: 256", "seed: 3").replace(
        "batch_size: 8", "batch_size: 8, micro_batch_size: 2"
    )
    assert problems_of_texts(text) == [
        "a:2: data.seed is the newest dialect (Fast-LLM >= 0.3), batch.micro_batch_size (a:3) is not, and their defaults "
        "differ; write both in one spelling"
    ]


def test_both_spellings_in_one_file() -> None:
    text = SMALL.replace("batch_size: 8", "batch_size: 8, micro_batch_size: 2")
    assert problems_of_texts(text)[0] == (
        "a:2: data.micro_batch_size is the newest dialect's spelling of batch.micro_batch_size, which is also given (a:3); "
        "keep one"
    )


@pytest.mark.parametrize("value", [".inf", ".nan", "0", "-1", "1e300", "[1]", "{a: 1}", "yes", "text"])
@pytest.mark.parametrize("key", ["sequence_length", "batch_size", "micro_batch_size"])
def test_no_number_at_todays_keys(key: str, value: str) -> None:
    """Arithmetic with them is left to the validation, which says what is wrong."""
    problems = small_problems(f"batch.{key}={value}", "schedule.depth_first_micro_batches=2")
    assert any(problem.startswith(f"override 1: batch.{key} = ") for problem in problems), problems
