"""How fast is fine-tuning with adapters, and how much memory does it take, against TRL's `SFTTrainer` with PEFT?

Full fine-tuning, LoRA (rank 16, alpha 32, on every matrix of the blocks, no dropout) and QLoRA (the same over NF4), of the
same Llama from the same weights and the same adapter, which is written once as PEFT's folder and whose B is not zero. The
conversations, the programs and the rules are those of sft.py: both sides train on the same conversations in every step, each
in a process of its own, in turn; tokens are compared before, loss and gradient norm of every step after, and a form that
computes something else is left out. The peer lays out a step's conversations in a padded rectangle or packed; ours is packed.

Beside that the floor: the step's matrix products, attention and optimizer, each measured alone (finetune_floor.py).

Memory is the most that was resident above what the imports hold; that of the whole process stands beside it.

    taskset -c 0,1 python benchmarks/finetune.py --trl-python /path/to/python     where TRL and PEFT are (bitsandbytes for QLoRA)
    python benchmarks/finetune.py --only 32k --method lora --rounds 5
    python benchmarks/finetune.py --quick                                         a tiny model; nothing is written
    python benchmarks/finetune.py --only 32k --parts                              where our own time goes, instead

Writes `benchmarks/results/finetune.json`; `python benchmarks/tables.py --write` puts it into docs/performance.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import sft
from benchmarks.common import RESULTS, FirstAdapter, write_result
from benchmarks.finetune_floor import Step, floor
from benchmarks.sft_programs import ALPHA, RANK, Job, ours
from modelyard.config.adapter import MODULES, Adapter
from modelyard.config.adapter_files import BASE_FILE
from modelyard.model.formats import open_huggingface
from modelyard.model.formats.peft import write_peft
from modelyard.train.models_on_disk import base_fingerprint

METHODS = ("full", "lora", "qlora")
OURS = "modelyard"
PARTS = ("blocks' products", "adapter's products", "head's products", "attention", "optimizer")
"""Of the floor."""
TARGETS = {"speed": 1.0, "of_floor": 1.1, "memory": 0.6}
"""At least as fast as the peer, at most so much of the floor's time, and of the peer's memory."""


@dataclasses.dataclass(frozen=True)
class Case(sft.Case):
    """One model, its data and how it is computed; every method is measured on it."""

    layouts: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("padded", ("TRL padded", "TRL padded by length, 8")),
        ("packed", ("TRL padding-free",)),
    )
    """How the peer lays out a step's conversations, and the forms that count as that: the fastest is compared."""

    @property
    def every_form(self) -> list[str]:
        return [form for _, forms in self.layouts for form in forms]


def cases(threads: int) -> dict[str, Case]:
    """By name: vocabulary, dtype."""
    short = Case("32k", threads=threads)
    # One rectangle of all the conversations: its logits at this vocabulary are several GiB.
    narrow = (("padded", ("TRL padded by length, 8",)), ("packed", ("TRL padding-free",)))
    return {
        "32k": short,
        "128k": dataclasses.replace(short, tokenizer="llama3", layouts=narrow),
        "32k-bf16": dataclasses.replace(short, dtype="bfloat16"),
    }


def quick_case(threads: int) -> Case:
    return Case(
        "32k",
        rows=2,
        sequence=512,
        hidden=128,
        layers=2,
        vocabulary=600,
        talks=150,
        threads=threads,
        layouts=(("padded", ("TRL padded",)), ("packed", ("TRL padding-free",))),
    )


# --- the adapter that both begin with -------------------------------------------------------------------------------


def write_adapter(folder: Path) -> None:
    """`folder`/adapter in PEFT's format, on `folder`/model."""
    base, adapter = open_huggingface(folder / "model"), Adapter(RANK, ALPHA, MODULES)
    write_peft(
        FirstAdapter(adapter.shapes(base.architecture)),
        folder / "adapter",
        adapter=adapter,
        architecture=base.architecture,
        family=base.family,
        base_path=folder / "model",
        fingerprint=base_fingerprint(folder / "model"),
    )
    # It says that the base was not quantized; here one adapter begins over both.
    (folder / "adapter" / BASE_FILE).unlink()


# --- the comparison -------------------------------------------------------------------------------------------------


def job_of(case: Case, folder: Path, method: str, name: str) -> Job:
    by_row, compiled = name.endswith(" by row"), name.endswith(" compiled")
    program = name.removesuffix(" by row").removesuffix(" compiled")
    return Job(
        program,
        str(folder),
        case.dtype,
        case.rows,
        case.sequence,
        case.threads,
        compiled,
        method,
        by_row,
    )


def measure(
    case: Case,
    folder: Path,
    methods: Sequence[str],
    rounds: int,
    python: str | None,
    *,
    compiled: bool = True,
) -> dict[str, Any]:
    """Every method: ours and the peer's forms in turn (`python` None: ours alone), then the floor."""
    schedule = sft.prepare(case, folder, 1 + rounds)
    write_adapter(folder)
    return {
        "vocabulary": schedule["vocabulary"],
        "methods": {
            method: measure_method(case, folder, method, schedule, rounds, python, compiled=compiled)
            for method in methods
        },
    }


def measure_method(
    case: Case,
    folder: Path,
    method: str,
    schedule: dict[str, Any],
    rounds: int,
    python: str | None,
    *,
    compiled: bool,
) -> dict[str, Any]:
    """rows (by program: what `sft.compare` says, memory_bytes above the imports, difference from ours; or failed), against (by
    the peer's layout: its fastest form, speed, memory and memory_whole of the two fastest, least_memory of all), floor, of_floor.

    Raises RuntimeError where ours does not train, or our two forms do not compute the same.
    """
    mine = [OURS, f"{OURS} by row", *([f"{OURS} compiled"] if compiled else [])]
    theirs = case.every_form if python is not None else []
    failed: dict[str, str] = {}
    for form in list(theirs):  # one that cannot run must not end the others
        try:
            sft.compare([job_of(case, folder, method, form)], schedule, 1, python or "")
        except RuntimeError as error:
            failed[form] = str(error)
            theirs.remove(form)
    jobs = [job_of(case, folder, method, name) for name in (*mine, *theirs)]
    rows: dict[str, dict[str, Any]] = sft.compare(jobs, schedule, rounds, python or sys.executable)
    for row in rows.values():
        row["memory_bytes"] = row["peak_bytes"] - row["imports_bytes"]
        row["difference"] = sft.furthest(rows[OURS], row)
        if not row["difference"] <= sft.TOLERANCE[case.dtype]:
            row["failed"] = f"computes something else: {row['difference']:.1e} from ours"
    if not all(rows[OURS]["grad_norm"]) or any("failed" in rows[name] for name in mine):
        raise RuntimeError(f"{OURS} does not train: {rows}")
    rows |= {name: {"failed": why} for name, why in failed.items()}
    best = _fastest(rows, mine)
    result: dict[str, Any] = {"rows": rows, "ours": best, "against": {}}
    for layout, forms in case.layouts:
        equal = [form for form in forms if form in rows and "failed" not in rows[form]]
        if equal:
            result["against"][layout] = _ratios(rows, mine, equal)
    least = floor_of(step_of(case, folder, method, schedule))
    result["floor"] = least
    floor_speed = least["tokens"] / sum(least[part] for part in PARTS)
    result["of_floor"] = floor_speed / rows[best]["tokens_per_second"]
    result["eager_of_floor"] = floor_speed / rows[OURS]["tokens_per_second"]
    return result


def _ratios(rows: dict[str, dict[str, Any]], mine: list[str], equal: list[str]) -> dict[str, Any]:
    ours, theirs = (rows[_fastest(rows, names)] for names in (mine, equal))

    def least(names: list[str], what: str) -> float:
        return min(rows[name][what] for name in names)

    return {
        "form": _fastest(rows, equal),
        "speed": ours["tokens_per_second"] / theirs["tokens_per_second"],
        "speed_eager": rows[OURS]["tokens_per_second"] / theirs["tokens_per_second"],
        "memory": ours["memory_bytes"] / theirs["memory_bytes"],
        "memory_whole": ours["peak_bytes"] / theirs["peak_bytes"],
        "least_memory": least(mine, "memory_bytes") / least(equal, "memory_bytes"),
    }


def _fastest(rows: dict[str, dict[str, Any]], names: list[str]) -> str:
    return max(names, key=lambda name: rows[name]["tokens_per_second"])


def step_of(case: Case, folder: Path, method: str, schedule: dict[str, Any]) -> Step:
    """The measured step that has about as many tokens as the others."""
    tokens = sft.tokens_of(schedule, "lengths")[1:]
    place = 1 + min(range(len(tokens)), key=lambda n: abs(tokens[n] - statistics.median(tokens)))
    talks = [talk for row in schedule["steps"][place] for talk in row]
    return Step(
        open_huggingface(folder / "model").architecture,
        tuple(schedule["lengths"][talk] for talk in talks),
        sum(schedule["trained"][talk] for talk in talks),
        None if method == "full" else RANK,
        case.dtype,
        case.threads,
    )


def _floor_into(queue: Any, step: Step) -> None:
    queue.put(floor(step))


def floor_of(step: Step) -> dict[str, float]:
    """`floor` in a process of its own, and how many tokens it is the floor of."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_floor_into, args=(queue, step))
    process.start()
    found = queue.get()
    process.join()
    return {"tokens": step.tokens, "trained": step.trained, **found}


def print_result(method: str, result: dict[str, Any]) -> None:
    print(f"  {method:<32} {'tokens/s':>9} {'s/step':>7} {'MiB':>7} {'whole':>7}   loss, norm of step 1")
    for name, row in result["rows"].items():
        if "failed" in row:
            print(f"    {name:<30} left out: {row['failed']}")
            continue
        print(
            f"    {name:<30} {row['tokens_per_second']:>9,.0f} {statistics.median(row['seconds']):>7.2f} "
            f"{row['memory_bytes'] / 2**20:>7,.0f} {row['peak_bytes'] / 2**20:>7,.0f}   {row['loss'][0]:.5f}, "
            f"{row['grad_norm'][0]:.5f}"
        )
    for layout, ratios in result["against"].items():
        print(
            f"    against {ratios['form']} ({layout}): {ratios['speed']:.2f} times as fast (target {TARGETS['speed']:.2f}; "
            f"eager {ratios['speed_eager']:.2f}), {ratios['memory']:.2f} of its memory (target {TARGETS['memory']:.2f}; least "
            f"to least {ratios['least_memory']:.2f}, whole processes {ratios['memory_whole']:.2f})"
        )
    parts = ", ".join(f"{part} {result['floor'][part]:.3f}" for part in PARTS)
    print(
        f"    {result['of_floor']:.2f} of the floor's time (target {TARGETS['of_floor']:.2f}; eager "
        f"{result['eager_of_floor']:.2f}), seconds: {parts}",
        flush=True,
    )


# --- where our time goes --------------------------------------------------------------------------------------------


def parts(case: Case, folder: Path, method: str, steps: int = 3) -> list[tuple[str, int, float]]:
    """What torch's profiler sees of our step: (operation and shapes, calls, seconds), the longest first."""
    from torch.profiler import ProfilerActivity, profile

    torch.set_num_threads(case.threads)
    running = ours(job_of(case, folder, method, OURS))
    next(running)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        for _ in range(steps):
            next(running)
    found = [
        (f"{event.key} {event.input_shapes}", event.count // steps, event.self_cpu_time_total / 1e6 / steps)
        for event in profiler.key_averages(group_by_input_shape=True)
    ]
    return sorted(found, key=lambda part: -part[2])


def print_parts(case: Case, method: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        schedule = sft.prepare(case, folder, 6)
        write_adapter(folder)
        # Our loop writes to standard output what a user wants to read.
        found, screen = [], sys.stdout
        try:
            found = parts(case, folder, method)
        finally:
            sys.stdout = screen
        least = floor_of(step_of(case, folder, method, schedule))
    print(f"{method}: {sum(part[2] for part in found):.3f} s a step; floor:", least)
    for what, calls, seconds in found[:40]:
        print(f"  {seconds:>8.4f} s {calls:>5} x {what[:150]}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--trl-python", metavar="PATH", help="interpreter that has TRL and PEFT (none: ours alone)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="measured steps (default: 5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", action="append", metavar="CASE", help="may be given several times")
    parser.add_argument("--method", action="append", choices=METHODS, help="may be given several times")
    parser.add_argument("--eager", action="store_true", help="ours without its compiled form")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that everything runs")
    parser.add_argument("--parts", action="store_true", help="where our own time goes, instead")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    every = {"quick": quick_case(options.threads)} if options.quick else cases(options.threads)
    if unknown := [name for name in options.only or () if name not in every]:
        parser.error(f"no case {', '.join(unknown)}; there are: {', '.join(every)}")
    methods = options.method or METHODS
    if options.parts:
        for name in options.only or every:
            for method in methods:
                print_parts(every[name], method)
        return
    versions = peer_versions(options.trl_python) if options.trl_python else None
    if versions is None:
        who = f"{options.trl_python} cannot import TRL and PEFT" if options.trl_python else "no --trl-python"
        print(f"{who}: ours alone, nothing is written")
    written = versions is not None and not options.quick
    path = RESULTS / "finetune.json"
    results: dict[str, Any] = {}
    if (options.only or options.method) and path.exists():
        results = json.loads(path.read_text(encoding="utf-8"))["results"]
    for name in options.only or every:
        case = every[name]
        if case.tokenizer == "llama3" and not (sft.SHARED / "tokenizers" / "llama3").exists():
            print(f"{name} needs {sft.SHARED / 'tokenizers' / 'llama3'}: left out")
            continue
        print(
            f"{name}: {case.rows} x {case.sequence} tokens, {case.dtype}, {case.threads} threads", flush=True
        )
        python = options.trl_python if versions is not None else None
        with tempfile.TemporaryDirectory() as folder:
            result = measure(
                case,
                Path(folder),
                methods,
                options.rounds,
                python,
                compiled=not options.eager and not options.quick,
            )
        for method, found in result["methods"].items():
            print_result(method, found)
        if written:
            before = results.get(name, {}).get("methods", {})
            together = before | result["methods"]
            result["methods"] = {method: together[method] for method in METHODS if method in together}
            results[name] = {"case": dataclasses.asdict(case), "versions": versions, **result}
            write_result("finetune", {"results": {name: results[name] for name in every if name in results}})
    if written:
        print(f"\nwrote {path}")


def peer_versions(python: str) -> dict[str, str] | None:
    """As `sft.peer_versions`, of what adapters need as well."""
    return sft.peer_versions(
        python, ("trl", "peft", "transformers", "accelerate", "torch"), ("bitsandbytes",)
    )


if __name__ == "__main__":
    main()
