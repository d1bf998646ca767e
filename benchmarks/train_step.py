"""How fast is a training step, and how much memory does it hold, against the programs that users would pick instead?

Ours (eager, and with `training.compile: yes`) against transformers' `LlamaForCausalLM` and litgpt's `GPT`, each in a
plain, well-written PyTorch loop, eager and compiled: same weights, batch, dtype, threads and optimizer. Every program
has a process of its own; they step in turn, never at once; the median of the rounds counts. The first step's loss and
gradient norm must agree, or the comparison is refused: a step that does not train is fast.

Prints for each case tokens/s, the ratio of our faster form to each peer's faster form, the share of the machine's own
matrix-multiply speed, peak memory above what the imports hold, and the floor: the step's matrix products measured alone,
and those with attention and optimizer. `--parts` says where our time goes. Writes `benchmarks/results/train_step.json`.

    python benchmarks/train_step.py                         every case, about an hour on 2 cores
    python benchmarks/train_step.py --only 32k-512 --rounds 5
    python benchmarks/train_step.py --only 32k-512 --parts

litgpt is compared where it is installed (`pip install litgpt`), and left out, saying so, where it is not.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import RESULTS, write_result
from benchmarks.contenders import NAMES, Case, Contender, build, can_run, installed
from benchmarks.floor import floor

PEERS = ("transformers", "litgpt")


def cases(threads: int) -> dict[str, Case]:
    """By name: vocabulary, sequence length, `packed` for 16 isolated documents a row, `bf16`."""
    found = {}
    for dtype, suffix in (("float32", ""), ("bfloat16", "-bf16")):
        for vocabulary, short in ((32_000, "32k"), (128_256, "128k")):
            for rows, sequence in ((4, 512), (1, 2048)):
                case = Case("", dtype, vocabulary, rows, sequence, threads=threads)
                found[f"{short}-{sequence}{suffix}"] = case
        packed = Case("", dtype, 32_000, 1, 2048, documents=16, threads=threads)
        found[f"32k-2048-packed{suffix}"] = packed
    return found


def compare(case: Case, peer: str, rounds: int) -> dict[str, dict[str, float]]:
    """Our two forms and the peer's two, stepping in turn: seconds (median), loss, grad_norm, peak_bytes."""
    names = [name for name in NAMES if name.split()[0] in ("modelyard", peer)]
    contenders = {name: Contender(dataclasses.replace(case, contender=name)) for name in names}
    try:
        first = {name: contender.ask("warm up") for name, contender in contenders.items()}
        for name, answer in first.items():
            for key in ("loss", "grad_norm"):
                reference = first["modelyard"][key]
                if abs(answer[key] - reference) > (2e-4 if case.dtype == "float32" else 2e-2) * abs(
                    reference
                ):
                    raise RuntimeError(
                        f"{name} computes something else: {key} {answer[key]}, ours {reference}"
                    )
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(rounds):
            for name, contender in contenders.items():
                seconds[name].append(contender.ask("step")["seconds"])
        return {
            name: {
                "seconds": statistics.median(seconds[name]),
                "fastest": min(seconds[name]),
                "loss": first[name]["loss"],
                "grad_norm": first[name]["grad_norm"],
                **contenders[name].ask("memory"),
            }
            for name in names
        }
    finally:
        for contender in contenders.values():
            contender.close()


def _floor_into(queue: Any, case: Case) -> None:
    queue.put(floor(case))


def floor_of(case: Case) -> dict[str, float]:
    """`floor`, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_floor_into, args=(queue, case))
    process.start()
    found = queue.get()
    process.join()
    return found


def report(name: str, case: Case, peers: list[str], rounds: int) -> dict[str, Any]:
    """Measure one case and print its table."""
    shape = case.architecture()
    print(f"\n{name}: {shape.parameter_count():,} parameters, {case.rows} x {case.sequence} tokens"
          f"{f' in {case.documents} documents a row' if case.documents > 1 else ''}, {case.dtype}, "
          f"{case.threads} threads", flush=True)  # fmt: skip
    least = floor_of(case)
    products = least["blocks' products"] + least["head's products"]
    whole = products + least["attention"] + least["optimizer"]
    causal = shape.attention_flops_per_token(case.sequence // case.documents, causal=True)
    flops = case.tokens * (shape.matmul_flops_per_token() + causal)
    result: dict[str, Any] = {"case": dataclasses.asdict(case), "floor": least, "peers": {}}
    print(f"  matrix multiply {least['matmul_peak'] / 1e9:,.0f} GFLOP/s; floor: products {products:.3f} s, with "
          f"attention and optimizer {whole:.3f} s")  # fmt: skip
    print(
        f"  {'':<22} {'tokens/s':>9} {'s/step':>7} {'of peak':>8} {'/ floor':>8} {'peak MiB':>9}   loss, norm"
    )
    for peer in peers:
        rows = compare(case, peer, rounds)
        for who, row in rows.items():
            print(f"  {who:<22} {case.tokens / row['seconds']:>9,.0f} {row['seconds']:>7.3f} "
                  f"{flops / row['seconds'] / least['matmul_peak']:>8.0%} {row['seconds'] / whole:>8.2f} "
                  f"{row['peak_bytes'] / 2**20:>9,.0f}   {row['loss']:.4f}, {row['grad_norm']:.3f}")  # fmt: skip
        ours = min(
            (row for who, row in rows.items() if who.startswith("modelyard")), key=lambda r: r["seconds"]
        )
        theirs = min((row for who, row in rows.items() if who.startswith(peer)), key=lambda r: r["seconds"])
        speed = theirs["seconds"] / ours["seconds"]
        eager = rows[peer]["seconds"] / rows["modelyard"]["seconds"]
        memory = ours["peak_bytes"] / min(
            row["peak_bytes"] for who, row in rows.items() if who.startswith(peer)
        )
        print(f"  against {peer}'s faster form: {speed:.2f} times as fast (eager to eager {eager:.2f}), "
              f"{memory:.2f} of its least memory", flush=True)  # fmt: skip
        result["peers"][peer] = {"speed": speed, "speed_eager": eager, "memory": memory, "rows": rows}
    return result


# --- where our time goes --------------------------------------------------------------------------------------------

_PART_OF = (
    ("flash_attention", "attention"),
    ("fused_adamw", "optimizer"),
    ("aten::mm", "products"),
    ("aten::addmm", "products"),
    ("aten::bmm", "products"),
    ("CompiledFxGraph", "compiled: norms, rotary, activation, sums"),
)


def parts(case: Case) -> dict[str, float]:
    """Seconds of one of our steps by part, as torch's profiler sees them."""
    from torch.profiler import ProfilerActivity, profile

    torch.set_num_threads(case.threads)
    step = build(case)
    step()
    step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    found: dict[str, float] = {}
    for event in profiler.key_averages():
        part = next(
            (part for sign, part in _PART_OF if sign in event.key), "everything else between the products"
        )
        found[part] = found.get(part, 0.0) + event.self_cpu_time_total / 1e6
    return found


def print_parts(case: Case) -> None:
    least = floor_of(case)
    floors = {
        "products": least["blocks' products"] + least["head's products"],
        "attention": least["attention"],
        "optimizer": least["optimizer"],
    }
    for contender in ("modelyard", "modelyard compiled"):
        found = parts(dataclasses.replace(case, contender=contender))
        print(f"\n{contender:<44} {'time':>8} {'floor':>8} {'gap':>8}   [s]")
        for part, seconds in sorted(found.items(), key=lambda item: -item[1]):
            bound = floors.get(part, 0.0)
            print(f"  {part:<42} {seconds:>8.3f} {bound:>8.3f} {seconds - bound:>8.3f}")
        total, bound = sum(found.values()), sum(floors.values())
        print(f"  {'the step':<42} {total:>8.3f} {bound:>8.3f} {total - bound:>8.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="steps of each program (default: 5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", action="append", metavar="CASE", help="may be given several times")
    parser.add_argument("--parts", action="store_true", help="where our own time goes, instead")
    options = parser.parse_args()
    every = cases(options.threads)
    if unknown := [name for name in options.only or () if name not in every]:
        parser.error(f"no case {', '.join(unknown)}; there are: {', '.join(every)}")
    chosen = {name: every[name] for name in options.only or every}
    if options.parts:
        for case in chosen.values():
            print_parts(case)
        return
    for peer in PEERS:
        if not installed(peer):
            print(f"{peer} is not installed: left out")
    # Written after each case; those of `--only` take their places among the others.
    path = RESULTS / "train_step.json"
    results = (
        json.loads(path.read_text(encoding="utf-8"))["results"] if options.only and path.exists() else {}
    )
    for name, case in chosen.items():
        peers = [p for p in PEERS if installed(p) and can_run(dataclasses.replace(case, contender=p))]
        results[name] = {"rounds": options.rounds, **report(name, case, peers, options.rounds)}
        ordered = {name: results[name] for name in every if name in results}
        write_result("train_step", {"results": ordered})
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
