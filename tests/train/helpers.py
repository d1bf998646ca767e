"""A run of a few kilobytes on random tokens, in the present process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from modelyard.config.loader import Loaded, load_config
from modelyard.train.console import Console
from modelyard.train.state import Run

CONFIG = """\
training:
  train_iters: 12
  logs: {interval: 1, tensorboard: no}
  checkpoint: {interval: 2, offset: 1, keep: 2, keep_every: 2}
batch: {sequence_length: 16, batch_size: 4}
data: {datasets: {training: {type: random, num_documents: 50, document_length: 20}, held_out: {type: random}}}
optimizer: {learning_rate: {base: 0.01, warmup_iterations: 8}}
model:
  base_model:
    vocab_size: 32
    transformer:
      {num_layers: 1, hidden_size: 8, num_attention_heads: 2, ffn_hidden_size: 16, gated: yes, add_linear_biases: no,
       normalization: {type: rms_norm}, rotary: {type: default}}
run: {experiment_dir: run}
"""


def loaded(*overrides: str) -> Loaded:
    """`train.yaml` of the working directory, which the fixture `tiny` makes."""
    return load_config(["train.yaml"], overrides)


def new_run(*overrides: str) -> Run:
    config = loaded(*overrides)
    assert config.architecture is not None
    return Run(config.train, config.architecture, force=False, console=Console())


def lines(path: str | Path) -> list[dict[str, Any]]:
    """A file of JSON lines."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def losses(folder: str = "run") -> dict[int, float]:
    """The training losses of a run by iteration."""
    return {r["iteration"]: r["loss"] for r in lines(f"{folder}/metrics.jsonl") if "evaluator" not in r}
