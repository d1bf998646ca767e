"""`modelyard plan` as people call it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modelyard.cli import main

EXAMPLE = str(Path(__file__).parents[2] / "examples" / "train-llama-3.1-8b.yaml")
LLAMA_405B = [
    EXAMPLE,
    "model.preset=llama-3.1-405b",
    "batch.sequence_length=8192",
    "batch.batch_size=2048",
    "batch.micro_batch_size=1",
    "model.distributed.tensor_parallel=8",
    "model.distributed.sequence_tensor_parallel=yes",
    "model.distributed.pipeline_parallel=16",
    "model.multi_stage.zero_stage=1",
]


def plan(*words: str) -> int:
    return main(["plan", *words])


def test_says_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(EXAMPLE, "--gpus", "32") == 0
    text = capsys.readouterr().out
    assert "32 x NVIDIA H100 SXM5 80 GB" in text
    assert "GiB of 79.0 GiB: fits" in text
    assert "weights reduce-scatter  136 calls" in text  # 34 groups of parameters, 4 micro-batches, ZeRO 2
    assert "iterations of 1,048,576 tokens" in text


def test_as_a_record(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(EXAMPLE, "--gpus", "8", "--gpu", "h200", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["layout"]["shard"] == 8
    assert record["checkpoint_bytes"] == 12 * 8_030_261_248
    assert record["memory"]["fits"] is True
    # fp32 weights and two moments, an eighth of each; the rest of a row of the vocabulary and of norms is filled up
    assert record["memory"]["at_rest_bytes"] == pytest.approx(12 * 8_030_261_248 / 8, rel=1e-6)
    tokens = record["tokens_per_second_per_gpu"] * 8 * record["step_seconds"]
    assert tokens == pytest.approx(256 * 4096)
    # MFU by hand: 6 x (parameters without the embedding) and the triangle of 32 layers, 32 heads of 128, over 989 TFLOP/s
    flops = 6 * (8_030_261_248 - 128256 * 4096 - 65 * 4096) + 6 * 32 * 32 * 128 * 4096
    expected = flops * record["tokens_per_second_per_gpu"] / 989e12
    assert record["mfu_causal"] == pytest.approx(expected, rel=1e-4)


def test_16384_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*LLAMA_405B, "model.multi_stage.recompute=selective", "--gpus", "16384", "--json"]
    assert plan(*words) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["layout"]["shard"], record["micro_batches"]) == (128, 16)
    # (p - 1) / m of the compute of a step, whose share of the step's time is a little less than the whole
    assert 0.35 < record["bubble_share"] * (1 + 15 / 16) / (15 / 16) <= 1.02


def test_documents_are_less_work(capsys: pytest.CaptureFixture[str]) -> None:
    steps = []
    for length in ("4096", "256"):
        assert plan(EXAMPLE, "--gpus", "8", "--document-length", length, "--json") == 0
        steps.append(json.loads(capsys.readouterr().out)["items"]["attention"])
    assert steps[1] < 0.3 * steps[0]


def test_a_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["model.base_model.transformer.num_layers=2", "model.base_model.vocab_size=4096"]
    assert plan(EXAMPLE, *small, "--gpus", "4", "--trace", "--json", "batch.batch_size=8") == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert record["formula_peak_bytes"] == pytest.approx(record["peak_bytes"], rel=0.05)
    kinds = {(one["kind"], one["operation"]): one["calls"] for one in record["calls"]}
    assert kinds["weights", "all-gather"] == 4  # embedding, two blocks, the rest


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "h1000"], "--gpu h1000: there is no hardware of this name (there is: a100"),
        (["--gpus", "8", "--rank", "2"], "--rank: says which process to trace; add --trace"),
        (["--measure"], "--measure: measures this machine; write --gpu this-machine"),
        (["--search", "--trace"], "--search and --trace: one at a time"),
        (["--gpus", "0"], "--gpus 0: at least 1 is needed"),
        (["--gpus", "24"], "batch.batch_size: 256 rows cannot be dealt evenly to 24"),
        (["--network", "fast"], "--network fast: not a rate of data; write bytes as 50GB/s"),
        (
            ["--gpus", "8", "--document-length", "5000"],
            "--document-length 5000: a mean length in tokens, from 1 to",
        ),
        (["--gpus", "8", "--trace", "--rank", "8"], "--rank 8: the layout has ranks 0 to 7"),
        (["--gpus", "1000000"], "--gpus 1000000: at most 131,072 can be planned for"),
        (
            ["model.distributed.tensor_parallel=3", "--gpus", "3"],
            "num_attention_heads 32 evenly; sizes that work: 1, 2, 4, 8",
        ),
    ],
)
def test_what_cannot_be_planned(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(EXAMPLE, *words) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.out == ""


def test_what_does_not_fit_is_told_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(EXAMPLE, "--gpus", "1", "--gpu", "a6000") == 2
    error = capsys.readouterr().err
    assert "does not fit: a process needs" in error
    assert "no layout of 1 would; the least that does: " in error
    assert "NVIDIA RTX A6000" in error.partition("the least that does")[2]


def test_another_layout_of_the_same_devices(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(EXAMPLE, "batch.micro_batch_size=32", "--gpus", "8") == 2
    error = capsys.readouterr().err
    assert "on the same devices this would: 8 processes" in error


def test_search(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(EXAMPLE, "--gpus", "16", "--search") == 0
    text = capsys.readouterr().out
    assert " 1  16 processes = " in text
    assert "10  16 processes = " in text
    assert "to paste, for the first:\n  batch:\n    micro_batch_size: " in text


def test_fp8_is_said_not_to_be_modelled(capsys: pytest.CaptureFixture[str]) -> None:
    words = [EXAMPLE, "training.fp8=rowwise", "--gpus", "32"]
    assert plan(*words) == 0
    assert "rowwise is planned as bf16" in capsys.readouterr().out
    assert plan(*words[:1], "--gpus", "32") == 0
    assert "fp8" not in capsys.readouterr().out
