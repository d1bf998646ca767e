"""`data: {format, path, split}` of the first era."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from modelyard.config.data import DataConfig
from modelyard.config.document import Document
from modelyard.config.legacy_data import rewrite_data


def rewritten(**data: Any) -> dict[str, Any]:
    document = Document({"data": dict(data)}, {("data", key): f"x:{key}" for key in data}, "x")
    notices, problems = rewrite_data(document)
    assert problems == []
    assert len(notices) == 1
    datasets: dict[str, Any] = document.values["data"]["datasets"]
    DataConfig.model_validate(document.values["data"])
    return datasets


def problem(**data: Any) -> str:
    document = Document({"data": dict(data)}, {("data", key): f"x:{key}" for key in data}, "x")
    notices, (line,) = rewrite_data(document)
    assert notices == []
    return line


def cut(source: dict[str, Any], begin: float, end: float) -> dict[str, Any]:
    return {"type": "slice", "dataset": source, "begin": begin, "end": end}


def store(path: str) -> dict[str, Any]:
    return {"type": "memmap", "path": path}


def test_one_store_cut_by_documents() -> None:
    assert rewritten(format="list", path=["tokens"], split=[8, 1, 1]) == {
        "training": cut(store("tokens"), 0.0, 0.8),
        "validation": cut(store("tokens"), 0.8, 0.9),
        "test": cut(store("tokens"), 0.9, 1.0),
    }


def test_the_default_split() -> None:
    datasets = rewritten(format="list", path="tokens")
    assert {name: (entry["begin"], entry["end"]) for name, entry in datasets.items()} == {
        "training": (0.0, 0.969),
        "validation": (0.969, 0.999),
        "test": (0.999, 1.0),
    }


def test_a_whole_store_is_not_cut() -> None:
    assert rewritten(format="list", path=["tokens"], split=[1, 0, 0]) == {"training": store("tokens")}


def test_weighted_stores_are_blended_slices() -> None:
    assert rewritten(format="list", path=[0.7, "a", 0.3, "b"], split=[9, 1])["validation"] == {
        "type": "blended",
        "datasets": [cut(store("a"), 0.9, 1.0), cut(store("b"), 0.9, 1.0)],
        "weights": [0.7, 0.3],
    }


def test_a_json_file_names_stores_relative_to_itself(tmp_path: Path) -> None:
    file = tmp_path / "fast_llm_dataset.json"
    file.write_text(
        json.dumps({"datasets": [{"prefix": "a", "weight": 2}, {"prefix": "deep/b", "weight": 1}]})
    )
    assert rewritten(format="file", path=str(file), split=[1, 0, 0])["training"] == {
        "type": "blended",
        "datasets": [store(f"{tmp_path}/a"), store(f"{tmp_path}/deep/b")],
        "weights": [2.0, 1.0],
    }


def test_a_file_that_is_not_there_yet_stays_a_file() -> None:
    assert rewritten(format="file", path="gone.json", split=[99, 1, 0]) == {
        "training": cut({"type": "file", "path": "gone.json"}, 0.0, 0.99),
        "validation": cut({"type": "file", "path": "gone.json"}, 0.99, 1.0),
    }


def test_random_tokens_differ_between_splits() -> None:
    assert rewritten(format="random", split=[1, 1, 0]) == {
        "training": {"type": "random", "name": "training"},
        "validation": {"type": "random", "name": "validation"},
    }


def test_todays_form_is_left_alone() -> None:
    document = Document({"data": {"datasets": {}}}, {}, "x")
    assert rewrite_data(document) == ([], [])


def test_problems(tmp_path: Path) -> None:
    assert problem(format="fil", path="x").startswith(
        "x:format: data.format = 'fil': expected one of file, list, random; did"
    )
    assert problem(format="sample", path="x").startswith("x:format: data.format = 'sample': expected one of")
    assert problem(format="list", path=["a", "b", "c"]).startswith(
        "x:path: data.path = ['a', 'b', 'c']: expected [PATH]"
    )
    assert problem(format="list", path=["a"], split=[0, 0, 0]).startswith(
        "x:split: data.split = [0, 0, 0]: expected"
    )
    assert problem(format="list", path=["a"], split="99").startswith("x:split: data.split = '99': expected")
    assert problem(format="file", path=5).startswith("x:path: data.path = 5: expected the path of a file")
    assert problem(format="file", path="a", datasets={}).startswith(
        "x:format: data.format is the older form of data.datasets"
    )
    bad = tmp_path / "bad.json"
    bad.write_text("{")
    assert "is not valid JSON" in problem(format="file", path=str(bad))
    bad.write_text('{"datasets": [{"path": "a"}]}')
    assert 'is not of the form {"datasets": [{"prefix": PATH, "weight": NUMBER}, ...]}' in problem(
        format="file", path=str(bad)
    )
    bad.write_text('{"datasets": []}')
    assert problem(format="file", path=str(bad)) == f"{bad} lists no datasets"


@pytest.mark.parametrize("split", [[0.5, 0.25, 0.25], [2, 1, 1], [50, 25, 25]])
def test_splits_are_normalised(split: list[float]) -> None:
    datasets = rewritten(format="list", path=["a"], split=split)
    assert [entry["end"] for entry in datasets.values()] == [0.5, 0.75, 1.0]
