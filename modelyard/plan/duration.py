"""How long a step takes on a cluster: the parts of `parts`, the messages of `communication`, the pipeline's bubble.

The rules, all of them pure arithmetic:

- A part takes as long as its FLOPs at the rate that its kind and shape reach, or its bytes at the memory's, whichever is longer;
  all parts of a step together a little more than each alone (`Rates.together`).
- A collective takes the bytes that a process sends, over the slowest wire that its ring goes through. A group whose processes
  are all in one node has the node's links. Otherwise the ring crosses between nodes; its members of one node then have their
  shares of the network together. Ranks are laid out as the mesh has them: replicate, shard, pipeline, context, tensor, the last
  innermost.
- Exchanges of tensor and context parallelism, and messages between stages, are waited for: so this program, and torch's
  schedules, have it. Weights are gathered and gradients reduced while something else is computed; what does not fit there
  counts, and so do the first gather and the last reduction.
- The bubble: the schedule is played through (`modelyard.plan.bubble`); where all stages are equal that is (p - 1) / v of a
  micro-batch (arXiv 2104.04473), of fewer micro-batches than processes more.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod

from modelyard.config.adapter import matmul_flops_per_token
from modelyard.config.layout import DIMENSIONS, Layout
from modelyard.parallel.stages import layer_costs, process_of
from modelyard.plan.bubble import StageTime, enough_micro_batches, makespan
from modelyard.plan.communication import Term, communication_of
from modelyard.plan.hardware import Cluster
from modelyard.plan.parts import Part, parts_of
from modelyard.plan.workload import Workload

OVERLAPPED = ("weights", "replicate")
"""Kinds of communication that go on beside the computation."""
SECONDS_A_DAY = 86_400


@dataclass(frozen=True)
class Program:
    """How a program differs from this one, for rows that others published; ours is the default."""

    hidden: Mapping[str, float] = field(default_factory=dict)
    """Kind of communication (`tensor`, `pipeline`) → share of its time that goes on beside the computation."""
    recomputed: float = 0.0
    """Share of the blocks' matrix products that the backward computes again, beyond what the workload says."""


OURS = Program()


@dataclass(frozen=True)
class Duration:
    """Seconds of one step, and what follows from them."""

    items: Mapping[str, float]
    """Where the slowest process's step goes; they add up to `step`."""
    hidden: float
    """Seconds of communication beside the computation, not in `items`."""
    step: float
    tokens: int
    """Of a step."""
    gpus: int
    flops_causal: float
    """FLOPs that the model needs for a step, attention counted as the triangle."""
    flops_full: float
    """The same, attention counted as the square."""
    flops_executed: float
    """FLOPs of matrix products and attention that are done, what is recomputed twice."""
    peak: float | None
    """Dense FLOP/s of one device, for the utilisations; None: not known."""

    @property
    def tokens_per_second(self) -> float:
        """Of one device."""
        return self.tokens / self.step / self.gpus

    @property
    def flops_per_second(self) -> float:
        """Of one device, as the model needs them, attention as the triangle."""
        return self.flops_causal / self.step / self.gpus

    @property
    def mfu_causal(self) -> float | None:
        """Share of the peak that the model's FLOPs are, attention as the triangle (Fast-LLM, Megatron)."""
        return self._share(self.flops_causal)

    @property
    def mfu_full(self) -> float | None:
        """The same with attention as the square (PaLM, torchtitan)."""
        return self._share(self.flops_full)

    @property
    def hfu(self) -> float | None:
        """Share of the peak that is executed."""
        return self._share(self.flops_executed)

    @property
    def bubble_share(self) -> float:
        """Of the step's time."""
        return self.items.get("bubble", 0.0) / self.step

    def days(self, iterations: int) -> float:
        """That so many steps take, without anything between them."""
        return iterations * self.step / SECONDS_A_DAY

    def gpu_hours(self, iterations: int) -> float:
        """Of all devices."""
        return iterations * self.step * self.gpus / 3600

    def _share(self, flops: float) -> float | None:
        return None if not self.peak else flops / self.step / self.gpus / self.peak


def duration_of(workload: Workload, cluster: Cluster, program: Program = OURS) -> Duration:
    """Of one step. The cluster has to have as many devices as the layout has processes."""
    if cluster.gpus != workload.layout.world:
        raise ValueError(f"{cluster.gpus} devices for {workload.layout.world} processes")
    times: dict[int, _Times] = {}
    for alike in _alike_places(workload):
        times |= dict.fromkeys(alike, _times_of(workload, cluster, program, alike[0]))
    slowest = max(times, key=lambda place: times[place].turn * workload.micro_batches + times[place].once)
    pace = times[slowest]
    items = dict(pace.items)
    if bubble := _bubble(workload, slowest, times):
        items["bubble"] = bubble
    sequence = workload.sequence_length
    shape, tokens = workload.architecture, workload.step_tokens
    products = matmul_flops_per_token(shape, workload.adapter)
    copies = workload.layout.data * workload.layout.context * workload.layout.tensor
    executed = sum(time.executed for time in times.values()) * copies * workload.micro_batches
    hardware = cluster.hardware
    peak = hardware.peak("bfloat16" if hardware.is_gpu else workload.dtype)
    return Duration(
        items,
        pace.hidden,
        sum(items.values()),
        tokens,
        cluster.gpus,
        float(tokens * (products + shape.attention_flops_per_token(sequence, causal=True))),
        float(tokens * (products + shape.attention_flops_per_token(sequence, causal=False))),
        executed,
        peak,
    )


# --- one process ----------------------------------------------------------------------------------------------


@dataclass
class _Times:
    """Of one place along the pipeline."""

    items: dict[str, float]
    """Seconds a step, without the bubble."""
    turn: float
    """Seconds of one micro-batch, forward and backward, with what is waited for."""
    forward: float
    """Of `turn`."""
    weights: float
    """Of `turn`, what a split backward can put off."""
    once: float
    """Seconds that come once a step."""
    hidden: float
    executed: float
    """FLOPs of a micro-batch."""


def _alike_places(workload: Workload) -> list[list[int]]:
    """The places along the pipeline, those together that have the same to do."""
    stages, shape = workload.layout.stages, workload.architecture
    found: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for place in range(workload.layout.pipeline):
        mine = workload.stages_at(place)
        layers = [layer for stage in mine for layer in workload.stage_layers[stage]]
        windows = tuple(sorted(shape.window_of(layer) or 0 for layer in layers))
        names = tuple(layers) if workload.frozen else ()
        found[windows, names, 0 in mine, stages - 1 in mine].append(place)
    return list(found.values())


def _times_of(workload: Workload, cluster: Cluster, program: Program, place: int) -> _Times:
    hardware, count = cluster.hardware, workload.micro_batches
    items: dict[str, float] = defaultdict(float)
    phases: dict[str, float] = defaultdict(float)
    """Seconds of one micro-batch."""
    weights = executed = once = calls = 0.0
    for part in _with_recomputed(parts_of(workload, place), program):
        seconds = seconds_of(part, workload, cluster)
        items[_item(part)] += seconds * (1 if part.per_step else count)
        if part.per_step:
            once += seconds
            continue
        calls += part.times * part.calls
        # In a pipeline the loss, and with it the head, is computed when its backward begins.
        in_backward = workload.layout.pipeline > 1 and part.name in ("head", "loss")
        phases["backward" if in_backward else part.phase] += seconds
        if part.kind in ("matmul", "attention"):
            executed += part.all_flops
        if part.direction == "weight gradient" and part.name != "head":
            weights += seconds
    host = calls * hardware.rates.dispatch - sum(phases.values()) if hardware.is_gpu else 0.0
    if host > 0:  # the device waits for the host to tell it what to do
        items["waiting for the host"] = host * count
        phases["forward"] += host / 3
        phases["backward"] += host * 2 / 3

    wire: dict[tuple[str, str], float] = defaultdict(float)
    for term in communication_of(workload, place):
        wire[term.key] += seconds_of_term(term, workload.layout, cluster)
    exposed: dict[str, float] = defaultdict(float)
    for (kind, _), seconds in wire.items():
        if not (kind in OVERLAPPED and hardware.overlaps):
            exposed[kind] += seconds * (1 - program.hidden.get(kind, 0.0))
    if hardware.overlaps:
        units = max(1, sum(len(workload.stage_layers[stage]) for stage in workload.stages_at(place)))
        backward = phases["backward"] + phases["recompute"]
        exposed |= _beside(workload, wire, phases["forward"], backward, units)
    waited = sum(exposed[kind] for kind in ("tensor", "context", "pipeline"))
    items |= {f"{kind} exchanges": seconds for kind, seconds in exposed.items() if seconds}
    return _Times(
        dict(items),
        turn=sum(phases.values()) + waited / count,
        forward=phases["forward"] + waited / count / 2,
        weights=weights,
        once=once + sum(exposed.values()) - waited,
        hidden=sum(wire.values()) - sum(exposed.values()),
        executed=executed,
    )


def seconds_of(part: Part, workload: Workload, cluster: Cluster) -> float:
    """Of all the times that a part is done in a micro-batch, or in a step where that is when it is done."""
    rates, dtype = cluster.hardware.rates, workload.dtype
    compute = 0.0
    if part.kind == "matmul" and part.shape is not None:
        compute = part.flops / rates.matmul(dtype, *part.shape, part.direction)
    elif part.kind == "attention":
        head = workload.architecture.head_size
        compute = part.flops / rates.attention(dtype, head, part.length, backward=part.phase == "backward")
    through = rates.update() if part.kind == "update" else rates.stream(part.size)
    memory = part.moved / through
    memory += part.exponentials / rates.exponentials(dtype)
    each = max(compute, memory)
    if cluster.hardware.is_gpu:
        each = max(each, part.calls * rates.launch)
    else:
        each += part.calls * rates.dispatch
    return part.times * each / rates.together


def _with_recomputed(parts: Iterable[Part], program: Program) -> Iterable[Part]:
    for part in parts:
        yield part
        is_forward = part.phase == "forward" and part.kind == "matmul"
        if program.recomputed and is_forward and part.name in ("projections", "feed-forward"):
            yield replace(part, phase="recompute", times=part.times * program.recomputed)


_ITEMS = {
    "projections": "projections",
    "feed-forward": "feed-forward",
    "attention": "attention",
    "head": "head and loss",
    "loss": "head and loss",
    "adapter": "adapter",
    "NF4": "NF4",
    "gradient accumulation": "gradients",
    "gathered weights": "gathered weights",
    "gradient norm and scale": "optimizer",
    "optimizer": "optimizer",
    "publish": "optimizer",
}


def _item(part: Part) -> str:
    if part.phase == "recompute":
        return "recomputation"
    return _ITEMS.get(part.name, "norms, rotary, activation, sums")


# --- communication --------------------------------------------------------------------------------------------


def members_in_node(layout: Layout, dimension: str, gpus_per_node: int) -> tuple[int, int]:
    """Processes of a group along `dimension` (or `weights`: shard and context; `world`), and how many of them one node has."""
    along = _ALONG.get(dimension, (dimension,))
    inner, steps = 1, []
    for name in reversed(DIMENSIONS):
        size = getattr(layout, name)
        if name in along:
            steps.append((size, inner))
        inner *= size
    size = prod(size for size, _ in steps)
    return size, _first_node(steps, gpus_per_node)


_ALONG = {"weights": ("shard", "context"), "world": DIMENSIONS, "step": DIMENSIONS}


def _first_node(steps: list[tuple[int, int]], gpus_per_node: int) -> int:
    """How many ranks are below `gpus_per_node` where (places, distance in rank) is of each dimension."""
    ranks = [0]
    for size, distance in steps:
        last = min(size * distance, gpus_per_node)
        ranks = [rank + more for rank in ranks for more in range(0, last, distance)]
        ranks = [rank for rank in ranks if rank < gpus_per_node]
    return len(ranks)


def seconds_of_term(term: Term, layout: Layout, cluster: Cluster) -> float:
    """Of all calls of a step."""
    if not term.calls or term.group <= 1:
        return 0.0
    rates, hardware = cluster.hardware.rates, cluster.hardware
    size, here = members_in_node(layout, term.dimension, cluster.gpus_per_node)
    crosses = here < size
    kind, operation = term.key
    if kind == "pipeline":
        # One neighbour is asked, over the wire between the two; the slowest pair counts.
        wire = cluster.network if crosses else hardware.link
        return term.bytes / rates.send(
            wire, term.message_bytes, crosses=crosses
        ) + term.calls * rates.latency(0 if crosses else 1, 1 if crosses else 0)
    wire = min(hardware.link, here * cluster.network) if crosses else hardware.link
    nodes = -(-size // here) if crosses else 1
    inside, between = size - nodes, nodes - 1
    if operation == "all-reduce":
        # Up a tree and down again where that has fewer steps than twice round a ring (NCCL chooses so for short messages).
        inside, between = 2 * min(inside, here - 1), 2 * min(between, math.ceil(math.log2(nodes)))
    latency = rates.latency(inside, between)
    return term.bytes / rates.send(wire, term.message_bytes, crosses=crosses) + term.calls * latency


def _beside(
    workload: Workload,
    wire: Mapping[tuple[str, str], float],
    forward: float,
    backward: float,
    units: int,
) -> dict[str, float]:
    """Seconds a step that gathers and reductions take beyond the computation that they go on beside."""
    count, stage = workload.micro_batches, workload.layout.zero_stage
    gather = wire.get(("weights", "all-gather"), 0.0)
    reduce = wire.get(("weights", "reduce-scatter"), 0.0)
    replicate = wire.get(("replicate", "all-reduce"), 0.0)
    rest = (units - 1) / units

    def waited(communication: float, computation: float) -> float:
        """One unit has nothing to go on beside."""
        return communication / units + max(0.0, rest * (communication - computation))

    reductions = count if stage > 1 else 1
    back = (reduce + replicate) / reductions
    if stage == 3:
        there = gather / (2 * count)
        # The backward has half of the gathers beside its reductions.
        found = count * (waited(there, forward) + waited(there + back, backward))
        gathers = count * waited(there, forward)
    else:
        gathers = waited(gather, forward)
        found = gathers + reductions * waited(back, backward)
    reduced = found - gathers
    share = replicate / (reduce + replicate) if replicate else 0.0
    return {"weights": gathers + reduced * (1 - share), "replicate": reduced * share}


# --- the pipeline -----------------------------------------------------------------------------------------------


def _bubble(workload: Workload, pace: int, times: Mapping[int, _Times]) -> float:
    """Seconds of a step in which the slowest process, at `pace`, has nothing to do."""
    layout = workload.layout
    if layout.pipeline == 1:
        return 0.0
    costs, head = layer_costs(workload.architecture, workload.sequence_length)
    last = layout.stages - 1
    works = [
        sum(costs[layer] for layer in layers) + (head if stage == last else 0)
        for stage, layers in enumerate(workload.stage_layers)
    ]
    stages = []
    for stage, work in enumerate(works):
        place = process_of(stage, layout)
        time = times[place]
        share = work / sum(works[other] for other in workload.stages_at(place))
        inputs = max(time.turn - time.forward - time.weights, 0.0)
        stages.append(StageTime(share * time.forward, share * inputs, share * time.weights))
    count = enough_micro_batches(layout, workload.micro_batches)
    return max(0.0, makespan(layout, count, stages) - count * times[pace].turn)
