"""`modelyard plan`: what a config needs and how long it takes on hardware that is not here."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from modelyard.config.disk import checkpoint_bytes, size
from modelyard.config.layout import Layout, possible_worlds, shape_problems, world_problems
from modelyard.config.loader import Loaded
from modelyard.config.train import TrainConfig
from modelyard.errors import UserError
from modelyard.plan.communication import communication_of
from modelyard.plan.duration import Duration, duration_of, members_in_node
from modelyard.plan.hardware import (
    THIS_MACHINE,
    Cluster,
    cluster_of,
    hardware_names,
    load_hardware,
    parse_rate,
)
from modelyard.plan.layout import layout_rows
from modelyard.plan.memory import KINDS, Memory, memory_of, most_of_all
from modelyard.plan.room import Room, room_of
from modelyard.plan.search import Found, in_short, lines_to_paste, search, why_slower
from modelyard.plan.summary import indented, table
from modelyard.plan.workload import Workload, workload_of

STORAGE = 2e9
"""Bytes/s that a node writes to the disk of checkpoints where nobody says otherwise."""
TO_HOST = 25e9
"""Bytes/s from a GPU to its host's memory: PCIe 4, pinned."""
MOST_GPUS = 1 << 17

NOT_MODELLED = "is planned as bf16: what it saves and costs is not modelled"

Rows = list[tuple[str, str]]


def plan_command(options: argparse.Namespace, loaded: Loaded) -> int:
    """Print the plan; the exit status is 0 where it fits. Raises UserError where there is none, or where it does not fit."""
    config, architecture = loaded.train, loaded.architecture
    if architecture is None:
        raise UserError(
            "model: the shape is not known; give an architecture, a preset (model.preset=llama-3.1-8b), or a `pretrained` folder "
            "that is there"
        )
    problems = [f"{key}: {why}" for key, why in shape_problems(config, architecture)]
    if problems and not options.search:
        raise UserError(*problems)
    _refuse_without_effect(options)
    if options.gpus is not None and options.gpus > MOST_GPUS:
        raise UserError(f"--gpus {options.gpus}: at most {MOST_GPUS:,} can be planned for")
    if options.gpus is not None and options.gpus > 0 and not options.search:
        _refuse_impossible(config, options.gpus)  # before a machine is measured for it
    cluster = _cluster(options, config)
    if options.search:
        return _print_search(options, loaded, cluster)
    _refuse_impossible(config, cluster.gpus)
    workload = _workload(options, loaded, cluster)
    if options.trace:
        return _print_trace(options, workload)
    place, memory = most_of_all(workload)
    duration, room = duration_of(workload, cluster), room_of(memory, cluster.hardware)
    if options.json:
        print(json.dumps(as_dict(config, workload, cluster, place, memory, room, duration)))
    else:
        print(report(config, workload, cluster, place, memory, room, duration, storage=_storage(options)))
    if not room.fits:
        raise UserError(does_not_fit(loaded, workload, cluster, room))
    return 0


def _refuse_without_effect(options: argparse.Namespace) -> None:
    """Options that would change nothing beside the others."""
    if options.rank and not options.trace:
        raise UserError("--rank: says which process to trace; add --trace, or leave it out")
    if options.measure and options.gpu != THIS_MACHINE:
        raise UserError(f"--measure: measures this machine; write --gpu {THIS_MACHINE}, or leave it out")
    if options.search and options.trace:
        raise UserError("--search and --trace: one at a time; trace a layout that the search found")


def _refuse_impossible(config: TrainConfig, gpus: int) -> None:
    if impossible := world_problems(config, gpus):
        near = ", ".join(map(str, possible_worlds(config)[:8]))
        raise UserError(
            *(f"{key}: {why}".replace("--nproc", "--gpus") for key, why in impossible),
            f"--gpus {gpus}: not possible with this config; possible: {near}; or let --search choose a layout",
        )


def _cluster(options: argparse.Namespace, config: TrainConfig) -> Cluster:
    network = None if options.network is None else parse_rate(options.network, "--network")
    if options.gpu == THIS_MACHINE:
        from modelyard.plan.machine import this_machine

        hardware = this_machine(again=options.measure)
    else:
        hardware = load_hardware(options.gpu)
    gpus = options.gpus
    if gpus is None:
        worlds = possible_worlds(config)
        gpus = worlds[0] if worlds else 1
    return cluster_of(hardware, gpus, gpus_per_node=options.gpus_per_node, network=network)


def _workload(options: argparse.Namespace, loaded: Loaded, cluster: Cluster) -> Workload:
    assert loaded.architecture is not None
    length = options.document_length
    if length is not None and not 1 <= length <= loaded.train.batch.sequence_length:
        raise UserError(
            f"--document-length {length}: a mean length in tokens, from 1 to batch.sequence_length "
            f"{loaded.train.batch.sequence_length}"
        )
    if length is not None and loaded.train.batch.cross_document_attention:
        raise UserError(
            f"--document-length {length}: documents see each other (batch.cross_document_attention: yes), so that their "
            "length changes nothing; write no, or leave the option out"
        )
    return workload_of(
        loaded.train,
        loaded.architecture,
        cluster.gpus,
        on_gpu=cluster.hardware.is_gpu,
        document_length=length,
    )


def _storage(options: argparse.Namespace) -> float:
    return STORAGE if options.storage is None else parse_rate(options.storage, "--storage")


# --- one plan -----------------------------------------------------------------------------------------------------


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
        ("a step", table(_duration_rows(workload, duration) + _fp8_rows(config))),
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
        (name, f"{_seconds(seconds):>9}  {seconds / duration.step:5.1%}")
        for name, seconds in items
        if seconds > 0.0005 * duration.step
    ]
    rows.append(("in all", f"{_seconds(duration.step):>9}"))
    if duration.hidden > 0.0005 * duration.step:
        rows.append(
            ("beside that", f"{_seconds(duration.hidden):>9}  of messages, while something is computed")
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


def _fp8_rows(config: TrainConfig) -> Rows:
    return [] if config.training.fp8 == "none" else [("fp8", f"{config.training.fp8} {NOT_MODELLED}")]


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
        f"training waits {_seconds(copied)} for the copy to the host"
        if config.training.checkpoint.asynchronous
        else ("training waits for it")
    )
    rows.append(
        (
            "a checkpoint",
            f"{size(whole)}: {_seconds(written)} to write at {storage / 1e9:g} GB/s a node (assumed; --storage), {stops}",
        )
    )
    return rows


def _seconds(seconds: float) -> str:
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


# --- what does not fit --------------------------------------------------------------------------------------------


def does_not_fit(loaded: Loaded, workload: Workload, cluster: Cluster, room: Room) -> str:
    """One line: what is missing, what would do on these devices, or else the least hardware that would."""
    assert loaded.architecture is not None
    there = f"a process needs {size(room.needed)}, and {cluster.hardware.title} has {size(room.there)}"
    found, _ = search(loaded.train, loaded.architecture, workload, cluster, best=1)
    if found:
        return f"does not fit: {there}; on the same devices this would: {in_short(found[0])} (--search shows the best ten)"
    return f"does not fit: {there}, and no layout of {cluster.gpus:,} would; {least_hardware(loaded, workload, cluster)}"


def least_hardware(loaded: Loaded, workload: Workload, cluster: Cluster) -> str:
    """The fewest devices of this kind, a power of two, on which some layout fits; failing that, of other kinds."""
    assert loaded.architecture is not None
    kinds = [cluster.hardware.name, *(name for name in hardware_names() if name != cluster.hardware.name)]
    for name in kinds:
        hardware = cluster.hardware if name == cluster.hardware.name else load_hardware(name)
        gpus = 1
        while gpus <= MOST_GPUS:
            tried = cluster_of(hardware, gpus)
            if name == cluster.hardware.name:
                tried = replace(cluster, gpus=gpus)
            found, _ = search(loaded.train, loaded.architecture, workload, tried, best=1)
            if found:
                return f"the least that does: {gpus:,} x {hardware.title} ({in_short(found[0])})"
            gpus *= 2
    return (
        "no number of the devices that are known would, with this batch; lower batch.sequence_length, or raise "
        "batch.batch_size so that more of them have rows"
    )


# --- search and trace ---------------------------------------------------------------------------------------------


def _print_search(options: argparse.Namespace, loaded: Loaded, cluster: Cluster) -> int:
    assert loaded.architecture is not None
    base = _base(options, loaded, cluster)
    found, tried = search(loaded.train, loaded.architecture, base, cluster)
    if not found:
        raise UserError(
            f"no layout of {cluster.gpus:,} x {cluster.hardware.title} fits ({tried:,} were looked at); "
            f"{least_hardware(loaded, base, cluster)}"
        )
    if options.json:
        print(json.dumps([_found_as_dict(one, cluster) for one in found]))
        return 0
    print(f"the best of {tried:,} layouts of {cluster.gpus:,} x {cluster.hardware.title}\n")
    print(indented(_search_table(found)))
    if loaded.train.training.fp8 != "none":
        print(f"\ntraining.fp8: {loaded.train.training.fp8} {NOT_MODELLED}")
    print(f"\nto paste, for the first:\n{indented(lines_to_paste(found[0]))}")
    return 0


def _base(options: argparse.Namespace, loaded: Loaded, cluster: Cluster) -> Workload:
    """The config's work in any layout: the one with nothing but data parallelism takes no notice of the config's own."""
    config = loaded.train
    distributed = config.model.distributed.model_copy(
        update={
            "tensor_parallel": 1,
            "pipeline_parallel": 1,
            "sequence_data_parallel": 1,
            "data_parallel_replicas": 1,
        }
    )
    batch = config.batch.model_copy(update={"micro_batch_size": None, "sequential_micro_batches": None})
    model = config.model.model_copy(update={"distributed": distributed})
    alone = config.model_copy(update={"model": model, "batch": batch})
    assert loaded.architecture is not None
    return workload_of(
        alone,
        loaded.architecture,
        1,
        on_gpu=cluster.hardware.is_gpu,
        document_length=options.document_length,
    )


def _search_table(found: list[Found]) -> str:
    lines = []
    for number, one in enumerate(found, 1):
        duration = one.duration
        mfu = f"MFU {duration.mfu_causal:.1%}" if duration.mfu_causal is not None else ""
        lines.append(
            f"{number:>2}  {in_short(one)}\n"
            f"    {_seconds(duration.step)} a step, {duration.tokens_per_second:,.0f} tokens/s a device, {mfu}, "
            f"{size(one.room.needed)} of {size(one.room.there)}"
            + ("" if number == 1 else f"\n    {why_slower(one, found[0])}")
        )
    return "\n".join(lines)


def _found_as_dict(found: Found, cluster: Cluster) -> dict[str, Any]:
    place, memory = most_of_all(found.workload)
    return as_dict(found.config, found.workload, cluster, place, memory, found.room, found.duration) | {
        "yaml": lines_to_paste(found)
    }


def _print_trace(options: argparse.Namespace, workload: Workload) -> int:
    from modelyard.plan.trace import trace

    layout = workload.layout
    ranks = options.rank or _ranks_worth_a_trace(layout)
    for rank in ranks:
        if not 0 <= rank < layout.world:
            raise UserError(f"--rank {rank}: the layout has ranks 0 to {layout.world - 1}")
    records: list[dict[str, Any]] = []
    for rank in ranks:
        traced = trace(workload, rank)
        place = place_of(layout, rank)
        memory = memory_of(workload, place)
        records.append(_trace_dict(rank, place, traced, memory))
        if not options.json:
            print(_trace_text(rank, place, traced, memory, workload))
    if options.json:
        print(json.dumps(records))
    return 0


def _trace_dict(rank: int, place: int, traced: Any, memory: Memory) -> dict[str, Any]:
    return {
        "rank": rank,
        "place": place,
        "peak_bytes": traced.peak_bytes,
        "formula_peak_bytes": memory.peak,
        "at_rest_bytes": traced.at_rest_bytes,
        "phases": traced.phase_peaks,
        "by_category": traced.by_category,
        "calls": [
            {"kind": kind, "operation": operation, "calls": calls, "bytes": sent}
            for (kind, operation), (calls, sent) in sorted(traced.calls.items())
        ],
    }


def _trace_text(rank: int, place: int, traced: Any, memory: Memory, workload: Workload) -> str:
    rows = [
        (
            "peak",
            f"{size(traced.peak_bytes)} (by formula {size(memory.peak)}, {memory.peak / traced.peak_bytes - 1:+.2%})",
        ),
        ("between steps", size(traced.at_rest_bytes)),
        ("phases", ", ".join(f"{phase} {size(peak)}" for phase, peak in traced.phase_peaks.items())),
        (
            "at the peak",
            ", ".join(f"{kind} {size(held)}" for kind, held in traced.by_category.items() if held),
        ),
    ]
    expected: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for term in communication_of(workload, place):
        expected[term.key][0] += term.calls
        expected[term.key][1] += term.bytes
    for key in sorted({*traced.calls, *expected}):
        calls, sent = traced.calls.get(key, (0, 0.0))
        same = abs(expected[key][0] - calls) < 0.5 and abs(expected[key][1] - sent) < 1
        verdict = (
            "as by formula" if same else f"by formula {expected[key][0]:,.0f} calls, {size(expected[key][1])}"
        )
        if calls or expected[key][0]:
            rows.append((" ".join(key), f"{calls:,} calls, {size(sent)} sent ({verdict})"))
    title = f"rank {rank}" + (f", number {place} of the pipeline" if workload.layout.pipeline > 1 else "")
    return f"{title}\n{indented(table(rows))}"


def place_of(layout: Layout, rank: int) -> int:
    """The number along the pipeline of a rank."""
    return rank // (layout.tensor * layout.context) % layout.pipeline


def _ranks_worth_a_trace(layout: Layout) -> Iterable[int]:
    """One of each place along the pipeline, at most the first, the second and the last two."""
    places = range(layout.pipeline)
    chosen = sorted({*places[:2], *places[-2:]})
    return [place * layout.tensor * layout.context for place in chosen]
