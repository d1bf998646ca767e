"""What all pages and tables are tested under."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _no_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables as wide as they like, whatever the shell says that started the tests."""
    monkeypatch.delenv("COLUMNS", raising=False)
