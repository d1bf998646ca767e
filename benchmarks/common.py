"""What the benchmark scripts share."""

from __future__ import annotations

import json
import platform
from datetime import date
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent / "results"


def write_result(name: str, values: dict[str, Any]) -> Path:
    """Write `benchmarks/results/<name>.json` with the versions and the date beside the values."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads"
    )
    head = {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device,
    }
    path.write_text(json.dumps({**head, **values}, indent=1) + "\n", encoding="utf-8")
    return path


def put_into(page: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- NAME: ... -->` and `<!-- end of NAME -->` on a page of docs/.

    Raises ValueError where the page has no such place.
    """
    old = page.read_text(encoding="utf-8")
    begin, end = old.find(f"<!-- {name}: "), old.find(f"<!-- end of {name} -->")
    if not 0 <= begin < end:
        raise ValueError(f"{page} has no place for {name}")
    begin = old.index("-->", begin) + len("-->")
    page.write_text(f"{old[:begin]}\n{text}\n{old[end:]}", encoding="utf-8")
