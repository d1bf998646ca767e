"""Hugging Face folders from live weights and from checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch

from modelyard.config.architecture import Architecture
from modelyard.config.train import TrainConfig
from modelyard.errors import UserError, missing_path
from modelyard.model.formats import WeightSource, export_huggingface, open_huggingface
from modelyard.train.checkpoint import Checkpoint, find_checkpoint
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


def open_model(path: Path) -> tuple[WeightSource, Architecture, str, Path, Path | None]:
    """Weights of a checkpoint, an experiment's newest checkpoint, or a Hugging Face folder.

    Returns (weights, architecture, family, folder, tokenizer folder or None). Raises UserError when `path` is none of
    them.
    """
    if not path.exists():
        raise UserError(f"model {missing_path(path)}")
    if (path / "config.json").is_file():
        model = open_huggingface(path)
        return model.weights, model.architecture, model.family, path, path
    folder = find_checkpoint(path)
    if folder is None:
        raise UserError(f"{path} holds neither a Hugging Face model (config.json) nor a checkpoint")
    checkpoint = Checkpoint(folder)
    tokenizer = folder.parent.parent / "tokenizer"
    return (
        checkpoint,
        checkpoint.architecture,
        natural_family(checkpoint.architecture),
        folder,
        tokenizer if tokenizer.is_dir() else None,
    )


def natural_family(architecture: Architecture) -> str:
    """The Hugging Face family that holds this shape."""
    if architecture.qkv_bias and not architecture.output_bias:
        return "qwen2"
    return "mistral" if architecture.window_size is not None else "llama"


def convert(
    source: Path, destination: Path, *, family: str | None, dtype: str | None, tokenizer_folder: Path | None
) -> int:
    """`modelyard convert`: stream `source` into a Hugging Face folder, one tensor in memory at a time."""
    weights, architecture, natural, folder, found_tokenizer = open_model(source)
    if destination.exists():
        raise UserError(f"{destination} exists already; choose another folder or remove it")
    is_huggingface = (folder / "config.json").is_file()
    export_huggingface(
        weights,
        destination,
        architecture=architecture,
        family=family or natural,
        dtype=DTYPES[dtype] if dtype else None if is_huggingface else torch.bfloat16,
        tokenizer_folder=tokenizer_folder or found_tokenizer,
        reference_folder=folder if is_huggingface else None,
    )
    print(f"wrote {destination}")
    return 0
