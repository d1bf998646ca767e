"""Which layout of so many devices is the fastest that fits, and why the others are not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import gcd

from modelyard.config.adapter import matmul_flops_per_token
from modelyard.config.architecture import Architecture
from modelyard.config.layout import (
    FIXED_STAGES,
    SPLIT_BACKWARD,
    Layout,
    Schedule,
    divisors,
    layout_of,
    shape_problems,
    world_problems,
)
from modelyard.config.train import TrainConfig
from modelyard.plan.duration import Duration, duration_of
from modelyard.plan.hardware import Cluster
from modelyard.plan.layout import layout_line
from modelyard.plan.memory import Memory, least_memory, most_of_all
from modelyard.plan.room import Room, room_of
from modelyard.plan.workload import Workload

SCHEDULES: tuple[Schedule, ...] = ("1f1b", "interleaved", "zero_bubble", "zbv")
"""Those worth trying: `gpipe` is never faster than `1f1b`, and keeps more."""
TURNS = (2, 4, 8)
"""Stages a process that are tried where the schedule leaves them open, and as many as the layers allow."""
LEAST_CHUNK = 4096
"""Tokens of a row that a process has at least: rows are not spread thinner."""
ROWS = (1, 2, 4, 8)
"""Of a micro-batch."""
LARGE = 8192
"""Length of a matrix product that counts as large."""


@dataclass(frozen=True)
class Found:
    """A layout, and what is known of it."""

    config: TrainConfig
    workload: Workload
    duration: Duration
    memory: Memory
    room: Room


def search(
    config: TrainConfig, architecture: Architecture, workload: Workload, cluster: Cluster, *, best: int = 10
) -> tuple[list[Found], int]:
    """The fastest layouts that fit, and how many layouts there were to choose from.

    The batch, what is computed and with which dtype stay as `workload`, of the same config in any layout, has them. Layouts are
    looked at in the order of what they take at least; where that is more than the last of the best takes, it ends.
    """
    tried = sorted(
        (
            (at_least(candidate, cluster), candidate, changed)
            for changed, candidate in candidates(config, architecture, workload, cluster)
        ),
        key=lambda one: (one[0], *_simpler(one[1])),
    )
    found: list[Found] = []
    for bound, candidate, changed in tried:
        if len(found) == best and bound > found[-1].duration.step:
            break
        if least_memory(candidate) > cluster.hardware.memory:
            continue
        duration = duration_of(candidate, cluster)
        if len(found) == best and duration.step >= found[-1].duration.step:
            continue
        _, memory = most_of_all(candidate)
        room = room_of(memory, cluster.hardware)
        if room.fits:
            found = _with(found, Found(changed, candidate, duration, memory, room), best)
    return found, len(tried)


def anything_fits(
    config: TrainConfig, architecture: Architecture, workload: Workload, cluster: Cluster
) -> bool:
    """Whether any layout does; those that take the least at any rate are asked first."""
    tried = [(least_memory(work), work) for _, work in candidates(config, architecture, workload, cluster)]
    for least, candidate in sorted(tried, key=lambda one: one[0]):
        if least > cluster.hardware.memory:
            return False
        _, memory = most_of_all(candidate)
        if room_of(memory, cluster.hardware).fits:
            return True
    return False


def _with(found: list[Found], new: Found, best: int) -> list[Found]:
    """The best with a new one among them; of layouts that only save memory in other ways the fastest stays."""
    alike = [other for other in found if _is_alike(other.workload, new.workload)]
    if any(other.duration.step <= new.duration.step for other in alike):
        return found
    kept = [other for other in found if other not in alike]
    return sorted([*kept, new], key=lambda one: (one.duration.step, *_simpler(one.workload)))[:best]


def at_least(workload: Workload, cluster: Cluster) -> float:
    """Seconds that a step takes at any rate: matrix products as fast as large ones, attention, the exchanges of tensor
    parallelism, and the bubble where nothing fills it."""
    layout, shape, rates = workload.layout, workload.architecture, cluster.hardware.rates
    products = matmul_flops_per_token(shape, workload.adapter)
    attention = shape.attention_flops_per_token(workload.sequence_length, causal=True)
    if workload.document_length is not None:
        attention = round(attention * min(1.0, workload.document_length / workload.sequence_length))
    if workload.recompute == "full":
        head = 6 * shape.vocab_size * shape.hidden_size
        products, attention = products + (products - head) // 3, attention * 4 // 3
    length = float(workload.document_length or workload.sequence_length)
    large = rates.matmul(workload.dtype, LARGE, LARGE, LARGE, "output")
    seconds = products / large + attention / rates.attention(
        workload.dtype, shape.head_size, length, backward=False
    )
    seconds *= workload.step_tokens / cluster.gpus / rates.together
    if layout.tensor > 1:
        ring = 1 - 1 / layout.tensor
        layers = shape.num_layers / layout.pipeline * workload.micro_batches
        sent = 8 * layers * workload.tokens * shape.hidden_size * workload.width * ring
        seconds += sent / rates.send(cluster.hardware.link, layout.tensor, crosses=False)
    if layout.schedule in ("1f1b", "interleaved"):
        seconds *= 1 + (layout.pipeline - 1) / (layout.stages_per_process * workload.micro_batches)
    return seconds


def _simpler(workload: Workload) -> tuple[int, ...]:
    """Of layouts that are equally fast, the one with fewer splits first."""
    layout = workload.layout
    return layout.pipeline, layout.tensor, layout.context, layout.zero_stage, layout.stages_per_process


def _is_alike(workload: Workload, other: Workload) -> bool:
    """Whether two layouts differ in what they save memory with alone: ZeRO, recomputation."""
    same = replace(workload.layout, zero_stage=other.layout.zero_stage) == other.layout
    return same and workload.micro_rows == other.micro_rows


def candidates(
    config: TrainConfig, architecture: Architecture, workload: Workload, cluster: Cluster
) -> Iterator[tuple[TrainConfig, Workload]]:
    """All layouts that can be on these devices and whose weights and optimizer state have room."""
    for tensor, context, pipeline in _splits(architecture, workload, cluster):
        if cluster.gpus % (tensor * context * pipeline):
            continue
        data = cluster.gpus // (tensor * context * pipeline)
        for schedule, turns in _schedules(pipeline, architecture.num_layers):
            for rows in _micro_rows(workload.batch_rows, data):
                changed = _changed(config, tensor, context, pipeline, schedule, turns, rows)
                if world_problems(changed, cluster.gpus) or shape_problems(changed, architecture):
                    continue
                layout = layout_of(changed, cluster.gpus)
                # As `workload_of` has it: no compiled code where the backward is split.
                compiled = workload.compiled and not (pipeline > 1 and schedule in SPLIT_BACKWARD)
                yield from _kept(
                    changed, replace(workload, layout=layout, micro_rows=rows, compiled=compiled)
                )


def _splits(
    architecture: Architecture, workload: Workload, cluster: Cluster
) -> Iterator[tuple[int, int, int]]:
    """(tensor, context, pipeline)."""
    heads = gcd(architecture.num_attention_heads, architecture.head_groups, architecture.ffn_hidden_size)
    tensors = [t for t in divisors(gcd(heads, architecture.vocab_size)) if t <= cluster.gpus_per_node]
    most = workload.sequence_length // LEAST_CHUNK
    contexts = [1 << power for power in range(10) if power == 0 or 1 << power <= most]
    pipelines = [p for p in divisors(cluster.gpus) if p <= architecture.num_layers]
    for tensor in tensors:
        for context in contexts:
            for pipeline in pipelines:
                yield tensor, context, pipeline


def _schedules(pipeline: int, layers: int) -> Iterator[tuple[Schedule, int | None]]:
    """Schedules, and the stages a process that a configuration has to name."""
    if pipeline == 1:
        yield "1f1b", None
        return
    for schedule in SCHEDULES:
        if schedule in FIXED_STAGES:
            yield schedule, None
        else:
            most = layers // pipeline
            for turns in (
                sorted({*TURNS, min(most, 2 * TURNS[-1])}) if schedule == "interleaved" else TURNS[:1]
            ):
                if 2 <= turns <= most:
                    yield schedule, turns


def _micro_rows(batch_rows: int, data: int) -> Iterable[int]:
    if batch_rows % data:
        return []
    return [rows for rows in ROWS if batch_rows // data % rows == 0]


def _changed(
    config: TrainConfig,
    tensor: int,
    context: int,
    pipeline: int,
    schedule: Schedule,
    turns: int | None,
    rows: int,
) -> TrainConfig:
    distributed = config.model.distributed.model_copy(
        update={
            "tensor_parallel": tensor,
            "sequence_tensor_parallel": tensor > 1,
            "pipeline_parallel": pipeline,
            "pipeline_schedule": schedule,
            "stages_per_process": turns,
            "sequence_data_parallel": context,
            "data_parallel_replicas": 1,
        }
    )
    batch = config.batch.model_copy(update={"micro_batch_size": rows, "sequential_micro_batches": None})
    model = config.model.model_copy(update={"distributed": distributed})
    return config.model_copy(update={"model": model, "batch": batch})


def _kept(config: TrainConfig, workload: Workload) -> Iterator[tuple[TrainConfig, Workload]]:
    """The layout with each ZeRO stage and recomputation, from the fastest on."""
    for stage in (1, 2, 3):
        if stage > 1 and workload.layout.shard * workload.layout.context == 1:
            continue
        for recompute in ("none", "selective", "full"):
            multi_stage = config.model.multi_stage.model_copy(
                update={"zero_stage": stage, "recompute": recompute}
            )
            model = config.model.model_copy(update={"multi_stage": multi_stage})
            layout: Layout = replace(workload.layout, zero_stage=stage)
            yield (
                config.model_copy(update={"model": model}),
                replace(workload, layout=layout, recompute=recompute),
            )


def lines_to_paste(found: Found) -> str:
    """The layout as YAML, to come after whatever layout a config has."""
    layout, distributed = found.workload.layout, found.config.model.distributed
    yes = "yes" if layout.sequence_parallel else "no"
    stages = distributed.stages_per_process
    lines = [
        "batch:",
        f"  micro_batch_size: {found.workload.micro_rows}",
        "  sequential_micro_batches: null",
        "model:",
        "  distributed:",
        f"    tensor_parallel: {layout.tensor}",
        f"    sequence_tensor_parallel: {yes}",
        f"    sequence_data_parallel: {layout.context}",
        f"    data_parallel_replicas: {layout.replicate}",
        f"    pipeline_parallel: {layout.pipeline}",
    ]
    if layout.pipeline > 1:
        lines.append(f"    pipeline_schedule: {layout.schedule}")
    lines.append(f"    stages_per_process: {'null' if stages is None else stages}")
    lines += [
        "  multi_stage:",
        f"    zero_stage: {layout.zero_stage}",
        f"    recompute: {found.workload.recompute}",
    ]
    return "\n".join(lines)


def why_slower(found: Found, first: Found) -> str:
    """What the first one saves: the largest differences of the step's items, in its time."""
    names = {*found.duration.items, *first.duration.items}
    more = {name: found.duration.items.get(name, 0.0) - first.duration.items.get(name, 0.0) for name in names}
    slower = found.duration.step / first.duration.step - 1
    if slower < 0.0005:
        return "as fast, and splits more"
    largest = sorted(more, key=lambda name: -more[name])
    worth_saying = 0.005 * first.duration.step
    parts = [
        f"{name} {more[name] / first.duration.step:+.1%}"
        for name in dict.fromkeys([*largest[:2], largest[-1]])
        if abs(more[name]) > worth_saying
    ]
    return f"{slower:+.1%}: {', '.join(parts) or 'a little of everything'}"


def in_short(found: Found) -> str:
    """The layout in a line of a table."""
    work = found.workload
    pieces = [layout_line(work.layout)]
    if work.layout.pipeline > 1:
        pieces.append(f"{work.layout.schedule} x {work.layout.stages_per_process}")
    pieces += [f"{work.micro_batches} x {work.micro_rows} rows", f"recompute {work.recompute}"]
    return ", ".join(pieces)
