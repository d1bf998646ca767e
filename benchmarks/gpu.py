"""Every test and benchmark that wants a GPU: torch >= 2.11 is all it needs, no network, no pydantic.

    python benchmarks/gpu.py                what must hold, the chip's own rates, and a core of ten cells; under 9 minutes
    python benchmarks/gpu.py --part 1       other shapes; 2: longer rows, whole and packed; 3: all layers of large models, the
                                            longest rows; 4: fp8, the peers' other forms; each under 9 minutes
    python benchmarks/gpu.py --list         the cells of all parts, what is measured already, and what the planner says
    python benchmarks/gpu.py --cpu          the same code at toy sizes on the CPU, to see that the script works

A cell is a model, a batch and a program: ours eager, compiled, with the kernels in Triton, with both; transformers' model in a
compiled loop, with Liger's kernels where they are installed. Each has a process and a limit of time of its own; what fails is a row
with the reason. First the equality of every kernel and of whatever else is faster than its twin (benchmarks/gpu_checks.py). A cell
whose first loss or gradient norm differs from the other programs' says so.

All results are in one file, benchmarks/results/GPU-DATE.json, written after each cell: what is stopped goes on where it was, and
parts add to it. `--again` measures anew, `--fresh` begins another file. `--write-docs` puts the table into docs/performance.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import RESULTS, put_into, versions_of, write_result
from benchmarks.gpu_cells import CHECKS, CHIP, FP8, LIMIT, PARTS, Cell, layers_of, planned
from benchmarks.gpu_checks import CHECKS as EVERY_CHECK
from benchmarks.gpu_checks import outcome_of
from benchmarks.gpu_programs import chip_rates, measure

DOCS = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
TOLERANCE, TOLERANCE_OF_FP8 = 2e-2, 1e-1
"""Relative, of the first step's loss and gradient norm."""
ANSWER = "answer: "
PACKAGES = ("transformers", "liger_kernel", "triton")
TOO_LONG = "stopped: no time left"
REHEARSED = 16 << 30
"""Bytes of the GPU of a rehearsal."""


def memory_of_gpu(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else REHEARSED


def hardware_here(device: torch.device) -> Any:
    """The planner's hardware, where it knows this GPU and can read its files."""
    if device.type != "cuda":
        return None
    try:
        from modelyard.plan.machine import known_gpu

        return known_gpu(torch.cuda.get_device_name(), memory_of_gpu(device))
    except ImportError:
        return None


# --- one process ----------------------------------------------------------------------------------------------------


def run_cell(cell: Cell, device: torch.device, end: float) -> dict[str, Any]:
    layers = layers_of(cell, memory_of_gpu(device))
    found: dict[str, Any] = {**dataclasses.asdict(cell), "layers": layers, "model": cell.model}
    try:
        found["planned"] = planned(cell, layers, hardware_here(device))
    except ImportError as error:
        found["planned"] = {"failed": str(error)}
    return found | measure(cell, layers, device, end)


def child(task: str, device: torch.device, end: float) -> dict[str, Any]:
    """What a process of its own is started for."""
    kind, _, name = task.partition(":")
    if kind == "check":
        return {"outcome": outcome_of(EVERY_CHECK[name], device)}
    if kind == "chip":
        return chip_rates(device)
    cell = next(cell for cells in PARTS.values() for cell in cells if cell.key == name)
    return run_cell(cell if device.type == "cuda" else cell.rehearsed(), device, end)


def apart(task: str, seconds: float) -> dict[str, Any]:
    """`child` in a process of its own, for so many seconds at most; else `failed` and why."""
    if seconds < 5:
        return {"failed": TOO_LONG}
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "HF_HUB_OFFLINE": "1", **os.environ}
    command = [sys.executable, __file__, "--child", task, "--seconds", str(seconds)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, check=False, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"{TOO_LONG} after {seconds:.0f} s"}
    answers = [line for line in done.stdout.splitlines() if line.startswith(ANSWER)]
    if done.returncode or not answers:
        last = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
        return {"failed": f"ended with status {done.returncode}: {last[:300]}"}
    found: dict[str, Any] = json.loads(answers[-1][len(ANSWER) :])
    return found


# --- the results ----------------------------------------------------------------------------------------------------


def file_of(name: str, folder: Path, *, fresh: bool) -> Path:
    """The results that are there of this GPU, the newest, or those that are begun today."""
    short = re.search(r"[ABHLT]\d{2,4}S?\b|RTX \w+", name)
    stem = re.sub(r"[^a-z0-9]+", "-", (short[0] if short else name).lower())
    known = sorted(folder.glob(f"{stem}-????-??-??.json"))
    return known[-1] if known and not fresh else folder / f"{stem}-{date.today().isoformat()}.json"


def is_done(row: dict[str, Any] | None) -> bool:
    """Whether there is nothing to be tried again: a figure, or a reason other than time."""
    return row is not None and not str(row.get("failed", "")).startswith(TOO_LONG)


def disagreement(row: dict[str, Any], rows: dict[str, dict[str, Any]]) -> str | None:
    """How the first step departs from that of the first program of the same model; None where it agrees."""
    same = [
        r
        for r in rows.values()
        if r.get("model") == row["model"] and "loss" in r and r["layers"] == row["layers"]
    ]
    if "loss" not in row or not same:
        return None
    limit = TOLERANCE_OF_FP8 if row["program"] in FP8 else TOLERANCE
    for key in ("loss", "grad_norm"):
        if abs(row[key] - same[0][key]) > limit * abs(same[0][key]):
            return f"another {key}: {row[key]:.4f}, not {same[0][key]:.4f}"
    return None


def table(found: dict[str, Any]) -> str:
    """Of all cells, in Markdown."""
    head = (
        "model", "program", "layers", "tokens/s", "planned", "MFU, causal", "MFU, square", "peak GiB", "planned",
        "loss", "gradient norm",
    )  # fmt: skip
    lines = [list(head), ["---", "---", *["---:"] * (len(head) - 2)]]
    for row in found["cells"].values():
        if "failed" in row:
            lines.append([row["model"], row["program"], str(row.get("layers", "")), row["failed"], *[""] * 7])
            continue
        plan = row["planned"]
        speed, memory = plan.get("tokens_per_second"), plan.get("peak_bytes")
        lines.append(
            [
                row["model"],
                row["program"],
                str(row["layers"]),
                f"{row['tokens_per_second']:,.0f}",
                f"{speed:,.0f}" if speed else "",
                f"{row['mfu_causal']:.1%}" if "mfu_causal" in row else "",
                f"{row['mfu_full']:.1%}" if "mfu_full" in row else "",
                f"{row['peak_bytes'] / 2**30:.1f}",
                f"{memory / 2**30:.1f}" if memory else "",
                f"{row['loss']:.3f}",
                f"{row['grad_norm']:.3f}" + (f" ({row['differs']})" if row.get("differs") else ""),
            ]
        )
    chip, versions = found.get("chip", {}), found.get("versions", {})
    said = [f"`make gpu`, {found['date']}, {found['device']}, torch {found['torch']}"]
    said += [f"{name} {version}" for name, version in versions.items()]
    if "matmul_bf16" in chip:
        said.append(f"its own products {chip['matmul_bf16'] / 1e12:,.0f} TFLOP/s in bf16")
        said.append(f"its copies {chip['copy'] / 1e12:.2f} TB/s")
    failed = [name for name, outcome in found.get("checks", {}).items() if not outcome.startswith("ok")]
    checks = "Every check held." if not failed else f"**Did not hold: {', '.join(failed)}.**"
    return ", ".join(said) + f". {checks}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


# --- a part ---------------------------------------------------------------------------------------------------------


class Part:
    """Runs what a part has, within its time, and keeps the results."""

    def __init__(self, options: argparse.Namespace, device: torch.device):
        self.options, self.device = options, device
        self.begin = time.monotonic()
        self.due = self.begin
        """When what was begun so far should be done: what it leaves over is the next one's."""
        name = "rehearsal" if options.cpu else torch.cuda.get_device_name()
        folder = Path(options.folder) if options.folder else RESULTS
        self.path = file_of(name, folder, fresh=options.fresh or options.cpu)
        self.found: dict[str, Any] = {"chip": {}, "checks": {}, "cells": {}}
        if self.path.exists() and not options.cpu:
            kept = json.loads(self.path.read_text(encoding="utf-8"))
            self.found = {key: kept.get(key, value) for key, value in self.found.items()}
        self.found["versions"] = versions_of(PACKAGES)
        self.failed = self.passed = 0

    def keep(self) -> None:
        write_result(self.path.stem, self.found, folder=self.path.parent)

    def ask(self, task: str, seconds: float) -> dict[str, Any]:
        self.due += seconds
        end = min(self.due, self.begin + LIMIT)
        if self.device.type == "cpu" and not self.options.processes:
            return child(task, self.device, end)
        return apart(task, end - time.monotonic())

    def check(self, chosen: list[str]) -> None:
        for name in chosen:
            if self.found["checks"].get(name, "").startswith("ok") and not self.options.again:
                continue
            answer = self.ask(f"check:{name}", CHECKS / len(EVERY_CHECK))
            outcome = answer.get("outcome") or f"FAIL  {answer['failed']}"
            self.found["checks"][name] = outcome
            self._count(outcome.startswith("ok"))
            print(f"{name:<22} {outcome}", flush=True)
            self.keep()

    def chip(self) -> None:
        if "matmul_bf16" not in self.found["chip"] or self.options.again:
            self.found["chip"] = self.ask("chip", CHIP)
            self.keep()
        for name, rate in self.found["chip"].items():
            print(f"{name:<22} {rate if isinstance(rate, str) else f'{rate / 1e12:.4g} T/s'}", flush=True)

    def cells(self, cells: list[Cell]) -> None:
        rows = self.found["cells"]
        pending = [cell for cell in cells if self.options.again or not is_done(rows.get(cell.key))]
        print(f"{len(cells) - len(pending)} of {len(cells)} cells are done", flush=True)
        left = self.begin + LIMIT - time.monotonic()
        # Where some are done already the others may take longer.
        factor = max(1.0, left / max(sum(cell.seconds for cell in pending), 1))
        self.due = time.monotonic()
        for cell in pending:
            row = self.ask(f"cell:{cell.key}", factor * cell.seconds)
            row.setdefault("model", cell.model)
            row.setdefault("program", cell.program)
            if differs := disagreement(row, {k: r for k, r in rows.items() if k != cell.key}):
                row["differs"] = differs
            rows[cell.key] = row
            # What a machine cannot run is no failure of the script; what it runs otherwise than it should is.
            self._count(not differs)
            print(line(cell, row), flush=True)
            self.keep()

    def _count(self, is_well: bool) -> None:
        self.passed, self.failed = self.passed + is_well, self.failed + (not is_well)


def line(cell: Cell, row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"{cell.key:<72} -- {row['failed']}"
    mfu = f"MFU {row['mfu_causal']:.1%} causal, {row['mfu_full']:.1%} square  " if "mfu_causal" in row else ""
    plan = row["planned"]
    expected = f"planned {plan['peak_bytes'] / 2**30:.1f} GiB" if "peak_bytes" in plan else ""
    if "tokens_per_second" in plan:
        expected += f", {plan['tokens_per_second']:,.0f} tokens/s"
    return (
        f"{cell.key:<72} {row['tokens_per_second']:>9,.0f} tokens/s  {mfu}{row['peak_bytes'] / 2**30:.1f} GiB  "
        f"loss {row['loss']:.3f}  gradient norm {row['grad_norm']:.3f}  {row.get('differs') or ''}  {expected}"
    )


def show(parts: dict[int, list[Cell]], memory: int, rows: dict[str, Any]) -> None:
    """The cells, and what is known of them."""
    for number, cells in parts.items():
        print(f"part {number}, at most {sum(cell.seconds for cell in cells)} s")
        for cell in cells:
            layers = layers_of(cell, memory)
            peak = planned(cell, layers, None).get("peak_bytes")
            words = f"{layers} layers" + (f", planned {peak / 2**30:.1f} GiB" if peak else "")
            done = (
                "measured"
                if "tokens_per_second" in rows.get(cell.key, {})
                else rows.get(cell.key, {}).get("failed", "")
            )
            print(f"  {cell.key:<72} {words}  {done}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cpu", action="store_true", help="rehearse on the CPU at toy sizes; measures nothing"
    )
    parser.add_argument("--part", type=int, choices=PARTS, metavar="N", help=f"0 (the core) to {max(PARTS)}")
    parser.add_argument("--again", action="store_true", help="measure what is measured already")
    parser.add_argument("--fresh", action="store_true", help="begin another file of results")
    parser.add_argument("--list", action="store_true", help="show the cells and measure nothing")
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/performance.md")
    parser.add_argument("--folder", metavar="FOLDER", help="of the results (default: benchmarks/results)")
    parser.add_argument("--processes", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = parse()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu and not options.cpu else "cpu")
    if options.child:
        # Ends before it is ended: a figure from fewer steps is one.
        print(ANSWER + json.dumps(child(options.child, device, time.monotonic() + options.seconds - 8)))
        return 0
    if options.list:
        memory = memory_of_gpu(device) if on_gpu else 139 << 30
        kept = {}
        if on_gpu and (path := file_of(torch.cuda.get_device_name(), RESULTS, fresh=False)).exists():
            kept = json.loads(path.read_text(encoding="utf-8"))["cells"]
        show(PARTS, memory, kept)
        return 0
    if not options.cpu and not on_gpu:
        print("error: no CUDA device (--cpu rehearses the script without one)", file=sys.stderr)
        return 2
    part = Part(options, device)
    numbers = [options.part or 0] if options.part is not None or not options.cpu else list(PARTS)
    if 0 in numbers:
        part.check(list(EVERY_CHECK))
    part.chip()
    part.cells([cell for number in numbers for cell in PARTS[number]])
    print(f"wrote {part.path}")
    if options.write_docs and not options.cpu:
        put_into(DOCS, "gpu", table(json.loads(part.path.read_text(encoding="utf-8"))))
        print(f"wrote {DOCS}")
    print(f"{part.passed} passed, {part.failed} failed, {time.monotonic() - part.begin:.0f} s")
    return 1 if part.failed else 0


if __name__ == "__main__":
    sys.exit(main())
