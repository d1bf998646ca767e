"""Hugging Face folders from live weights and from checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from modelyard.config.architecture import Architecture
from modelyard.config.huggingface import read_config
from modelyard.config.pretrained import model_tokenizer, natural_family, reference_folder
from modelyard.config.train import TrainConfig
from modelyard.errors import UserError, missing_path
from modelyard.files import numbered_folders
from modelyard.model.formats import WeightSource, export_huggingface, open_huggingface
from modelyard.parallel.apply import Parallel
from modelyard.parallel.world import World
from modelyard.train.checkpoint import Checkpoint, open_checkpoint
from modelyard.train.weights import DTYPES


class LiveWeights:
    """The parameters of a running model as a source of weights; in a layout, gathered one tensor at a time.

    The main process asks for tensors with `load`, while the others answer in `serve`, until it calls `done`.
    """

    def __init__(self, parallel: Parallel, world: World):
        self._parallel, self._world = parallel, world
        self._dtype = next(iter(parallel.weights.master.values())).dtype
        self._shapes = parallel.architecture.parameter_shapes()
        self._owner: dict[str, int] = {}
        """Of each parameter's stage the lowest rank, which hands it on."""
        for number, names in enumerate(world.gather(parallel.own)):
            for name in names:
                self._owner.setdefault(name, number)

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype

    def load(self, name: str) -> Tensor:
        self._world.tell(name)
        tensor = self._gathered(name)
        assert tensor is not None
        return tensor

    def serve(self) -> None:
        """Answer the main process until it has what it wants."""
        asked: str | None = None
        while (asked := self._world.tell(asked)) is not None:
            self._gathered(asked)

    def done(self) -> None:
        self._world.tell(None)

    def _gathered(self, name: str) -> Tensor | None:
        """The full tensor in the main process and in those that hold parts of it."""
        world, parallel, owner, full = self._world, self._parallel, self._owner[name], None
        if name in parallel.own:
            full = parallel.whole({name: parallel.weights.master[name].detach()})[name]
        if owner == 0:
            return full
        if world.rank == owner:
            assert full is not None
            world.send(full.cpu().contiguous(), to=0)
        elif world.is_main:
            full = world.receive(torch.empty(self._shapes[name], dtype=self._dtype), sender=owner)
        return full


def export_weights(
    parallel: Parallel,
    destination: Path,
    *,
    config: TrainConfig,
    tokenizer_folder: Path | None,
    world: World,
) -> None:
    """Write the model as `training.export` says; `destination` appears only once it is complete.

    Every process calls this, the main one writes; what goes wrong there is raised in all.
    """
    export = config.training.export
    assert export.format is not None
    weights = LiveWeights(parallel, world)
    with world.together():
        if not world.is_main:
            weights.serve()
            return
        try:
            export_huggingface(
                weights,
                destination,
                architecture=parallel.architecture,
                family=export.format,
                dtype=DTYPES[export.data_type],
                tokenizer_folder=tokenizer_folder,
                reference_folder=reference_folder(Path(config.pretrained.path))
                if config.pretrained
                else None,
                sequence_length=config.batch.sequence_length,
                replace=True,
            )
        finally:
            weights.done()


@dataclass(frozen=True)
class OpenModel:
    """A model on disk, whatever its form."""

    weights: WeightSource
    architecture: Architecture
    family: str
    folder: Path
    is_huggingface: bool
    tokenizer_folder: Path | None
    reference_folder: Path | None
    """Whose config.json and generation config an export carries along."""


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
        return OpenModel(model.weights, model.architecture, model.family, path, True, path, path)
    checkpoint = open_checkpoint(path)
    if checkpoint is None:
        raise UserError(f"{path} holds neither a Hugging Face model (config.json) nor a checkpoint")
    tokenizer = model_tokenizer(checkpoint.folder)
    # An average says its family; it may come from folders that had no config of ours.
    family = checkpoint.state.get("family") or checkpoint.config["training"]["export"]["format"]
    return OpenModel(
        checkpoint,
        checkpoint.architecture,
        family or natural_family(checkpoint.architecture),
        checkpoint.folder,
        False,
        tokenizer if tokenizer.is_dir() else None,
        reference_folder(checkpoint.folder),
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


def refuse_in_a_run(destination: Path) -> None:
    """Raise UserError for a place in the `checkpoint/` of a run, where the run would find it and take it for its own."""
    for parent in destination.absolute().resolve().parents:
        marks = (parent.parent / name for name in ("metrics.jsonl", "config.json", ".lock"))
        if parent.name == "checkpoint" and any(mark.exists() for mark in marks):
            raise UserError(f"{destination} is inside the run {parent.parent}; name a folder elsewhere")


def convert(
    source: Path, destination: Path, *, family: str | None, dtype: str | None, tokenizer_folder: Path | None
) -> int:
    """`modelyard convert`: stream `source` into a Hugging Face folder, one tensor in memory at a time.

    A checkpoint is written in bf16 unless `dtype` says otherwise, a Hugging Face folder in its own type.
    """
    if destination.exists():
        raise UserError(f"{destination} exists already; choose another folder or remove it")
    refuse_in_a_run(destination)
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
        reference_folder=model.reference_folder,
    )
    which = f"iteration {model.weights.iteration}, " if isinstance(model.weights, Checkpoint) else ""
    print(f"wrote {destination} ({which}from {model.folder})")
    return 0
