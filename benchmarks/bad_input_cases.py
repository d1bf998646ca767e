"""The mistakes of `benchmarks/bad_input.py`, each with the essential words of its answer."""

from __future__ import annotations

import fcntl
import os
import resource
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Provoke = Callable[[ExitStack], list[str]]


@dataclass(frozen=True)
class Mistake:
    """`provoke` changes the project in the working directory and returns the words to start the program with."""

    group: str
    name: str
    what: str
    says: tuple[str, ...]
    """Words that the answer must have."""
    provoke: Provoke
    status: int = 2
    afterwards: Callable[[], str | None] | None = None
    """A look at the folder when all is over; what is wrong, or None."""


MISTAKES: list[Mistake] = []


def _add(group: str, name: str, what: str, *says: str, **rest: Any) -> Callable[[Provoke], Provoke]:
    def register(provoke: Provoke) -> Provoke:
        MISTAKES.append(Mistake(group, name, what, says, provoke, **rest))
        return provoke

    return register


def _simple(group: str, name: str, what: str, words: list[str], *says: str, **rest: Any) -> None:
    _add(group, name, what, *says, **rest)(lambda _: list(words))


def _train(*overrides: str) -> list[str]:
    return ["train", "train.yaml", "run.experiment_dir=new", *overrides]


def _replace(file: str, old: str, new: str) -> None:
    text = Path(file).read_text(encoding="utf-8")
    assert old in text, (file, old)
    Path(file).write_text(text.replace(old, new, 1), encoding="utf-8")


def _flip(file: str | Path, at: float = 0.5) -> None:
    content = bytearray(Path(file).read_bytes())
    content[int(len(content) * at)] ^= 1
    Path(file).write_bytes(content)


# Keys and values

KEYS = "Keys and values"
T = "model.base_model.transformer"
for _name, _override, *_says in (
    ("key-top", "trainig.train_iters=3", "unknown key 'trainig'", "did you mean 'training'"),
    ("key-second", "training.train_iter=3", "unknown key 'train_iter' in training", "did you mean 'train_iters'"),
    ("key-third", "training.checkpoint.intervall=3", "'intervall' in training.checkpoint", "did you mean 'interval'"),
    ("key-evaluator", "training.evaluators.validation.evaluator.iteration=3", "did you mean 'iterations'"),
    ("key-dataset", "data.datasets.training.pth=x", "unknown key 'pth'", "did you mean 'path'"),
    ("key-deepest", f"{T}.rotary.thet=1e4", "unknown key 'thet' in model.base_model.transformer.rotary", "'theta'"),
    ("key-elsewhere", "training.batch_size=4", "unknown key 'batch_size' in training; it belongs to batch.batch_size"),
    ("type-text", "training.train_iters=many", "override 2: training.train_iters = 'many': expected a whole number"),
    ("type-fraction", "batch.batch_size=2.5", "batch.batch_size = 2.5: expected a whole number"),
    ("type-number", "training.logs.tensorboard=3", "training.logs.tensorboard = 3: expected yes or no"),
    ("type-list", "training.checkpoint=[1, 2]", "training.checkpoint = [1, 2]: expected a section"),
    ("type-section", "batch.sequence_length={a: 1}", "batch.sequence_length = {'a': 1}: expected a whole number"),
    ("type-null", "training.train_iters=", "training.train_iters = null: expected a whole number"),
    ("value-negative", "training.train_iters=-1", "training.train_iters = -1: expected a number of at least 0"),
    ("value-nan", "optimizer.weight_decay=.nan", "optimizer.weight_decay = nan: expected a"),
    ("value-huge", "batch.sequence_length=1" + "0" * 30, "batch.sequence_length = 1e+30: expected a whole number"),
    ("value-word", "data.sampling.shuffle=al", "data.sampling.shuffle = 'al': expected one of epoch, full"),
    ("value-type", "data.datasets.training={type: memmmap, path: x}", "unknown dataset type 'memmmap'", "'memmap'"),
    ("value-dtype", "model.distributed.training_dtype=float17", "training_dtype", "float17", "float16"),
):  # fmt: skip
    _simple(KEYS, _name, f"`{_override[:60]}`", _train(_override), *_says)

_simple(
    KEYS,
    "several-at-once",
    "three of them at once: each is said",
    _train("trainig=1", "batch.batch_size=x", f"{T}.hidden=4"),
    "'trainig'",
    "batch.batch_size = 'x'",
    "'hidden'",
)
_simple(
    KEYS,
    "batch-not-dividing",
    "`batch.batch_size=10 batch.micro_batch_size=4`",
    _train("batch.batch_size=10", "batch.micro_batch_size=4"),
    "batch_size 10 is not a multiple of micro_batch_size 4; nearest that are: 8 and 12",
)
_simple(
    KEYS,
    "heads-not-dividing",
    "`head_groups=3` with 4 heads",
    _train(f"{T}.head_groups=3"),
    "head_groups 3 does not divide num_attention_heads 4",
)
_simple(
    KEYS,
    "key-prepare",
    "`prepare` with `dataset.feild=content`",
    ["prepare", "prepare.yaml", "output_path=new", "dataset.feild=content"],
    "unknown key 'feild' in dataset; did you mean 'field'",
)


@_add(
    KEYS,
    "key-twice",
    "a key given twice in a file",
    "train.yaml:3: 'train_iters' is given twice (first in line 2)",
)
def _twice(_: ExitStack) -> list[str]:
    _replace("train.yaml", "  train_iters: 4\n", "  train_iters: 4\n  train_iters: 5\n")
    return _train()


@_add(
    KEYS,
    "tab",
    "a line indented by a tab",
    "train.yaml:2: not valid YAML: a tab; YAML is indented with spaces",
)
def _tab(_: ExitStack) -> list[str]:
    _replace("train.yaml", "  train_iters", "\ttrain_iters")
    return _train()


@_add(KEYS, "not-utf8", "a file that is not UTF-8", "train.yaml is not a text file (byte 0 is not UTF-8)")
def _latin(_: ExitStack) -> list[str]:
    Path("train.yaml").write_bytes(b"\xff" + Path("train.yaml").read_bytes())
    return _train()


@_add(
    KEYS,
    "alias-bomb",
    "aliases of aliases that stand for 10⁹ values",
    "aliases (`*name`) make more than 100,000 values",
)
def _bomb(_: ExitStack) -> list[str]:
    lines = ["b0: &b0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"b{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 10)}]" for i in range(1, 9)]
    Path("train.yaml").write_text("\n".join(lines) + "\n")
    return _train()


@_add(KEYS, "too-deep", "5,000 brackets inside one another", "nested more than 64 deep")
def _deep(_: ExitStack) -> list[str]:
    Path("train.yaml").write_text("training: " + "[" * 5000 + "]" * 5000 + "\n")
    return _train()


@_add(KEYS, "merge-itself", "a section merged into itself", "an alias (`*name`) that contains itself")
def _itself(_: ExitStack) -> list[str]:
    _replace("train.yaml", "training:\n", "training: &loop\n  <<: *loop\n")
    return _train()


@_add(
    KEYS,
    "control-characters",
    "a key with a line end and an escape sequence in it",
    r"unknown key 'a\nb\x1b[31m'",
)
def _control(_: ExitStack) -> list[str]:
    _replace("train.yaml", "training:\n", '"a\\nb\\e[31m": 1\ntraining:\n')
    return _train()


_simple(
    KEYS,
    "no-config",
    "a config that is not there",
    ["train", "trian.yaml"],
    "trian.yaml does not exist",
    "train.yaml",
)
_simple(
    KEYS,
    "no-such-verb",
    "`modelyard trian`",
    ["trian", "train.yaml"],
    "'trian' is not a verb; did you mean 'train'",
)
_simple(
    KEYS,
    "wrong-verb",
    "a preparation config given to `train`",
    ["train", "prepare.yaml"],
    "data preparation; use `modelyard prepare`",
)
_simple(
    KEYS,
    "long-path",
    "a path of 300 characters in one name",
    _train(f"run.experiment_dir={'x' * 300}"),
    "File name too long",
)

# Data

DATA = "Data"
_simple(
    DATA,
    "vocabulary-too-small",
    "a vocabulary smaller than the token ids: `vocab_size=100`",
    _train("model.base_model.vocab_size=100"),
    "data/training was prepared with a tokenizer of 320 tokens, the model has vocab_size 100",
)
_simple(
    DATA,
    "other-tokenizer",
    "`data.tokenizer.path` of another tokenizer than the store's",
    _train("data.tokenizer.path=other-tokenizer"),
    "data.tokenizer.path: other-tokenizer is another tokenizer than the one that data/training was prepared with",
)


@_add(
    DATA,
    "two-tokenizers",
    "two stores made with two tokenizers",
    "prepared with another tokenizer than",
    "other-data",
)
def _two(_: ExitStack) -> list[str]:
    from benchmarks.bad_input import program

    status, _, err = program(
        "prepare", "prepare.yaml", "output_path=other-data", "tokenizer.path=other-tokenizer"
    )
    assert status == 0, err
    return _train("data.datasets.validation.path=other-data/fast_llm_config_validation.yaml")


@_add(
    DATA,
    "shard-missing",
    "a shard that is missing",
    "data/training/tokens_00000.bin is missing; prepare the data again",
)
def _missing(_: ExitStack) -> list[str]:
    Path("data/training/tokens_00000.bin").unlink()
    return _train()


@_add(DATA, "shard-empty", "an empty shard", "data/training/tokens_00000.bin has 0 bytes, not the")
def _empty(_: ExitStack) -> list[str]:
    Path("data/training/tokens_00000.bin").write_bytes(b"")
    return _train()


@_add(DATA, "shard-truncated", "a truncated shard", "data/validation/tokens_00000.bin has", "torn or changed")
def _truncated(_: ExitStack) -> list[str]:
    file = Path("data/validation/tokens_00000.bin")
    file.write_bytes(file.read_bytes()[:-3])
    return _train()


@_add(
    DATA,
    "shard-flipped",
    "one bit flipped in a shard",
    "data/training/tokens_00000.bin does not have the checksum",
)
def _flipped(_: ExitStack) -> list[str]:
    _flip("data/training/tokens_00000.bin")
    return _train()


@_add(
    DATA,
    "index-flipped",
    "one bit flipped in the documents' lengths",
    "data/training/lengths.bin does not have the checksum",
)
def _flipped_index(_: ExitStack) -> list[str]:
    _flip("data/training/lengths.bin", 0.9)
    return _train()


@_add(
    DATA,
    "manifest-edited",
    "a store's manifest edited by hand",
    "data/training/manifest.json differs from its own checksum",
)
def _edited(_: ExitStack) -> list[str]:
    _replace("data/training/manifest.json", '"vocab_size": 320', '"vocab_size": 300')
    return _train()


@_add(
    DATA,
    "store-unfinished",
    "a store that `prepare` did not finish",
    "data/training does not exist",
    "data/training.tmp is an unfinished one",
)
def _unfinished(_: ExitStack) -> list[str]:
    os.rename("data/training", "data/training.tmp")
    return _train()


def _record(number: int, line: str) -> list[str]:
    lines = Path("texts.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    lines[number] = line + "\n"
    Path("texts.jsonl").write_text("".join(lines), encoding="utf-8")
    return ["prepare", "prepare.yaml", "output_path=new"]


_add(DATA, "field-absent", "a record without the field", "texts.jsonl: record 18", "'text'")(
    lambda _: _record(17, '{"txt": "a"}')
)
_add(DATA, "field-null", "a record whose field is null", "texts.jsonl: record 18", "null")(
    lambda _: _record(17, '{"text": null}')
)
_add(DATA, "field-number", "a record whose field is a number", "texts.jsonl: record 18", "'text'")(
    lambda _: _record(17, '{"text": 3}')
)
_add(DATA, "record-torn", "a record that is no JSON", "texts.jsonl: record 18", "JSON")(
    lambda _: _record(17, '{"text": "a')
)
_simple(
    DATA,
    "field-unknown",
    "`dataset.field=content` where the column is `text`",
    ["prepare", "prepare.yaml", "output_path=new", "dataset.field=content"],
    "texts.jsonl: record 1",
    "'content'",
)
_simple(
    DATA,
    "documents-too-long",
    "`truncate_documents: no` and rows shorter than every document",
    _train("batch.truncate_documents=no", "batch.sequence_length=1"),
    "no document fits in a row of sequence_length + 1 = 2 tokens (the longest has",
    "set batch.truncate_documents: yes",
)
_simple(
    DATA,
    "no-such-dataset",
    "an evaluator of a dataset that is not there",
    _train("training.evaluators.validation.evaluator.dataset_name=validaton"),
    "data.datasets has no 'validaton'; did you mean 'validation'",
)

# Pretrained folders

MODEL = "A pretrained folder"
CONTINUE = ["train", "continue.yaml"]


def _edit_weights(change: Callable[[dict[str, Any]], None]) -> list[str]:
    from safetensors.torch import load_file, save_file

    tensors = load_file("model/model.safetensors")
    change(tensors)
    save_file(tensors, "model/model.safetensors", {"format": "pt"})
    return CONTINUE


Q = "model.layers.1.self_attn.q_proj.weight"
_add(MODEL, "tensor-missing", "a tensor missing", "model lacks", "layers.1.self_attn.q_proj.weight")(
    lambda _: _edit_weights(lambda tensors: tensors.pop(Q))
)
_add(MODEL, "tensor-extra", "a tensor too many", "layers.1.self_attn.q_norm.weight")(
    lambda _: _edit_weights(
        lambda tensors: tensors.update({Q.replace("q_proj", "q_norm"): tensors[Q][0].clone()})
    )
)
_add(
    MODEL,
    "tensor-shape",
    "a tensor of another shape",
    "layers.1.self_attn.q_proj.weight",
    "[16, 32]",
    "[32, 32]",
)(lambda _: _edit_weights(lambda tensors: tensors.update({Q: tensors[Q][:16].clone()})))
_simple(
    MODEL,
    "family",
    "`pretrained.format=qwen2` for a Llama",
    [*CONTINUE, "pretrained.format=qwen2"],
    "pretrained.format is qwen2, but model/config.json says llama; write format: llama",
)
_simple(
    MODEL,
    "format-list",
    "a list as `pretrained.format`",
    [*CONTINUE, "pretrained.format=[llama]"],
    "pretrained.format = ['llama']: expected one of auto, llama",
)


@_add(MODEL, "family-unknown", "a model of a family that is not read", "model/config.json", "mamba")
def _family(_: ExitStack) -> list[str]:
    _replace("model/config.json", '"model_type": "llama"', '"model_type": "mamba"')
    return CONTINUE


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4976698672\n"


@_add(
    MODEL,
    "lfs-pointer",
    "weights that are git-lfs pointers, with `model_weights: yes`",
    "model/model.safetensors is a git-lfs pointer, not the weights; fetch them with `git lfs pull`",
)
def _pointer(_: ExitStack) -> list[str]:
    Path("model/model.safetensors").write_text(POINTER)
    return CONTINUE


@_add(MODEL, "lfs-pointer-shape", "the same with `model_weights: no`", status=0)
def _pointer_shape(_: ExitStack) -> list[str]:
    Path("model/model.safetensors").write_text(POINTER)
    return [*CONTINUE, "pretrained.model_weights=no"]


@_add(MODEL, "weights-truncated", "weights cut short", "model/model.safetensors has", "cut short")
def _cut_weights(_: ExitStack) -> list[str]:
    file = Path("model/model.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    return CONTINUE


@_add(MODEL, "no-weights", "a folder without weights", "model has no weights")
def _no_weights(_: ExitStack) -> list[str]:
    Path("model/model.safetensors").unlink()
    return CONTINUE


@_add(MODEL, "config-torn", "a config.json cut short", "model/config.json")
def _torn_config(_: ExitStack) -> list[str]:
    Path("model/config.json").write_text(Path("model/config.json").read_text()[:100])
    return CONTINUE


@_add(
    MODEL,
    "model-tokenizer",
    "a model with another tokenizer than the data's",
    "the model in model has another tokenizer than the one that data/training was prepared with",
    "tokenizer.path: model",
)
def _model_tokenizer(_: ExitStack) -> list[str]:
    shutil.copy("other-tokenizer/tokenizer.json", "model/tokenizer.json")
    return CONTINUE


_simple(
    MODEL,
    "shape-changed",
    "a shape that the weights do not have: `hidden_size=48`",
    [*CONTINUE, f"{T}.hidden_size=48"],
    "hidden_size = 48, but the pretrained weights have 32",
    "pretrained.model_weights: no",
)
_simple(
    MODEL,
    "no-model",
    "a folder that is not there",
    [*CONTINUE, "pretrained.path=modle"],
    "pretrained.path: modle does not exist",
    "model",
)

# The experiment's folder

RUN = "The experiment's folder"
_simple(
    RUN,
    "another-run",
    "a folder whose run was trained otherwise",
    [
        "train",
        "train.yaml",
        "training.train_iters=6",
        "optimizer.weight_decay=0.5",
        f"{T}.ffn_hidden_size=96",
    ],
    "optimizer.weight_decay: was 0.01, is now 0.5",
    "architecture.ffn_hidden_size: was 64, is now 96",
    "choose another run.experiment_dir",
)
_simple(
    RUN,
    "foreign-folder",
    "a folder that holds other things",
    ["train", "train.yaml", "run.experiment_dir=model"],
    "run.experiment_dir: model is not the folder of a run, it holds",
)
_simple(
    RUN,
    "folder-is-file",
    "a file in its place",
    ["train", "train.yaml", "run.experiment_dir=texts.jsonl"],
    "run.experiment_dir: texts.jsonl cannot be written to",
)


@_add(
    RUN,
    "two-at-once",
    "a second process in the same folder",
    "another process is training in run at this moment",
)
def _second(stack: ExitStack) -> list[str]:
    ready, told = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with open("run/.lock", "w") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)
            os.write(ready[1], b"x")
            os.read(told[0], 1)
        os._exit(0)
    os.read(ready[0], 1)

    def leave() -> None:
        os.write(told[1], b"x")
        os.waitpid(child, 0)
        for descriptor in (*ready, *told):
            os.close(descriptor)

    stack.callback(leave)
    return ["train", "train.yaml", "training.train_iters=6"]


@_add(
    RUN,
    "all-damaged",
    "all checkpoints damaged",
    "run/checkpoint/4/",
    "differs from its checksum",
    "every checkpoint in run/checkpoint is damaged",
)
def _all_damaged(_: ExitStack) -> list[str]:
    for folder in Path("run/checkpoint").iterdir():
        _flip(next(folder.glob("*.distcp")))
    return ["train", "train.yaml", "training.train_iters=6"]


def _previous_stays() -> str | None:
    from modelyard.train.checkpoint import newest_usable

    names = sorted(path.name for path in Path("run/checkpoint").iterdir())
    newest, damaged = newest_usable(Path("run/checkpoint"))
    if names != ["2", "4"] or damaged or newest != Path("run/checkpoint/4"):
        return f"checkpoints are {names}, damaged {damaged}"
    return None


def _little_room() -> None:
    # A limit on the size of files is a disk that is full for checkpoints and has room for log lines.
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))


@_add(
    RUN,
    "disk-full",
    "no room while saving (exit status 1; here a limit on the size of files stands for a full disk)",
    "iteration 6 is not saved: File too large (a limit on file size: ulimit -f) in run/checkpoint",
    "checkpoint run/checkpoint/4 stays",
    status=1,
    afterwards=_previous_stays,
)
def _full(_: ExitStack) -> list[str]:
    _little_room()
    return ["train", "train.yaml", "training.train_iters=8", "training.export.interval="]


@_add(
    RUN,
    "disk-full-continue",
    "the same with `training.checkpoint.on_error: continue`: it trains on, and its last save fails too (exit status 1)",
    "the last iteration, 8, is not saved",
    status=1,
    afterwards=_previous_stays,
)
def _full_continue(_: ExitStack) -> list[str]:
    _little_room()
    return [
        "train",
        "train.yaml",
        "training.train_iters=8",
        "training.export.interval=",
        "training.checkpoint.on_error=continue",
    ]


_simple(
    RUN,
    "convert-over",
    "`convert` into a folder that exists",
    ["convert", "run", "model"],
    "model exists already; choose another folder or remove it",
)
_simple(
    RUN,
    "generate-nothing",
    "`generate` from a folder without a model",
    ["generate", "data", "--prompt", "a"],
    "data holds neither a Hugging Face model (config.json), nor an adapter (adapter_config.json), nor a checkpoint",
)


@_add(
    RUN,
    "too-big",
    "a run that the disk cannot hold",
    "run.experiment_dir: the run writes up to",
    "are free; lower training.checkpoint.keep",
)
def _too_big(_: ExitStack) -> list[str]:
    return _train(f"{T}.hidden_size=65536", f"{T}.ffn_hidden_size=262144", f"{T}.num_layers=2000")


# Adapters

ADAPTERS = "Adapters"
ADAPTED = [*CONTINUE, "pretrained.adapter=adapter"]
MERGE = ["merge", "adapter", "--to", "merged"]


def _adapter(*, quantised: bool = False, **config: Any) -> None:
    """An adapter of `model` in PEFT's form, of rank 2, with these keys of adapter_config.json otherwise."""
    import json

    import torch

    from modelyard.config.adapter import Adapter, Quantization
    from modelyard.model.formats import open_huggingface
    from modelyard.model.formats.peft import write_peft
    from modelyard.train.models_on_disk import base_fingerprint

    class Zeros:
        def names(self) -> list[str]:
            return list(shapes)

        def shape(self, name: str) -> tuple[int, ...]:
            return shapes[name]

        def dtype(self, name: str) -> torch.dtype:
            return torch.float32

        def load(self, name: str) -> torch.Tensor:
            return torch.zeros(shapes[name])

    base, quantization = Path("model"), Quantization(16) if quantised else None
    model = open_huggingface(base)
    adapter = Adapter(rank=2, alpha=4.0, modules=("q_proj", "v_proj"), quantization=quantization)
    shapes = adapter.shapes(model.architecture)
    write_peft(
        Zeros(),
        Path("adapter"),
        adapter=adapter,
        architecture=model.architecture,
        family=model.family,
        base_path=base,
        fingerprint=base_fingerprint(base),
    )
    file = Path("adapter/adapter_config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | config))


def _with_adapter(
    name: str, what: str, words: list[str], *says: str, quantised: bool = False, **config: Any
) -> None:
    def provoke(_: ExitStack) -> list[str]:
        _adapter(quantised=quantised, **config)
        return list(words)

    _add(ADAPTERS, name, what, *says)(provoke)


_with_adapter(
    "adapter-biases",
    "an adapter of PEFT's that trains biases too",
    MERGE,
    "adapter/adapter_config.json: bias 'all' is not supported (only 'none')",
    bias="all",
)
_with_adapter(
    "adapter-head",
    "one that adapts the head",
    ADAPTED,
    "target_modules names ['lm_head']: only matrices that every block has are adapted",
    target_modules=["q_proj", "lm_head"],
)
_with_adapter(
    "adapter-pattern",
    "one with another rank for some layers",
    MERGE,
    "rank_pattern {'q_proj': 4} is not supported: every adapter has one rank here",
    rank_pattern={"q_proj": 4},
)
_with_adapter(
    "adapter-shape",
    "one whose file says another rank than its tensors have",
    MERGE,
    "'layers.0.self_attn.q_proj.lora_A' has shape [2, 32], the architecture wants [3, 32]",
    "adapter is no whole adapter of model",
    r=3,
)
_with_adapter(
    "adapter-rank",
    "going on with an adapter of another rank than the config's",
    [*ADAPTED, f"{T}.peft.rank=4"],
    f"{T}.peft.rank is another than that of pretrained.adapter adapter (2); leave it out",
)
_with_adapter(
    "adapter-as-model",
    "an adapter as `pretrained.path`",
    [*CONTINUE, "pretrained.path=adapter"],
    "adapter is an adapter; write it as pretrained.adapter, and the model that it adapts as pretrained.path",
)
_with_adapter(
    "merge-quantised",
    "`merge` of an adapter that was trained on a quantised base, without saying onto what",
    MERGE,
    "adapter was trained on a quantised base: write `modelyard merge adapter --to merged --onto original`",
    quantised=True,
)
_with_adapter(
    "merge-over",
    "`merge` into a folder that exists",
    [*MERGE[:-1], "model"],
    "model exists already; choose another",
)
_simple(
    ADAPTERS,
    "merge-nothing",
    "`merge` of a model",
    ["merge", "model", "--to", "merged"],
    "model is no adapter but a whole model: there is nothing to merge",
)


@_add(
    ADAPTERS,
    "adapter-base-changed",
    "an adapter whose base has other weights by now",
    "adapter was trained on other weights (model), fingerprint ",
    "give its own base with --base DIR",
)
def _another_base(_: ExitStack) -> list[str]:
    _adapter()
    _edit_weights(lambda tensors: tensors[Q].mul_(2))
    return ["generate", "adapter", "--prompt", "a"]


@_add(
    ADAPTERS,
    "adapter-base-gone",
    "an adapter whose base is not here",
    "adapter adapts 'some/Model-8B', which is no folder here; give the base with --base DIR",
)
def _no_base(_: ExitStack) -> list[str]:
    _adapter(base_model_name_or_path="some/Model-8B")
    Path("adapter/modelyard_adapter.json").unlink()
    return ["generate", "adapter", "--prompt", "a"]


@_add(
    ADAPTERS,
    "adapter-nan",
    "values that are no numbers in an adapter",
    "the adapter's 'layers.1.self_attn.v_proj.lora_B' has 1 of ",
)
def _broken_adapter(_: ExitStack) -> list[str]:
    from safetensors.torch import load_file, save_file

    _adapter()
    file = "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"][0, 0] = float("nan")
    save_file(tensors, file)
    return MERGE


# Plans

PLANS = "Plans"
for _name, _words, *_says in (
    ("plan-gpu", "--gpu h1000", "--gpu h1000: there is no hardware of this name", "did you mean 'h100'"),
    ("plan-network", "--network 50", "--network 50: not a rate of data; write bytes as 50GB/s, or bits as 400Gb/s"),
    ("plan-no-layout", "--gpus 3", "batch.batch_size: ", "rows cannot be dealt evenly to 3", "let --search choose a layout"),
    ("plan-no-room", "--gpu a6000 model.base_model.vocab_size=2000000000", "does not fit: a process needs"),
):  # fmt: skip
    _simple(PLANS, _name, f"`{_words}`", ["plan", "train.yaml", *_words.split()], *_says)
