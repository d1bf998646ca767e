"""What README and docs say exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from modelyard.cli import VERBS
from modelyard.config.loader import load_config

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_commands_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
    for verb in re.findall(r"^(?:\$ )?modelyard ([a-z]+)", text, flags=re.MULTILINE):
        assert verb in VERBS or verb == "tokenizer", verb
    for path in re.findall(r"(?:examples|benchmarks|tests)/[\w./-]+\w", text):
        assert (ROOT / path).exists(), path
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for target in re.findall(r"`make ([a-z-]+)`", text):
        assert target in targets, target


@pytest.mark.parametrize("name", ["prepare.yaml", "train.yaml"])
def test_quickstart_files_load(name: str) -> None:
    loaded = load_config([ROOT / "examples" / "quickstart" / name])
    assert loaded.notices == []
    if name == "train.yaml":
        assert loaded.architecture is not None
        assert 1e6 < loaded.architecture.parameter_count() < 5e6
