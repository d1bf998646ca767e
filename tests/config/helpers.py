"""A small configuration to vary, and ways to read what is said about it."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelyard.config.loader import Loaded, load_config
from modelyard.errors import UserError

TINY = """\
training: {train_iters: 100}
batch: {sequence_length: 64, batch_size: 4}
data: {datasets: {training: {type: random}}}
model:
  base_model:
    vocab_size: 512
    transformer:
      num_layers: 2
      hidden_size: 64
      num_attention_heads: 4
      gated: yes
      add_linear_biases: no
      normalization: {type: rms_norm}
      rotary: {type: default}
run: {experiment_dir: runs/tiny}
"""


def write(folder: Path, text: str, name: str = "config.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def load_tiny(folder: Path, *overrides: str) -> Loaded:
    return load_config([write(folder, TINY)], overrides)


def problems_of(files: list[Path], *overrides: str, kind: str | None = None) -> list[str]:
    """The problems that loading raises, with the folders of the files left out."""
    with pytest.raises(UserError) as raised:
        load_config(files, overrides, kind=kind)
    problems = raised.value.problems
    for file in files:
        problems = [problem.replace(f"{file.parent}/", "") for problem in problems]
    return problems


def tiny_problems(folder: Path, *overrides: str) -> list[str]:
    return problems_of([write(folder, TINY)], *overrides)
