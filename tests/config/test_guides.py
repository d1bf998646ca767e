"""The guides' YAML files, exactly as printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelyard.config.architecture import Architecture, Rotary
from modelyard.config.data import FileDataset, SliceDataset
from modelyard.config.layout import Layout, layout_of
from modelyard.config.loader import Loaded, load_config
from modelyard.config.presets import PRESETS
from modelyard.config.training import LossEvaluatorConfig
from modelyard.plan.summary import summarise


@pytest.fixture
def load(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)

    def load(*names: str, overrides: tuple[str, ...] = ()) -> Loaded:
        return load_config([shared / "configs" / f"{name}.yaml" for name in names], overrides)

    return load


def notices(loaded: Loaded) -> list[str]:
    return [notice.rpartition("/configs/")[2] for notice in loaded.notices]


def the_evaluator(loaded: Loaded) -> LossEvaluatorConfig:
    assert list(loaded.train.training.evaluators) == ["validation"]
    evaluator = loaded.train.training.evaluators["validation"].evaluator
    assert isinstance(evaluator, LossEvaluatorConfig)
    return evaluator


def test_llama_from_scratch(load) -> None:  # type: ignore[no-untyped-def]
    loaded = load("llama-3.1-8b-train", "llama-3.1-8b-architecture-part")
    config = loaded.train
    assert loaded.kind == "train"
    assert loaded.architecture == Architecture(
        vocab_size=128_256,
        hidden_size=4096,
        num_layers=32,
        num_attention_heads=32,
        head_groups=8,
        head_size=128,
        ffn_hidden_size=14_336,
        rotary=Rotary(type="llama3", theta=500_000.0),
        max_position_embeddings=65_536,
    )
    assert loaded.architecture.parameter_count() == 8_030_261_248
    assert notices(loaded) == [
        "llama-3.1-8b-train.yaml:6: the unnamed evaluator in training.evaluators is now training.evaluators.validation"
    ]
    assert config.training.train_iters == 100_000
    assert config.training.evaluators["validation"].interval == 100
    assert the_evaluator(loaded) == LossEvaluatorConfig(iterations=25, dataset_name="validation")
    assert (config.batch.batch_size, config.batch.micro_batch_size, config.batch.sequence_length) == (
        256,
        2,
        4096,
    )
    assert config.optimizer.learning_rate.base == 6e-4
    assert config.optimizer.learning_rate.minimum == 6e-5
    assert config.optimizer.learning_rate.decay_iterations == 100_000
    assert config.model.distributed.training_dtype == "bfloat16"
    assert config.model.base_model.cross_entropy_impl == "fused"
    assert config.data.datasets["training"] == FileDataset(
        type="file", path=Path("path/to/training_dataset_config.yaml")
    )
    assert loaded.without_effect == []
    assert layout_of(config, 32) == Layout(shard=32, zero_stage=2)
    assert config.batch.micro_batches(32) == 4
    assert [
        warning.rpartition("/configs/")[2].split(" does not exist")[0] for warning in loaded.warnings
    ] == [
        "llama-3.1-8b-train.yaml:26: data.datasets.training: path/to/training_dataset_config.yaml",
        "llama-3.1-8b-train.yaml:29: data.datasets.validation: path/to/validation_dataset_config.yaml",
    ]


def test_qwen_from_scratch(load) -> None:  # type: ignore[no-untyped-def]
    loaded = load("qwen-2.5-7b-train", "qwen-2.5-7b-architecture-part")
    assert loaded.architecture is not None
    assert loaded.architecture.parameter_count() == 7_615_616_512
    assert loaded.architecture.norm_epsilon == 1e-6
    assert (loaded.architecture.qkv_bias, loaded.architecture.output_bias, loaded.architecture.mlp_bias) == (
        True,
        False,
        False,
    )
    assert loaded.architecture.head_size == 128
    assert loaded.notices == []
    assert loaded.train.training.export.format == "qwen2"


@pytest.mark.parametrize("family", ["llama-3.1-8b", "qwen-2.5-7b"])
def test_from_scratch_with_the_shape_of_a_folder_that_is_not_there(load, family: str) -> None:  # type: ignore[no-untyped-def]
    loaded = load(f"{family}-train", f"{family}-pretrained-part")
    assert loaded.architecture is None
    assert loaded.train.pretrained is not None
    assert not loaded.train.pretrained.model_weights
    assert loaded.warnings[0].endswith(
        "pretrained.path: fast-llm-tutorial/pretrained_model does not exist (there is no 'fast-llm-tutorial' in the working directory)"
    )


def test_a_near_name_of_the_pretrained_folder_is_said_and_not_taken(load, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "fast-llm-tutorial" / "pretrained-model").mkdir(parents=True)
    loaded = load("llama-3.1-8b-train", "llama-3.1-8b-pretrained-part")
    assert loaded.architecture is None
    assert "nearest there: fast-llm-tutorial/pretrained-model" in loaded.warnings[0]


def test_continued_pretraining(load) -> None:  # type: ignore[no-untyped-def]
    loaded = load("llama-3.1-8b-continue")
    assert notices(loaded) == [
        "llama-3.1-8b-continue.yaml:5: training.validation is now training.evaluators.validation",
        "llama-3.1-8b-continue.yaml:20: data.format/path/split is now data.datasets: training, validation",
    ]
    assert the_evaluator(loaded) == LossEvaluatorConfig(iterations=25, dataset_name="validation")
    assert loaded.train.training.evaluators["validation"].interval == 1000
    source = FileDataset(type="file", path=Path("fast-llm-tutorial/dataset.json"))
    assert loaded.train.data.datasets == {
        "training": SliceDataset(type="slice", dataset=source, begin=0.0, end=0.99),
        "validation": SliceDataset(type="slice", dataset=source, begin=0.99, end=1.0),
    }
    assert loaded.train.pretrained is not None
    assert loaded.train.pretrained.model_weights
    assert loaded.train.pretrained.path == Path("fast-llm-tutorial/pretrained-model")


def test_fine_tuning(load) -> None:  # type: ignore[no-untyped-def]
    loaded = load("llama-3.1-8b-sft")
    assert notices(loaded) == [
        "llama-3.1-8b-sft.yaml:34: data.sampling.use_loss_masking_spans is now batch.use_loss_masking_spans",
        "llama-3.1-8b-sft.yaml:32: data.truncate_documents is now batch.truncate_documents",
    ]
    batch = loaded.train.batch
    assert batch.use_loss_masking_spans
    assert not batch.truncate_documents
    assert not batch.cross_document_attention
    assert loaded.train.data.sampling.shuffle == "epoch"
    assert loaded.train.optimizer.learning_rate.base == 2e-5
    assert {row.key for row in loaded.without_effect} == {"model.base_model.transformer.use_flash_attention"}
    assert loaded.train.model.distributed.timeout == 3600
    assert layout_of(loaded.train, 8) == Layout(shard=8, zero_stage=3)


def test_preparation_is_recognised(load) -> None:  # type: ignore[no-untyped-def]
    loaded = load("sft-prepare")
    assert loaded.kind == "prepare"
    assert loaded.architecture is None
    prepare = loaded.prepare
    assert prepare.output_path == Path("sft-tutorial/tokenized/Llama-3.1-8B")
    assert prepare.dataset.field == "text"
    assert prepare.dataset.loss_masking_spans == "spans"
    assert prepare.splits == {"training": 0.998, "validation": 0.002}
    assert prepare.tokenize_workers == 32


COMBINATIONS = [
    ("llama-3.1-8b-train", "llama-3.1-8b-architecture-part"),
    ("llama-3.1-8b-train", "llama-3.1-8b-pretrained-part"),
    ("llama-3.1-8b-continue",),
    ("llama-3.1-8b-sft",),
    ("qwen-2.5-7b-train", "qwen-2.5-7b-architecture-part"),
    ("qwen-2.5-7b-train", "qwen-2.5-7b-pretrained-part"),
    ("sft-prepare",),
]


@pytest.mark.parametrize("names", COMBINATIONS)
def test_the_whole_summary_of_each(load, names: tuple[str, ...]) -> None:  # type: ignore[no-untyped-def]
    text, problems, _ = summarise(load(*names))
    assert problems == []
    assert text.startswith("configuration\n")


def test_every_file_of_the_guides_is_in_a_test(shared: Path) -> None:
    files = {path.stem for path in (shared / "configs").glob("*.yaml")}
    assert files == {name for names in COMBINATIONS for name in names}


def test_overrides_on_a_guide(load) -> None:  # type: ignore[no-untyped-def]
    loaded = load(
        "llama-3.1-8b-train",
        "llama-3.1-8b-architecture-part",
        overrides=(
            "training.train_iters=50",
            "training.evaluators.validation.interval=5",
            "model.base_model.transformer.num_layers=4",
            "optimizer.learning_rate.base=1e-4",
        ),
    )
    assert loaded.train.training.train_iters == 50
    assert loaded.train.training.evaluators["validation"].interval == 5
    assert loaded.architecture is not None
    assert loaded.architecture.num_layers == 4
    assert loaded.train.optimizer.learning_rate.base == 1e-4


def test_the_printed_architecture_is_the_preset(load) -> None:  # type: ignore[no-untyped-def]
    for family in ("llama-3.1-8b", "qwen-2.5-7b"):
        loaded = load(f"{family}-train", f"{family}-architecture-part")
        assert loaded.architecture is not None
        assert loaded.architecture.parameter_shapes() == PRESETS[family].parameter_shapes()
