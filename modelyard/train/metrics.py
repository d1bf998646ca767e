"""Numbers of a run: one JSON line a record, TensorBoard and others who listen, and the line that a person reads."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from modelyard.config.adapter import Adapter, matmul_flops_per_token
from modelyard.config.architecture import Architecture
from modelyard.files import replace_text
from modelyard.train.appending import AppendedFile
from modelyard.train.step import StepResult

if TYPE_CHECKING:
    from modelyard.train.board import Board
    from modelyard.train.state import Run

# Dense peaks in FLOP/s of bf16, which those of fp16 equal, from the vendors' data sheets (never the figures "with sparsity").
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

# Of GPUs that have fp16 and no bf16.
PEAK_FP16_FLOPS = {"V100": 125e12, "Tesla T4": 65e12}

MOSTLY_TRAINED = 0.9
"""Share of a step's positions that are trained on below which the log line says it: of conversations it is part of the picture,
of texts a sign that something is wrong."""
STARVED = 0.1
"""Share of the time spent waiting for data above which the log line says so."""


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense peak of the device in FLOP/s, or None where it is not known for this dtype."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    known = PEAK_BF16_FLOPS | (PEAK_FP16_FLOPS if dtype == torch.float16 else {})
    return next((peak for part, peak in known.items() if part in name), None)


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: by the allocator on a GPU, resident in the process otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def model_flops_per_second(
    architecture: Architecture,
    sequence_length: int,
    tokens_per_second: float,
    *,
    causal: bool = True,
    adapter: Adapter | None = None,
) -> float:
    """FLOP/s that the model needs at this speed, forward and backward, nothing counted twice.

    `causal` counts the triangle of the attention; otherwise the square. Beside an `adapter` frozen matrices have no gradient
    to be computed.
    """
    attention = architecture.attention_flops_per_token(sequence_length, causal=causal)
    return tokens_per_second * (matmul_flops_per_token(architecture, adapter) + attention)


def utilization(
    architecture: Architecture,
    sequence_length: int,
    tokens_per_second: float,
    peak: float | None,
    *,
    adapter: Adapter | None = None,
) -> dict[str, float]:
    """Model FLOP/s over the peak: `mfu_causal` counts the triangle of the attention, `mfu_full` the square."""
    if peak is None:
        return {}
    return {
        f"mfu_{name}": model_flops_per_second(
            architecture, sequence_length, tokens_per_second, causal=causal, adapter=adapter
        )
        / peak
        for name, causal in (("causal", True), ("full", False))
    }


class NoMetrics:
    """In place of a `MetricsLog` in the processes that keep none."""

    def __init__(self) -> None:
        self.evaluated: set[str] = set()
        """As the main process has it."""

    def write(self, record: dict[str, Any], *, prefix: str) -> None:
        """Nothing: the main process has the same record."""

    def rewind(self, iteration: int) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class MetricsLog:
    """`metrics.jsonl` of one experiment, and whoever else wants its records.

    Starting again at iteration N drops the records after N, and a torn last line, so that the file reads as that of
    a run which was never stopped.
    """

    def __init__(
        self, folder: Path, *, resumed_at: int, tensorboard: bool, complain: Callable[[str], None] = print
    ):
        self.path = folder / "metrics.jsonl"
        self.evaluated: set[str] = set()
        """Evaluators that have their record for the iteration resumed at."""
        self.listeners: list[Callable[[dict[str, Any], str], None]] = []
        """Called with each record and its prefix."""
        self._tensorboard, self._complain = tensorboard, complain
        self._open(resumed_at)

    def _open(self, resumed_at: int) -> None:
        kept = keep_records(self.path, lambda record: record["iteration"] <= resumed_at)
        self.evaluated = {r["evaluator"] for r in kept if r["iteration"] == resumed_at and "evaluator" in r}
        self._file = AppendedFile(self.path, self._complain)
        self._board: Board | None = None
        if self._tensorboard:
            from modelyard.train.board import Board

            folder = self.path.with_name("tensorboard")
            self._board = Board(folder, first_step=resumed_at + 1, complain=self._complain)

    def rewind(self, iteration: int) -> None:
        """Drop what came after `iteration`, as a start from there would."""
        self.close()
        self._open(iteration)

    def write(self, record: dict[str, Any], *, prefix: str) -> None:
        """Append `record`, which holds `iteration`, with the time [seconds since 1970] beside it.

        Its numbers go to TensorBoard as `<prefix>/<key>`, those of a section as `<prefix>/<section>/<key>`.
        """
        self._file.write(json.dumps({**record, "time": round(time.time(), 3)}) + "\n")
        if self._board is not None:
            self._board.add_scalars(scalars(record, prefix), record["iteration"])
        for listener in self.listeners:
            listener(record, prefix)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def scalars(record: dict[str, Any], prefix: str) -> dict[str, float]:
    """The numbers of a record but its iteration, as `{"<prefix>/<key>": value}`; sections are flattened."""
    found: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            found |= scalars(value, f"{prefix}/{key}")
        elif key != "iteration" and isinstance(value, int | float):
            found[f"{prefix}/{key}"] = value
    return found


def keep_records(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Rewrite a file of JSON lines with the wanted records only, and return them; what is not a whole record goes."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = []
    for line in lines:
        try:
            record = json.loads(line) if line.endswith("\n") else None
        except ValueError:
            continue
        if isinstance(record, dict) and "iteration" in record and wanted(record):
            kept.append((line, record))
    if len(kept) != len(lines):
        replace_text(path, "".join(line for line, _ in kept))
    return [record for _, record in kept]


def training_line(record: dict[str, Any], train_iters: int, seconds_left: float) -> str:
    """The line that a person reads, from the record that the program keeps."""
    parts = [
        f"iteration {record['iteration']}/{train_iters}",
        f"loss {_number(record['loss'], '.4f')}",
        f"lr {record['learning_rate']:.3e}",
        f"grad norm {_number(record['grad_norm'], '.3f')}",
        *([f"trained {record['trained_share']:.1%}"] if record["trained_share"] < MOSTLY_TRAINED else []),
        f"{record['tokens_per_second']:,.0f} tokens/s",
    ]
    if "mfu_causal" in record:
        parts.append(f"MFU {record['mfu_causal']:.1%} causal, {record['mfu_full']:.1%} full")
    parts.append(f"memory {record['memory_bytes'] / 2**30:.2f} GiB")
    starved = ": TRAINING WAITS FOR DATA" if record["data_wait_share"] > STARVED else ""
    parts.append(f"data wait {record['data_wait_share']:.1%}{starved}")
    if record["skipped_steps"]:
        parts.append(f"skipped {record['skipped_steps']}")
    parts.append(f"ETA {timedelta(seconds=round(seconds_left))}")
    return " | ".join(parts)


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


class IntervalMeter:
    """Speed since the last log line, over steps alone (evaluations and saves are not counted)."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.seconds = self.data_wait = 0.0
        self.tokens = 0

    def add(self, seconds: float, data_wait: float, tokens: int) -> None:
        self.seconds += seconds
        self.data_wait += data_wait
        self.tokens += tokens


def training_record(
    run: Run, result: StepResult, rate: float, meter: IntervalMeter, peak: float | None
) -> dict[str, Any]:
    """The metrics of this iteration; `loss` is its own over its whole batch, `loss_mean` that of the log interval.

    Of several processes all must call this: `memory_bytes` is that of the one which has the most, `seconds` are this one's.
    """
    speed, length, progress = meter.tokens / meter.seconds, run.config.batch.sequence_length, run.progress
    return {
        "iteration": progress.iteration,
        "loss": _finite(result.loss),
        "learning_rate": rate,
        "grad_norm": _finite(result.grad_norm),
        "tokens": progress.tokens,
        "tokens_per_second": speed,
        "targets": result.targets,
        "trained_share": result.targets / run.config.batch.tokens,
        "loss_mean": progress.loss_sum / progress.loss_count if progress.loss_count else None,
        "skipped_steps": progress.skipped_steps,
        **({} if run.scaler is None else {"loss_scale": run.scaler.scale}),
        "data_wait_share": meter.data_wait / meter.seconds,
        "memory_bytes": run.world.largest(peak_memory(run.device)),
        "model_flops_per_second": model_flops_per_second(
            run.architecture, length, speed, adapter=run.adapter
        ),
        **utilization(run.architecture, length, speed / run.world.size, peak, adapter=run.adapter),
        "seconds": run.clock.read(),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
