"""Hugging Face folders from live weights and from checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from modelyard.config.architecture import Architecture
from modelyard.config.huggingface import FAMILIES, can_export, read_config
from modelyard.config.train import TrainConfig
from modelyard.errors import UserError, missing_path
from modelyard.files import numbered_folders
from modelyard.model.formats import WeightSource, export_huggingface, open_huggingface
from modelyard.train.checkpoint import Checkpoint, open_checkpoint
from modelyard.train.weights import DTYPES


class LiveWeights:
    """The parameters of a running model as a source of weights."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter]):
        self.parameters = parameters

    def names(self) -> list[str]:
        return list(self.parameters)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.parameters[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.parameters[name].dtype

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
        sequence_length=config.batch.sequence_length,
        replace=True,
    )


@dataclass(frozen=True)
class OpenModel:
    """A model on disk, whatever its form."""

    weights: WeightSource
    architecture: Architecture
    family: str
    folder: Path
    is_huggingface: bool
    tokenizer_folder: Path | None


def open_model(path: Path) -> OpenModel:
    """A checkpoint, an experiment's newest checkpoint, or a Hugging Face folder. Raises UserError otherwise."""
    if not path.exists():
        raise UserError(f"model {missing_path(path)}")
    exports = [folder for folder in numbered_folders(path) if (folder / "config.json").is_file()]
    if exports:
        path = exports[-1]  # `EXPERIMENT_DIR/export/llama` means its newest
    # An experiment has a config.json too, of its own.
    if (path / "config.json").is_file() and not (path / "checkpoint").is_dir():
        if "modelyard_version" in read_config(path):
            raise UserError(f"{path} is the folder of a run that has no checkpoint yet")
        model = open_huggingface(path)
        return OpenModel(model.weights, model.architecture, model.family, path, True, path)
    checkpoint = open_checkpoint(path)
    if checkpoint is None:
        raise UserError(f"{path} holds neither a Hugging Face model (config.json) nor a checkpoint")
    tokenizer = checkpoint.folder.parent.parent / "tokenizer"
    return OpenModel(
        checkpoint,
        checkpoint.architecture,
        checkpoint.config["training"]["export"]["format"] or natural_family(checkpoint.architecture),
        checkpoint.folder,
        False,
        tokenizer if tokenizer.is_dir() else None,
    )


def named_tokenizer(folder: Path | None) -> Path | None:
    """What `--tokenizer` names, if it was given. Raises UserError where no tokenizer is there."""
    if folder is None:
        return None
    if not folder.exists():
        raise UserError(f"--tokenizer: {missing_path(folder)}")
    if not folder.is_dir():
        raise UserError(f"--tokenizer: {folder} is a file; name the folder that it lies in")
    files = ("tokenizer.json", "tokenizer.model", "vocab.json")
    if not any((folder / name).is_file() for name in files):
        raise UserError(f"--tokenizer: {folder} holds no tokenizer (none of {', '.join(files)})")
    return folder


def natural_family(architecture: Architecture) -> str:
    """The Hugging Face family that holds this shape."""
    return next((family for family in FAMILIES if can_export(architecture, family) is None), "llama")


def convert(
    source: Path, destination: Path, *, family: str | None, dtype: str | None, tokenizer_folder: Path | None
) -> int:
    """`modelyard convert`: stream `source` into a Hugging Face folder, one tensor in memory at a time.

    A checkpoint is written in bf16 unless `dtype` says otherwise, a Hugging Face folder in its own type.
    """
    if destination.exists():
        raise UserError(f"{destination} exists already; choose another folder or remove it")
    tokenizer_folder = named_tokenizer(tokenizer_folder)
    model = open_model(source)
    default = None if model.is_huggingface else torch.bfloat16
    export_huggingface(
        model.weights,
        destination,
        architecture=model.architecture,
        family=family or model.family,
        dtype=DTYPES[dtype] if dtype else default,
        tokenizer_folder=tokenizer_folder or model.tokenizer_folder,
        reference_folder=model.folder if model.is_huggingface else None,
    )
    which = f"iteration {model.weights.iteration}, " if isinstance(model.weights, Checkpoint) else ""
    print(f"wrote {destination} ({which}from {model.folder})")
    return 0
