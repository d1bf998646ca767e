from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.helpers import CONFIG


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with the `train.yaml` of `helpers`."""
    monkeypatch.chdir(tmp_path)
    Path("train.yaml").write_text(CONFIG)
    return tmp_path
