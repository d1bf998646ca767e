"""What do the processes of a layout say to each other in one optimizer step? Counted, and held to the formulas.

    python benchmarks/communication.py [--write-docs]

A small model takes two steps in bf16 on gloo, one process each of a layout; of the second step every collective and
message is counted as torch dispatches it, with its group and its size. Bytes are those that a process sends, in a ring:
an all-gather or reduce-scatter of B bytes among n sends B * (n - 1) / n, an all-reduce twice that.

The formulas are `modelyard.plan.communication`'s. Each line of the table is what the textbook counts (`formula`) and what
this program sends beyond it, by name (`beyond`); the sum must be what was counted, to the byte: exit status 1 otherwise.
Writes benchmarks/results/communication.json, and with `--write-docs` the table of docs/layouts.md. About half a minute on
two cores.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

from benchmarks.common import put_into, write_result  # noqa: E402
from modelyard.parallel.mesh import Mesh  # noqa: E402
from modelyard.plan.communication import OF_THE_LOSS, Term, communication_of  # noqa: E402
from modelyard.plan.meter import Key, Meter  # noqa: E402
from modelyard.plan.workload import Workload  # noqa: E402
from modelyard.train.step import train_step  # noqa: E402
from tests.parallel.cases import layout_of as L  # noqa: E402
from tests.parallel.cases import name_of  # noqa: E402
from tests.parallel.matrix import TINY, Case, build, global_batch, local_batch, make_optimizer  # noqa: E402
from tests.parallel.processes import run_distributed  # noqa: E402

DOCS = ROOT / "docs" / "layouts.md"
NAME = "communication"
SHAPE = replace(TINY, vocab_size=96, hidden_size=32, head_size=8, ffn_hidden_size=48, qkv_bias=False)
"""Every length is its own, so that no message has the size of another kind's; all are divisible by 8."""
TIED = replace(SHAPE, tie_word_embeddings=True)
CASES = [
    *(Case(L(shard=2, zero=zero), architecture=SHAPE, micro_batch_size=1) for zero in (1, 2, 3)),
    Case(L(shard=4, zero=3), architecture=SHAPE, micro_batch_size=1),
    Case(L(replicate=2, shard=2, zero=2), architecture=SHAPE, micro_batch_size=1),
    Case(L(tensor=2), architecture=SHAPE),
    Case(L(tensor=2, sequence=True), architecture=SHAPE),
    Case(L(tensor=2), architecture=SHAPE, recompute="full"),
    Case(L(tensor=2, sequence=True), architecture=SHAPE, recompute="selective"),
    Case(L(tensor=2, sequence=True), architecture=SHAPE, recompute="full"),
    Case(L(context=2), architecture=SHAPE),
    Case(L(context=4), architecture=SHAPE, recompute="full"),
    Case(L(pipeline=2), architecture=SHAPE),
    Case(L(pipeline=4), architecture=TIED),
    Case(L(pipeline=2, schedule="interleaved"), architecture=SHAPE),
    Case(L(pipeline=2, schedule="zbv"), architecture=TIED),
    Case(L(shard=2, pipeline=2, zero=3), architecture=SHAPE, micro_batch_size=1),
    Case(L(shard=2, pipeline=2, tensor=2, sequence=True, zero=1), architecture=TIED),
    Case(L(shard=2, context=2, tensor=2, zero=3), architecture=SHAPE),
]
CASES = [replace(case, dtype=torch.bfloat16) for case in CASES]


# --- counting and formulas --------------------------------------------------------------------------------------


def count(case: Case) -> dict[Key, tuple[int, float]]:
    """Calls and bytes that this process sends in the second step of a case."""
    mesh = Mesh(case.layout, torch.device("cpu"))
    run = build(case, mesh)
    optimizer = make_optimizer(case, run)
    meter = Meter()
    meter.tensor_group = mesh.group("tensor").group_name if case.layout.tensor > 1 else None
    for step in range(2):
        meter.start()
        with meter:
            train_step(
                run.model,
                run.weights,
                optimizer,
                local_batch(case, run, step),
                learning_rate=1e-2,
                micro_batch_size=case.micro_batch_size,
                max_norm=1.0,
                loss_options=case.options,
                device=mesh.device,
                mesh=mesh,
            )
    return meter.sent


def expected(case: Case) -> Iterator[Term]:
    """What each process should send in a step of the case."""
    workload = Workload(
        case.architecture,
        case.layout,
        batch_rows=case.rows,
        micro_rows=case.micro_batch_size,
        sequence_length=case.sequence_length,
        recompute=case.recompute,
    )
    # The rows are masked: of all tokens so many are trained on.
    trained = global_batch(case, 1).num_targets / workload.step_tokens
    layout = case.layout
    for rank in range(layout.world):
        place = rank // (layout.context * layout.tensor) % layout.pipeline
        for term in communication_of(workload, place):
            yield replace(term, bytes=term.bytes * trained) if term.why == OF_THE_LOSS else term


# --- the table --------------------------------------------------------------------------------------------------


def label(case: Case) -> str:
    """The row's name without what all of these have."""
    common = ("no-bias", "uneven", "accumulation", "bf16")
    return ",".join(word for word in name_of(case).split(",") if word not in common)


def rows_of(case: Case) -> list[dict[str, Any]]:
    """The lines of one layout; calls and bytes of a process on average."""
    world = case.layout.world
    counted: dict[Key, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for answer in run_distributed(count, world, case):
        for key, (calls, size) in answer.items():
            counted[key][0] += calls
            counted[key][1] += size
    terms = list(expected(case))
    rows = []
    for key in sorted({*counted, *(term.key for term in terms)}):
        mine = [term for term in terms if term.key == key]
        formula = [sum(getattr(t, what) for t in mine if not t.why) / world for what in ("calls", "bytes")]
        beyond: dict[str, tuple[float, float]] = {}
        for term in mine:
            if term.why:
                before = beyond.get(term.why, (0.0, 0.0))
                beyond[term.why] = (before[0] + term.calls / world, before[1] + term.bytes / world)
        found = [number / world for number in counted[key]]
        rest = [found[n] - formula[n] - sum(extra[n] for extra in beyond.values()) for n in (0, 1)]
        rows.append(
            {
                "layout": label(case),
                "kind": key[0],
                "operation": key[1],
                "counted": found,
                "formula": formula,
                "beyond": beyond,
                "unexplained": rest if max(map(abs, rest)) > 1e-6 else None,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a line a layout, kind and operation."""

    def pair(numbers: Any) -> str:
        calls, size = numbers
        return f"{calls:g} x, {size:,.0f} B" if calls or size else "none"

    lines = [
        "| layout | for | operation | counted | formula | beyond it |",
        "| --- | --- | --- | ---: | ---: | --- |",
    ]
    before = None
    for row in rows:
        beyond = "; ".join(f"{why}: {pair(numbers)}" for why, numbers in row["beyond"].items())
        if row["unexplained"]:
            beyond += f" **unexplained: {pair(row['unexplained'])}**"
        layout = "" if row["layout"] == before else f"`{row['layout']}`"
        before = row["layout"]
        cells = (layout, row["kind"], row["operation"], pair(row["counted"]), pair(row["formula"]), beyond)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/layouts.md")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = [row for case in CASES for row in rows_of(case)]
    print(table(rows))
    unexplained = [row for row in rows if row["unexplained"]]
    print(f"{len(rows)} lines, {len(unexplained)} unexplained")
    print(f"wrote {write_result(NAME, {'rows': rows})}")
    if arguments.write_docs:
        put_into(DOCS, NAME, table(rows))
        print(f"wrote {DOCS}")
    sys.exit(1 if unexplained else 0)


if __name__ == "__main__":
    main()
