"""`modelyard validate`: figures, problems, and that it needs neither torch nor transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from modelyard.chat.segments import Kind
from modelyard.config.huggingface import write_config
from modelyard.config.loader import load_config
from modelyard.config.optimizer import LearningRateConfig
from modelyard.config.presets import PRESETS
from modelyard.data.store import StoreWriter
from modelyard.plan.summary import plot, summarise
from tests.config.helpers import TINY, load_tiny, write
from tests.conftest import ROOT
from tests.report.inspecting import byte, make_store


def store(folder: Path, documents: int, tokens: int, vocab_size: int = 100) -> dict[str, str]:
    """A token store of equally long documents."""
    with StoreWriter(folder, vocab_size=vocab_size) as writer:
        for _ in range(documents):
            writer.append(np.zeros(tokens // documents, dtype=np.uint32))
    return {"type": "memmap", "path": str(folder)}


def llama(folder: Path, *overrides: str) -> str:
    text = TINY[: TINY.index("model:")] + "model: {preset: llama-3.1-8b}\nrun: {experiment_dir: x}\n"
    shape = ["batch.sequence_length=8192", "batch.batch_size=256", "batch.micro_batch_size=2"]
    summary, problems, _ = summarise(load_config([write(folder, text)], [*shape, *overrides]))
    assert problems == []
    return summary


def test_figures_of_llama_3_1_8b(tmp_path: Path) -> None:
    text = llama(tmp_path, "training.train_iters=100_000", "training.checkpoint.interval=1000",
                 "training.export={interval: 20_000, format: llama}")  # fmt: skip
    assert (
        "parameters     8,030,261,248 (525,336,576 in the embedding, and as many in the output layer)" in text
    )
    assert "tokens per iteration  2,097,152 (256 rows of 8,192)" in text
    assert "data       all 256 rows of a step, in 128 micro-batches of 2" in text
    assert "total tokens          209,715,200,000 (100,000 iterations)" in text
    # 45.03 G in the matrix products, 6.44 G or 12.88 G in attention at 8,192.
    assert "51.47 G with causal attention" in text
    assert "57.91 G with the full square" in text
    assert "checkpoint      89.7 GiB (weights + 2 Adam moments); 100 written, at most 6 at a time" in text
    assert "export          15.0 GiB (bfloat16); 5 written, at most 5 at a time" in text
    assert "up to 613.3 GiB" in text


def test_epochs_over_the_data(tmp_path: Path) -> None:
    a, b = store(tmp_path / "a", 10, 12_800), store(tmp_path / "b", 30, 6400)
    blend = f"{{type: blended, weights: [1, 1], datasets: [{{type: memmap, path: {a['path']}}}, {{type: memmap, path: {b['path']}}}]}}"
    text, problems, warnings = summarise(load_tiny(tmp_path, f"data.datasets.training={blend}"))
    assert (problems, warnings) == ([], [])
    # 100 iterations of 256 tokens, half from each.
    assert f"training  12,800 tokens in 10 documents, 50.0% of the rows: 1.00 epochs ({a['path']})" in text
    assert f"training  6,390 tokens in 30 documents, 50.0% of the rows: 2.00 epochs ({b['path']})" in text


def test_data_of_another_vocabulary_is_a_problem(tmp_path: Path) -> None:
    a = store(tmp_path / "a", 10, 1000, vocab_size=513)
    loaded = load_tiny(tmp_path, f"data.datasets.training={{type: memmap, path: {a['path']}}}")
    _, problems, _ = summarise(loaded)
    assert problems == [
        f"data.datasets.training: {a['path']} was prepared with a tokenizer of 513 tokens, the model has vocab_size 512; "
        "prepare it with the model's tokenizer, or raise model.base_model.vocab_size"
    ]


def test_problems_and_warnings_come_with_the_whole_summary(tmp_path: Path) -> None:
    loaded = load_config(
        [write(tmp_path, TINY)],
        ["training.export={interval: 5, format: qwen2}", "data.datasets.training={type: memmap, path: gone}"],
        keep_problems=True,
    )
    text, problems, warnings = summarise(loaded)
    assert len(problems) == 1
    assert len(warnings) == 1
    assert [line for line in text.splitlines() if line and not line.startswith(" ")] == [
        "configuration", "model", "batch", "layout", "data", "compute", "disk", "learning rate",
    ]  # fmt: skip
    assert "training  not there yet" in text
    assert "export format  qwen2: cannot hold this architecture" in text


def test_what_kind_of_decoder_it_is(tmp_path: Path) -> None:
    text, _, _ = summarise(load_tiny(tmp_path))
    assert "kind           rms_norm, feed-forward silu (gated), biases nowhere, rotary default" in text
    assert "\n  trained " not in text
    overrides = [f"model.base_model.transformer.{key}" for key in ("gated=no", "normalization.type=layer_norm",
                 "rotary.type=none", "add_linear_biases=only_attn_qkv", "per_layer_lr_scale=[0, null]")]  # fmt: skip
    text, _, _ = summarise(load_tiny(tmp_path, *overrides))
    kind = "layer_norm, feed-forward gelu (not gated), biases only_attn_qkv, 2,048 learned positions"
    assert f"kind           {kind}" in text
    # a block: query and output 64 x 64, key and value 16 x 64, their biases, two norms, the feed-forward
    block = 2 * 64 * 64 + 2 * 16 * 64 + 64 + 16 + 16 + 2 * 2 * 64 + 2 * 256 * 64
    trained = (512 + 2048) * 64 + block + 2 * 64
    assert f"trained        {trained:,} ({block:,} frozen by a learning-rate scale of 0)" in text


def test_weights_that_git_lfs_left_out(tmp_path: Path) -> None:
    config = write_config(PRESETS["llama-3.2-1b"], family="llama", dtype="bfloat16")
    (tmp_path / "config.json").write_text(json.dumps(config))
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    for number in (1, 2):
        (tmp_path / f"model-0000{number}-of-00002.safetensors").write_text(pointer)
    text = (
        TINY[: TINY.index("model:")]
        + "run: {experiment_dir: x}\npretrained: {path: FOLDER, model_weights: WEIGHTS}\n"
    )
    text = text.replace("FOLDER", str(tmp_path))
    file = write(tmp_path, text.replace("WEIGHTS", "yes"))
    assert summarise(load_config([file]))[1] == [
        f"{tmp_path}/model-0000{number}-of-00002.safetensors is a git-lfs pointer, not the file; fetch it with "
        "`git lfs pull`"
        for number in (1, 2)
    ]
    file = write(tmp_path, text.replace("WEIGHTS", "no"))
    assert summarise(load_config([file]))[1] == []


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    text, problems, warnings = summarise(load_tiny(tmp_path, "pretrained.path=gone/model"))
    assert problems == []
    assert len(warnings) == 1
    assert "parameters  unknown until gone/model is there" in text


def test_schedules_that_are_probably_not_meant(tmp_path: Path) -> None:
    def warnings(*overrides: str) -> list[str]:
        return summarise(load_tiny(tmp_path, *(f"optimizer.learning_rate.{text}" for text in overrides)))[2]

    assert warnings("warmup_iterations=200") == ["the warm-up (200 iterations) is as long as the run (100)"]
    assert warnings("decay_style=cosine", "decay_iterations=200") == [
        "the run ends at 100, before the learning rate reaches its minimum at 200 (optimizer.learning_rate.decay_iterations)"
    ]
    assert warnings("decay_style=cosine", "decay_iterations=100") == []


def test_keys_without_effect_are_listed(tmp_path: Path) -> None:
    text, _, _ = summarise(load_tiny(tmp_path, "training.num_workers=4"))
    assert text.splitlines()[-2:] == [
        "accepted without effect here",
        "  training.num_workers  batches are read from memory-mapped stores, without worker processes",
    ]


def test_preparation(tmp_path: Path) -> None:
    file = write(tmp_path, "output_path: out\ndataset: {path: x}\ntokenizer: {path: y}\n")
    text, problems, _ = summarise(load_config([file]))
    assert problems == []
    assert "output_path: out" in text
    file = write(tmp_path, "output_path: out\ndataset: {path: org/name}\ntokenizer: {path: ./gone}\n")
    (warning,) = summarise(load_config([file]))[2]
    assert warning.startswith("tokenizer.path: gone does not exist")


def test_the_learning_rate_drawn() -> None:
    config = LearningRateConfig(base=1.0, decay_style="linear", warmup_iterations=20, decay_iterations=60)
    assert plot(config, 60).splitlines() == [
        "1.00e+00 |                ▁▃▆█▇▆▄▃▂▁",
        "         |             ▂▄▆███████████▆▅▄▃▂",
        "         |          ▂▅▇████████████████████▇▆▅▄▂▁",
        "         |      ▁▃▆███████████████████████████████▇▆▄▃▂▁",
        "         |   ▂▄▆█████████████████████████████████████████▆▅▄▃▂",
        "       0 |▂▅▇██████████████████████████████████████████████████▇▆▅▄▂▁",
        "         +------------------------------------------------------------",
        "    step  1                                                         60",
        "first 5.000e-02, last 0.000e+00 (linear)",
    ]
    for iterations in (1, 2, 7, 100_000):
        assert all(len(line) <= 76 for line in plot(config, iterations).splitlines())
    assert plot(LearningRateConfig(base=0.0), 10)


@pytest.mark.parametrize(
    "module", ["modelyard.config.loader", "modelyard.plan.summary", "modelyard.config.schema"]
)
def test_no_torch_no_transformers_and_quick(module: str) -> None:
    code = (
        "import sys, time; start = time.perf_counter()\n"
        f"import {module}\n"
        "heavy = {'torch', 'transformers', 'datasets', 'tokenizers', 'safetensors'} & set(sys.modules)\n"
        "print(heavy, time.perf_counter() - start < 5)"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert output == "set() True\n"


def test_data_that_is_there_and_cannot_be_used_is_a_problem(tmp_path: Path) -> None:
    """What training would refuse: torn files, no document that fits, no mask."""
    a = store(tmp_path / "a", 10, 1000)
    named = f"data.datasets.training={{type: memmap, path: {a['path']}}}"
    _, problems, _ = summarise(load_tiny(tmp_path, named, "batch.use_loss_masking_spans=yes"))
    assert len(problems) == 1
    assert "has no loss mask" in problems[0]
    text, problems, _ = summarise(
        load_tiny(tmp_path, named, "batch.truncate_documents=no", "batch.sequence_length=32")
    )
    assert len(problems) == 1
    assert "no document fits in a row of sequence_length + 1 = 33 tokens" in problems[0]
    assert "training  cannot be used" in text
    tokens = tmp_path / "a" / "tokens_00000.bin"
    tokens.write_bytes(tokens.read_bytes()[:-1])
    _, problems, _ = summarise(load_tiny(tmp_path, named))
    assert len(problems) == 1
    assert "tokens_00000.bin" in problems[0]


def test_epochs_of_packed_documents_count_rows(tmp_path: Path) -> None:
    """Documents of 40 tokens, one a row of 65: 100 iterations of 4 rows are 40 epochs of 10 documents."""
    a = store(tmp_path / "a", 10, 400)
    settings = [
        "batch.truncate_documents=no",
        "batch.sequence_length=64",
        "batch.batch_size=4",
        "batch.micro_batch_size=4",
    ]
    loaded = load_tiny(tmp_path, f"data.datasets.training={{type: memmap, path: {a['path']}}}", *settings)
    text, _, _ = summarise(loaded)
    assert "400 tokens in 10 documents: 40.00 epochs" in text


def test_no_masks_where_masks_are_wanted_if_there_are_any(tmp_path: Path) -> None:
    named = f"data.datasets.training={json.dumps(store(tmp_path / 'plain', 10, 100))}"
    said = "no dataset has a loss mask: every token is trained on (batch.use_loss_masking_spans: auto)"
    assert said in summarise(load_tiny(tmp_path, named, "batch.use_loss_masking_spans=auto"))[0]
    assert said not in summarise(load_tiny(tmp_path, named, "batch.use_loss_masking_spans=no"))[0]


def test_conversations_are_trained_on_by_what_they_are(tmp_path: Path) -> None:
    kinds = [byte(Kind.CONTENT, "user"), byte(Kind.CONTENT, "assistant")]
    path = make_store(tmp_path / "s", None, [[0, 1]] * 4, kinds=[kinds] * 4, vocab_size=100)
    named = f"data.datasets.training={{type: memmap, path: {path}}}"
    words = ["batch.use_loss_masking_spans=auto", "batch.loss_lane=last_answer"]
    text = summarise(load_tiny(tmp_path, named, *words))[0]
    assert "packed whole, trained on by the loss lane last_answer" in text
    assert "no dataset has a loss mask" not in text
