from typing import Any

from modelyard.config.optimizer import LearningRateConfig
from modelyard.train.resume import binding_differences, schedule_difference


def config(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "training.train_iters": 10,
        "training.logs.interval": 1,
        "batch.batch_size": 8,
        "batch.micro_batch_size": 4,
        "data.sampling.seed": 1,
        "optimizer.weight_decay": 0.1,
        "optimizer.learning_rate.base": 1e-3,
        "model.base_model.vocab_size": 64,
        "model.base_model.cross_entropy_impl": "auto",
        "model.distributed.seed": 1,
        "model.preset": None,
        "pretrained": None,
        "run.experiment_dir": "run",
    }
    nested: dict[str, Any] = {}
    for key, value in (base | changes).items():
        *sections, leaf = key.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[leaf] = value
    return nested


def test_free_changes() -> None:
    free = {
        "training.train_iters": 20,
        "training.logs.interval": 5,
        "batch.micro_batch_size": 2,
        "optimizer.learning_rate.base": 5e-4,  # compared by value, below
        "model.base_model.cross_entropy_impl": "torch",
        "run.experiment_dir": "elsewhere",
        "batch.sequential_micro_batches": 4,
        "model.base_model.vocab_size": 128,  # compared as an architecture
        "pretrained": {"path": "elsewhere"},
    }
    assert binding_differences(config(), config(**free)) == []


def test_binding_changes_are_named_with_both_values() -> None:
    changes = {
        "batch.batch_size": 16,
        "data.sampling.seed": 2,
        "optimizer.weight_decay": 0.2,
        "model.base_model.logit_z_loss": 1e-4,
        "model.distributed.seed": 3,
        "pretrained": {"path": "there", "model_weights": True},
    }
    assert binding_differences(config(), config(**changes)) == [
        "batch.batch_size: was 8, is now 16",
        "data.sampling.seed: was 1, is now 2",
        "model.base_model.logit_z_loss: was None, is now 0.0001",
        "model.distributed.seed: was 1, is now 3",
        "optimizer.weight_decay: was 0.1, is now 0.2",
        "pretrained.model_weights: was None, is now True",
    ]


def test_schedule_may_change_where_it_has_not_been_yet() -> None:
    def wsd(start: int, end: int) -> LearningRateConfig:
        return LearningRateConfig(
            base=1e-3,
            decay_style="wsd",
            warmup_iterations=10,
            decay_start_iteration=start,
            decay_iterations=end,
        )

    assert schedule_difference(wsd(100, 120), wsd(500, 600), steps=100) is None
    difference = schedule_difference(wsd(100, 120), wsd(500, 600), steps=101)
    assert difference is not None
    assert difference.startswith(
        "optimizer.learning_rate: at step 101 of the 101 already taken it was 0.00095"
    )
