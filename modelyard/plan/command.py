"""`modelyard plan`: what a config needs and how long it takes on hardware that is not here."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from modelyard.config.disk import size
from modelyard.config.layout import Layout, possible_worlds, shape_problems, world_problems
from modelyard.config.loader import Loaded
from modelyard.config.train import TrainConfig
from modelyard.errors import UserError
from modelyard.plan.apart import apart
from modelyard.plan.communication import communication_of
from modelyard.plan.duration import duration_of
from modelyard.plan.hardware import (
    THIS_MACHINE,
    Cluster,
    cluster_of,
    hardware_names,
    load_hardware,
    parse_rate,
)
from modelyard.plan.memory import Memory, memory_of, most_of_all
from modelyard.plan.report import NOT_MODELLED, STORAGE, as_dict, report, seconds_text
from modelyard.plan.room import Room, room_of
from modelyard.plan.search import Found, anything_fits, in_short, lines_to_paste, search, why_slower
from modelyard.plan.summary import indented, table
from modelyard.plan.workload import Workload, workload_of

MOST_GPUS = 1 << 17


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


# --- what does not fit --------------------------------------------------------------------------------------------


def does_not_fit(loaded: Loaded, workload: Workload, cluster: Cluster, room: Room) -> str:
    """One line: what is missing, what would do on these devices, or else the least hardware that would."""
    assert loaded.architecture is not None
    there = f"a process needs {size(room.needed)}, and {cluster.hardware.title} has {size(room.there)}"
    if anything_fits(loaded.train, loaded.architecture, workload, cluster):
        found, _ = search(loaded.train, loaded.architecture, workload, cluster, best=1)
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
            if anything_fits(loaded.train, loaded.architecture, workload, tried):
                found, _ = search(loaded.train, loaded.architecture, workload, tried, best=1)
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
            f"    {seconds_text(duration.step)} a step, {duration.tokens_per_second:,.0f} tokens/s a device, {mfu}, "
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
        traced = apart(trace, workload, rank)
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
