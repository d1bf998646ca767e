"""Every mistake of docs/bad-input.md, made in a small real project: its line, its exit status, and nothing lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.bad_input import build_project, lost, make, table
from benchmarks.bad_input_cases import MISTAKES, Mistake

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def working(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_project(tmp_path_factory.mktemp("bad-input") / "project")


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_mistake(mistake: Mistake, working: Path, tmp_path: Path) -> None:
    outcome = make(mistake, working, tmp_path / "copy")
    assert lost(mistake, outcome, tmp_path / "copy") is None


def test_what_is_looked_for_can_be_missed(working: Path, tmp_path: Path) -> None:
    """A wrong word, a wrong exit status and a file that appears are each seen."""
    first = MISTAKES[0]
    outcome = make(first, working, tmp_path / "one")
    other_words = Mistake("", "", "", ("did you mean 'batch'",), first.provoke)
    assert "does not say" in str(lost(other_words, outcome, tmp_path))
    assert "exit status 2, not 1" in str(lost(Mistake("", "", "", (), first.provoke, 1), outcome, tmp_path))

    def valid(_: object) -> list[str]:
        Path("prepare.yaml").write_text(Path("prepare.yaml").read_text().replace("seed: 3", "seed: 4"))
        return ["prepare", "prepare.yaml", "output_path=written"]

    written = make(Mistake("", "", "", (), valid, 0), working, tmp_path / "two")
    assert "written/training/tokens_00000.bin" in written.changed


def test_the_table_has_every_mistake() -> None:
    text = (ROOT / "docs" / "bad-input.md").read_text(encoding="utf-8")
    for mistake in MISTAKES:
        (row,) = [line for line in text.splitlines() if line.endswith(f"| `{mistake.name}` |")]
        for words in mistake.says:
            assert words.replace("|", "\\|") in row, mistake.name
    assert table([]) == "\n"
