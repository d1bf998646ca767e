"""Hugging Face folders from live weights and from checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch

from modelyard.config.architecture import Architecture
from modelyard.config.train import TrainConfig
from modelyard.model.formats import export_huggingface
from modelyard.train.weights import DTYPES


class LiveWeights:
    """The parameters of a running model as a source of weights."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter]):
        self.parameters = parameters

    def names(self) -> list[str]:
        return list(self.parameters)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.parameters[name].shape)

    def load(self, name: str) -> torch.Tensor:
        return self.parameters[name].detach()


def export_weights(
    parameters: dict[str, torch.nn.Parameter],
    destination: Path,
    *,
    architecture: Architecture,
    config: TrainConfig,
    tokenizer_folder: Path | None,
) -> None:
    """Write the model as `training.export` says; `destination` appears only once it is complete."""
    export = config.training.export
    assert export.format is not None
    export_huggingface(
        LiveWeights(parameters),
        destination,
        architecture=architecture,
        family=export.format,
        dtype=DTYPES[export.data_type],
        tokenizer_folder=tokenizer_folder,
        reference_folder=Path(config.pretrained.path) if config.pretrained else None,
    )
