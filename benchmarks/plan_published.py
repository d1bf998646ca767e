"""How near is the planner to what others published? Predicted and published speed of training runs that nobody here made.

    python benchmarks/plan_published.py [--write-docs]

Every row is a run as its source describes it; what the source does not say is said to be assumed. One set of constants
predicts all of them (`modelyard/plan/attainable.yaml`); rows marked `calibration` are those that its `together` was chosen by,
and prove nothing. Other programs hide some of their communication or recompute other things than this one: a row says so in
`program`, by its source. fp8 rows are left out: the planner does not plan fp8.

Writes benchmarks/results/plan_published.json and, with `--write-docs`, the table of docs/planner.md. Seconds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import put_into, write_result  # noqa: E402
from modelyard.config.architecture import Architecture  # noqa: E402
from modelyard.config.layout import Layout  # noqa: E402
from modelyard.plan.duration import OURS, Duration, Program, duration_of  # noqa: E402
from modelyard.plan.hardware import cluster_of, load_hardware  # noqa: E402
from modelyard.plan.workload import Workload  # noqa: E402

NAME = "plan_published"
DOCS = ROOT / "docs" / "planner.md"
LLAMA_VOCABULARY = 128_256
OVERLAP = 0.5
"""Share of the exchanges of tensor parallelism that a program hides which says that it overlaps them: assumed, one for all."""


def llama(
    hidden: int, layers: int, heads: int, inner: int, vocabulary: int = LLAMA_VOCABULARY
) -> Architecture:
    """Llama 3's proportions: 8 key/value heads of 128."""
    return Architecture(vocabulary, hidden, layers, heads, 8, 128, inner)


def gpt(hidden: int, layers: int, vocabulary: int, *, head: int = 128, tied: bool = False) -> Architecture:
    """GPT's proportions: as many key/value heads as heads, a feed-forward of four times the width, no gate."""
    heads = hidden // head
    return Architecture(
        vocabulary,
        hidden,
        layers,
        heads,
        heads,
        head,
        4 * hidden,
        tie_word_embeddings=tied,
        gated=False,
        activation="gelu",
        norm_type="layer_norm",
    )


B8, B70, B405 = (
    llama(4096, 32, 32, 14336),
    llama(8192, 80, 64, 28672),
    llama(16384, 126, 128, 53248),
)


@dataclass(frozen=True)
class Row:
    """One published figure and the run that it is of."""

    source: str
    what: str
    workload: Workload
    gpu: str
    unit: str
    """`tokens/s` of one GPU, or `MFU full`, `MFU causal` in per cent, or `TFLOP/s` of one GPU, attention counted full."""
    published: float
    program: Program = OURS
    remark: str = ""
    calibration: bool = False


def row(
    source: str,
    what: str,
    architecture: Architecture,
    layout: Layout,
    batch_rows: int,
    micro_rows: int,
    sequence: int,
    unit: str,
    published: float,
    *,
    gpu: str = "h100",
    compiled: bool = True,
    recompute: Any = "none",
    program: Program = OURS,
    remark: str = "",
    calibration: bool = False,
) -> Row:
    """A row in fewer words."""
    workload = Workload(
        architecture,
        layout,
        batch_rows,
        micro_rows,
        sequence,
        recompute=recompute,
        compiled=compiled,
        on_gpu=True,
    )
    return Row(source, what, workload, gpu, unit, published, program, remark, calibration)


def llama_rows() -> Iterator[Row]:
    source = "Llama 3, table 4 (arXiv 2407.21783)"
    # Gradients are accumulated in fp32 over micro-batches and reduced once, messages between stages are asynchronous (3.3.2).
    # A stage of 128 was the embedding or the head alone; here 126 layers make 112 stages.
    program = Program(hidden={"pipeline": 1.0})
    for gpus, context, sequence, data, each, published in (
        (8_192, 1, 8_192, 64, 32, 43),
        (16_384, 1, 8_192, 128, 16, 41),
        (16_384, 16, 131_072, 8, 16, 38),
    ):
        layout = Layout(
            shard=data,
            pipeline=16,
            context=context,
            tensor=8,
            sequence_parallel=True,
            schedule="interleaved",
            stages_per_process=7,
        )
        what = f"405B, {gpus:,} x H100, TP 8 CP {context} PP 16 DP {data}, {sequence:,} tokens"
        remark = "PaLM's MFU, which the paper cites, counts the square"
        yield row(
            source,
            what,
            B405,
            layout,
            data * each,
            1,
            sequence,
            "MFU full",
            published,
            program=program,
            remark=remark,
        )


def fast_llm_rows() -> Iterator[Row]:
    layout = Layout(shard=32, zero_stage=2)
    yield row("Fast-LLM, quick start", "Llama-3.1-8B, 32 x H100, ZeRO 2", B8, layout, 256, 2, 4096, "tokens/s", 10_100,
              calibration=True)  # fmt: skip
    mistral = llama(4096, 32, 32, 14336, 32_000)
    for source, published in (("Fast-LLM, documentation", 10_350), ("Fast-LLM, README", 9_800)):
        yield row(source, "Mistral-7B, 32 x H100, 256k tokens a batch", mistral, layout, 32, 1, 8192, "tokens/s", published,
                  remark="ZeRO 2 and rows of 8,192 tokens assumed")  # fmt: skip


def torchtitan_rows() -> Iterator[Row]:
    source = "torchtitan, 2024-12"
    weak = "GPUs of 500 W with HBM2e"
    again = Program(recomputed=0.5)
    """Its selective checkpointing saves every second matrix product."""
    for gpus, figures in ((8, (5_762, 6_667)), (128, (5_605, 6_514))):
        for compiled, published in zip((False, True), figures, strict=True):
            what = f"Llama-3.1-8B, {gpus} x H100, FSDP, {'compiled' if compiled else 'eager'}"
            layout = Layout(shard=gpus, zero_stage=3)
            yield row(source, what, B8, layout, 2 * gpus, 2, 8192, "tokens/s", published, compiled=compiled,
                      recompute="selective", program=again, remark=weak)  # fmt: skip
    source = "torchtitan, 2025-06"
    layout = Layout(shard=8, tensor=8, sequence_parallel=True, zero_stage=3)
    asynchronous = Program(hidden={"tensor": OVERLAP}, recomputed=0.5)
    for name, program, published in (("", again, 4_378), (", async TP", asynchronous, 4_809.4)):
        yield row(source, f"Llama-3.1-8B, 64 x H100, FSDP 8 TP 8{name}", B8, layout, 8 * 12, 12, 8192, "tokens/s", published,
                  recompute="selective", program=program, remark=weak)  # fmt: skip
    layout = Layout(shard=32, tensor=8, sequence_parallel=True, zero_stage=3)
    asynchronous = Program(hidden={"tensor": OVERLAP})
    for name, program, published in (("", OURS, 597.3), (", async TP", asynchronous, 652.4)):
        yield row(source, f"Llama-3.1-70B, 256 x H100, FSDP 32 TP 8{name}", B70, layout, 32 * 16, 16, 8192, "tokens/s",
                  published, recompute="full", program=program, remark=weak)  # fmt: skip
    source = "torchtitan, docs/performance.md (2024)"
    layout = Layout(shard=64, zero_stage=3)
    yield row(source, "Llama-3-8B, 64 x A100, FSDP", B8, layout, 64, 1, 8192, "tokens/s", 2_973, gpu="a100",
              recompute="selective", program=again, remark="compiled assumed")  # fmt: skip
    yield row(source, "Llama-3-70B, 64 x A100, FSDP", B70, layout, 64, 1, 8192, "tokens/s", 331, gpu="a100",
              recompute="full", remark="compiled and one row a micro-batch assumed")  # fmt: skip


def megatron_rows() -> Iterator[Row]:
    source = "Megatron-LM, README (Mcore 0.8)"
    program = Program(hidden={"tensor": OVERLAP, "pipeline": 1.0})
    # (billions, hidden, layers, TP, PP, GPUs, TFLOP/s): the widths and depths are those of GPT's proportions that make the
    # number of parameters, the batch of 1,152 rows is that of the README's strong scaling,
    # and a stage has one layer.
    for size, hidden, layers, tensor, pipeline, gpus, published in (
        (1.7, 2048, 24, 1, 1, 48, 408.8),
        (7.1, 4096, 30, 2, 1, 96, 465.9),
        (16, 6144, 32, 4, 1, 192, 489.1),
        (32, 8192, 37, 8, 1, 384, 459.6),
        (70, 8192, 84, 8, 2, 768, 419.7),
        (119, 12288, 64, 8, 4, 1536, 420.5),
        (177, 12288, 96, 8, 6, 2304, 432.8),
        (314, 16384, 96, 8, 8, 3072, 474.4),
        (462, 18432, 112, 8, 16, 6144, 459.9),
    ):
        yield row(source, f"{size}B, {gpus:,} x H100, TP {tensor} PP {pipeline}", gpt(hidden, layers, 131_072),
                  _megatron(layers, gpus, tensor, pipeline), 1152, 1, 4096, "TFLOP/s", published, program=program,
                  remark="shape from the size, batch and stages assumed")  # fmt: skip
    for gpus, published in ((96, 47), (4608, 42)):
        yield row(source, f"177B, strong scaling, {gpus:,} x H100, TP 8 PP 6", gpt(12288, 96, 131_072),
                  _megatron(96, gpus, 8, 6), 1152, 1, 4096, "MFU full", published, program=program,
                  remark="shape from the size, PP and stages assumed")  # fmt: skip


def _megatron(layers: int, gpus: int, tensor: int, pipeline: int) -> Layout:
    return Layout(
        shard=gpus // tensor // pipeline,
        pipeline=pipeline,
        tensor=tensor,
        sequence_parallel=tensor > 1,
        schedule="interleaved" if pipeline > 1 else "1f1b",
        stages_per_process=layers // pipeline if pipeline > 1 else 1,
    )


def foundry_rows() -> Iterator[Row]:
    source = "llm-foundry, benchmarking README"
    b7 = gpt(4096, 32, 50_368, tied=True)
    assumed = "8,192 tokens a micro-batch assumed"
    for gpus, published in ((8, 10_643), (512, 9_670)):
        yield row(source, f"MPT-7B, {gpus} x H100, 2,048 tokens", b7, Layout(shard=gpus, zero_stage=3), 16 * gpus, 4, 2048,
                  "tokens/s", published, compiled=False, remark=assumed, calibration=gpus == 8)  # fmt: skip
    yield row(source, "MPT-7B, 8 x H100, 8,192 tokens, full recomputation", b7, Layout(shard=8, zero_stage=3), 32, 1, 8192,
              "tokens/s", 6_935, compiled=False, recompute="full", remark=assumed, calibration=True)  # fmt: skip
    yield row(source, "MPT-70B, 512 x H100, 2,048 tokens, full recomputation", gpt(8192, 80, 50_368, tied=True),
              Layout(shard=512, zero_stage=3), 512 * 8, 8, 2048, "tokens/s", 1_007, compiled=False, recompute="full",
              remark="16,384 tokens a micro-batch assumed")  # fmt: skip
    yield row(source, "MPT-1B, 128 x H100, 2,048 tokens", gpt(2048, 24, 50_368, tied=True), Layout(shard=128, zero_stage=3),
              128 * 8, 4, 2048, "tokens/s", 44_123, compiled=False, remark=assumed, calibration=True)  # fmt: skip
    yield row(source, "MPT-3B, 16 x H100, 2,048 tokens", gpt(2560, 32, 50_368, tied=True), Layout(shard=16, zero_stage=3),
              16 * 16, 4, 2048, "tokens/s", 24_142, compiled=False, remark=assumed, calibration=True)  # fmt: skip


def predicted(entry: Row) -> tuple[float, Duration]:
    """The figure in the row's unit, and the whole prediction."""
    cluster = cluster_of(load_hardware(entry.gpu), entry.workload.layout.world)
    found = duration_of(entry.workload, cluster, entry.program)
    assert found.mfu_full is not None
    assert found.mfu_causal is not None
    values = {
        "tokens/s": found.tokens_per_second,
        "MFU full": 100 * found.mfu_full,
        "MFU causal": 100 * found.mfu_causal,
        "TFLOP/s": found.flops_full / found.step / found.gpus / 1e12,
    }
    return values[entry.unit], found


def results() -> list[dict[str, Any]]:
    """All rows with their errors."""
    rows = []
    for entry in (*llama_rows(), *fast_llm_rows(), *torchtitan_rows(), *megatron_rows(), *foundry_rows()):
        value, found = predicted(entry)
        most = sorted(found.items.items(), key=lambda item: -item[1])
        rows.append(
            {
                "source": entry.source,
                "run": entry.what,
                "unit": entry.unit,
                "published": entry.published,
                "predicted": value,
                "error": value / entry.published - 1,
                "mfu_causal": found.mfu_causal,
                "mfu_full": found.mfu_full,
                "bubble_share": found.bubble_share,
                "calibration": entry.calibration,
                "remark": entry.remark,
                "shares": {name: seconds / found.step for name, seconds in most},
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a line a run."""
    lines = [
        "| published by | run | unit | published | predicted | error | MFU causal, full | bubble | remarks |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    before = None
    for entry in rows:
        source = "" if entry["source"] == before else entry["source"]
        before = entry["source"]
        is_share = entry["unit"].startswith("MFU")
        number = "{:.1f}" if is_share else "{:,.0f}"
        error = (
            f"{entry['predicted'] - entry['published']:+.1f} points" if is_share else f"{entry['error']:+.1%}"
        )
        remark = ("calibration; " if entry["calibration"] else "") + entry["remark"]
        cells = (
            source,
            entry["run"],
            entry["unit"],
            f"{entry['published']:,}",
            number.format(entry["predicted"]),
            error,
            f"{entry['mfu_causal']:.1%}, {entry['mfu_full']:.1%}",
            f"{entry['bubble_share']:.1%}" if entry["bubble_share"] else "",
            remark.rstrip("; "),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/planner.md")
    arguments = parser.parse_args()
    rows = results()
    print(table(rows))
    print(f"wrote {write_result(NAME, {'rows': rows})}")
    if arguments.write_docs:
        put_into(DOCS, NAME, table(rows))
        print(f"wrote {DOCS}")


if __name__ == "__main__":
    main()
