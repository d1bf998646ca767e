"""The weights of PEFT's adapter folders under our names, and such folders from our adapters. PEFT is not imported."""

from __future__ import annotations

from pathlib import Path

import torch

from modelyard.config.adapter import Adapter
from modelyard.config.adapter_files import BASE_FILE, PEFT_CONFIG, PEFT_WEIGHTS, base_file, peft_config
from modelyard.config.architecture import Architecture
from modelyard.errors import UserError
from modelyard.files import complete_or_absent, write_json
from modelyard.model.formats.huggingface import HuggingFaceWeights, huggingface_name
from modelyard.model.formats.safetensors import FileWriter, read_entries
from modelyard.model.formats.source import WeightSource, shape_problems
from modelyard.model.formats.tokenizer_files import copy_tokenizer

_PREFIX = "base_model.model."
_PARTS = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_magnitude": "lora_magnitude_vector",
}
"""What PEFT calls the parameters of an adapted matrix."""


def peft_name(name: str, family: str) -> str:
    """What PEFT calls our adapter parameter `name` on a model of this family."""
    matrix, _, part = name.rpartition(".")
    return f"{_PREFIX}{_module(matrix, family)}.{_PARTS[part]}"


def _module(matrix: str, family: str) -> str:
    return huggingface_name(f"{matrix}.weight", family).removesuffix(".weight")


def open_peft(folder: Path, adapter: Adapter, architecture: Architecture, family: str) -> HuggingFaceWeights:
    """The adapter of a PEFT folder on a model of this shape; only the header is read.

    What is in the file and has no place in such an adapter keeps PEFT's name; what is missing, is. Raises UserError where
    there is no such file, or tensors are no real numbers.
    """
    path = folder / PEFT_WEIGHTS
    if not path.is_file() and any(folder.glob("adapter_model*.bin")):
        raise UserError(
            f"{folder} has its weights as a pickled .bin file, which can run code when read; save it as safetensors first "
            "(PEFT: save_pretrained)"
        )
    # Some versions write `lora_magnitude_vector.weight`.
    found = {name.replace("_vector.weight", "_vector"): entry for name, entry in read_entries(path).items()}
    for name, entry in found.items():
        if not entry.dtype.is_floating_point:
            raise UserError(f"{path}: '{name}' is {str(entry.dtype).removeprefix('torch.')}, no real number")
    ours = {peft_name(name, family): name for name in adapter.shapes(architecture)}
    return HuggingFaceWeights({ours.get(name, name): entry for name, entry in found.items()})


def write_peft(
    source: WeightSource,
    destination: Path,
    *,
    adapter: Adapter,
    architecture: Architecture,
    family: str,
    base_path: Path,
    fingerprint: str,
    dtype: torch.dtype | None = None,
    tokenizer_folder: Path | None = None,
    replace: bool = False,
) -> None:
    """Write a folder that `peft.PeftModel.from_pretrained` loads onto the base; complete or absent.

    `base_path` is the base's folder and `fingerprint` that of its weights. `dtype` None: as the source has them. With
    `replace`, what is at the destination stays until the new folder is complete. Raises UserError when the destination
    exists otherwise, or the source lacks parameters.
    """
    if destination.exists() and not replace:
        raise UserError(f"{destination} exists already")
    shapes = adapter.shapes(architecture)
    if problems := shape_problems(source, shapes, "the adapter"):
        raise UserError(*problems)
    dtypes = {name: dtype or source.dtype(name) for name in shapes}
    names = sorted(shapes, key=lambda name: -dtypes[name].itemsize)
    targets = {_module(matrix, family).rpartition(".")[2] for matrix in adapter.matrices(architecture)}
    with complete_or_absent(destination) as temporary:
        entries = [(peft_name(name, family), dtypes[name], shapes[name]) for name in names]
        with FileWriter(temporary / PEFT_WEIGHTS, entries) as writer:
            for name in names:
                writer.write(source.load(name).to(dtypes[name]))
        write_json(temporary / PEFT_CONFIG, peft_config(adapter, sorted(targets), str(base_path)))
        write_json(temporary / BASE_FILE, base_file(adapter, str(base_path), fingerprint))
        if tokenizer_folder is not None:
            copy_tokenizer(tokenizer_folder, temporary)
