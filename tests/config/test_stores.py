"""Sizes of the data from the stores' manifests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from modelyard.config.data import DatasetConfig
from modelyard.config.stores import Source, sources
from modelyard.errors import UserError

ADAPTER: TypeAdapter[DatasetConfig] = TypeAdapter(DatasetConfig)


def store(folder: Path, documents: int, tokens: int, vocab_size: int = 100) -> dict[str, str]:
    folder.mkdir(parents=True)
    manifest = {"documents": documents, "tokens": tokens, "vocab_size": vocab_size}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return {"type": "memmap", "path": str(folder)}


def found(dataset: object) -> list[Source]:
    return sources(ADAPTER.validate_python(dataset), 64)


def test_every_type(tmp_path: Path) -> None:
    a, b = store(tmp_path / "a", 10, 1000), store(tmp_path / "b", 30, 5000, 200)
    assert found(a) == [Source(a["path"], 1.0, 10, 1000, 100)]
    assert found({"type": "slice", "dataset": a, "begin": 0.0, "end": 0.9}) == [
        Source(a["path"], 1.0, 9, 900, 100)
    ]
    assert found({"type": "concatenated", "name": "both", "datasets": [a, b]}) == [
        Source("both", 1.0, 40, 6000, 200)
    ]
    assert found({"type": "blended", "datasets": [a, b], "weights": [3.0, 1.0]}) == [
        Source(a["path"], 0.75, 10, 1000, 100),
        Source(b["path"], 0.25, 30, 5000, 200),
    ]
    assert found({"type": "sampled", "dataset": a, "sampling": {"seed": 5}}) == found(a)
    assert found({"type": "random", "num_documents": 5}) == [Source("dummy", 1.0, 5, 320, None)]


def test_a_dataset_file_is_relative_to_itself(tmp_path: Path) -> None:
    store(tmp_path / "tokens" / "training", 3, 30)
    file = tmp_path / "tokens" / "training.yaml"
    file.write_text("type: memmap\npath: training\n")
    assert found({"type": "file", "path": str(file)})[0].tokens == 30


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"manifest.json does not exist"):
        found({"type": "memmap", "path": str(tmp_path)})
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="is not the manifest of a token store"):
        found({"type": "memmap", "path": str(tmp_path)})
    with pytest.raises(UserError, match="does not exist"):
        found({"type": "file", "path": str(tmp_path / "gone.yaml")})
