"""Ranks of a preparation one after the other in this process, and small sources of all kinds for them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from modelyard.config.prepare import PrepareConfig
from modelyard.data.prepare import prepare

from .test_prepare import TEXTS


def as_rank(cfg: PrepareConfig, rank: int, world_size: int, **options: Any) -> PrepareConfig:
    return cfg.model_copy(
        update={
            "distributed": cfg.distributed.model_copy(
                update={"rank": rank, "world_size": world_size, "timeout": 60.0} | options
            )
        }
    )


def together(cfg: PrepareConfig, world_size: int) -> list[str]:
    """All ranks one after the other, rank 0 last; returns what they say."""
    lines: list[str] = []
    for rank in reversed(range(world_size)):
        prepare(as_rank(cfg, rank, world_size), report=lines.append, terminal=False)
    return lines


def part_folder(tmp_path: Path) -> Path:
    (folder,) = (tmp_path / "out.parts").iterdir()
    return folder


def a_source(tmp_path: Path, kind: str, *, bad: int = -1) -> dict[str, Any]:
    """A `dataset` section: about 30 KB in one file or many, with records of all lengths; number `bad` has no text."""
    folder = tmp_path / "source"
    folder.mkdir()
    texts = [" ".join(TEXTS[i : i + 1 + i % 9]) for i in range(150)]
    records: list[dict[str, Any]] = [
        {"text": text, "url": f"page/{i}", "spans": [[0, i % 3]]} for i, text in enumerate(texts)
    ]
    if bad >= 0:
        records[bad]["text"] = None
    if kind == "code":
        for i, text in enumerate(texts):
            (folder / f"{i:03}.py").write_text(text + "\n")
        (folder / "150.py").write_text("")
        return {"path": str(folder), "extensions": [".py"]}
    if kind in ("line", "paragraph", "document"):
        for number in range(3):
            (folder / f"{number}.txt").write_text("\n\n".join(texts[50 * number : 50 * number + 50]) + "\n")
        return {"path": str(folder), "sample_by": kind}
    files = 5 if kind.endswith("s") else 1
    for number in range(files):
        some = records[number::files]
        if kind.startswith("parquet"):
            pq.write_table(pa.Table.from_pylist(some), folder / f"{number}.parquet", row_group_size=20)
            continue
        data = "".join(json.dumps(record) + "\n" for record in some).encode()
        if kind.startswith("zst"):
            noise = random.Random(number)  # so that some of it is left
            lines = [json.dumps(r | {"noise": noise.randbytes(60).hex()}) + "\n" for r in some]
            frames = ["".join(lines[i : i + 5]).encode() for i in range(0, len(lines), 5)]
            (folder / f"{number}.jsonl.zst").write_bytes(b"".join(map(zstandard.compress, frames)))
        else:
            (folder / f"{number}.jsonl").write_bytes(data.removesuffix(b"\n"))
    return {
        "path": str(folder),
        "loss_masking_spans": "spans",
        "columns": ["url"],
        "special_tokens": "text",
    }


KINDS = ["jsonl", "jsonls", "zst", "zsts", "parquet", "parquets", "line", "paragraph", "document", "code"]
