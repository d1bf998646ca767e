"""The folder of a run: whose it is, and what it says about itself (`config.json`)."""

from __future__ import annotations

import dataclasses
import json
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

import modelyard
from modelyard.config.architecture import Architecture, architecture_from
from modelyard.config.layout import Layout
from modelyard.config.peft import adapter_in_short, adapter_of
from modelyard.config.train import TrainConfig
from modelyard.errors import UserError
from modelyard.files import replace_text
from modelyard.plan.layout import layout_line
from modelyard.train.resume import run_differences

# Any of these makes a folder one that a run has been in.
_MARKS = ("checkpoint", "metrics.jsonl", "log.txt", "events.jsonl")
# What people and schedulers put into a folder before its run begins.
_BESIDE = (".yaml", ".yml", ".sh", ".md", ".txt", ".out", ".err", ".log")


def refuse_foreign_folder(folder: Path) -> None:
    """Raise UserError where `folder` is not the place of a run: it holds other things and nothing of a run."""
    if not folder.is_dir() or any((folder / mark).exists() for mark in _MARKS):
        return
    foreign = sorted(
        path.name
        for path in folder.iterdir()
        if not path.name.startswith(".") and (path.is_dir() or path.suffix not in _BESIDE)
    )
    if foreign:
        shown = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
        raise UserError(
            f"run.experiment_dir: {folder} is not the folder of a run, it holds {shown}; "
            "name an empty or new folder, or use this one with --force"
        )


def another_run(
    folder: Path, config: TrainConfig, architecture: Architecture, data_fingerprint: str
) -> str | None:
    """One line where the run that left its records in `folder`, but no checkpoint, was another one than this."""
    if not (folder / "export").exists() and not _has_content(folder / "metrics.jsonl"):
        return None  # it got nowhere: nothing of it would be lost
    try:
        old = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        differences = run_differences(
            old["config"],
            architecture_from(old["architecture"]),
            old["data_fingerprint"],
            config=config,
            architecture=architecture,
            data_fingerprint=data_fingerprint,
        )
        started = datetime.fromtimestamp(old["started"]).strftime("%Y-%m-%d %H:%M")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # from a version that kept none, or not whole: there is nothing to compare with
    if not differences:
        return None
    shown = "; ".join(differences[:3]) + (
        f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
    )
    return f"run.experiment_dir: {folder} belongs to another run, started {started} and without a checkpoint ({shown})"


def _has_content(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def write_description(
    folder: Path,
    config: TrainConfig,
    architecture: Architecture,
    *,
    device: torch.device,
    layout: Layout,
    data_fingerprint: str,
) -> None:
    """`config.json`: what runs here, complete or as it was before; `started` in it is in seconds since 1970."""
    adapter = adapter_of(config.model.base_model.transformer.peft)
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    description: dict[str, Any] = {
        "modelyard_version": modelyard.__version__,
        "torch_version": torch.__version__,
        "device": device.type + name,
        "processes": layout.world,
        "layout": layout_line(layout),
        "started": round(time.time(), 3),
        "config": config.model_dump(mode="json"),
        "architecture": dataclasses.asdict(architecture),
        "parameters": architecture.parameter_count(),
        "trained": None if adapter is None else adapter_in_short(adapter, architecture),
        "tokens_per_iteration": config.batch.tokens,
        "data_fingerprint": data_fingerprint,
    }
    replace_text(folder / "config.json", json.dumps(description, indent=2, ensure_ascii=False) + "\n")
