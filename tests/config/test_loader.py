"""Merging, the architecture, pretrained folders, and every problem at once with its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modelyard.config.architecture import Architecture, Rotary
from modelyard.config.huggingface import write_config
from modelyard.config.loader import load_config
from modelyard.config.presets import PRESETS
from modelyard.errors import UserError
from modelyard.plan.summary import resolved, yaml_text
from tests.config.helpers import TINY, load_tiny, problems_of, tiny_problems, write

TRANSFORMER = "model.base_model.transformer"


def pretrained_folder(folder: Path, preset: str = "llama-3.2-1b", family: str = "llama") -> Path:
    folder.mkdir()
    config = write_config(PRESETS[preset], family=family, dtype="bfloat16")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"")
    return folder


# What is there without asking


def test_defaults(tmp_path: Path) -> None:
    loaded = load_tiny(tmp_path)
    config = loaded.train
    assert config.training.logs.interval == 100
    assert config.training.logs.tensorboard
    assert config.training.checkpoint.interval is None
    assert config.training.checkpoint.keep == 5
    assert config.training.export.keep is None
    assert config.training.export.data_type == "bfloat16"
    assert config.training.max_skipped_steps == 10
    assert (config.batch.micro_batch_size, config.batch.micro_rows()) == (None, 4)
    assert config.batch.tokens == 256
    assert config.batch.cross_document_attention
    assert config.optimizer.weight_decay == 0.01
    assert (config.optimizer.beta_1, config.optimizer.beta_2, config.optimizer.epsilon) == (0.9, 0.999, 1e-8)
    assert config.optimizer.gradient_norm_clipping == 1.0
    assert config.optimizer.learning_rate.base == 1e-4
    assert config.model.distributed.seed == 1234
    assert config.model.distributed.training_dtype == "float32"
    assert config.pretrained is None
    assert loaded.warnings == loaded.notices == loaded.problems == []
    assert loaded.architecture is not None
    assert loaded.architecture.tie_word_embeddings
    assert loaded.architecture.head_groups == 1
    assert loaded.architecture.ffn_hidden_size == 256
    assert loaded.architecture.head_size == 16
    assert loaded.architecture.max_position_embeddings == 64


def test_the_document_is_what_was_written(tmp_path: Path) -> None:
    loaded = load_tiny(tmp_path, "training.validation.interval=5", "data.datasets.validation={type: random}")
    assert loaded.document["training"] == {"train_iters": 100, "evaluators": {"validation": {"interval": 5}}}
    assert loaded.origins["batch", "batch_size"].endswith("config.yaml:2")
    assert loaded.origins["training", "evaluators", "validation", "interval"] == "override 1"


def test_files_are_merged_left_to_right_and_overrides_win(tmp_path: Path) -> None:
    first = write(tmp_path, TINY)
    second = write(
        tmp_path, "training: {train_iters: 7}\noptimizer: {beta_2: 0.95, beta_1: 0.8}\n", "second.yaml"
    )
    config = load_config([first, second], ["optimizer.beta_1=0.7"]).train
    assert config.training.train_iters == 7
    assert config.optimizer.beta_2 == 0.95
    assert config.optimizer.beta_1 == 0.7
    assert load_config([second, first]).train.training.train_iters == 100


@pytest.mark.parametrize(
    ("override", "value"),
    [("bf16", "bfloat16"), ("bfloat16", "bfloat16"), ("fp32", "float32"), ("float64", "float64")],
)
def test_names_of_number_types(tmp_path: Path, override: str, value: str) -> None:
    config = load_tiny(tmp_path, f"model.distributed.training_dtype={override}").train
    assert config.model.distributed.training_dtype == value


def test_whole_numbers_in_any_notation(tmp_path: Path) -> None:
    config = load_tiny(
        tmp_path, "training.train_iters=1e5", "optimizer.weight_decay=0", "batch.batch_size=1_000"
    ).train
    assert config.training.train_iters == 100_000
    assert isinstance(config.training.train_iters, int)
    assert config.optimizer.weight_decay == 0
    assert config.batch.batch_size == 1000


def test_the_resolved_configuration_loads_as_itself(tmp_path: Path) -> None:
    loaded = load_tiny(tmp_path, "optimizer.learning_rate.base=1e-06", "data.sampling.seed=3")
    again = load_config([write(tmp_path, yaml_text(resolved(loaded)), "resolved.yaml")])
    assert again.architecture == loaded.architecture
    assert again.train.training == loaded.train.training
    assert again.train.optimizer == loaded.train.optimizer
    assert again.train.data == loaded.train.data
    assert yaml_text(resolved(again)) == yaml_text(resolved(loaded))


# Evaluators


def test_an_evaluator_reads_the_dataset_of_its_name(tmp_path: Path) -> None:
    loaded = load_tiny(tmp_path, "training.evaluators.web.interval=5", "data.datasets.web={type: random}",
                       "training.evaluators.web.evaluator.iterations=3")  # fmt: skip
    evaluator = loaded.train.training.evaluators["web"].evaluator
    assert (evaluator.type, evaluator.dataset_name, evaluator.iterations) == ("loss", "web", 3)  # type: ignore[union-attr]


def test_a_samples_evaluator(tmp_path: Path) -> None:
    loaded = load_tiny(
        tmp_path,
        "training.evaluators.text={interval: 5, type: samples, prompts: ['Hello', ''], max_new_tokens: 8}",
    )
    evaluator = loaded.train.training.evaluators["text"].evaluator
    assert evaluator.model_dump() == {
        "type": "samples", "prompts": ["Hello", ""], "max_new_tokens": 8, "temperature": 1.0,
        "top_k": None, "top_p": None, "seed": 0,
    }  # fmt: skip


def test_a_dataset_that_nobody_has(tmp_path: Path) -> None:
    assert tiny_problems(
        tmp_path,
        "training.evaluators.validation={interval: 5, evaluator: {dataset_name: validaton}}",
        "data.datasets.validation={type: random}",
        "training.test_iters=2",
    ) == [
        "override 3: data.datasets has no 'test' (there are: training, validation)",
        "override 1: data.datasets has no 'validaton'; did you mean 'validation'?",
    ]


def test_a_dataset_that_nobody_reads(tmp_path: Path) -> None:
    loaded = load_tiny(tmp_path, "data.datasets.web={type: random}")
    assert loaded.warnings == ["override 1: data.datasets.web is read by no evaluator"]


# The architecture


def test_an_architecture_that_was_never_given(tmp_path: Path) -> None:
    text = TINY[: TINY.index("model:")] + "run: {experiment_dir: x}\n"
    (problem,) = problems_of([write(tmp_path, text)])
    assert "no architecture is given; write model.preset" in problem
    (problem,) = problems_of([write(tmp_path, text)], f"{TRANSFORMER}.use_flash_attention=yes")
    assert "no architecture is given" in problem


def test_the_dialects_defaults_are_honoured_and_said(tmp_path: Path) -> None:
    text = (
        TINY[: TINY.index("model:")]
        + "model: {base_model: {transformer: {num_layers: 2}}}\nrun: {experiment_dir: x}\n"
    )
    file = write(tmp_path, text)
    loaded = load_config([file])
    assert loaded.architecture == Architecture(
        vocab_size=49_152,
        hidden_size=1024,
        num_layers=2,
        num_attention_heads=8,
        head_groups=1,
        head_size=128,
        ffn_hidden_size=4096,
        tie_word_embeddings=True,
        activation="gelu",
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        rotary=Rotary("none"),
        max_position_embeddings=2048,
        gated=False,
        norm_type="layer_norm",
        position_embeddings=2048,
    )
    assert loaded.notices == [
        f"{file}:4: {TRANSFORMER} does not say all that makes the kind of decoder; the dialect's defaults hold: "
        "normalization.type: layer_norm, gated: no, add_linear_biases: yes, rotary.type: none"
    ]
    assert load_tiny(tmp_path).notices == []


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("rotary={type: yarn, theta: 1}", "yarn needs a theta above 1, not 1"),
        ("rotary={type: yarn, beta_fast: 1, beta_slow: 2}", "beta_fast must not be below beta_slow"),
        ("max_window_layers=1", "there is no window: give window_size too, or leave max_window_layers out"),
        ("init_method_min=0.1", "cannot be at least 0.1 and at most 0.05 (init_method_max)"),
        ("head_groups=3", "head_groups 3 does not divide num_attention_heads 4"),
        (
            "hidden_size=63",
            "num_attention_heads 4 does not divide hidden_size 63; give kv_channels or change one",
        ),
        ("kv_channels=15", "rotary needs an even head width, not 15"),
        (
            "normalization.type=none",
            "a decoder without normalization is not supported; write type: rms_norm or layer_norm",
        ),
    ],
)
def test_architectures_that_are_not_built(tmp_path: Path, override: str, problem: str) -> None:
    limit = [f"{TRANSFORMER}.init_method_max=0.05"] if "init" in override else []
    found, *_ = tiny_problems(tmp_path, f"{TRANSFORMER}.{override}", *limit)
    assert problem in found
    assert found.startswith(("override 1: ", "config.yaml:"))


def test_no_positions_at_all_have_to_be_asked_for(tmp_path: Path) -> None:
    loaded = load_tiny(
        tmp_path, f"{TRANSFORMER}.rotary.type=none", "model.base_model.use_position_embeddings=no"
    )
    assert loaded.architecture is not None
    assert loaded.architecture.rotary.type == "none"


@pytest.mark.parametrize(
    ("word", "biases"),
    [
        ("yes", (True, True, True)),
        ("no", (False, False, False)),
        ("everywhere", (True, True, True)),
        ("nowhere", (False, False, False)),
        ("only_attn_qkv", (True, False, False)),
        ("only_attn", (True, True, False)),
        ("only_mlp", (False, False, True)),
    ],
)
def test_words_for_biases(tmp_path: Path, word: str, biases: tuple[bool, bool, bool]) -> None:
    architecture = load_tiny(tmp_path, f"{TRANSFORMER}.add_linear_biases={word}").architecture
    assert architecture is not None
    assert (architecture.qkv_bias, architecture.output_bias, architecture.mlp_bias) == biases


def test_a_preset_and_what_overrides_it(tmp_path: Path) -> None:
    text = TINY[: TINY.index("model:")] + "model: {preset: llama-3.1-8b}\nrun: {experiment_dir: x}\n"
    file = write(tmp_path, text)
    assert load_config([file]).architecture == PRESETS["llama-3.1-8b"]
    smaller = load_config([file], [f"{TRANSFORMER}.num_layers=4"]).architecture
    assert smaller is not None
    assert (smaller.num_layers, smaller.hidden_size) == (4, 4096)
    stretched = load_config([file], [f"{TRANSFORMER}.rotary.scale_factor=32"]).architecture
    assert stretched is not None
    assert stretched.max_position_embeddings == 32 * 8192
    (problem,) = problems_of([file], "model.preset=llama-3.1-8")
    assert problem.startswith("override 1: unknown preset 'llama-3.1-8'; did you mean 'llama-3.1-8b'?")


def test_longest_position(tmp_path: Path) -> None:
    def positions(*overrides: str) -> int | None:
        architecture = load_tiny(tmp_path, *overrides).architecture
        assert architecture is not None
        return architecture.max_position_embeddings

    assert positions() == 64
    assert positions(f"{TRANSFORMER}.rotary.type=llama3") == 65_536
    assert positions(f"{TRANSFORMER}.rotary.type=llama3", "batch.sequence_length=100_000") == 100_000
    assert positions("model.base_model.max_position_embeddings=4096") == 4096
    loaded = load_tiny(tmp_path, "model.base_model.max_position_embeddings=32")
    assert loaded.warnings == [
        "override 1: model.base_model.max_position_embeddings = 32, but rows of 64 tokens are trained; exports will say "
        "that the model supports fewer than it has seen"
    ]


def test_an_export_format_that_cannot_hold_the_architecture(tmp_path: Path) -> None:
    assert tiny_problems(tmp_path, "training.export={interval: 5, format: qwen2}") == [
        "override 1: training.export.format: format qwen2 has biases on query, key and value alone, this model has none "
        "(llama holds it); see add_linear_biases: only_attn_qkv"
    ]
    assert tiny_problems(tmp_path, "training.export={interval: 5}") == [
        "override 1: training.export: export.interval is given without export.format; write format: llama (or qwen2, mistral, starcoder2)"
    ]
    (problem,) = tiny_problems(tmp_path, "training.export={interval: 5, format: fast_llm}")
    assert (
        problem
        == "override 1: training.export.format = 'fast_llm': expected one of llama, qwen2, mistral, starcoder2, peft"
    )


def test_a_problem_that_leaves_the_rest_understood_can_be_kept(tmp_path: Path) -> None:
    file = write(tmp_path, TINY)
    loaded = load_config([file], ["training.export={interval: 5, format: qwen2}"], keep_problems=True)
    assert len(loaded.problems) == 1
    assert loaded.architecture is not None


# Pretrained models


def test_shape_of_a_pretrained_folder(tmp_path: Path) -> None:
    folder = pretrained_folder(tmp_path / "model")
    text = TINY[: TINY.index("model:")] + f"pretrained: {{path: {folder}}}\nrun: {{experiment_dir: x}}\n"
    loaded = load_config([write(tmp_path, text)])
    assert loaded.architecture == PRESETS["llama-3.2-1b"]
    assert loaded.warnings == []
    # Where positions rotate is no shape; the preset's longest position is void with another stretching.
    longer = load_config([write(tmp_path, text)], [f"{TRANSFORMER}.rotary.theta=1e6"])
    assert longer.architecture is not None
    assert longer.architecture.rotary.theta == 1e6


def test_weights_that_would_not_fit(tmp_path: Path) -> None:
    folder = pretrained_folder(tmp_path / "model")
    text = TINY[: TINY.index("model:")] + f"pretrained: {{path: {folder}}}\nrun: {{experiment_dir: x}}\n"
    changes = [
        f"{TRANSFORMER}.num_layers=4",
        "model.base_model.tie_word_embeddings=no",
        f"{TRANSFORMER}.add_linear_biases=yes",
    ]
    problems = problems_of([write(tmp_path, text)], *changes)
    assert problems == [
        "override 2: model.base_model.tie_word_embeddings = no, but the pretrained weights have yes; remove it, or "
        "write pretrained.model_weights: no",
        f"override 1: {TRANSFORMER}.num_layers = 4, but the pretrained weights have 16; remove it, or write "
        "pretrained.model_weights: no",
        f"override 3: {TRANSFORMER}.add_linear_biases does not fit the pretrained weights' biases; remove it, or write "
        "pretrained.model_weights: no",
    ]
    loaded = load_config([write(tmp_path, text)], [*changes, "pretrained.model_weights=no"])
    assert loaded.architecture is not None
    assert loaded.architecture.num_layers == 4


def test_a_folder_of_another_family_without_weights_or_config(tmp_path: Path) -> None:
    folder = pretrained_folder(tmp_path / "model")
    text = (
        TINY[: TINY.index("model:")]
        + f"pretrained:\n  path: {folder}\n  format: qwen2\nrun: {{experiment_dir: x}}\n"
    )
    (problem,) = problems_of([write(tmp_path, text)])
    assert problem.startswith("config.yaml:6: pretrained.format is qwen2, but ")
    assert problem.endswith("says llama; write format: llama")
    (folder / "model.safetensors").unlink()
    loaded = load_config([write(tmp_path, text)], ["pretrained.format=auto"])
    assert loaded.warnings == [
        f"{tmp_path}/config.yaml:5: pretrained.path: {folder} has no weights (*.safetensors)"
    ]
    (folder / "config.json").unlink()
    loaded = load_config([write(tmp_path, text)])
    assert loaded.architecture is None
    assert loaded.warnings == [
        f"{tmp_path}/config.yaml:5: pretrained.path: {folder}/config.json does not exist (there is no "
        f"'config.json' in {folder})"
    ]


def test_no_path_is_no_pretrained_model(tmp_path: Path) -> None:
    assert load_tiny(tmp_path, "pretrained.path=null").train.pretrained is None
    assert tiny_problems(tmp_path, "pretrained.model_weights=yes")[0].startswith(
        "override 1: pretrained.path is missing"
    )
    shape_alone = load_tiny(tmp_path, "pretrained.path=/nowhere", "pretrained.load_config=none")
    assert shape_alone.architecture is not None


# Problems


def test_unknown_keys_at_every_depth(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        TINY
        + "optimzer: {beta_1: 0.9}\noptimizer:\n  sequence_length: 5\n  learning_rate:\n    bsae: 1e-4\n    flavour: 1\n",
    )
    overrides = ("training.evaluators.v.evaluator.iteration=5", "data.datasets.v={type: file, pth: x}")
    assert sorted(problems_of([file], *overrides)) == [
        "config.yaml:16: unknown key 'optimzer'; did you mean 'optimizer'?",
        "config.yaml:18: unknown key 'sequence_length' in optimizer; it belongs to batch.sequence_length",
        "config.yaml:20: unknown key 'bsae' in optimizer.learning_rate; did you mean 'base'?",
        "config.yaml:21: unknown key 'flavour' in optimizer.learning_rate; known keys: base, minimum, decay_style, "
        "decay_iterations, decay_start_iteration, decay_power, warmup_iterations, schedule",
        "override 1: unknown key 'iteration' in training.evaluators.v.evaluator; did you mean 'iterations'?",
        "override 2: data.datasets.v.path is missing (The YAML file. Paths inside it are relative to it)",
        "override 2: unknown key 'pth' in data.datasets.v; did you mean 'path'?",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("training.train_iters=abc", "training.train_iters = 'abc': expected a whole number"),
        ("training.train_iters=1.5", "training.train_iters = 1.5: expected a whole number"),
        ("training.train_iters=-1", "training.train_iters = -1: expected a number of at least 0"),
        ("training.train_iters=yes", "training.train_iters = yes: expected a whole number"),
        ("batch.truncate_documents=1", "batch.truncate_documents = 1: expected yes or no"),
        ("optimizer.beta_1=x", "optimizer.beta_1 = 'x': expected a number"),
        ("optimizer.beta_1=1", "optimizer.beta_1 = 1: expected a number below 1"),
        ("training=5", "training = 5: expected a section (`key: value` lines)"),
        ("training.logs=[1]", "training.logs = [1]: expected a section (`key: value` lines)"),
        ("run.experiment_dir=5", "run.experiment_dir = 5: expected a path"),
        (
            "optimizer.learning_rate.decay_style=cosin",
            "optimizer.learning_rate.decay_style = 'cosin': expected one of constant, linear, power, cosine, wsd; did you "
            "mean 'cosine'?",
        ),
        (
            f"{TRANSFORMER}.add_linear_biases=everywere",
            f"{TRANSFORMER}.add_linear_biases = 'everywere': expected yes or no or one of everywhere, nowhere, only_attn_qkv, "
            "only_attn, only_mlp, only_attn_output, attn_qkv_and_mlp, attn_output_and_mlp; did you mean 'everywhere'?",
        ),
        (
            "optimizer.gradient_scaler={initial: 2, minimum: 4}",
            "optimizer.gradient_scaler: minimum 4 is above initial 2",
        ),
        (
            "optimizer.state=8 bit",
            "optimizer.state = '8 bit': expected one of float32, 8bit; did you mean '8bit'?",
        ),
        (
            "batch.micro_batch_size=3",
            "batch: batch_size 4 is not a multiple of micro_batch_size 3; nearest that are: 3 and 6",
        ),
        (
            "batch.sequential_micro_batches=4",
            None,
        ),
        (
            "training.evaluators.x={interval: 1, evaluator: {type: los}}",
            "training.evaluators.x.evaluator = {'type': 'los'}: expected a `type` that is one of loss, samples, chat",
        ),
    ],
)
def test_wrong_values(tmp_path: Path, override: str, problem: str | None) -> None:
    if problem is None:
        assert load_tiny(tmp_path, override).train.batch.micro_rows() == 1
    else:
        assert f"override 1: {problem}" in tiny_problems(tmp_path, override)


def test_missing_keys_say_what_they_are(tmp_path: Path) -> None:
    problems = problems_of(
        [write(tmp_path, "training: {logs: {interval: 5}}\nbatch: {sequence_length: 64}\n")]
    )
    assert problems == [
        "config.yaml:1: training.train_iters is missing (Length of the run, in optimizer steps (iterations), skipped ones "
        "included; 0 only evaluates)",
        "config.yaml:2: batch.batch_size is missing (Rows in one optimizer step, over all micro-batches and processes, in "
        "sequences)",
        "config.yaml: data is missing (What is read, and in which order)",
        "config.yaml: run is missing (Where the run lives)",
    ]


def test_problems_of_every_kind_at_once(tmp_path: Path) -> None:
    problems = tiny_problems(
        tmp_path,
        "training.train_itres=5",
        f"{TRANSFORMER}.num_experts=8",
        "model.base_model.decoder.num_blok=3",
        "training.export={interval: 5, format: mistral}",
        "model.multi_stage.zero_stge=1",
        f"{TRANSFORMER}.add_linear_biases=yes",
    )
    assert [problem.split(":")[0] for problem in problems] == [
        f"override {number}" for number in (3, 2, 1, 5, 4)
    ]


def test_several_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        load_config([tmp_path / "a.yaml", tmp_path], ["nonsense"])
    assert len(raised.value.problems) == 3
    with pytest.raises(UserError, match="no configuration given"):
        load_config([])


def test_kinds(tmp_path: Path) -> None:
    prepare = write(tmp_path, "output_path: out\ndataset: {path: x}\ntokenizer: {path: y}\n", "prepare.yaml")
    assert load_config([prepare]).kind == "prepare"
    assert load_config([prepare], kind="prepare").kind == "prepare"
    assert problems_of([prepare], kind="train") == [
        "prepare.yaml is a configuration for data preparation; use `modelyard prepare`"
    ]
    train = write(tmp_path, TINY)
    assert problems_of([train], kind="prepare") == [
        "config.yaml is a configuration for training; use `modelyard train`"
    ]
    other = write(tmp_path, "trainig: {}\n", "other.yaml")
    assert (
        "neither a training nor a preparation configuration (found trainig; did you mean 'training'?)"
        in problems_of([other])[0]
    )


def test_paths_that_are_not_there_are_warnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = load_tiny(
        tmp_path, "data.datasets.training={type: memmap, path: tokens/training}", "data.tokenizer.path=tok"
    )
    assert loaded.warnings == [
        "override 1: data.datasets.training: tokens/training does not exist (there is no 'tokens' in the working directory)",
        "override 2: data.tokenizer.path: tok does not exist (there is no 'tok' in the working directory)",
    ]


def test_triton_is_read_as_fused(tmp_path: Path) -> None:
    loaded = load_tiny(tmp_path, "model.base_model.cross_entropy_impl=triton")
    assert loaded.notices == [
        "override 1: model.base_model.cross_entropy_impl: triton is read as fused (the kernel follows the hardware)"
    ]
