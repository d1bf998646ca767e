"""How near is the planner to this machine's processor? Predicted and measured seconds of real training steps.

    python benchmarks/plan_cpu.py [--only WORD] [--write-docs]

First the machine is measured (`modelyard.plan.machine`), alone with all threads and by two processes of one thread each: on
generic sizes, none of them a case's. Then every case's step is predicted, and only then run: the fastest of its steps after
two that warm up, as the machine's rates are of the fastest calls. Nothing is chosen by what came out. Cases differ in size, length, recomputation, packing, adapters, dtype,
accumulation, and in how two processes on gloo share the work.

Writes benchmarks/results/plan_cpu.json and, with `--write-docs`, the table of docs/planner.md. Three to four minutes on two cores,
which must have nothing else to do.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.common import RESULTS, put_into, write_result  # noqa: E402
from modelyard.config.adapter import MODULES, Adapter, Quantization  # noqa: E402
from modelyard.config.architecture import Architecture  # noqa: E402
from modelyard.config.layout import Layout  # noqa: E402
from modelyard.data.batch import Batch  # noqa: E402
from modelyard.model.adapter import AdaptedWeights  # noqa: E402
from modelyard.model.init import InitStd, initialize  # noqa: E402
from modelyard.parallel.apply import parallelize  # noqa: E402
from modelyard.parallel.mesh import Mesh  # noqa: E402
from modelyard.plan.duration import Duration, duration_of  # noqa: E402
from modelyard.plan.hardware import Hardware, cluster_of  # noqa: E402
from modelyard.plan.machine import FORMAT, fingerprint, hardware_from, measure  # noqa: E402
from modelyard.plan.workload import Workload  # noqa: E402
from modelyard.train.allocator import keep_freed_memory  # noqa: E402
from modelyard.train.optimizer import Optimizer  # noqa: E402
from modelyard.train.step import LossOptions, train_step  # noqa: E402
from modelyard.train.weights import DTYPES  # noqa: E402
from tests.parallel.processes import run_distributed  # noqa: E402

NAME = "plan_cpu"
DOCS = ROOT / "docs" / "planner.md"
TARGET = 0.15
"""Error up to which a prediction counts as met."""
STEPS, MOST_SECONDS = 5, 7.0
UNDISTURBED = 0.97
"""Of its cores' time a process has at least so much in a step that nothing else disturbed. One process steps until it had one."""


@dataclass(frozen=True)
class Case:
    name: str
    workload: Workload
    lengths: tuple[int, ...] = ()
    """Of a row's documents; none: the row is one."""


def shape(hidden: int, layers: int, vocabulary: int, **fields: Any) -> Architecture:
    """Llama's proportions: heads of 64, two queries to a key, feed-forward 8/3 of the width."""
    heads = hidden // 64
    inner = int(hidden * 8 / 3 / 64 + 0.5) * 64
    return Architecture(vocabulary, hidden, layers, heads, max(heads // 2, 1), 64, inner, **fields)


def cases() -> list[Case]:
    """In the order in which they are run."""
    one, two = Layout(), "two processes, "
    base = Workload(shape(384, 6, 8192), one, 4, 4, 512, dtype="float32")
    packed = (32, 64, 96, 128, 160, 192, 160, 128, 64)
    small = Workload(shape(128, 4, 1024), one, 8, 8, 256, dtype="float32")
    wide = Workload(shape(512, 8, 32_000), one, 2, 2, 512, dtype="float32")
    low_rank = Adapter(16, 32.0, MODULES)
    found = [
        Case("1 M, 8 x 256", small),
        Case("5 M tied, 4 x 512", replace(base, architecture=shape(256, 4, 8192, tie_word_embeddings=True))),
        Case("16 M, 4 x 512", base),
        Case("16 M, 2 x 1,024", replace(base, batch_rows=2, micro_rows=2, sequence_length=1024)),
        Case("16 M, 1 x 2,048", replace(base, batch_rows=1, micro_rows=1, sequence_length=2048)),
        Case("16 M, 2 x 1,024, packed", replace(base, batch_rows=2, micro_rows=2, sequence_length=1024,
                                                document_length=1024 / len(packed)), packed),
        Case("56 M, 32k words, 2 x 512", wide),
        Case("16 M, 4 micro-batches of 512", replace(base, micro_rows=1)),
        Case("16 M, recompute selective", replace(base, recompute="selective")),
        Case("16 M, recompute full", replace(base, recompute="full")),
        Case("16 M, LoRA", frozen(replace(base, adapter=low_rank))),
        Case("16 M, QLoRA", frozen(replace(base, adapter=replace(low_rank, quantization=Quantization())))),
        Case("16 M, bf16", replace(base, dtype="bfloat16")),
        Case("16 M Qwen: biases, window 256", replace(base, architecture=shape(384, 6, 8192, qkv_bias=True, window_size=256))),
    ]  # fmt: skip
    for name, layout in (
        ("ZeRO 1", Layout(shard=2)),
        ("ZeRO 3", Layout(shard=2, zero_stage=3)),
        ("tensor", Layout(tensor=2)),
        ("tensor, sequence", Layout(tensor=2, sequence_parallel=True)),
        ("pipeline", Layout(pipeline=2)),
        ("context", Layout(context=2)),
    ):
        rows = 4 if layout.data * layout.pipeline == 1 else 1 if layout.pipeline == 2 else 2
        narrow_head = shape(512, 4, 2048)
        found.append(
            Case(f"{two}{name}", replace(base, architecture=narrow_head, layout=layout, micro_rows=rows))
        )
    return found


def frozen(workload: Workload) -> Workload:
    """With nothing trained but the adapter."""
    return replace(workload, frozen=frozenset(workload.architecture.parameter_shapes()))


# --- running --------------------------------------------------------------------------------------------------


class Random:
    """Weights of a base, as a source."""

    def __init__(self, architecture: Architecture):
        self._shapes = architecture.parameter_shapes()

    def load(self, name: str) -> torch.Tensor:
        return torch.randn(self._shapes[name]) * self._shapes[name][-1] ** -0.5


def batch_of(case: Case, rows: int) -> Batch:
    workload = case.workload
    length = workload.sequence_length
    lengths = case.lengths or (length,)
    tokens = torch.randint(workload.architecture.vocab_size, (rows, length + 1))
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(rows, -1)
    return Batch(
        tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), positions.contiguous(), ends.expand(rows, -1)
    )


def seconds_of_steps(case: Case, now: Callable[[], float] = time.perf_counter) -> float:
    """The fastest of a process's steps."""
    workload, device = case.workload, torch.device("cpu")
    warnings.simplefilter("ignore")
    keep_freed_memory()
    torch.manual_seed(0)
    layout, architecture = workload.layout, workload.architecture
    mesh = Mesh(layout, device, alone=layout.world == 1)
    fill: Any = lambda model, write: initialize(  # noqa: E731
        model, 0, InitStd.for_architecture(architecture), write=write
    )
    if workload.adapter is not None:
        dtype = DTYPES[workload.dtype]
        source: Any = Random(architecture)
        fill = AdaptedWeights(source, workload.adapter, seed=0, dtype=dtype, device=device).fill
    run = parallelize(
        architecture,
        mesh,
        compute_dtype=DTYPES[workload.dtype],
        recompute=workload.recompute,
        compile=False,
        sequence_length=workload.sequence_length,
        fill=fill,
        frozen=workload.frozen,
        adapter=workload.adapter,
    )
    optimizer = Optimizer(
        run.weights.master,
        weight_decay=0.1,
        betas=(0.9, 0.95),
        epsilon=1e-8,
        scales=dict.fromkeys(workload.frozen, 0.0),
    )
    batch = run.local(batch_of(case, workload.batch_rows // layout.data))

    def step() -> None:
        train_step(
            run.model,
            run.weights,
            optimizer,
            batch,
            learning_rate=1e-4,
            micro_batch_size=workload.micro_rows,
            max_norm=1.0,
            loss_options=LossOptions(),
            device=device,
            mesh=mesh,
        )

    for _ in range(2):
        step()
    times: list[float] = []
    undisturbed, alone = 0, layout.world == 1
    while len(times) < STEPS or (alone and not undisturbed and len(times) < 4 * STEPS):
        begin, used = now(), time.process_time()
        step()
        seconds = now() - begin
        times.append(seconds)
        undisturbed += time.process_time() - used >= UNDISTURBED * seconds * torch.get_num_threads()
        if undisturbed and sum(times) > MOST_SECONDS:
            break
    return min(times)


def run(case: Case, now: Callable[[], float]) -> float:
    """Seconds of the slowest process."""
    if case.workload.layout.world == 1:
        return seconds_of_steps(case, now)
    return max(run_distributed(seconds_of_steps, case.workload.layout.world, case))


def machines(threads: int, worlds: set[int], now: Callable[[], float]) -> dict[int, dict[str, Any]]:
    """This machine by number of processes: alone, and two that measure at the same time with a thread each."""

    def found(figures: dict[str, Any]) -> dict[str, Any]:
        return {"format": FORMAT, "machine": fingerprint(), "date": "today", **figures}

    def in_process() -> dict[str, Any]:
        return found(measure())

    kept = {}
    if 2 in worlds:
        kept[2] = run_distributed(in_process, 2)[0]
    if 1 in worlds:
        torch.set_num_threads(threads)
        kept[1] = found(measure(now=now))
    return kept


def results(
    machine: dict[int, dict[str, Any]],
    chosen: list[Case],
    now: Callable[[], float],
    tell: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Each case predicted, then run."""
    hardware: dict[int, Hardware] = {count: hardware_from(kept) for count, kept in machine.items()}
    predictions: list[tuple[Case, Duration]] = []
    for case in chosen:
        world = case.workload.layout.world
        predictions.append((case, duration_of(case.workload, cluster_of(hardware[world], world))))
    rows = []
    for case, prediction in predictions:
        measured = run(case, now)
        shares = sorted(prediction.items.items(), key=lambda item: -item[1])
        rows.append(
            {
                "case": case.name,
                "clock": now.__name__ if case.workload.layout.world == 1 else "perf_counter",
                "threads": torch.get_num_threads() if case.workload.layout.world == 1 else 1,
                "parameters": case.workload.architecture.parameter_count(),
                "measured": measured,
                "predicted": prediction.step,
                "error": prediction.step / measured - 1,
                "shares": {name: seconds / prediction.step for name, seconds in shares},
            }
        )
        tell(
            f"{case.name:32} measured {measured:.3f} s, predicted {prediction.step:.3f} s ({rows[-1]['error']:+.0%})"
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a line a case."""
    lines = [
        "| case | parameters | measured, s | predicted, s | error | most of it goes to (predicted) |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for entry in rows:
        most = ", ".join(f"{name} {share:.0%}" for name, share in list(entry["shares"].items())[:4])
        error = f"{entry['error']:+.1%}"
        own = " (processor's own time)" if entry["clock"] == "process_time" else ""
        cells = (
            f"{entry['case']}{own}",
            f"{entry['parameters'] / 1e6:.1f} M",
            f"{entry['measured']:.3f}",
            f"{entry['predicted']:.3f}",
            f"**{error}**" if abs(entry["error"]) > TARGET else error,
            most,
        )
        lines.append("| " + " | ".join(cells) + " |")
    met = sum(abs(entry["error"]) <= TARGET for entry in rows)
    lines += ["", f"{met} of {len(rows)} within {TARGET:.0%}."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="WORD", help="cases whose name has it, the others as they were")
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/planner.md")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="on a machine that others use: time of the processor's own, for cases of one process with one thread",
    )
    arguments = parser.parse_args()
    now = time.process_time if arguments.processor_time else time.perf_counter
    if arguments.processor_time:
        torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    every = cases()
    chosen = [case for case in every if arguments.only is None or arguments.only in case.name]
    machine = machines(torch.get_num_threads(), {case.workload.layout.world for case in chosen}, now)
    rows = results(machine, chosen, now, lambda line: print(line, flush=True))
    before: dict[str, Any] = {}
    if arguments.only is not None and (RESULTS / f"{NAME}.json").exists():
        before = json.loads((RESULTS / f"{NAME}.json").read_text(encoding="utf-8"))
    # Those of `--only` take their places among the others.
    known = {row["case"]: row for row in (*before.get("rows", ()), *rows)}
    rows = [known[case.name] for case in every if case.name in known]
    kept = before.get("machine", {}) | {str(count): figures["rates"] for count, figures in machine.items()}
    print(table(rows))
    print(f"wrote {write_result(NAME, {'rows': rows, 'machine': kept})}")
    if arguments.write_docs:
        put_into(DOCS, NAME, table(rows))
        print(f"wrote {DOCS}")


if __name__ == "__main__":
    main()
