"""What the benchmark scripts share."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent / "results"


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_result(name: str, values: dict[str, Any], *, folder: Path = RESULTS) -> Path:
    """Write `benchmarks/results/<name>.json` with the versions and the date beside the values."""
    path = folder / f"{name}.json"
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


class FirstAdapter:
    """An adapter to begin with, as a source of weights: A and B drawn by name, and no B zero, so that every gradient counts.

    The numbers are ones that bf16 has: a peer that narrows some of them loses nothing.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]):
        """`shapes` as `Adapter.shapes` gives them."""
        self._shapes, self._numbers = shapes, {name: number for number, name in enumerate(shapes)}

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def load(self, name: str) -> torch.Tensor:
        shape = self._shapes[name]
        generator = torch.Generator().manual_seed(self._numbers[name])
        values = torch.randn(shape, generator=generator) * (shape[1] ** -0.5 if name.endswith("A") else 0.02)
        return values.bfloat16().float()
