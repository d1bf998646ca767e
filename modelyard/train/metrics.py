"""Numbers of a run: one JSON line a record, TensorBoard, and the line that a person reads."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from modelyard.config.architecture import Architecture

# Dense bf16 peaks in FLOP/s, from the vendors' data sheets (never the figures "with sparsity").
PEAK_BF16_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX A6000": 154.8e12,
    "RTX 4090": 165.2e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense peak of the device in FLOP/s, or None where it is not known for this dtype."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_BF16_FLOPS.items() if part in name), None)


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: by the allocator on a GPU, resident in the process otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def utilization(
    architecture: Architecture, sequence_length: int, tokens_per_second: float, peak: float | None
) -> dict[str, float]:
    """Model FLOP/s over the peak: `mfu_causal` counts the triangle of the attention, `mfu_full` the square."""
    if peak is None:
        return {}
    return {
        f"mfu_{name}": tokens_per_second
        * (
            architecture.matmul_flops_per_token()
            + architecture.attention_flops_per_token(sequence_length, causal=causal)
        )
        / peak
        for name, causal in (("causal", True), ("full", False))
    }


class MetricsLog:
    """`metrics.jsonl` and TensorBoard of one experiment.

    Starting again at iteration N drops the records after N, and a torn last line, so that the file reads as that of
    a run which was never stopped.
    """

    def __init__(self, folder: Path, *, resumed_at: int, tensorboard: bool):
        self.path = folder / "metrics.jsonl"
        kept = keep_records(self.path, lambda record: record["iteration"] <= resumed_at)
        self.evaluated = {r["evaluator"] for r in kept if r["iteration"] == resumed_at and "evaluator" in r}
        """Evaluators that have their record for the iteration resumed at."""
        self._file = self.path.open("a", encoding="utf-8")
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_at + 1)

    def write(self, record: dict[str, Any], *, prefix: str) -> None:
        """Append `record`, which holds `iteration`, with the time [seconds since 1970] beside it.

        Its numbers go to TensorBoard as `<prefix>/<key>`.
        """
        self._file.write(json.dumps({**record, "time": round(time.time(), 3)}) + "\n")
        self._file.flush()
        if self._board is not None:
            for key, value in record.items():
                if key != "iteration" and isinstance(value, int | float):
                    self._board.add_scalar(f"{prefix}/{key}", value, record["iteration"])

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def keep_records(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Rewrite a file of JSON lines with the wanted records only, and return them; a line that is not whole goes."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = []
    for line in lines:
        try:
            record = json.loads(line) if line.endswith("\n") else None
        except ValueError:
            continue
        if record is not None and wanted(record):
            kept.append((line, record))
    if len(kept) != len(lines):
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(line for line, _ in kept), encoding="utf-8")
        os.replace(temporary, path)
    return [record for _, record in kept]


def training_line(record: dict[str, Any], train_iters: int, seconds_left: float) -> str:
    """The line that a person reads, from the record that the program keeps."""
    parts = [
        f"iteration {record['iteration']}/{train_iters}",
        f"loss {_number(record['loss'], '.4f')}",
        f"lr {record['learning_rate']:.3e}",
        f"grad norm {_number(record['grad_norm'], '.3f')}",
        f"{record['tokens_per_second']:,.0f} tokens/s",
    ]
    if "mfu_causal" in record:
        parts.append(f"MFU {record['mfu_causal']:.1%} causal, {record['mfu_full']:.1%} full")
    parts.append(f"memory {record['memory_bytes'] / 2**30:.2f} GiB")
    parts.append(f"data wait {record['data_wait_share']:.1%}")
    if record["skipped_steps"]:
        parts.append(f"skipped {record['skipped_steps']}")
    parts.append(f"ETA {timedelta(seconds=round(seconds_left))}")
    return " | ".join(parts)


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)
