"""The models that may be started from, as far as their files tell without torch: Hugging Face folders and checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

from modelyard.config.adapter_files import is_peft_folder
from modelyard.config.architecture import Architecture, architecture_from
from modelyard.config.huggingface import FAMILIES, can_export, read_architecture, read_config, weight_problems
from modelyard.errors import UserError
from modelyard.files import damage, numbered_folders


def is_checkpoint(folder: Path) -> bool:
    """Whether `folder` is one checkpoint; an experiment, which may hold many, is not."""
    return (folder / "state.json").is_file() and (folder / ".metadata").is_file()


def has_shape(folder: Path) -> bool:
    """Whether something in `folder` says what shape a model has, or should."""
    return is_checkpoint(folder) or (folder / "config.json").exists() or is_peft_folder(folder)


def read_shape(folder: Path) -> tuple[Architecture, str]:
    """The shape of the model in `folder`, and the Hugging Face family that holds it.

    Raises UserError where it cannot be read, or where `folder` is that of a run, whose newest checkpoint is another one
    tomorrow.
    """
    if is_checkpoint(folder):
        architecture = _stored_architecture(folder / "state.json")
        return architecture, natural_family(architecture)
    if is_peft_folder(folder):
        raise UserError(
            f"{folder} is an adapter; write it as pretrained.adapter, and the model that it adapts as pretrained.path"
        )
    if "modelyard_version" in read_config(folder):
        found = numbered_folders(folder / "checkpoint")
        which = f"; name one of its checkpoints: {found[-1]}" if found else ", and it has no checkpoint yet"
        raise UserError(f"{folder} is the folder of a run{which}")
    return read_architecture(folder)


def _stored_architecture(path: Path) -> Architecture:
    try:
        return architecture_from(json.loads(path.read_text(encoding="utf-8"))["architecture"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error!r})") from None


def natural_family(architecture: Architecture) -> str:
    """The Hugging Face family that holds this shape."""
    return next((family for family in FAMILIES if can_export(architecture, family) is None), "llama")


def unreadable_weights(folder: Path) -> list[str]:
    """What keeps the weights in `folder` from being read, as far as sizes and first bytes say."""
    return damage(folder, checksums=False) if is_checkpoint(folder) else weight_problems(folder)


def model_tokenizer(folder: Path) -> Path:
    """Where the tokenizer of the model in `folder` is, if it has one.

    That of a checkpoint lies in its experiment; one that belongs to no experiment, as an average, has it inside.
    """
    if not is_checkpoint(folder):
        return folder
    inside = folder / "tokenizer"
    return inside if inside.is_dir() else folder.parent.parent / "tokenizer"


def reference_folder(folder: Path) -> Path | None:
    """The folder whose config.json an export of a model that began as `folder` carries along; None where none has one."""
    if not is_checkpoint(folder):
        return folder
    carried = folder / "tokenizer"
    return carried if (carried / "config.json").is_file() else None
