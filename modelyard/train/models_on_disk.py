"""Models on disk, whatever their form: Hugging Face folders, checkpoints, and adapters together with what they adapt."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from modelyard.config.adapter import Adapter, is_adapter_parameter
from modelyard.config.adapter_files import (
    PEFT_WEIGHTS,
    StoredAdapter,
    is_peft_folder,
    no_adapter,
    stored_adapter,
)
from modelyard.config.architecture import Architecture
from modelyard.config.huggingface import FAMILIES, read_config
from modelyard.config.peft import quantization_keys, yaml_line
from modelyard.config.pretrained import model_tokenizer, natural_family, reference_folder
from modelyard.errors import UserError, missing_path
from modelyard.files import numbered_folders
from modelyard.model.formats import WeightSource, open_huggingface
from modelyard.model.formats.merged import DequantizedWeights, MergedWeights
from modelyard.model.formats.peft import open_peft
from modelyard.model.formats.source import shape_problems
from modelyard.model.formats.tokenizer_files import has_tokenizer
from modelyard.train.checkpoint import Checkpoint, open_checkpoint

_COMPARED = 1 << 14
"""Values of each tensor that a fingerprint is taken of."""


@dataclass(frozen=True)
class OpenAdapter:
    """An adapter on disk, with the weights that it belongs to."""

    adapter: Adapter
    weights: WeightSource
    """The adapter's own parameters."""
    base: WeightSource
    """What it adapts, as it lies in its folder."""
    trained_on: WeightSource
    """The same as it was in training: made numbers again after it was quantised, where it was."""
    base_path: Path | None
    """The base's folder; None where it was trained as well, and lies beside the adapter."""
    base_family: str
    """The Hugging Face family of the base."""


@dataclass(frozen=True)
class OpenModel:
    """A model on disk, whatever its form. An adapter is merged into what it was trained on."""

    weights: WeightSource
    architecture: Architecture
    family: str
    folder: Path
    is_huggingface: bool
    """Whether it is a Hugging Face folder, or an adapter of one."""
    tokenizer_folder: Path | None
    reference_folder: Path | None
    """Whose config.json and generation config an export carries along."""
    checkpoint: Checkpoint | None = None
    """Where the weights, or those of the adapter, are from a checkpoint."""
    adapted: OpenAdapter | None = None


def open_model(path: Path, *, base: Path | None = None) -> OpenModel:
    """A checkpoint, an experiment's newest checkpoint, a Hugging Face folder, or an adapter: a checkpoint of one or PEFT's
    folder. `base` is what the adapter adapts, where that is not at the place that it names.

    Raises UserError where there is no model, or the adapter and its base do not belong together.
    """
    return _open(path, base, ())


def _open(path: Path, base: Path | None, above: tuple[Path, ...]) -> OpenModel:
    """`above`: the adapters that this is the base of."""
    if not path.exists():
        raise UserError(f"{'base' if above else 'model'} {missing_path(path)}")
    exports = [
        folder
        for folder in numbered_folders(path)
        if (folder / "config.json").is_file() or is_peft_folder(folder)
    ]
    if exports:
        path = exports[-1]  # `EXPERIMENT_DIR/export/llama` means its newest
    if is_peft_folder(path):
        if any(path.glob("model*.safetensors")):
            raise UserError(
                f"{path} has both a model and an adapter (adapter_config.json); put the adapter into a folder of its own"
            )
        return _open_adapter(path, base, above, None)
    # An experiment has a config.json too, of its own.
    if (path / "config.json").is_file() and not (path / "checkpoint").is_dir():
        if "modelyard_version" in read_config(path):
            raise UserError(f"{path} is the folder of a run that has no checkpoint yet")
        _refuse_base(base, path)
        model = open_huggingface(path)
        return OpenModel(model.weights, model.architecture, model.family, path, True, path, path)
    checkpoint = open_checkpoint(path)
    if checkpoint is None:
        raise UserError(
            f"{path} holds neither a Hugging Face model (config.json), nor an adapter (adapter_config.json), nor a checkpoint"
        )
    return _model_of(checkpoint, base, above)


def model_of(checkpoint: Checkpoint, *, base: Path | None = None) -> OpenModel:
    """The model of a checkpoint that is open; `base` as `open_model` takes it. Raises UserError as that does."""
    return _model_of(checkpoint, base, ())


def _model_of(checkpoint: Checkpoint, base: Path | None, above: tuple[Path, ...]) -> OpenModel:
    if checkpoint.state.get("adapter") is not None:
        return _open_adapter(checkpoint.folder, base, above, checkpoint)
    _refuse_base(base, checkpoint.folder)
    return _of_checkpoint(checkpoint, checkpoint)


def _refuse_base(base: Path | None, folder: Path) -> None:
    if base is not None:
        raise UserError(f"--base {base}: {folder} is a whole model and adapts no other; leave --base out")


def _of_checkpoint(checkpoint: Checkpoint, weights: WeightSource) -> OpenModel:
    tokenizer = model_tokenizer(checkpoint.folder)
    return OpenModel(
        weights,
        checkpoint.architecture,
        _family(checkpoint) or natural_family(checkpoint.architecture),
        checkpoint.folder,
        False,
        tokenizer if tokenizer.is_dir() else None,
        reference_folder(checkpoint.folder),
        checkpoint,
    )


def _family(checkpoint: Checkpoint) -> str | None:
    """The Hugging Face family that a checkpoint says it is of. An average does; it may come from folders that had no config
    of ours."""
    family = checkpoint.state.get("family") or checkpoint.config["training"]["export"]["format"]
    return family if family in FAMILIES else None


# --- adapters ---------------------------------------------------------------------------------------------------


def _open_adapter(
    folder: Path, base_path: Path | None, above: tuple[Path, ...], checkpoint: Checkpoint | None
) -> OpenModel:
    stored = stored_adapter(folder)
    assert stored is not None
    adapter = stored.adapter
    if checkpoint is not None and not adapter.freeze_others:
        _refuse_base(base_path, folder)
        return _with_own_base(checkpoint, adapter)
    here = folder.resolve()
    found = base_path or _named_base(stored)
    if found.resolve() in (here, *above):
        itself = "itself" if found.resolve() == here else f"{found}, which adapts {folder} in turn,"
        raise UserError(f"{folder} names {itself} as its base; give the model that it adapts with --base DIR")
    base = _open(found, None, (here, *above))
    _refuse_other_base(stored, base, checkpoint)
    weights = _adapter_weights(stored, base, checkpoint)
    trained_on = as_trained_on(base.weights, adapter, base.architecture)
    return replace(
        base,
        weights=MergedWeights(trained_on, weights, adapter),
        family=(checkpoint and _family(checkpoint)) or base.family,
        folder=folder,
        tokenizer_folder=_own_tokenizer(folder) or base.tokenizer_folder,
        checkpoint=checkpoint,
        adapted=OpenAdapter(adapter, weights, base.weights, trained_on, base.folder, base.family),
    )


def _with_own_base(checkpoint: Checkpoint, adapter: Adapter) -> OpenModel:
    """An adapter that was trained together with everything else."""
    own = {True: list[str](), False: list[str]()}
    for name in checkpoint.names():
        own[is_adapter_parameter(name)].append(name)
    weights, base = _Part(checkpoint, own[True]), _Part(checkpoint, own[False])
    if problems := shape_problems(weights, adapter.shapes(checkpoint.architecture), checkpoint.folder):
        raise UserError(*problems)
    whole = _of_checkpoint(checkpoint, MergedWeights(base, weights, adapter))
    return replace(whole, adapted=OpenAdapter(adapter, weights, base, base, None, whole.family))


def as_trained_on(base: WeightSource, adapter: Adapter, architecture: Architecture) -> WeightSource:
    """The base as an adapter knew it in training."""
    how = adapter.quantization
    return base if how is None else DequantizedWeights(base, how, architecture)


def first_adapter(path: Path, adapter: Adapter, base: Path) -> WeightSource:
    """The parameters of the adapter at `path`, to go on training as `adapter` on the model at `base`.

    Raises UserError where there is none, it is another kind of adapter, or of another base.
    """
    if not path.exists():
        raise UserError(f"pretrained.adapter: {missing_path(path)}")
    stored = stored_adapter(path)
    if stored is None:
        raise UserError(f"pretrained.adapter: {no_adapter(path)}")
    checkpoint, model, theirs = None if stored.is_peft else Checkpoint(path), open_model(base), stored.adapter
    differing = [key for key in _KIND if getattr(theirs, key) != getattr(adapter, key)]
    if theirs.matrices(model.architecture).keys() != adapter.matrices(model.architecture).keys():
        differing.append("modules")
    problems = [
        f"pretrained.adapter: {path} has {key} {getattr(theirs, key)}, the config {getattr(adapter, key)}"
        for key in differing
    ]
    if stored.knows_quantization and theirs.quantization != adapter.quantization:
        keys = quantization_keys(theirs.quantization)
        written = ", ".join(yaml_line(key, value) for key, value in keys.items())
        problems.append(
            f"pretrained.adapter: {path} was trained on a base that was kept in another way; write {written}"
        )
    if problems:
        raise UserError(*problems)
    _refuse_other_base(stored, model, checkpoint)
    return _adapter_weights(stored, model, checkpoint)


_KIND = ("rank", "alpha", "rank_stabilized", "dora")
"""What of an adapter its parameters mean something with, beside the matrices."""


def _adapter_weights(stored: StoredAdapter, base: OpenModel, checkpoint: Checkpoint | None) -> WeightSource:
    """The parameters of an adapter by logical name. Raises UserError where those are not the ones that `base` can have."""
    weights: WeightSource
    if checkpoint is None:
        weights = open_peft(stored.folder, stored.adapter, base.architecture, base.family)
    else:
        weights = _Part(checkpoint, [name for name in checkpoint.names() if is_adapter_parameter(name)])
    shapes = stored.adapter.shapes(base.architecture)
    if problems := shape_problems(weights, shapes, PEFT_WEIGHTS if checkpoint is None else "it"):
        more = " (and more such)" if len(problems) > 1 else ""
        raise UserError(
            f"{stored.folder} is no whole adapter of {base.folder}: {problems[0]}{more}; it was cut short, or is that of "
            "another base"
        )
    return weights


def _named_base(stored: StoredAdapter) -> Path:
    """The folder that an adapter names as its base. Raises UserError where there is none."""
    if not stored.base_path:
        raise UserError(f"{stored.folder} does not say what it adapts; give that with --base DIR")
    named = Path(stored.base_path).expanduser()
    for place in (named, stored.folder / named):
        if place.is_dir():
            return place
    raise UserError(
        f"{stored.folder} adapts '{stored.base_path}', which is no folder here; give the base with --base DIR"
    )


def _refuse_other_base(stored: StoredAdapter, base: OpenModel, checkpoint: Checkpoint | None) -> None:
    """Raise UserError where `base` is known not to be what the adapter was trained on."""
    if (
        checkpoint is not None
        and checkpoint.architecture.parameter_shapes() != base.architecture.parameter_shapes()
    ):
        raise UserError(f"{stored.folder} is an adapter of a model of another shape than {base.folder}")
    if stored.fingerprint is None or (found := base_fingerprint(base.weights)) == stored.fingerprint:
        return
    named = "" if stored.base_path is None else f" ({stored.base_path})"
    raise UserError(
        f"{stored.folder} was trained on other weights{named}, fingerprint {stored.fingerprint[:12]}, than those in "
        f"{base.folder}, {found[:12]}; give its own base with --base DIR"
    )


def _own_tokenizer(folder: Path) -> Path | None:
    """The tokenizer beside an adapter, if there is one."""
    tokenizer = model_tokenizer(folder)
    return tokenizer if has_tokenizer(tokenizer) else None


class _Part:
    """Some of a checkpoint's parameters as a source of weights."""

    def __init__(self, checkpoint: Checkpoint, names: Sequence[str]):
        self._checkpoint, self._names = checkpoint, names

    def names(self) -> Sequence[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._checkpoint.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._checkpoint.dtype(name)

    def load(self, name: str) -> Tensor:
        return self._checkpoint.load(name)


def base_fingerprint(base: Path | WeightSource) -> str:
    """What tells one model's weights from another's of the same shape: sha256 over every name and shape, and the first
    16,384 values of each tensor as fp64. Files, their number and the type that values are stored in do not matter: the same
    model in fp32 and in bf16 have one fingerprint, unless the narrower one was rounded. Of an adapter merged into its base it is
    made of theirs, as they lie on the disk: what comes of a product depends on the processor.

    Of Hugging Face folders little is read, whatever their size; of a checkpoint, which can be read by whole tensors alone,
    everything, a tensor at a time.
    """
    source = open_model(base).weights if isinstance(base, Path) else base
    if isinstance(source, MergedWeights):
        adapter, parts = source.adapter, [source.base, source.update]
        facts = [*map(base_fingerprint, parts), f"{adapter.scale!r} {adapter.dora}"]
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()
    if isinstance(source, DequantizedWeights):
        return hashlib.sha256(f"{base_fingerprint(source.base)}\n{source.how}".encode()).hexdigest()
    digest = hashlib.sha256()
    for name in sorted(source.names()):
        digest.update(f"{name} {list(source.shape(name))}\n".encode())
        beginning = getattr(source, "beginning", None)
        values = beginning(name, _COMPARED) if beginning else source.load(name).flatten()[:_COMPARED]
        digest.update(values.to(torch.float64).numpy().tobytes())
    return digest.hexdigest()
