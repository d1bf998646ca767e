"""The newest dialect's configs that several tests vary: facts of its documentation, in files of our own."""

from __future__ import annotations

from modelyard.config.loader import Loaded, load_reading
from modelyard.config.reading import merge_documents
from modelyard.config.yaml import parse_override, parse_yaml
from modelyard.errors import UserError

RUN = """\
training:
  train_iters: 100
  evaluators:
    validation: {type: loss, interval: 10, iterations: 2}
data:
  micro_batch_size: 8192
  maximum_document_length: 4096
  datasets: {training: {type: random}, validation: {type: random}}
  seed: 7
batch: {batch_size: 256}
model:
  distributed: {compute_dtype: bf16}
run: {experiment_dir: runs/newest}
"""

LLAMA = """\
model:
  base_model:
    hidden_size: 4096
    tied_embedding_weight: false
    embeddings: {vocab_size: 128256}
    decoder:
      num_blocks: 32
      block:
        normalization: {type: rms_norm, epsilon: 1.0e-05}
        mixer: {heads: 32, head_groups: 8, head_size: 128, add_linear_biases: false, rotary: {type: llama3, theta: 500_000}}
        mlp: {intermediate_size: 14336, gated: true, activation: silu, add_linear_biases: false}
    head: {normalization: {type: rms_norm, epsilon: 1.0e-05}}
"""

QWEN = """\
model:
  base_model:
    hidden_size: 3584
    tied_embedding_weight: false
    embeddings: {vocab_size: 152064}
    decoder:
      num_blocks: 28
      block:
        normalization: {type: rms_norm, epsilon: 1.0e-06}
        mixer:
          heads: 28
          head_groups: 4
          head_size: 128
          BIASES
          rotary: {type: default, theta: 1_000_000}
        mlp: {intermediate_size: 18944, gated: true, activation: silu, add_linear_biases: false}
    head: {normalization: {type: rms_norm, epsilon: 1.0e-06}}
"""
QWEN_BY_THE_OUTPUT = QWEN.replace(
    "BIASES", "add_linear_biases: true\n          dense_layer: {bias: {enabled: false}}"
)
QWEN_BY_LAYER = QWEN.replace(
    "BIASES",
    "add_linear_biases: false\n"
    + "\n".join(f"          {name}_layer: {{bias: {{enabled: true}}}}" for name in ("query", "key", "value")),
)

SMALL = """\
training: {train_iters: 10}
data: {micro_batch_size: 256, datasets: {training: {type: random}}}
batch: {batch_size: 8}
model:
  base_model:
    hidden_size: 64
    embeddings: {vocab_size: 512}
    decoder:
      num_blocks: 2
      block:
        normalization: {type: rms_norm}
        mixer: {heads: 4, add_linear_biases: no, rotary: {type: default}}
        mlp: {gated: yes, add_linear_biases: no}
    head: {normalization: {type: rms_norm}}
run: {experiment_dir: runs/x}
"""

BASE = "model.base_model."
BLOCK = "model.base_model.decoder.block."


def load_texts(*texts: str, overrides: tuple[str, ...] = ()) -> Loaded:
    """Load files `a`, `b`, ... with these contents, then overrides. Raises UserError."""
    documents = [parse_yaml(text, name) for text, name in zip(texts, "abcdef")]
    documents += [parse_override(text, number) for number, text in enumerate(overrides, start=1)]
    return load_reading(merge_documents(documents))


def load_small(*overrides: str) -> Loaded:
    return load_texts(SMALL, overrides=overrides)


def problems_of_texts(*texts: str, overrides: tuple[str, ...] = ()) -> list[str]:
    try:
        load_texts(*texts, overrides=overrides)
    except UserError as error:
        return error.problems
    raise AssertionError("it loads")


def small_problems(*overrides: str) -> list[str]:
    return problems_of_texts(SMALL, overrides=overrides)
