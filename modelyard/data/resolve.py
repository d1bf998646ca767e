"""From what the user wrote in `data.datasets` to a tree without `file` datasets and with every path found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from modelyard.config.data import (
    DATASET_TYPES,
    BlendedDataset,
    ConcatenatedDataset,
    ConcatenatedMemmapDataset,
    DatasetConfig,
    FileDataset,
    MemmapDataset,
    SampledDataset,
    SliceDataset,
)
from modelyard.config.document import Document
from modelyard.config.problems import explain
from modelyard.config.yaml import read_yaml
from modelyard.data.files import refuse_raw_data
from modelyard.errors import UserError, missing_path

_ADAPTER: TypeAdapter[DatasetConfig] = TypeAdapter(DatasetConfig)


def resolve(config: DatasetConfig, base: Path | None = None) -> DatasetConfig:
    """The same dataset with its files read, its paths joined to their folders, and slices moved below blends.

    `base` is the folder that relative paths start from; None is the working directory.

    Raises:
        UserError: a file is missing, does not hold a dataset, or files lead in a circle.
    """
    return _resolve(config, base, ())


def _resolve(config: DatasetConfig, base: Path | None, files: tuple[Path, ...]) -> DatasetConfig:
    match config:
        case FileDataset():
            path = _join(base, config.path)
            seen = [file.resolve() for file in files]
            if path.resolve() in seen:
                raise UserError(f"dataset files lead in a circle: {' → '.join(map(str, [*files, path]))}")
            return _resolve(read_dataset_file(path), path.parent, (*files, path))
        case MemmapDataset():
            return config.model_copy(update={"path": _join(base, config.path)})
        case ConcatenatedMemmapDataset():
            return _concatenation(_join(base, config.path))
        case SliceDataset():
            return _slice(_resolve(config.dataset, base, files), config.begin, config.end)
        case SampledDataset():
            return config.model_copy(update={"dataset": _resolve(config.dataset, base, files)})
        case ConcatenatedDataset() | BlendedDataset():
            parts = [_resolve(part, base, files) for part in config.datasets]
            return config.model_copy(update={"datasets": parts})
    return config


def _slice(config: DatasetConfig, begin: float, end: float) -> DatasetConfig:
    """A slice of documents; of a blend, which has rows, it is the blend of the slices."""
    match config:
        case BlendedDataset():
            parts = [_slice(part, begin, end) for part in config.datasets]
            return config.model_copy(update={"datasets": parts})
        case SampledDataset():
            return config.model_copy(update={"dataset": _slice(config.dataset, begin, end)})
    return SliceDataset(type="slice", dataset=config, begin=begin, end=end)


def _concatenation(folder: Path) -> ConcatenatedDataset:
    """The prepared files of a folder: those that its index.txt names, else all."""
    if not folder.is_dir():
        raise UserError(
            missing_path(folder) if not folder.exists() else f"{folder} is a file, not a folder of .idx files"
        )
    index = folder / "index.txt"
    if index.is_file():
        lines = [line.strip() for line in index.read_text(encoding="utf-8").splitlines()]
        prefixes = [folder / line for line in lines if line]
    else:
        prefixes = sorted(path.with_suffix("") for path in folder.glob("*.idx"))
    if not prefixes:
        raise UserError(f"{index if index.is_file() else folder} names no prepared files (.idx)")
    parts: list[DatasetConfig] = [MemmapDataset(type="memmap", path=path) for path in prefixes]
    return ConcatenatedDataset(type="concatenated", name=str(folder), datasets=parts)


def _join(base: Path | None, path: Path) -> Path:
    return path if base is None else base / path


def read_dataset_file(path: Path) -> DatasetConfig:
    """The one dataset that a YAML file holds; a list of prefixes and weights (the oldest form) is a blend of them.

    Raises:
        UserError: missing, not YAML, or not one dataset; one line per problem.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a dataset file{_instead_of_folder(path)}")
    refuse_raw_data(path)
    document = read_yaml(path)
    values: dict[str, Any] = document.values
    if isinstance(values.get("config"), dict) and "type" not in values:
        # Beside it stands `metadata`: counts, which the data itself has.
        values, origins = document.take(("config",))
        document = Document(values, origins, document.name)
    if "type" not in values and _is_prefix_list(values.get("datasets")):
        values = _blend_of_prefixes(values["datasets"])
    try:
        return _ADAPTER.validate_python(values)
    except ValidationError as error:
        schema = DATASET_TYPES.get(str(values.get("type")), FileDataset)
        raise UserError(*explain(error, document, schema)) from None


def _instead_of_folder(path: Path) -> str:
    if (path / "manifest.json").is_file():
        return "; it is a token store: write type: memmap"
    files = sorted(path.glob("fast_llm_config*.yaml"))
    return f"; name one in it, as {files[0]}" if files else ""


def _is_prefix_list(entries: Any) -> bool:
    return isinstance(entries, list) and all(
        isinstance(entry, dict) and "prefix" in entry for entry in entries
    )


def _blend_of_prefixes(entries: list[dict[str, Any]]) -> dict[str, Any]:
    stores = [{"type": "memmap", "path": entry["prefix"]} for entry in entries]
    return {"type": "blended", "datasets": stores, "weights": [entry.get("weight", 1) for entry in entries]}
