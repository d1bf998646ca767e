"""Fine-tuning on conversations: one loss whatever the micro-batches and processes, and what an export carries."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from modelyard.chat.format import chat_family
from modelyard.config.prepare import PrepareConfig
from modelyard.data.batch import Batch
from modelyard.data.prepare import prepare
from modelyard.data.store import TokenStore
from modelyard.data.tokenizer import load_tokenizer
from modelyard.errors import UserError
from modelyard.train import state as state_module
from modelyard.train.checkpoint import Checkpoint
from modelyard.train.run import train
from modelyard.train.step import StepResult, train_step
from tests.parallel.processes import run_distributed
from tests.train.helpers import lines, loaded, losses, new_run

pytestmark = pytest.mark.usefixtures("talks")

LONG = "a wide sea " * 40
"""Longer than two rows: spread over several, of which those in the middle hold nothing to train on."""
ANSWERS = ["42", "the ship sails over a wide sea", "", "user assistant system " * 4]


@pytest.fixture
def talks(tiny: Path, chat_tokenizers: dict[str, Path]) -> None:
    """Conversations of ragged lengths, one of them with a question of several rows, and a config to train on them."""
    records = [
        {
            "messages": [
                {"role": "user", "content": "how?"},
                {"role": "assistant", "content": ANSWERS[i % 4] * (1 + i % 3)},
            ]
        }
        for i in range(20)
    ]
    for _ in range(3):
        records.append(
            {"messages": [{"role": "user", "content": LONG}, {"role": "assistant", "content": "the ship"}]}
        )
    Path("talks.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    document = {
        "output_path": "data",
        "dataset": {"path": "talks.jsonl", "conversations": {"family": "chatml"}},
        "tokenizer": {"path": str(chat_tokenizers["chatml"])},
        "tokenize_workers": 1,
    }
    prepare(PrepareConfig.model_validate(document), report=lambda line: None, terminal=False)


TALKS = (
    "data.datasets={training: {type: file, path: data/fast_llm_config.yaml}}",
    "model.base_model.vocab_size=290",
    "batch={sequence_length: 48, batch_size: 8, cross_document_attention: no, overlong: split}",
    "model.distributed.training_dtype=float64",
    "training.train_iters=3",
    "training.checkpoint={interval: 3, offset: 0}",
)


def run(name: str, *overrides: str) -> int:
    return train(loaded(*TALKS, f"run.experiment_dir={name}", *overrides))


def weights(name: str) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(Path(name, "checkpoint", "3"))
    found = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in checkpoint.tensors().items()}
    checkpoint.load_into(found)
    return found


def test_one_batch_of_8_is_eight_of_1_and_two_processes() -> None:
    """With ragged lengths, and micro-batches in which nothing is trained on."""
    stream = new_run(*TALKS, "run.experiment_dir=look").stream
    targets = [stream.rows(row, row + 1).num_targets for row in range(24)]
    assert targets.count(0) > 0
    assert len(set(targets)) > 5
    assert run("whole", "batch.micro_batch_size=8") == 0
    assert run("ones", "batch.micro_batch_size=1") == 0
    assert run_distributed(run, 2, "two", "batch.micro_batch_size=2") == [0, 0]
    expected = weights("whole")
    for name in ("ones", "two"):
        assert losses(name) == pytest.approx(losses("whole"), abs=1e-12)
        for parameter, values in weights(name).items():
            torch.testing.assert_close(values, expected[parameter], rtol=0, atol=1e-12, msg=parameter)


def test_a_batch_without_anything_to_train_on_changes_nothing() -> None:
    """Rows of the middle of a long question: the step is left out, and said to be."""
    made = new_run(*TALKS, "run.experiment_dir=nothing")
    found = made.stream.batch(0)
    empty = Batch(found.input_ids, torch.full_like(found.labels, -100), found.positions, found.cu_seqlens)
    before = {name: value.clone() for name, value in made.parallel.weights.master.items()}
    result = train_step(
        made.parallel.model,
        made.parallel.weights,
        made.optimizer,
        empty,
        learning_rate=1.0,
        micro_batch_size=2,
        max_norm=1.0,
        loss_options=made.loss_options,
        device=torch.device("cpu"),
    )
    assert (result.skipped, result.targets, result.loss, result.grad_norm) == (
        "no trained token in the batch",
        0,
        0,
        0,
    )
    for name, value in made.parallel.weights.master.items():
        assert torch.equal(value, before[name])


def test_an_export_stops_where_answers_end_and_has_the_template(chat_tokenizers: dict[str, Path]) -> None:
    assert run("tuned", "training.export={format: llama, interval: 3, offset: 0}") == 0
    folder = Path("tuned/export/llama/3")
    end = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert end == tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|im_end|>"])
    asked = [{"role": "user", "content": "how?"}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    store = TokenStore("data/data")
    number = next(i for i in range(20) if len(store.document(i)) > len(ids))
    assert store.document(number)[: len(ids)].tolist() == ids
    assert chat_family(folder).name == "chatml"


def test_only_answers_are_targets() -> None:
    """What is trained on is what the assistant said, each with its end."""
    stream = new_run(*TALKS, "run.experiment_dir=look").stream
    batch = stream.rows(0, 24)
    tokenizer_folder = stream.tokenizer_folder
    assert tokenizer_folder is not None
    tokenizer = load_tokenizer(tokenizer_folder)
    said = tokenizer.decode(np.concatenate([row[row != -100].numpy() for row in batch.labels]))
    assert "how?" not in said
    assert "im_start" not in said
    assert said.count("<|im_end|>") == (batch.labels == tokenizer.special_token("<|im_end|>", "end").id).sum()


def test_an_evaluation_in_another_chat_format_is_refused(chat_tokenizers: dict[str, Path]) -> None:
    document = {
        "output_path": "other",
        "dataset": {"path": "talks.jsonl", "conversations": {"family": "chatml", "system": "sail"}},
        "tokenizer": {"path": str(chat_tokenizers["chatml"])},
    }
    prepare(PrepareConfig.model_validate(document), report=lambda line: None, terminal=False)
    evaluated = (
        "data.datasets.held_out={type: file, path: other/fast_llm_config.yaml}",
        "training.evaluators={held_out: {interval: 3, evaluator: {type: loss}}}",
    )
    with pytest.raises(UserError, match="are conversations in different chat formats") as error:
        run("mixed", *evaluated)
    assert "--force" in error.value.problems[-1]


def test_a_gradient_of_nothing_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that learns nothing looks healthy otherwise: its loss stands still near where it began."""
    true_step = state_module.train_step

    def detached(*arguments: Any, **settings: Any) -> StepResult:
        return replace(true_step(*arguments, **settings), grad_norm=0.0)

    monkeypatch.setattr(state_module, "train_step", detached)
    assert run("still") == 0
    said = [event["text"] for event in lines("still/events.jsonl") if event["event"] == "zero_gradient"]
    assert len(said) == 1
    assert said[0].startswith("warning: iteration 1: the gradient is exactly 0 although ")
    assert said[0].endswith(" tokens are trained on: nothing is learned")


def test_the_log_says_what_share_is_trained_on() -> None:
    assert run("share", "training.logs.interval=1") == 0
    for record in lines("share/metrics.jsonl"):
        assert record["trained_share"] == record["targets"] / (8 * 48)
        assert f"| trained {record['trained_share']:.1%} |" in Path("share/log.txt").read_text()


LAYOUTS = {
    "ZeRO 3": "model.multi_stage.zero_stage=3",
    "tensor and sequence": "model.distributed={tensor_parallel: 2, sequence_tensor_parallel: yes, training_dtype: float64}",
    "pipeline": "model.distributed={pipeline_parallel: 2, training_dtype: float64}",
    "context": "model.distributed={sequence_data_parallel: 2, training_dtype: float64}",
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_fine_tunes_alike(name: str) -> None:
    """On ragged conversations, some rows of which hold nothing to train on; evaluated by kind of token too."""
    shape = (
        "model.base_model.transformer={num_layers: 2, head_groups: 2}",
        "data.datasets.held_out={type: file, path: data/fast_llm_config.yaml}",
        "training.evaluators={held_out: {interval: 3, evaluator: {type: loss}}}",
        "batch.micro_batch_size=2",
    )
    assert run("one", *shape) == 0
    assert run_distributed(run, 2, "two", *shape, LAYOUTS[name]) == [0, 0]
    assert losses("two") == pytest.approx(losses("one"), abs=1e-12)
    (one,), (two,) = ([r for r in lines(f"{f}/metrics.jsonl") if "evaluator" in r] for f in ("one", "two"))
    assert set(one["kinds"]) == {"content", "terminator"}
    for kind, scores in one["kinds"].items():
        assert two["kinds"][kind] == pytest.approx(scores, abs=1e-12)
    expected = weights("one")
    for parameter, values in weights("two").items():
        torch.testing.assert_close(values, expected[parameter], rtol=0, atol=1e-12, msg=parameter)
