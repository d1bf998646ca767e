"""A small real project: tokenizer and token stores of a few files of the interpreter's own standard library."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Result:
    status: int
    out: str
    err: str


def modelyard(*words: object, cwd: Path, timeout: float = 120) -> Result:
    """Run the program as a user does, in its own process."""
    done = subprocess.run(
        [sys.executable, "-m", "modelyard", *map(str, words)],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


PREPARE = f"""\
output_path: data
dataset:
  path: {sysconfig.get_path("stdlib")}/json
  extensions: [.py]
tokenizer: {{path: tokenizer}}
splits: {{training: 0.7, validation: 0.3}}
seed: 3
"""

TRAIN = """\
training:
  train_iters: 12
  logs: {interval: 1, tensorboard: no}
  evaluators:
    validation:
      interval: 4
      evaluator: {type: loss, iterations: 2, dataset_name: validation}
  checkpoint: {interval: 3, keep: 2}
  export: {format: llama, interval: 6}
batch: {sequence_length: 32, micro_batch_size: 2, batch_size: 4, cross_document_attention: no}
data:
  datasets:
    training: {type: file, path: data/fast_llm_config_training.yaml}
    validation: {type: file, path: data/fast_llm_config_validation.yaml}
optimizer:
  weight_decay: 0.1
  learning_rate: {base: 3e-3, minimum: 3e-4, decay_style: cosine, decay_iterations: 12, warmup_iterations: 2}
model:
  base_model:
    vocab_size: 384
    tie_word_embeddings: yes
    transformer:
      num_layers: 2
      hidden_size: 32
      num_attention_heads: 4
      head_groups: 2
      ffn_hidden_size: 64
      gated: yes
      add_linear_biases: no
      normalization: {type: rms_norm}
      rotary: {type: default}
run: {experiment_dir: run}
"""


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `tokenizer/`, `data/` and `train.yaml`; tests copy or link what they change."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "prepare.yaml").write_text(PREPARE)
    (folder / "train.yaml").write_text(TRAIN)
    for words in (
        ("tokenizer", "train", "prepare.yaml", "--vocab-size", 384),
        ("prepare", "prepare.yaml"),
    ):
        done = modelyard(*words, cwd=folder)
        assert done.status == 0, done.out + done.err
    return folder


@pytest.fixture
def project(prepared: Path, tmp_path: Path) -> Path:
    """A fresh folder over the same prepared data, with a `train.yaml` of its own."""
    for name in ("tokenizer", "data"):
        (tmp_path / name).symlink_to(prepared / name)
    (tmp_path / "train.yaml").write_text(TRAIN)
    return tmp_path
