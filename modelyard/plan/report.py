"""A plan as people read it, and as a record."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

from modelyard.config.disk import checkpoint_bytes, size
from modelyard.config.layout import Layout
from modelyard.config.train import TrainConfig
from modelyard.plan.communication import communication_of
from modelyard.plan.duration import Duration, members_in_node
from modelyard.plan.hardware import Cluster
from modelyard.plan.layout import layout_rows
from modelyard.plan.memory import KINDS, Memory, memory_of
from modelyard.plan.room import Room
from modelyard.plan.summary import indented, table
from modelyard.plan.workload import Workload

STORAGE = 2e9
"""Bytes/s that a node writes to the disk of checkpoints where nobody says otherwise."""
TO_HOST = 25e9
"""Bytes/s from a GPU to its host's memory: PCIe 4, pinned."""
NOT_MODELLED = "is planned as bf16: what it saves and costs is not modelled"

Rows = list[tuple[str, str]]


def report(
    config: TrainConfig,
    workload: Workload,
    cluster: Cluster,
    place: int,
    memory: Memory,
    room: Room,
    duration: Duration,
    *,
    storage: float = STORAGE,
) -> str:
    """The plan as people read it."""
    layout = [
        (name, text.replace("--nproc N", "--gpus N"))
        for name, text in layout_rows(config, workload.architecture, workload.layout)
    ]
    blocks = [
        ("hardware", table(_cluster_rows(cluster))),
        ("layout", table(layout)),
        (_memory_title(workload, place), table(_memory_rows(workload, place, memory, room))),
        ("a step", table(_duration_rows(workload, duration) + _not_modelled_rows(config))),
        ("messages of a process in a step", table(_message_rows(workload, cluster, place))),
        ("the run", table(_run_rows(config, workload, cluster, duration, storage))),
    ]
    return "\n\n".join(f"{title}\n{indented(body)}" for title, body in blocks if body)


def _cluster_rows(cluster: Cluster) -> Rows:
    hardware = cluster.hardware
    rows = [("devices", f"{cluster.gpus:,} x {hardware.title}")]
    if cluster.nodes > 1:
        rows.append(
            (
                "nodes",
                f"{cluster.nodes:,} of {cluster.gpus_per_node}; each GPU sends {hardware.link / 1e9:,.0f} GB/s within "
                f"and {cluster.network / 1e9:,.0f} GB/s between them",
            )
        )
    return rows


def _memory_title(workload: Workload, place: int) -> str:
    if workload.layout.pipeline == 1:
        return "memory of a process"
    return f"memory of the process that holds most, number {place} of the pipeline"


def _memory_rows(workload: Workload, place: int, memory: Memory, room: Room) -> Rows:
    rows = [(kind, size(memory.at_peak[kind])) for kind in KINDS if memory.at_peak.get(kind, 0) >= 1 << 19]
    rows.append(
        ("at the peak", f"{size(memory.peak)}, in the {memory.moment}; {size(memory.at_rest)} between steps")
    )
    if room.runtime:
        rows.append(
            (
                "beside tensors",
                f"{size(room.fragmentation)} between them, {size(room.runtime)} context and libraries (assumed)",
            )
        )
    verdict = "fits" if room.fits else "does NOT fit"
    rows.append(("needed", f"{size(room.needed)} of {size(room.there)}: {verdict}"))
    other = [
        f"{mode} {size(memory_of(replace(workload, recompute=mode), place).peak)}"
        for mode in ("none", "selective", "full")
        if mode != workload.recompute and not workload.offload_activations
    ]
    if other:
        rows.append((f"recompute {workload.recompute}", f"the peak with another: {', '.join(other)}"))
    return rows


def _duration_rows(workload: Workload, duration: Duration) -> Rows:
    items = sorted(duration.items.items(), key=lambda item: -item[1])
    rows = [
        (name, f"{seconds_text(seconds):>9}  {seconds / duration.step:5.1%}")
        for name, seconds in items
        if seconds > 0.0005 * duration.step
    ]
    rows.append(("in all", f"{seconds_text(duration.step):>9}"))
    if duration.hidden > 0.0005 * duration.step:
        rows.append(
            ("beside that", f"{seconds_text(duration.hidden):>9}  of messages, while something is computed")
        )
    rows.append(
        (
            "FLOPs",
            f"{duration.flops_causal:.4g} of all devices with causal attention, {duration.flops_full:.4g} with the full "
            f"square; {duration.flops_executed:.4g} are computed",
        )
    )
    rows.append(
        (
            "speed",
            f"{duration.tokens_per_second:,.0f} tokens/s a device, {duration.tokens_per_second * duration.gpus:,.0f} in all; "
            f"{duration.flops_per_second / 1e12:,.4g} TFLOP/s",
        )
    )
    if duration.mfu_causal is not None and duration.mfu_full is not None and duration.peak:
        rows.append(
            (
                "MFU",
                f"{duration.mfu_causal:.1%} with causal attention (Fast-LLM, Megatron), {duration.mfu_full:.1%} with the full "
                f"square (PaLM, torchtitan), of {duration.peak / 1e12:,.4g} TFLOP/s; {duration.hfu:.1%} with what is computed "
                "twice",
            )
        )
    return rows


def _not_modelled_rows(config: TrainConfig) -> Rows:
    """What the seconds above do not know of."""
    rows = [] if config.training.fp8 == "none" else [("fp8", f"{config.training.fp8} {NOT_MODELLED}")]
    if config.model.multi_stage.cpu_offload:
        rows.append(
            (
                "cpu_offload",
                "copies to and from the host, and the optimizer there, are not modelled: a step takes longer",
            )
        )
    return rows


def _message_rows(workload: Workload, cluster: Cluster, place: int) -> Rows:
    found: dict[tuple[str, str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for term in communication_of(workload, place):
        if term.group > 1 and term.calls:
            entry = found[term.key[0], term.key[1], term.dimension]
            entry[0] += term.calls
            entry[1] += term.bytes
    rows = []
    for (kind, operation, dimension), (calls, sent) in found.items():
        members, here = members_in_node(workload.layout, dimension, cluster.gpus_per_node)
        where = (
            "within a node"
            if here >= members
            else f"{here} of {members} in a node"
            if here > 1
            else "between nodes"
        )
        rows.append(
            (f"{kind} {operation}", f"{calls:,.0f} calls, {size(sent)} sent, among {members:,} ({where})")
        )
    return rows


def _run_rows(
    config: TrainConfig, workload: Workload, cluster: Cluster, duration: Duration, storage: float
) -> Rows:
    iterations = config.training.train_iters
    rows = []
    if iterations:
        rows.append(
            (
                "duration",
                f"{duration.days(iterations):,.2f} days, {duration.gpu_hours(iterations):,.0f} GPU-hours for {iterations:,} "
                f"iterations of {workload.step_tokens:,} tokens, without evaluations and failures",
            )
        )
    whole = checkpoint_bytes(config, workload.architecture)
    writers = min(
        cluster.nodes, max(1, workload.layout.world // workload.layout.replicate // cluster.gpus_per_node)
    )
    written, copied = (
        whole / storage / writers,
        whole / (workload.layout.world / workload.layout.replicate) / TO_HOST,
    )
    stops = (
        f"training waits {seconds_text(copied)} for the copy to the host"
        if config.training.checkpoint.asynchronous
        else ("training waits for it")
    )
    rows.append(
        (
            "a checkpoint",
            f"{size(whole)}: {seconds_text(written)} to write at {storage / 1e9:g} GB/s a node (assumed; --storage), {stops}",
        )
    )
    return rows


def seconds_text(seconds: float) -> str:
    """Seconds as people read them."""
    if seconds >= 120:
        return f"{seconds / 60:,.1f} min"
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{seconds * 1e3:,.1f} ms"


def as_dict(
    config: TrainConfig,
    workload: Workload,
    cluster: Cluster,
    place: int,
    memory: Memory,
    room: Room,
    duration: Duration,
) -> dict[str, Any]:
    """The plan as a record: bytes, seconds, FLOP/s."""
    iterations = config.training.train_iters
    return {
        "gpu": cluster.hardware.name,
        "gpus": cluster.gpus,
        "gpus_per_node": cluster.gpus_per_node,
        "network_bytes_per_second": cluster.network,
        "layout": _sizes(workload.layout),
        "micro_batches": workload.micro_batches,
        "micro_batch_size": workload.micro_rows,
        "recompute": workload.recompute,
        "memory": {
            "place": place,
            "peak_bytes": memory.peak,
            "at_peak": dict(memory.at_peak),
            "moment": memory.moment,
            "at_rest_bytes": memory.at_rest,
            "needed_bytes": round(room.needed),
            "there_bytes": room.there,
            "fits": room.fits,
        },
        "step_seconds": duration.step,
        "items": dict(duration.items),
        "tokens_per_second_per_gpu": duration.tokens_per_second,
        "mfu_causal": duration.mfu_causal,
        "mfu_full": duration.mfu_full,
        "bubble_share": duration.bubble_share,
        "messages": [
            {
                "kind": term.key[0],
                "operation": term.key[1],
                "calls": term.calls,
                "bytes": term.bytes,
                "group": term.group,
            }
            for term in communication_of(workload, place)
        ],
        "days": duration.days(iterations),
        "gpu_hours": duration.gpu_hours(iterations),
        "checkpoint_bytes": checkpoint_bytes(config, workload.architecture),
    }


def _sizes(layout: Layout) -> dict[str, Any]:
    return {
        "replicate": layout.replicate,
        "shard": layout.shard,
        "pipeline": layout.pipeline,
        "context": layout.context,
        "tensor": layout.tensor,
        "sequence_parallel": layout.sequence_parallel,
        "zero_stage": layout.zero_stage,
        "schedule": layout.schedule,
        "stages_per_process": layout.stages_per_process,
    }
