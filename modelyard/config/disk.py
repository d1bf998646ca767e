"""What a run writes, in bytes, against what the disk has."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from modelyard.config.architecture import Architecture
from modelyard.config.peft import adapter_of
from modelyard.config.train import TrainConfig
from modelyard.config.training import CheckpointConfig, ExportConfig

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def checkpoint_bytes(config: TrainConfig, architecture: Architecture) -> int:
    """One checkpoint: master weights and Adam's two moments; of an adapter that is trained alone, nothing else."""
    width = 8 if config.model.distributed.training_dtype == "float64" else 4
    adapter = adapter_of(config.model.base_model.transformer.peft)
    count = 0 if adapter is None else adapter.parameter_count(architecture)
    if adapter is None or not adapter.freeze_others:
        count += architecture.parameter_count()
    return 3 * width * count


def export_bytes(config: TrainConfig, architecture: Architecture) -> int:
    """One Hugging Face folder, or one of PEFT's."""
    export, adapter = config.training.export, adapter_of(config.model.base_model.transformer.peft)
    if adapter is not None and export.format == "peft":
        return BYTES[export.data_type] * adapter.parameter_count(architecture)
    return BYTES[export.data_type] * architecture.parameter_count()


def saves(config: TrainConfig, section: CheckpointConfig | ExportConfig) -> tuple[int, int]:
    """(how many are written in the whole run, how many there are at most at a time)."""
    last = config.training.train_iters
    if last == 0:
        return 0, 0
    ephemeral = section.ephemeral_interval if isinstance(section, CheckpointConfig) else None
    # An old one goes only when the new one is complete; what is counted for them below has room for the last.
    short_lived, short_lived_kept = (last // ephemeral, min(2, last // ephemeral)) if ephemeral else (0, 0)
    if section.interval is None:
        at_the_end = int(isinstance(section, CheckpointConfig))
        return short_lived + at_the_end, short_lived_kept + at_the_end
    first = section.offset % section.interval or section.interval
    on_interval = (last - first) // section.interval + 1 if last >= first else 0
    final = not section.due(last)
    kept = on_interval
    if section.keep is not None:
        for_ever = on_interval // section.keep_every if section.keep_every else 0
        # One more than `keep`: an old one goes only when the new one is complete.
        kept = min(on_interval, section.keep + for_ever + 1)
    return on_interval + short_lived + final, kept + short_lived_kept + final


def run_bytes(config: TrainConfig, architecture: Architecture) -> int:
    """The most that the run's checkpoints and exports take at a time."""
    _, checkpoints = saves(config, config.training.checkpoint)
    _, exports = saves(config, config.training.export)
    return checkpoints * checkpoint_bytes(config, architecture) + exports * export_bytes(config, architecture)


def free_bytes(config: TrainConfig) -> int:
    """What the run may fill: free space, and what its folder holds already."""
    folder = config.run.experiment_dir.absolute()
    existing = _existing(folder)
    used = _used(folder) if existing == folder else 0
    return shutil.disk_usage(existing).free + used


def _used(folder: Path) -> int:
    """Bytes of the run's files that may make room for others; a run that is going on there may take some away meanwhile."""
    aside = (".damaged", ".rolled-back")  # what was set aside stays, whatever the run writes
    used = 0
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            if not any(word in part for part in path.parts for word in aside):
                with suppress(FileNotFoundError):
                    used += path.stat().st_size
    return used


def _existing(folder: Path) -> Path:
    """`folder`, or the nearest above it that is there."""
    return next(parent for parent in (folder, *folder.parents) if parent.is_dir())


def disk_problem(config: TrainConfig, architecture: Architecture) -> str | None:
    """One line where the run would fill the disk or cannot write to it, else None."""
    existing = _existing(config.run.experiment_dir.absolute())
    # What the kernel shows as files, such as /proc, has no size, and to root its permissions say nothing.
    if not os.access(existing, os.W_OK) or not shutil.disk_usage(existing).total:
        return f"run.experiment_dir: {config.run.experiment_dir} cannot be written to: {existing} is not writable"
    needed, free = run_bytes(config, architecture), free_bytes(config)
    if needed <= free:
        return None
    return (
        f"run.experiment_dir: the run writes up to {size(needed)} to {config.run.experiment_dir}, {size(free)} are free; "
        "lower training.checkpoint.keep, set training.export.keep, or choose another disk"
    )


def size(number: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"
