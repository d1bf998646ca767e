"""What all pages and tables are tested under, and what `modelyard inspect` is tested on."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelyard.cli import main
from modelyard.data.tokenizer_training import train_tokenizer
from tests.data.conftest import sentence
from tests.report.inspecting import Run, make_store, text


@pytest.fixture(autouse=True)
def _no_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables as wide as they like, whatever the shell says that started the tests."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer of 300 tokens: <|begin_of_text|> is 0, <|end_of_text|> is 1."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer((sentence(i) for i in range(200)), folder, vocab_size=300)
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs `modelyard inspect` in `tmp_path`; returns the exit status and what was printed."""
    monkeypatch.chdir(tmp_path)
    for name in ("COLUMNS", "FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)

    def inspect(*words: object) -> tuple[int, str]:
        status = main(["inspect", *map(str, words)])
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return inspect


@pytest.fixture
def good(tmp_path: Path, tokenizer_folder: Path) -> Path:
    """Ten documents, of each the first half masked."""
    documents = [text(tokenizer_folder, number) for number in range(10)]
    masks = [[int(place < len(d) // 2) for place in range(len(d))] for d in documents]
    return make_store(tmp_path / "good", tokenizer_folder, documents, masks)
