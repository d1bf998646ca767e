"""What do the processes of a layout say to each other in one optimizer step? Counted, and held to the formulas.

    python benchmarks/communication.py [--write-docs]

A small model takes two steps in bf16 on gloo, one process each of a layout; of the second step every collective and
message is counted as torch dispatches it, with its group and its size. Bytes are those that a process sends, in a ring:
an all-gather or reduce-scatter of B bytes among n sends B * (n - 1) / n, an all-reduce twice that.

Each line of the table is what the textbook counts (`formula`) and what this program sends beyond it, by name (`beyond`);
the sum must be what was counted, to the byte: exit status 1 otherwise. Writes benchmarks/results/communication.json, and
with `--write-docs` the table of docs/layouts.md. About half a minute on two cores.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from benchmarks.common import put_into, write_result  # noqa: E402
from modelyard.parallel.mesh import Mesh  # noqa: E402
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
B, F = 2, 4
"""Bytes of an element that is computed with (bf16) and of one that is summed over tokens (fp32)."""

Key = tuple[str, str]
"""(kind of parallelism, operation)."""

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


# --- counting ---------------------------------------------------------------------------------------------------


class Counter(TorchDispatchMode):
    """Counts calls and bytes sent by this process, by kind and operation."""

    def __init__(self, tensor_group: str | None):
        """`tensor_group`: the name of the group that shares matrices, where there is one."""
        super().__init__()
        self._tensor_group = tensor_group
        self.found: dict[Key, list[float]] = defaultdict(lambda: [0, 0.0])

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "c10d":
            self._count(op._opname.strip("_"), args)
        elif op.namespace == "_c10d_functional":
            raise NotImplementedError(f"{op} is not counted")
        return op(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        if name.startswith("recv"):
            return  # counted where it is sent
        group = next(dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject))
        ring = (group.size() - 1) / group.size()
        first = args[0] if isinstance(args[0], torch.Tensor) else args[0][0]
        size = first.numel() * first.element_size()
        if name == "allreduce":
            is_step = first.dtype == torch.float64
            kind = "tensor" if group.group_name == self._tensor_group else "replicate"
            key, sent = ("step" if is_step else kind, "all-reduce"), 2 * size * ring
        elif name == "send":
            key, sent = ("pipeline", "send"), float(size)
        else:
            # FSDP sends flat stretches of parameters, tensor parallelism [tokens, hidden], contexts [tokens, groups, head].
            kind = {1: "weights", 2: "tensor", 3: "context"}[first.dim()]
            operation, whole = {
                "allgather_base": ("all-gather", size),
                "reduce_scatter_base": ("reduce-scatter", size * group.size()),
            }[name]
            key, sent = (kind, operation), whole * ring
        self.found[key][0] += 1
        self.found[key][1] += sent


def count(case: Case) -> dict[Key, list[float]]:
    """Calls and bytes that this process sends in the second step of a case."""
    mesh = Mesh(case.layout, torch.device("cpu"))
    run = build(case, mesh)
    optimizer = make_optimizer(case, run)
    counter = Counter(mesh.group("tensor").group_name if case.layout.tensor > 1 else None)
    for step in range(2):
        counter.found.clear()
        with counter:
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
    return dict(counter.found)


# --- formulas ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Term:
    """Some calls of all processes together, and the bytes that they send in all."""

    key: Key
    why: str
    """Empty: it is in the textbook's formula."""
    calls: float
    bytes: float


def expected(case: Case) -> Iterator[Term]:
    """What a step of the case should send, all processes together."""
    layout, shape = case.layout, case.architecture
    everyone = layout.world // layout.pipeline
    """Processes that have one layer, or parts of it."""
    micro_batches = case.rows // layout.data // case.micro_batch_size
    tokens = case.micro_batch_size * case.sequence_length // layout.context
    yield from _weights(case, everyone, micro_batches)
    if layout.tensor > 1:
        yield from _tensor(case, everyone, micro_batches, tokens)
    again = micro_batches if case.recompute == "full" else 0
    if layout.context > 1:
        # Keys and values of all tokens, in bf16; gradients of both in bf16 back.
        keys_and_values = 2 * shape.head_groups // layout.tensor * shape.head_size
        sent = B * tokens * layout.context * keys_and_values * _ring(layout.context)
        calls = everyone * shape.num_layers
        for operation in ("all-gather", "reduce-scatter"):
            yield Term(("context", operation), "", calls * micro_batches, calls * micro_batches * sent)
        yield Term(
            ("context", "all-gather"), "recomputed blocks gather again", calls * again, calls * again * sent
        )
    if layout.pipeline > 1:
        # Between two stages of one process, at the bottom of a V, nothing is sent.
        boundaries = layout.stages - 1 - (layout.schedule == "zbv")
        calls = 2 * boundaries * micro_batches * everyone
        parts = layout.tensor if layout.sequence_parallel else 1
        yield Term(("pipeline", "send"), "", calls, calls * B * tokens * shape.hidden_size / parts)
        if shape.tie_word_embeddings and layout.schedule != "zbv":
            matrices = 2 * layout.replicate * shape.vocab_size * shape.hidden_size
            why = "the tied matrix's gradient, first stage to last and back"
            yield Term(("pipeline", "send"), why, 2 * everyone, F * matrices)
    sums = 2 * 5 * 8 * _ring(layout.world)
    yield Term(("step", "all-reduce"), "loss, norm, targets, stop", layout.world, layout.world * sums)


def _ring(size: int) -> float:
    return (size - 1) / size


def _weights(case: Case, everyone: int, micro_batches: int) -> Iterator[Term]:
    """Parameters gathered in bf16, gradients reduced in fp32, by groups of parameters (each block; embedding; the rest)."""
    layout, shape = case.layout, case.architecture
    size = layout.shard * layout.context
    hidden, matrix = shape.hidden_size, shape.vocab_size * shape.hidden_size // layout.tensor
    total = sum(
        torch.Size(s).numel() for n, s in shape.parameter_shapes().items() if n.startswith("layers.0.")
    )
    block = (total - 2 * hidden) // layout.tensor + 2 * hidden
    tied, split = shape.tie_word_embeddings, layout.pipeline > 1
    inner = [block] * shape.num_layers + ([] if tied else [matrix])
    rest = [matrix + hidden] + ([matrix] if tied and split else [])
    reduced = micro_batches if layout.zero_stage > 1 else 1
    gathered = 2 * micro_batches if layout.zero_stage == 3 else 1
    for units, is_rest in ((inner, False), (rest, True)):
        calls, elements = len(units) * everyone, sum(units) * everyone
        if size > 1:
            key = "weights", "all-gather"
            sent = B * elements * _ring(size)
            yield Term(key, "", gathered * calls, gathered * sent)
            if is_rest and layout.zero_stage == 3:
                stays = (1 if split else micro_batches) - gathered
                yield Term(
                    key, "head and last norm stay gathered until the backward", stays * calls, stays * sent
                )
            yield Term(
                ("weights", "reduce-scatter"), "", reduced * calls, reduced * F * elements * _ring(size)
            )
        if layout.replicate > 1:
            sent = 2 * F * elements / size * _ring(layout.replicate)
            yield Term(("replicate", "all-reduce"), "", reduced * calls, reduced * sent)


def _tensor(case: Case, everyone: int, micro_batches: int, tokens: int) -> Iterator[Term]:
    """[tokens, hidden] in bf16: two sums a layer in the forward and two in the backward."""
    layout, shape = case.layout, case.architecture
    ring = _ring(layout.tensor)
    sent = B * tokens * shape.hidden_size * ring
    layers, step = everyone * micro_batches * shape.num_layers, everyone * micro_batches
    again = layers if case.recompute == "full" else 0
    if layout.sequence_parallel:
        for operation in ("all-gather", "reduce-scatter"):
            key = "tensor", operation
            yield Term(key, "", 4 * layers, 4 * layers * sent)
            yield Term(key, "embedding and last norm", 2 * step, 2 * step * sent)
        gathers = {"none": 0, "selective": 2, "full": 2}[case.recompute] * layers
        yield Term(("tensor", "all-gather"), "what norms give is gathered again", gathers, gathers * sent)
        yield Term(
            ("tensor", "reduce-scatter"),
            "recomputed blocks sum again (all but the last sum)",
            again,
            again * sent,
        )
    else:
        key = "tensor", "all-reduce"
        yield Term(key, "", 4 * layers, 4 * layers * 2 * sent)
        yield Term(key, "embedding and last norm", 2 * step, 2 * step * 2 * sent)
        yield Term(key, "recomputed blocks sum again (all but the last sum)", again, again * 2 * sent)
    # The loss, in fp32: the highest logit of each trained token, then two more numbers.
    targets = global_batch(case, 1).num_targets * layout.tensor
    yield Term(
        ("tensor", "all-reduce"), "loss: 3 numbers a trained token", 2 * step, 2 * ring * 3 * F * targets
    )
    if layout.sequence_parallel:
        size = layout.shard * layout.context
        elements = shape.hidden_size * (2 * shape.num_layers + 1) * everyone / size
        why = "gradients of norms, once a step"
        yield Term(("tensor", "all-reduce"), why, layout.world, 2 * ring * F * elements)


# --- the table --------------------------------------------------------------------------------------------------


def label(case: Case) -> str:
    """The row's name without what all of these have."""
    common = ("no-bias", "uneven", "accumulation", "bf16")
    return ",".join(word for word in name_of(case).split(",") if word not in common)


def rows_of(case: Case) -> list[dict[str, Any]]:
    """The lines of one layout; calls and bytes of a process on average."""
    world = case.layout.world
    counted: dict[Key, list[float]] = defaultdict(lambda: [0, 0.0])
    for answer in run_distributed(count, world, case):
        for key, (calls, size) in answer.items():
            counted[key][0] += calls
            counted[key][1] += size
    terms = [term for term in expected(case) if term.calls]
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
