"""The budget of a training step: what each part needs at least, and where the time goes.

    python benchmarks/budget.py                             Llama-3.2-1B and four layers of Llama-3.1-8B on an H200, by arithmetic
    python benchmarks/budget.py train.yaml batch.sequence_length=8192 --gpu h100
    python benchmarks/budget.py 32k-512 --gpu this-machine --measure     the step itself, by torch's profiler, on what is here
    python benchmarks/budget.py 32k-512 llama-3.2-1b --gpu this-machine --measure --write-docs

A config is what `modelyard plan` takes (files and overrides, together one config), or one of the built-in names. For each part of
a step: FLOPs, the fewest bytes (each input read once, each output written once: `modelyard.plan.parts`), and the floor, each
operation's FLOPs at the chip's rate or its bytes at the memory's, whichever is longer. Of an H200 these are what was measured on
one: 788 TFLOP/s in bf16, 4.3 TB/s in a copy; of other GPUs the shares of their data sheets in `modelyard/plan/attainable.yaml`;
of this machine the best product and the passes that it was measured to do. Beside it the time that the planner expects of this
program, and with `--measure` what the profiler says; sorted by what lies between that and the floor.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import put_into, write_result
from modelyard.config.architecture import Architecture, Rotary
from modelyard.config.layout import Layout
from modelyard.errors import UserError, did_you_mean
from modelyard.plan.duration import seconds_of
from modelyard.plan.hardware import THIS_MACHINE, Cluster, Hardware, load_hardware
from modelyard.plan.part import Part
from modelyard.plan.parts import parts_of
from modelyard.plan.rates import SQUARE
from modelyard.plan.workload import Workload

NAME = "budget"
DOCS = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
MEASURED_CEILINGS = {"h200": (788e12, 4.3e12)}
"""FLOP/s in bf16 of a large product and bytes/s of a large copy, where somebody measured them on one."""
FUSED = "norms, rotary, activation, residual"
"""What is one row where a compiler has made one of it."""
TOGETHER = ("norms", "rotary", "activation", "residual")
LLAMA3 = Rotary("llama3", 500_000.0)
BUILT_IN = {
    "llama-3.2-1b": Workload(
        Architecture(128256, 2048, 16, 32, 8, 64, 8192, True, rotary=LLAMA3),
        Layout(), 4, 4, 4096, compiled=True, on_gpu=True,
    ),
    "llama-3.1-8b, 4 layers": Workload(
        Architecture(128256, 4096, 4, 32, 8, 128, 14336, rotary=LLAMA3), Layout(), 2, 2, 4096, compiled=True, on_gpu=True
    ),
    # The case of benchmarks/train_step.py.
    "32k-512": Workload(Architecture(32000, 512, 8, 8, 2, 64, 1344), Layout(), 4, 4, 512, dtype="float32"),
    "toy": Workload(Architecture(512, 64, 2, 4, 2, 16, 128), Layout(), 2, 1, 64, dtype="float32"),
}  # fmt: skip
FOR_GPUS, FOR_CPUS = ("llama-3.2-1b", "llama-3.1-8b, 4 layers"), ("32k-512",)


@dataclass(frozen=True)
class Ceilings:
    """What the chip can do at most."""

    flops: float
    bytes: float
    hardware: Hardware

    def floor(self, part: Part) -> float:
        """Seconds of all the times of a part, below which nothing computes it."""
        through = self.bytes
        if not self.hardware.is_gpu and part.kind == "memory":
            # What a cache holds is faster than the memory.
            through = max(through, self.hardware.rates.stream(part.size))
        elif not self.hardware.is_gpu and part.kind == "update":
            through = max(through, self.hardware.rates.update())
        return part.times * max(part.flops / self.flops, part.bytes / through)


def ceilings_of(hardware: Hardware, dtype: str) -> Ceilings:
    if hardware.name == THIS_MACHINE:
        return Ceilings(hardware.peaks.get(dtype) or hardware.peaks["float32"], hardware.bandwidth, hardware)
    flops = hardware.rates.matmul(dtype, SQUARE, SQUARE, SQUARE, "output")
    through = hardware.rates.stream(1 << 30)
    if hardware.name in MEASURED_CEILINGS and dtype == "bfloat16":
        flops, through = MEASURED_CEILINGS[hardware.name]
    return Ceilings(flops, through, hardware)


def row_of(part: str, compiled: bool) -> str:
    """The row that a part is counted in."""
    return FUSED if compiled and part in TOGETHER else part


def budget_of(workload: Workload, hardware: Hardware) -> dict[str, dict[str, float]]:
    """Row → `flops`, `bytes`, `floor_ms`, `planned_ms` of one process's step, and of the floor its share by phase."""
    cluster = Cluster(hardware, 1, 1, hardware.network)
    ceilings = ceilings_of(hardware, workload.dtype)
    found: dict[str, dict[str, float]] = {}
    for part in parts_of(workload):
        row = found.setdefault(
            row_of(part.name, workload.compiled),
            dict.fromkeys(("flops", "bytes", "floor_ms", "planned_ms"), 0.0),
        )
        count = 1 if part.per_step else workload.micro_batches
        row["flops"] += count * part.all_flops
        row["bytes"] += count * part.all_bytes
        row["floor_ms"] += 1e3 * count * ceilings.floor(part)
        row["planned_ms"] += 1e3 * count * seconds_of(part, workload, cluster)
        phase = f"floor_ms {part.phase}"
        row[phase] = row.get(phase, 0.0) + 1e3 * count * ceilings.floor(part)
    return found


def with_measured(
    rows: dict[str, dict[str, float]], measured: dict[tuple[str, str], float]
) -> dict[str, dict[str, float]]:
    """The rows with `measured_ms`, whole and by phase; those that have no floor are added."""
    found = {name: {**row, "measured_ms": 0.0} for name, row in rows.items()}
    for (name, phase), seconds in measured.items():
        empty = dict.fromkeys(("flops", "bytes", "floor_ms", "planned_ms", "measured_ms"), 0.0)
        row = found.setdefault(name, empty)
        row["measured_ms"] += 1e3 * seconds
        row[f"measured_ms {phase}"] = row.get(f"measured_ms {phase}", 0.0) + 1e3 * seconds
    return found


def gap(row: dict[str, float]) -> float:
    return row.get("measured_ms", row["planned_ms"]) - row["floor_ms"]


def table(case: dict[str, Any]) -> str:
    """Of one config, in Markdown."""
    rows, measured = case["rows"], "step_ms" in case
    head = [
        "part",
        "GFLOP",
        "fewest MB",
        "floor, ms",
        "planned, ms",
        *(["measured, ms"] if measured else []),
        "gap, ms",
    ]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for name, row in sorted(rows.items(), key=lambda item: -gap(item[1])):
        lines.append(_cells(name, row, measured))
    keys = ("flops", "bytes", "floor_ms", "planned_ms", "measured_ms")
    total = {key: sum(row.get(key, 0.0) for row in rows.values()) for key in keys}
    lines.append(_cells("**all**", total if measured else {k: total[k] for k in keys[:-1]}, measured))
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    ceilings = f"Floor at {case['flops'] / 1e12:,.3g} TFLOP/s and {case['bandwidth'] / 1e9:,.4g} GB/s."
    if not measured:
        return f"{text}\n\n{ceilings} Nothing was measured: the gap is that of the plan."
    said = (
        f"A step takes {case['step_ms']:,.0f} ms, {case['profiled_ms']:,.0f} under the profiler, of which "
        f"{case['unattributed_ms']:,.1f} ms belong to no part"
    )
    if most := list(case["unattributed"].items())[:3]:
        said += " (" + ", ".join(f"`{name}` {ms:.1f}" for name, ms in most) + ")"
    return f"{text}\n\n{ceilings} {said}."


def _cells(name: str, row: dict[str, float], measured: bool) -> list[str]:
    times = [row["floor_ms"], row["planned_ms"], *([row["measured_ms"]] if measured else []), gap(row)]
    return [name, f"{row['flops'] / 1e9:,.1f}", f"{row['bytes'] / 1e6:,.1f}", *(f"{ms:,.2f}" for ms in times)]


def describe(workload: Workload) -> str:
    shape = workload.architecture
    words = [
        f"{shape.parameter_count():,} parameters",
        f"{workload.batch_rows} × {workload.sequence_length} tokens",
        workload.dtype,
        "compiled" if workload.compiled else "eager",
    ]
    if workload.micro_batches > 1:
        words.append(f"{workload.micro_batches} micro-batches")
    if workload.recompute != "none":
        words.append(f"recompute {workload.recompute}")
    return ", ".join(words)


def case_of(workload: Workload, hardware: Hardware, *, measure: bool, steps: int) -> dict[str, Any]:
    """Everything of one config, as the results have it."""
    rows, ceilings = budget_of(workload, hardware), ceilings_of(hardware, workload.dtype)
    case: dict[str, Any] = {
        "what": describe(workload),
        "hardware": hardware.title,
        "flops": ceilings.flops,
        "bandwidth": ceilings.bytes,
        "rows": rows,
    }
    if measure:
        from benchmarks.budget_measured import measured_step

        found = measured_step(workload, steps)
        case["rows"] = with_measured(rows, found.parts)
        case["step_ms"], case["profiled_ms"] = 1e3 * found.seconds, 1e3 * found.profiled
        case["unattributed_ms"] = 1e3 * (found.profiled - sum(found.parts.values()))
        case["unattributed"] = {name: 1e3 * seconds for name, seconds in found.unattributed.items()}
    return case


def page(found: dict[str, Any]) -> str:
    """The budgets, as docs/performance.md shows them."""
    texts = [
        f"**{name}** on {case['hardware']}: {case['what']}.\n\n{table(case)}"
        for name, case in found["cases"].items()
    ]
    return "\n\n".join([f"`python benchmarks/budget.py`, {found['date']}, torch {found['torch']}.", *texts])


def chosen(words: list[str], hardware: Hardware, document_length: float | None) -> dict[str, Workload]:
    """What the command line means: built-in names, or one config. Raises UserError."""
    if not words:
        words = list(FOR_GPUS if hardware.is_gpu else FOR_CPUS)
    if all(word in BUILT_IN for word in words):
        return {word: replace(BUILT_IN[word], on_gpu=hardware.is_gpu) for word in words}
    from modelyard.config.loader import load_config
    from modelyard.plan.workload import workload_of

    files = [word for word in words if "=" not in word]
    for file in files:
        if not Path(file).exists():
            raise UserError(
                f"{file}: neither a file nor a built-in config (there are: {', '.join(BUILT_IN)})"
                f"{did_you_mean(file, list(BUILT_IN))}"
            )
    if not files:
        raise UserError(f"{words[0]}: an override of nothing; name a config file before it")
    loaded = load_config(files, [word for word in words if "=" in word], kind="train")
    if loaded.architecture is None:
        raise UserError(
            "model: the shape is not known; give an architecture, or a `pretrained` folder that is there"
        )
    workload = workload_of(
        loaded.train, loaded.architecture, 1, on_gpu=hardware.is_gpu, document_length=document_length
    )
    return {Path(files[0]).stem: workload}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="*", help=f"files and overrides, or of: {', '.join(BUILT_IN)}")
    parser.add_argument(
        "--gpu", default="h200", metavar="NAME", help="as `modelyard plan` has it (default: h200)"
    )
    parser.add_argument(
        "--document-length", type=float, metavar="N", help="mean length of isolated documents"
    )
    parser.add_argument("--measure", action="store_true", help="run the step here; needs --gpu this-machine")
    parser.add_argument(
        "--steps", type=int, default=4, metavar="N", help="steps under the profiler (default: 4)"
    )
    parser.add_argument("--compile", action="store_true", help="blocks compiled, whatever the config says")
    parser.add_argument("--json", action="store_true", help="print the results alone, and write nothing")
    parser.add_argument(
        "--write", action="store_true", help="add the results to benchmarks/results/budget.json"
    )
    parser.add_argument(
        "--write-docs", action="store_true", help="that, and the tables into docs/performance.md"
    )
    options = parser.parse_args()
    try:
        if options.measure and options.gpu != THIS_MACHINE:
            raise UserError(f"--measure: what runs here is to be held against --gpu {THIS_MACHINE}")
        if options.gpu == THIS_MACHINE:
            from modelyard.plan.machine import this_machine

            hardware = this_machine()
        else:
            hardware = load_hardware(options.gpu)
        workloads = chosen(options.config, hardware, options.document_length)
        if options.compile:
            workloads = {
                f"{name}, compiled": replace(workload, compiled=True) for name, workload in workloads.items()
            }
        cases = {
            name: case_of(workload, hardware, measure=options.measure, steps=options.steps)
            for name, workload in workloads.items()
        }
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(cases, indent=1))
        return 0
    for name, case in cases.items():
        print(f"\n{name} on {case['hardware']}: {case['what']}\n\n{table(case)}")
    if options.write or options.write_docs:
        from benchmarks.common import RESULTS

        path = RESULTS / f"{NAME}.json"
        before = json.loads(path.read_text(encoding="utf-8"))["cases"] if path.exists() else {}
        path = write_result(NAME, {"cases": before | cases})
        print(f"wrote {path}")
        if options.write_docs:
            put_into(DOCS, NAME, page(json.loads(path.read_text(encoding="utf-8"))))
            print(f"wrote {DOCS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
