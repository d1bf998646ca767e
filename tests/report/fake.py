"""Run folders made by hand, as `modelyard train` writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

START = 1_750_000_000.0
"""2025-06-15 15:06:40 UTC."""


def record(iteration: int, **changes: Any) -> dict[str, Any]:
    """A training record: 1,000 tokens and 2 seconds an iteration; `changes` replace values, None included."""
    return {
        "iteration": iteration,
        "loss": 8.0 - iteration / 10,
        "learning_rate": iteration / 1000,
        "grad_norm": 1.5,
        "tokens": 1000 * iteration,
        "tokens_per_second": 500.0,
        "targets": 990,
        "loss_mean": 8.5 - iteration / 10,
        "skipped_steps": 0,
        "data_wait_share": 0.25,
        "memory_bytes": 3 * 2**30,
        "model_flops_per_second": 1.5e12,
        "seconds": {
            "data": 0.5,
            "forward": 0.4,
            "backward": 0.8,
            "optimizer": 0.2,
            "checkpoint": 0.0,
            "evaluation": 0.0,
            "export": 0.0,
            "other": 0.1,
        },
        "time": START + 2.0 * iteration,
        **changes,
    }


def write_run(
    folder: Path,
    records: list[dict[str, Any]],
    *,
    events: list[dict[str, Any]] | None = None,
    config: dict[str, Any] | None = None,
    tail: str = "",
) -> Path:
    """A run folder of these records; without `events` or `config` as an older version left it. `tail` ends metrics.jsonl."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records) + tail)
    if events is not None:
        (folder / "events.jsonl").write_text("".join(json.dumps(one) + "\n" for one in events))
    if config is not None:
        facts = {
            "modelyard_version": "0.1.0",
            "torch_version": "2.13.0",
            "device": "cpu",
            "parameters": 1_234_567,
            "tokens_per_iteration": 1000,
        }
        (folder / "config.json").write_text(json.dumps({**facts, "config": config, "architecture": {}}))
    return folder


def event(kind: str, iteration: int, seconds: float, text: str = "", **more: Any) -> dict[str, Any]:
    """An event `seconds` after the start."""
    return {"time": START + seconds, "iteration": iteration, "event": kind, "text": text or kind, **more}
