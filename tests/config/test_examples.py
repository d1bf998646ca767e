"""The examples load without a note, and explain each of their keys."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from modelyard.config.loader import load_config
from modelyard.plan.summary import summarise
from tests.conftest import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
PARAMETERS = {
    "train-llama-3.1-8b": 8_030_261_248,
    "train-qwen-2.5-7b": 7_615_616_512,
    "continue-llama-3.1-8b": None,
    "train-tiny": 1_311_872,
    "prepare-text": None,
    "prepare-code": None,
    "prepare-conversations": None,
    "fine-tune-llama-3.1-8b": None,
    "fine-tune-llama-3.1-8b-qlora": None,
}


def test_every_example_is_here() -> None:
    assert {path.stem for path in EXAMPLES} == set(PARAMETERS)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_loads(path: Path) -> None:
    loaded = load_config([path])
    assert loaded.kind == ("prepare" if path.stem.startswith("prepare") else "train")
    assert loaded.notices == []
    assert loaded.without_effect == []
    count = loaded.architecture.parameter_count() if loaded.architecture else None
    assert count == PARAMETERS[path.stem]
    _, problems, _ = summarise(loaded)
    assert problems == []


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_explains_its_keys(path: Path) -> None:
    """Every key is explained where it first has a value; sections explain themselves."""
    explained: set[str] = set()
    for line in path.read_text().splitlines():
        if match := re.match(r"\s*(?:- )?(\w+):( [^#]+?)?\s*(#.*)?$", line):
            key, value, comment = match.groups()
            explained |= {key} if comment else set()
            # A split's name is the user's own.
            assert key in explained or not value or key in ("training", "validation"), line
