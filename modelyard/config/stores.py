"""What the prepared data holds, from the manifests alone (read as JSON; nothing is opened)."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from modelyard.config.data import (
    BlendedDataset,
    ConcatenatedDataset,
    DatasetConfig,
    MemmapDataset,
    RandomDataset,
    SampledDataset,
    SliceDataset,
)
from modelyard.data.resolve import resolve
from modelyard.errors import UserError, missing_path


@dataclass(frozen=True)
class Source:
    """Part of a dataset that is read in its own epochs."""

    name: str
    share: float
    """Share of the dataset's rows that come from here."""
    documents: int
    tokens: int
    vocab_size: int | None
    """Token ids are below this; None where nothing says so."""


def sources(dataset: DatasetConfig, sequence_length: int) -> list[Source]:
    """The sources of a dataset with their sizes. Raises UserError where a store is not there."""
    return _sources(resolve(dataset, None), sequence_length)


def _sources(dataset: DatasetConfig, sequence_length: int) -> list[Source]:
    match dataset:
        case MemmapDataset():
            return [_manifest(dataset.path)]
        case SampledDataset():
            return _sources(dataset.dataset, sequence_length)
        case SliceDataset():
            part = dataset.end - dataset.begin
            return [
                replace(source, documents=round(part * source.documents), tokens=round(part * source.tokens))
                for source in _sources(dataset.dataset, sequence_length)
            ]
        case ConcatenatedDataset():
            return [_together([_sources(part, sequence_length) for part in dataset.datasets], dataset.name)]
        case BlendedDataset():
            total = sum(dataset.weights)
            return [
                replace(source, share=source.share * weight / total)
                for part, weight in zip(dataset.datasets, dataset.weights)
                for source in _sources(part, sequence_length)
            ]
        case RandomDataset():
            length = dataset.document_length or sequence_length
            return [Source(dataset.name, 1.0, dataset.num_documents, dataset.num_documents * length, None)]
    raise AssertionError(f"a resolved dataset has no {type(dataset).__name__}")


def _together(parts: list[list[Source]], name: str) -> Source:
    found = [source for part in parts for source in part]
    sizes = [source.vocab_size for source in found if source.vocab_size is not None]
    return Source(
        name,
        1.0,
        sum(s.documents for s in found),
        sum(s.tokens for s in found),
        max(sizes) if sizes else None,
    )


def _manifest(store: Path) -> Source:
    path = store / "manifest.json"
    if not path.is_file():
        raise UserError(missing_path(path))
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        return Source(str(store), 1.0, manifest["documents"], manifest["tokens"], manifest["vocab_size"])
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError):
        raise UserError(f"{path} is not the manifest of a token store") from None
