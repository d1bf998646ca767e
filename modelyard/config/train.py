"""A whole training configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from modelyard.config.base import Section
from modelyard.config.batch import BatchConfig
from modelyard.config.data import DataConfig
from modelyard.config.model import ModelConfig, PretrainedConfig
from modelyard.config.optimizer import OptimizerConfig
from modelyard.config.training import GuideProfilingConfig, TrainingConfig


class RunConfig(Section):
    """Where the run lives."""

    experiment_dir: Path
    """Folder for checkpoints, exports, metrics and the resolved config; a run started again in it resumes."""

    @field_validator("experiment_dir")
    @classmethod
    def _one_name(cls, path: Path) -> Path:
        # a/../b is no folder while there is no a, and b as soon as somebody makes one.
        return path.resolve() if ".." in path.parts else path


class TrainConfig(Section):
    """Everything that `modelyard train` needs to know."""

    training: TrainingConfig
    """The run: its length and everything that happens at intervals."""
    batch: BatchConfig
    """How many tokens make one optimizer step, and how documents lie in them."""
    data: DataConfig
    """What is read, and in which order."""
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    """AdamW and the learning-rate schedule."""
    pretrained: PretrainedConfig | None = None
    """A model to start from."""
    model: ModelConfig = Field(default_factory=ModelConfig)
    """The decoder, its number types and seed."""
    run: RunConfig
    """Where the run lives."""
    profiling: GuideProfilingConfig = Field(default_factory=GuideProfilingConfig)
    """The guides' schedule of traces; `training.profiling` names iterations instead."""

    @field_validator("profiling", mode="before")
    @classmethod
    def _left_empty(cls, value: Any) -> Any:
        return {} if value is None else value

    @field_validator("pretrained", mode="before")
    @classmethod
    def _no_path_is_no_model(cls, value: Any) -> Any:
        if isinstance(value, dict) and "path" in value and value["path"] is None:
            return None
        return value
