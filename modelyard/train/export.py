"""Folders that other programs load, from live weights and from what lies on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from modelyard.config.adapter import Adapter
from modelyard.config.architecture import Architecture
from modelyard.config.peft import adapter_of
from modelyard.config.pretrained import reference_folder
from modelyard.config.train import TrainConfig
from modelyard.errors import UserError, missing_path
from modelyard.model.formats import WeightSource, export_huggingface
from modelyard.model.formats.merged import MergedWeights, TypedWeights
from modelyard.model.formats.peft import write_peft
from modelyard.model.formats.tokenizer_files import TOKENIZERS, has_tokenizer
from modelyard.parallel.apply import Parallel
from modelyard.parallel.world import World
from modelyard.train.models_on_disk import OpenModel, as_trained_on, base_fingerprint, open_model
from modelyard.train.weights import DTYPES


class LiveWeights:
    """The parameters of a running model as a source of weights; in a layout, gathered one tensor at a time.

    The main process asks for tensors with `load`, while the others answer in `serve`, until it calls `done`.
    """

    def __init__(self, parallel: Parallel, world: World, shapes: Mapping[str, tuple[int, ...]]):
        """`shapes` are those of the parameters that are asked for."""
        self._parallel, self._world, self._shapes = parallel, world, shapes
        self._owner: dict[str, int] = {}
        """Of each parameter's stage the lowest rank, which hands it on."""
        self._dtypes: dict[str, torch.dtype] = {}
        own = {name: parallel.weights.master[name].dtype for name in parallel.own}
        for number, dtypes in enumerate(world.gather(own)):
            for name, dtype in dtypes.items():
                self._owner.setdefault(name, number)
                self._dtypes.setdefault(name, dtype)

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._dtypes[name]

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
            full = world.receive(torch.empty(self._shapes[name], dtype=self._dtypes[name]), sender=owner)
        return full


def export_weights(
    parallel: Parallel,
    destination: Path,
    *,
    config: TrainConfig,
    tokenizer_folder: Path | None,
    base: Mapping[str, str] | None,
    world: World,
) -> None:
    """Write the model as `training.export` says; `destination` appears only once it is complete.

    `base` is what an adapter that is trained alone was filled around: "path" and "fingerprint". Raises UserError where
    other weights lie in its folder by now. Every process calls this, the main one writes; what goes wrong there is raised in all.
    """
    adapter = adapter_of(config.model.base_model.transformer.peft)
    shapes = parallel.architecture.parameter_shapes() if adapter is None or not adapter.freeze_others else {}
    live = LiveWeights(parallel, world, shapes | (adapter.shapes(parallel.architecture) if adapter else {}))
    with world.together():
        if not world.is_main:
            live.serve()
            return
        try:
            _write(live, adapter, destination, config, parallel.architecture, tokenizer_folder, base)
        finally:
            live.done()


def _write(
    live: LiveWeights,
    adapter: Adapter | None,
    destination: Path,
    config: TrainConfig,
    architecture: Architecture,
    tokenizer_folder: Path | None,
    base: Mapping[str, str] | None,
) -> None:
    """What the main process does of `export_weights`. A base that keeps its values is read from its folder again."""
    export, path = config.training.export, Path(config.pretrained.path) if config.pretrained else None
    assert export.format is not None
    weights: WeightSource = live
    if adapter is not None:
        below: WeightSource = live
        if adapter.freeze_others:
            assert path is not None
            assert base is not None
            model = open_model(path)
            if (found := base_fingerprint(model.weights)) != base["fingerprint"]:
                raise UserError(
                    f"pretrained.path: the weights in {path} (fingerprint {found[:12]}) are no longer those that the run was started "
                    f"with ({base['fingerprint'][:12]}); put these back"
                )
            if export.format == "peft":
                write_peft(
                    live,
                    destination,
                    adapter=adapter,
                    architecture=architecture,
                    family=model.family,
                    base_path=Path(base["path"]),
                    fingerprint=base["fingerprint"],
                    dtype=DTYPES[export.data_type],
                    tokenizer_folder=tokenizer_folder,
                    replace=True,
                )
                return
            below = as_trained_on(model.weights, adapter, architecture)
        weights = MergedWeights(below, live, adapter)
    export_huggingface(
        weights,
        destination,
        architecture=architecture,
        family=export.format,
        dtype=DTYPES[export.data_type],
        tokenizer_folder=tokenizer_folder,
        reference_folder=reference_folder(path) if path else None,
        sequence_length=config.batch.sequence_length,
        replace=True,
    )


def named_tokenizer(folder: Path | None) -> Path | None:
    """What `--tokenizer` names, if it was given. Raises UserError where no tokenizer is there."""
    if folder is None:
        return None
    if not folder.exists():
        raise UserError(f"--tokenizer: {missing_path(folder)}")
    if not folder.is_dir():
        raise UserError(f"--tokenizer: {folder} is a file; name the folder that it lies in")
    if not has_tokenizer(folder):
        raise UserError(f"--tokenizer: {folder} holds no tokenizer (none of {', '.join(TOKENIZERS)})")
    return folder


def refuse_in_a_run(destination: Path) -> None:
    """Raise UserError for a place in the `checkpoint/` of a run, where the run would find it and take it for its own."""
    for parent in destination.absolute().resolve().parents:
        marks = (parent.parent / name for name in ("metrics.jsonl", "config.json", ".lock"))
        if parent.name == "checkpoint" and any(mark.exists() for mark in marks):
            raise UserError(f"{destination} is inside the run {parent.parent}; name a folder elsewhere")


def refuse_existing(destination: Path) -> None:
    """Raise UserError where a folder cannot be written anew."""
    if destination.exists() or destination.is_symlink():
        raise UserError(f"{destination} exists already; choose another folder or remove it")
    refuse_in_a_run(destination)


def convert(
    source: Path,
    destination: Path,
    *,
    family: str | None,
    dtype: str | None,
    tokenizer_folder: Path | None,
    base: Path | None = None,
) -> int:
    """`modelyard convert`: stream `source` into a Hugging Face folder, one tensor in memory at a time, or an adapter into
    one of PEFT's (`family` "peft").

    A checkpoint is written in bf16 unless `dtype` says otherwise, a Hugging Face folder in its own type, and an adapter of
    one, which is merged into it, in that one's; PEFT's folder in the adapter's own.
    """
    refuse_existing(destination)
    tokenizer_folder = named_tokenizer(tokenizer_folder)
    model = open_model(source, base=base)
    tokenizer_folder, wanted = tokenizer_folder or model.tokenizer_folder, DTYPES[dtype] if dtype else None
    if family == "peft":
        _convert_to_peft(model, destination, dtype=wanted, tokenizer_folder=tokenizer_folder)
    else:
        weights = model.weights
        if (adapted := model.adapted) is not None:
            if adapted.adapter.quantization is not None:
                raise UserError(
                    f"{source} was trained on a quantised base; write `modelyard merge {source} --to {destination} --onto "
                    "original` (or dequantized), or convert it with --format peft"
                )
            weights = TypedWeights(weights, adapted.base)
        export_huggingface(
            weights,
            destination,
            architecture=model.architecture,
            family=family or model.family,
            dtype=wanted or (None if model.is_huggingface else torch.bfloat16),
            tokenizer_folder=tokenizer_folder,
            reference_folder=model.reference_folder,
        )
    which = f"iteration {model.checkpoint.iteration}, " if model.checkpoint else ""
    print(f"wrote {destination} ({which}from {model.folder})")
    return 0


def _convert_to_peft(
    model: OpenModel, destination: Path, *, dtype: torch.dtype | None, tokenizer_folder: Path | None
) -> None:
    adapted = model.adapted
    if adapted is None:
        raise UserError(f"{model.folder} holds no adapter, and --format peft writes nothing else")
    if adapted.base_path is None:
        raise UserError(
            f"{model.folder} was trained with freeze_others: no, and PEFT's folder has no place for the base that came of it; "
            "leave --format peft out"
        )
    write_peft(
        adapted.weights,
        destination,
        adapter=adapted.adapter,
        architecture=model.architecture,
        family=adapted.base_family,
        base_path=adapted.base_path.resolve(),
        fingerprint=base_fingerprint(adapted.base),
        dtype=dtype,
        tokenizer_folder=tokenizer_folder,
    )
