"""Hugging Face folders to our weights and back.

Our logical names are Llama's in Hugging Face without the `model.` prefix; other families rename some modules.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modelyard.config.architecture import Architecture
from modelyard.config.huggingface import (
    FAMILIES,
    pointer_problem,
    read_architecture,
    read_config,
    write_config,
)
from modelyard.errors import UserError, missing_path
from modelyard.files import complete_or_absent, write_json
from modelyard.model.formats.safetensors import FileWriter, TensorEntry, read_entries
from modelyard.model.formats.source import WeightSource, fit_problems
from modelyard.model.formats.tokenizer_files import copy_tokenizer, special_token_ids, stop_token_ids

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
DEFAULT_SHARD_BYTES = 5_000_000_000

_OUTSIDE = frozenset({"lm_head.weight"})
"""Names without the prefix `model.`."""
_BUFFERS = (".rotary_emb.inv_freq",)
"""Ends of the names of buffers that some exporters stored among the weights."""
_RENAMED: dict[str, dict[str, str]] = {family: {} for family in FAMILIES} | {
    "starcoder2": {".mlp.up_proj.": ".mlp.c_fc.", ".mlp.down_proj.": ".mlp.c_proj."}
}
"""Parts of our names, and what each family has in their place."""


def huggingface_name(name: str, family: str) -> str:
    """The name that `family` has for our logical `name`."""
    for ours, theirs in _RENAMED[family].items():
        name = name.replace(ours, theirs)
    return name if name in _OUTSIDE else f"model.{name}"


def logical_name(name: str, family: str) -> str | None:
    """Our name for what `family` calls `name`; None for what is no weight of this family's."""
    if name not in _OUTSIDE and not name.startswith("model."):
        return None
    name = name.removeprefix("model.")
    for ours, theirs in _RENAMED[family].items():
        name = name.replace(theirs, ours)
    return name


# --- reading ----------------------------------------------------------------------------------------------------


class HuggingFaceWeights:
    """The weights of a folder, a model's or an adapter's, by logical name, loaded one at a time."""

    def __init__(self, entries: Mapping[str, TensorEntry]):
        self._entries = entries

    def names(self) -> Sequence[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entries[name].dtype

    def load(self, name: str) -> Tensor:
        return self._entries[name].load()

    def beginning(self, name: str, count: int) -> Tensor:
        """The first `count` values of a tensor, in one row; the others are not read."""
        return self._entries[name].beginning(count)


@dataclass(frozen=True)
class HuggingFaceModel:
    folder: Path
    architecture: Architecture
    family: str
    weights: HuggingFaceWeights


def open_huggingface(folder: Path) -> HuggingFaceModel:
    """Open a folder with config.json and safetensors, single or sharded; only headers are read.

    Raises UserError when it is not such a folder, or when tensors are missing, have no place in the architecture or
    the wrong shape.
    """
    architecture, family = read_architecture(folder)
    entries = {}
    unknown = []
    for name, entry in _folder_entries(folder).items():
        if name.endswith(_BUFFERS) or (name == "lm_head.weight" and architecture.tie_word_embeddings):
            continue
        if (ours := logical_name(name, family)) is None:
            unknown.append(name)
        else:
            entries[ours] = entry
    if unknown:
        raise UserError(f"{folder} has weights that are not a {family}'s: {', '.join(unknown[:8])}")
    weights = HuggingFaceWeights(entries)
    if problems := fit_problems(weights, architecture, str(folder)):
        raise UserError(*problems)
    return HuggingFaceModel(folder, architecture, family, weights)


def _folder_entries(folder: Path) -> dict[str, TensorEntry]:
    if (folder / _SINGLE).is_file():
        return read_entries(folder / _SINGLE)
    if not (folder / _INDEX).is_file():
        if not folder.is_dir():
            raise UserError(missing_path(folder))
        if any(folder.glob("*.bin")):
            raise UserError(
                f"{folder} has its weights as pickled .bin files, which can run code when read; save it as "
                "safetensors first (transformers: model.save_pretrained)"
            )
        raise UserError(f"{folder} has no weights: neither {_SINGLE} nor {_INDEX}")
    try:
        files: dict[str, str] = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(files.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problem = pointer_problem(folder / _INDEX) or f"{folder / _INDEX} cannot be read: {error!r}"
        raise UserError(problem) from None
    entries: dict[str, TensorEntry] = {}
    problems = []
    for shard in shards:
        try:
            entries |= read_entries(folder / shard)
        except UserError as error:
            problems += error.problems
    problems = problems or [
        f"{folder / _INDEX} names '{name}' in {file}, which does not have it"
        for name, file in files.items()
        if name not in entries
    ]
    if problems:
        raise UserError(*problems)
    return entries


# --- writing ----------------------------------------------------------------------------------------------------


def export_huggingface(
    source: WeightSource,
    destination: Path,
    *,
    architecture: Architecture,
    family: str,
    dtype: torch.dtype | None = torch.bfloat16,
    tokenizer_folder: Path | None = None,
    reference_folder: Path | None = None,
    sequence_length: int | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    replace: bool = False,
    check: Callable[[Path], object] | None = None,
) -> None:
    """Write a folder that transformers loads as is; it appears at `destination` complete or not at all.

    Tensors are streamed, cast to `dtype` (None: as stored) one at a time. `reference_folder` is the Hugging Face
    folder that training began from: its config keys, generation config and, unless `tokenizer_folder` is given,
    tokenizer are carried along. `sequence_length` (tokens) bounds positions where the architecture says nothing.
    With `replace`, what is at the destination stays until the new folder is complete. `check` is called with the complete
    folder before it gets its name; what it raises is raised here, and nothing is left of the folder.
    Raises UserError when the destination exists otherwise, the weights do not fit or the family cannot hold the architecture.
    """
    if destination.exists() and not replace:
        raise UserError(f"{destination} exists already")
    if problems := fit_problems(source, architecture, "the model"):
        raise UserError(*problems)
    original = read_config(reference_folder) if reference_folder else {}
    tokenizer_folder = tokenizer_folder or reference_folder
    ids = _special_ids(original, tokenizer_folder)
    shapes = architecture.parameter_shapes()
    dtypes = {name: dtype or source.dtype(name) for name in shapes}
    config = write_config(
        architecture,
        family=family,
        dtype=str(dtypes["embed_tokens.weight"]).removeprefix("torch."),
        original=original or None,
        sequence_length=sequence_length,
        **ids,
    )

    with complete_or_absent(destination) as temporary:
        _write_weights(source, shapes, dtypes, family, temporary, max_shard_bytes)
        write_json(temporary / "config.json", config)
        stops = stop_token_ids(tokenizer_folder) if tokenizer_folder is not None else []
        _write_generation_config(temporary / "generation_config.json", reference_folder, ids, stops)
        if tokenizer_folder is not None:
            copy_tokenizer(tokenizer_folder, temporary)
        if check is not None:
            check(temporary)


def _write_weights(
    source: WeightSource,
    shapes: dict[str, tuple[int, ...]],
    dtypes: dict[str, torch.dtype],
    family: str,
    folder: Path,
    max_shard_bytes: int,
) -> None:
    sizes = {name: prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    single = len(shards) == 1
    files = [
        _SINGLE if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    for file, names in zip(files, shards, strict=True):
        names.sort(
            key=lambda name: -dtypes[name].itemsize
        )  # keeps every tensor aligned where dtypes are mixed
        entries = [(huggingface_name(name, family), dtypes[name], shapes[name]) for name in names]
        with FileWriter(folder / file, entries) as writer:
            for name in names:
                writer.write(source.load(name).to(dtypes[name]))
    if not single:
        weight_map = {
            huggingface_name(n, family): f for f, names in zip(files, shards, strict=True) for n in names
        }
        metadata = {"total_parameters": sum(map(prod, shapes.values())), "total_size": sum(sizes.values())}
        write_json(folder / _INDEX, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})


def _special_ids(original: Mapping[str, Any], tokenizer_folder: Path | None) -> dict[str, Any]:
    """The begin, end and padding tokens: what the reference says, else what the tokenizer says."""
    found = special_token_ids(tokenizer_folder) if tokenizer_folder is not None else {}
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {key: original[key] if original.get(key) is not None else found.get(key) for key in keys}


def _write_generation_config(
    path: Path, reference_folder: Path | None, ids: Mapping[str, Any], stops: Sequence[int]
) -> None:
    """The reference's, else the special tokens; a model that was trained on conversations stops where answers ended there."""
    reference = reference_folder / path.name if reference_folder is not None else None
    if reference is not None and reference.is_file() and not stops:
        shutil.copyfile(reference, path)
        return
    found = {key: value for key, value in ids.items() if value is not None}
    if reference is not None and reference.is_file():
        found = json.loads(reference.read_text(encoding="utf-8"))
    if stops:
        known = found.get("eos_token_id")
        before = known if isinstance(known, list) else [] if known is None else [known]
        found["eos_token_id"] = sorted({*before, *stops})
    write_json(path, found)
