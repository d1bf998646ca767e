"""Are the planner's formulas right? Memory and messages of single processes, by formula and as a dry run counts them.

    python benchmarks/plan_traced.py [--write-docs] [--only WORD]

Each line is one process of a configuration of real size: `modelyard.plan.trace` builds the model in its layout on tensors
without memory, takes two optimizer steps and counts what tensors hold and which collectives are called in the second.
Beside it stands what `modelyard.plan.memory` and `modelyard.plan.communication` say. Exit status 1 where a call or a byte
sent differs, or the highest point of memory by more than 5%. Writes benchmarks/results/plan_traced.json, and with
`--write-docs` the table of docs/planner.md. About five minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.common import put_into, write_result  # noqa: E402
from modelyard.config.adapter import MODULES, Adapter, Quantization  # noqa: E402
from modelyard.config.architecture import Architecture  # noqa: E402
from modelyard.config.layout import DIMENSIONS, Layout  # noqa: E402
from modelyard.config.presets import preset  # noqa: E402
from modelyard.plan.apart import apart  # noqa: E402
from modelyard.plan.communication import communication_of  # noqa: E402
from modelyard.plan.memory import memory_of  # noqa: E402
from modelyard.plan.trace import trace  # noqa: E402
from modelyard.plan.workload import Workload  # noqa: E402

DOCS = ROOT / "docs" / "planner.md"
NAME = "plan_traced"
MOST_OFF = 0.05
"""Of the traced peak."""
LORA = Adapter(16, 32, MODULES)
LORA_ATTENTION = Adapter(16, 32, ("q_proj", "v_proj", "o_proj"))


@dataclass(frozen=True)
class Config:
    """A workload, and which of its processes are looked at."""

    model: str
    workload: Workload
    ranks: tuple[int, ...] = (0,)


def config(
    model: str, layout: Layout, *, count: int = 1, ranks: tuple[int, ...] = (0,), **options: Any
) -> Config:
    """A configuration with `count` micro-batches of one row (`micro`) of 4,096 tokens (`length`) a process."""
    options = {"micro": 1, "length": 4096, **options}
    micro, length = options.pop("micro"), options.pop("length")
    shape = shape_of(model)
    if "adapter" in options:
        options["frozen"] = frozenset(shape.parameter_shapes())
    rows = layout.data * micro * count
    workload = Workload(shape, layout, rows, micro, length, on_gpu=True, **options)
    return Config(model, workload, ranks)


def shape_of(model: str) -> Architecture:
    name, _, layers = model.partition(" with ")
    shape = preset(name)
    return replace(shape, num_layers=int(layers.split()[0])) if layers else shape


L = Layout
SP: Any = {"sequence_parallel": True}
INTERLEAVED: Any = {"schedule": "interleaved", "stages_per_process": 2}
ZERO_BUBBLE: Any = {"schedule": "zero_bubble", "stages_per_process": 2}
ZBV: Any = {"schedule": "zbv", "stages_per_process": 2}
LLAMA_1B, LLAMA_8B, LLAMA_70B, LLAMA_405B = "llama-3.2-1b", "llama-3.1-8b", "llama-3.1-70b", "llama-3.1-405b"
QWEN, QWEN_7B, SMOL = "qwen-2.5-0.5b", "qwen-2.5-7b", "smollm2-360m"

CONFIGS = [
    # One process.
    config(LLAMA_1B, L()),
    config(LLAMA_1B, L(), count=2, recompute="selective"),
    config(LLAMA_1B, L(), recompute="full", micro=4),
    config(QWEN, L(), dtype="float32", length=2048),
    config(QWEN, L(), optimizer_state="8bit", micro=2, length=2048),
    config(SMOL, L(), document_length=512, micro=4, length=2048),
    config(SMOL, L(), cross_entropy="torch", length=2048),
    # ZeRO.
    config(LLAMA_1B, L(shard=8, zero_stage=1), count=2),
    config(LLAMA_1B, L(shard=8, zero_stage=2), count=2, recompute="selective"),
    config(LLAMA_8B, L(shard=8, zero_stage=3), length=8192, recompute="full"),
    config(LLAMA_8B, L(shard=32, zero_stage=3), length=8192, ranks=(0, 31)),
    config(QWEN_7B, L(replicate=4, shard=8, zero_stage=3), recompute="selective"),
    config(QWEN_7B, L(replicate=2, shard=8, zero_stage=2), count=2, recompute="full"),
    config(SMOL, L(replicate=8), count=2, length=2048),
    # Tensor, with and without sequence parallelism, and context.
    config(LLAMA_8B, L(tensor=8), recompute="full"),
    config(LLAMA_8B, L(shard=4, tensor=2, zero_stage=3, **SP), recompute="selective"),
    config(QWEN_7B, L(shard=8, tensor=4, zero_stage=1, **SP)),
    config(QWEN, L(tensor=2, **SP), recompute="full", length=2048),
    config(LLAMA_8B, L(context=8, zero_stage=3), length=32768, recompute="full", ranks=(0, 7)),
    config(LLAMA_1B, L(shard=2, context=4, zero_stage=2), count=2, length=16384),
    config(LLAMA_1B, L(shard=2, context=2, tensor=2, zero_stage=3, **SP), length=8192, recompute="selective"),
    config("starcoder2-3b", L(shard=2, tensor=2, zero_stage=3, **SP), recompute="selective"),
    config("mistral-7b-v0.3", L(shard=8, zero_stage=3), recompute="selective", length=8192),
    # Pipelines: each schedule, the first process and the last.
    config(LLAMA_1B, L(pipeline=4, schedule="gpipe"), count=4, ranks=(0, 3)),
    config(LLAMA_1B, L(pipeline=4), count=8, ranks=(0, 1, 3)),
    config(LLAMA_1B, L(pipeline=2, **INTERLEAVED), count=4, ranks=(0, 1)),
    config(LLAMA_1B, L(pipeline=2, **ZERO_BUBBLE), count=4, ranks=(0, 1)),
    config(LLAMA_1B, L(pipeline=2, **ZBV), count=4, ranks=(0, 1)),
    config(LLAMA_8B, L(shard=4, pipeline=4, zero_stage=2), count=4, recompute="selective", ranks=(0, 3)),
    config(LLAMA_1B, L(shard=4, pipeline=2, zero_stage=3), count=4, ranks=(0, 1)),
    config(QWEN, L(shard=2, pipeline=2, zero_stage=3, **ZBV), count=4, length=2048, ranks=(0, 1)),
    config(
        QWEN_7B, L(shard=2, pipeline=4, tensor=2, zero_stage=1, **SP), count=4, recompute="full", ranks=(0, 6)
    ),
    # Adapters.
    config(LLAMA_8B, L(), adapter=LORA, recompute="selective", length=2048),
    config(LLAMA_8B, L(), adapter=replace(LORA, quantization=Quantization(64, True)), recompute="full"),
    config(LLAMA_8B, L(shard=8, zero_stage=3), adapter=LORA_ATTENTION),
    config(QWEN_7B, L(shard=2, tensor=2, zero_stage=2, **SP), adapter=LORA, recompute="selective"),
    config(LLAMA_1B, L(tensor=2), adapter=replace(LORA, dora=True), count=2),
    config(SMOL, L(shard=2, zero_stage=3), adapter=replace(LORA, quantization=Quantization(64)), length=2048),
    # Large: as they are trained.
    config(LLAMA_70B, L(shard=4, pipeline=4, tensor=8, **SP), count=4, length=8192, ranks=(0, 24)),
    config(LLAMA_70B, L(shard=64, tensor=8, zero_stage=3, **SP), length=8192, recompute="full"),
    config(LLAMA_405B, L(shard=128, pipeline=16, tensor=8, **SP), count=16, length=8192, ranks=(120,)),
    config(
        LLAMA_405B,
        L(shard=8, pipeline=16, context=16, tensor=8, zero_stage=2, **SP),
        count=16,
        length=131072,
        ranks=(1920,),
    ),
]


# --- one line ---------------------------------------------------------------------------------------------------


def share_of(layout: Layout, rank: int) -> tuple[int, int]:
    """A process's place along the pipeline, and its number among those that keep one set of weights."""
    at = {}
    for name in reversed(DIMENSIONS):
        rank, at[name] = divmod(rank, getattr(layout, name))
    return at["pipeline"], at["shard"] * layout.context + at["context"]


def row_of(one: Config, rank: int) -> dict[str, Any]:
    """One process by formula and as traced."""
    place, share = share_of(one.workload.layout, rank)
    begin = time.perf_counter()
    traced = apart(trace, one.workload, rank)
    seconds = time.perf_counter() - begin
    formula = memory_of(one.workload, place)
    sent: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0])
    for term in communication_of(one.workload, place, share):
        sent[term.key][0] += term.calls
        sent[term.key][1] += term.bytes
    differ = []
    for key in sorted({*sent, *traced.calls}):
        (calls, size), (said_calls, said) = traced.calls.get(key, (0, 0.0)), sent.get(key, (0, 0.0))
        if calls != said_calls or abs(size - said) > 1e-9 * max(size, said):
            differ.append({"for": key, "traced": (calls, size), "formula": (said_calls, said)})
    return {
        "model": one.model,
        "layout": layout_words(one.workload.layout),
        "options": option_words(one.workload),
        "rank": rank,
        "traced_peak": traced.peak_bytes,
        "formula_peak": formula.peak,
        "error": formula.peak / traced.peak_bytes - 1,
        "traced_at_rest": traced.at_rest_bytes,
        "formula_at_rest": formula.at_rest,
        "calls": sum(calls for calls, _ in traced.calls.values()),
        "sent": sum(size for _, size in traced.calls.values()),
        "differ": differ,
        "seconds": round(seconds, 1),
    }


def layout_words(layout: Layout) -> str:
    sizes = [(name, getattr(layout, name)) for name in DIMENSIONS]
    words = [f"{name} {size}" for name, size in sizes if size > 1]
    if layout.shard * layout.context > 1:
        words.append(f"ZeRO {layout.zero_stage}")
    if layout.pipeline > 1:
        words.append(layout.schedule)
    return ", ".join(words + ["sequence"] * layout.sequence_parallel) or "one process"


def option_words(workload: Workload) -> str:
    words = [f"{workload.micro_batches} x {workload.micro_rows} x {workload.sequence_length:,}"]
    if workload.recompute != "none":
        words.append(f"recompute {workload.recompute}")
    if workload.dtype != "bfloat16":
        words.append(workload.dtype)
    if workload.document_length:
        words.append(f"documents of {workload.document_length:g}")
    if workload.optimizer_state == "8bit":
        words.append("8-bit moments")
    if workload.cross_entropy != "auto":
        words.append(f"loss by {workload.cross_entropy}")
    if (adapter := workload.adapter) is not None:
        words.append("DoRA" if adapter.dora else "QLoRA" if adapter.quantization else "LoRA")
    return ", ".join(words)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a line a process."""
    lines = [
        "| model | layout | micro-batches x rows x tokens | rank | peak, traced | by formula | error | at rest | calls | sent |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        rest = row["formula_at_rest"] / row["traced_at_rest"] - 1
        cells = (
            row["model"],
            row["layout"],
            row["options"],
            str(row["rank"]),
            f"{row['traced_peak'] / 1e9:,.3f} GB",
            f"{row['formula_peak'] / 1e9:,.3f} GB",
            f"{row['error']:+.2%}",
            f"{rest:+.2%}",
            f"{row['calls']:,}",
            f"{row['sent'] / 1e9:,.3f} GB" + (" **differs**" if row["differ"] else ""),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/planner.md")
    parser.add_argument(
        "--only",
        default="",
        metavar="WORD",
        help="configurations that have WORD in their line; nothing is written",
    )
    arguments = parser.parse_args()
    rows = []
    for one in CONFIGS:
        if (
            arguments.only
            not in f"{one.model} {layout_words(one.workload.layout)} {option_words(one.workload)}"
        ):
            continue
        for rank in one.ranks:
            row = row_of(one, rank)
            rows.append(row)
            print(
                f"{row['model']:<16} {row['layout']:<48} {row['options']:<36} {rank:>5} {row['traced_peak'] / 1e9:9.3f} GB "
                f"{row['error']:+7.2%} {row['seconds']:6.1f} s",
                flush=True,
            )
            for found in row["differ"]:
                print(f"    differs: {found}", flush=True)
    wrong = [row for row in rows if row["differ"] or abs(row["error"]) > MOST_OFF]
    print(f"{len(rows)} processes of {len(CONFIGS)} configurations, {len(wrong)} wrong")
    if not arguments.only:
        print(f"wrote {write_result(NAME, {'rows': rows})}")
        if arguments.write_docs:
            put_into(DOCS, NAME, table(rows))
            print(f"wrote {DOCS}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
