"""What a process holds at most in one optimizer step, in bytes, by replaying what the step takes and gives back.

The replay goes through the step as `modelyard.train.step` and the model do: it follows every tensor of more than a few
numbers a token, unit by unit, operation by operation, without computing anything. What it says is what tensors hold, to be held
against `modelyard.plan.trace`, which runs the step itself on tensors without data. An allocator needs more: pieces between
tensors, its own rounding; `fragmentation` of the plan stands for that.

Not in it: the device's own context, communication libraries' buffers, the batch's token ids.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from modelyard.config.layout import SPLIT_BACKWARD
from modelyard.plan.block import Block
from modelyard.plan.schedules import most_on_the_way, order
from modelyard.plan.units import Parameter, Unit, units_of
from modelyard.plan.workload import Workload

KINDS = (
    "master weights",
    "optimizer state",
    "weights to compute with",
    "gradients",
    "activations",
    "loss",
    "working space",
    "communication",
)
"""Of what is held, in the order in which it is shown."""


LEAST_NARROW = 4096
"""Parameters with fewer numbers keep their moments wide (`modelyard.train.optimizer`)."""


@dataclass(frozen=True)
class Memory:
    """What one process holds."""

    peak: int
    """The most at a time."""
    at_peak: Mapping[str, int]
    """The same by kind (`KINDS`)."""
    moment: str
    """Where in the step that is."""
    at_rest: int
    """Between two steps."""
    phases: Mapping[str, int]
    """The most in each phase: forward, backward, optimizer."""


def memory_of(workload: Workload, place: int = 0) -> Memory:
    """Of the process at `place` along the pipeline."""
    return _Replay(workload, place).run()


def most_of_all(workload: Workload) -> tuple[int, Memory]:
    """The place along the pipeline whose process holds the most, and what it holds."""
    found = {place: memory_of(workload, place) for place in _worth_asking(workload)}
    worst = max(found, key=lambda place: found[place].peak)
    return worst, found[worst]


def least_memory(workload: Workload) -> int:
    """What the first process holds at any rate, without a replay: weights, optimizer state, the blocks' activations."""
    replay, layout = _Replay(workload, 0), workload.layout
    units = [unit for stage in replay.stages for unit in stage]
    held = sum(unit.kept(replay.parts) + replay.moments(unit) for unit in units) * (not layout.offload)
    if replay.is_sharded and layout.zero_stage < 3:
        held += sum(unit.gathered(replay.parts) for unit in units)
    blocks = min(len(workload.stage_layers[stage]) for stage in workload.stages_at(0))
    if layout.pipeline > 1:
        blocks *= most_on_the_way(
            layout.schedule, layout.pipeline, layout.stages_per_process, 0, workload.micro_batches
        )
    first = replay.first_trained(replay.stages[0][:-1], is_first=True)
    away = first or workload.offload_activations
    return held if away else held + blocks * replay.block.kept


def _worth_asking(workload: Workload) -> list[int]:
    """Places along a pipeline one of which holds the most: the first, which has the embedding; the last, which has the head;
    and the earliest of those with the most layers, as earlier ones have more micro-batches on their way."""
    places = range(workload.layout.pipeline)
    layers = [sum(len(workload.stage_layers[s]) for s in workload.stages_at(place)) for place in places]
    return sorted({places[0], places[-1], layers.index(max(layers))})


@dataclass
class _Held:
    """What is held at the moment, and what was when it was most."""

    now: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    total: int = 0
    peak: int = 0
    at_peak: dict[str, int] = field(default_factory=dict)
    moment: str = ""
    phase: str = "forward"
    phases: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    where: str = ""

    def take(self, kind: str, *sizes: int) -> None:
        size = sum(sizes)
        self.now[kind] += size
        self.total += size
        if self.total > self.phases[self.phase]:
            self.phases[self.phase] = self.total
            if self.total > self.peak:
                self.peak, self.at_peak = self.total, dict(self.now)
                self.moment = f"{self.phase}, {self.where}" if self.where else self.phase

    def give(self, kind: str, *sizes: int) -> None:
        size = sum(sizes)
        self.now[kind] -= size
        self.total -= size


class _Replay:
    """One process's step."""

    def __init__(self, workload: Workload, place: int):
        self.workload, self.held, self.place = workload, _Held(), place
        self.stages = units_of(workload, place)
        self.block = Block(workload, self.held, self._made)
        layout = workload.layout
        self.is_sharded = layout.world > 1
        """Whether FSDP keeps the weights; one process alone has them in two sets of its own."""
        self.parts = layout.shard * layout.context
        self.is_mixed = workload.width != workload.master_width
        self.gathered: set[str] = set()
        """Units whose weights are there to compute with."""
        self.made: set[tuple[str, str]] = set()
        """Units and modules whose gradients this backward has made."""
        self.whole: set[str] = set()
        """Units with a gradient, not shared yet, from micro-batches before."""
        self.summed: set[str] = set()
        """Units with a gradient, of what this process keeps, that stays until the optimizer's step."""
        self._puts_off = False
        """Whether the backward is of the inputs alone, and makes no gradients of the blocks' weights."""
        self.flat = 0
        """Bytes of the last buffer that weights were gathered into, which stays until the next is there."""
        self.sent = 0
        """Bytes of the last buffer that gradients were sent from; likewise."""

    def run(self) -> Memory:
        held, units = self.held, [unit for stage in self.stages for unit in stage]
        if not self.workload.layout.offload:  # else the host has them
            held.take("master weights", *(unit.kept(self.parts) for unit in units))
            held.take("optimizer state", *(self.moments(unit) for unit in units))
            if (
                twin := self._second_copy()
            ) is not None:  # a second copy of a matrix has no moments of its own
                held.give("optimizer state", self.moments(twin))
        if not self.is_sharded and self.is_mixed:
            held.take("weights to compute with", *(self._copy(unit) for unit in units))
        if self.workload.layout.pipeline > 1:
            held.take("communication", self._messages())
        if self.workload.offload_activations and self.workload.on_gpu:
            held.take("working space", 2 * self.block.stream)  # the input in use and the one that comes next
        at_rest = held.total
        if self.workload.layout.pipeline == 1:
            self._micro_batches()
        else:
            self._pipeline()
        held.phase, held.where = "optimizer", ""
        held.take("working space", self._in_optimizer(units))
        return Memory(held.peak, held.at_peak, held.moment, at_rest, dict(held.phases))

    def moments(self, unit: Unit) -> int:
        counts = [(p.shard(self.parts), p.master_width) for p in unit.trained]
        if self.workload.optimizer_state == "float32":
            return sum(2 * count * width for count, width in counts)
        # A byte a number, and an fp32 scale for every 256; small ones stay as they are.
        return sum(
            2 * (count * width if count < LEAST_NARROW else count + width * -(-count // 256))
            for count, width in counts
        )

    def _second_copy(self) -> Unit | None:
        """Of tied embeddings, where this process has both the first stage and the last."""
        copies = [
            p
            for stage in self.stages
            for unit in stage
            for p in unit.parameters
            if p.module == "embed_tokens"
        ]
        return Unit("second copy", tuple(copies[1:])) if len(copies) > 1 else None

    def _in_optimizer(self, units: list[Unit]) -> int:
        """Moments of 8 bits are made wide for the update, a piece at a time."""
        if self.workload.optimizer_state == "float32":
            return 0
        counts = [p.shard(self.parts) for unit in units for p in unit.trained]
        piece = min(max(counts, default=0), 1 << (24 if self.workload.on_gpu else 17))
        return 6 * piece * self.workload.master_width

    def _copy(self, unit: Unit) -> int:
        """Bytes of the second set of weights that one process alone has."""
        return sum(p.count * p.width for p in unit.parameters if p.width != p.master_width)

    def _messages(self) -> int:
        """What a pipeline's stages receive into: torch has a place for each micro-batch's stream and its gradient."""
        work, mine = self.workload, self.workload.stages_at(self.place)
        behind = [stage for stage in mine if stage > 0]
        # From a stage of the same process no gradient is received, and the stream is kept in place of what would be.
        before = [stage for stage in mine if stage < work.layout.stages - 1 and stage + 1 not in mine]
        each = len(behind) + len(before)
        if work.layout.schedule in SPLIT_BACKWARD:
            each += len(
                behind
            )  # a backward of the inputs leaves its result at the place that the input came to
        return each * work.micro_batches * self.block.stream

    # --- the step ---------------------------------------------------------------------------------------------------

    def _micro_batches(self) -> None:
        """Forward and backward of one after the other. From the third on nothing is new."""
        count = min(self.workload.micro_batches, 3)
        (units,) = self.stages
        before = 0
        for number in range(count):
            self._forward(units)
            self.held.where = "head"
            self.block.head(_head(units[-1]))
            self.held.give("activations", before)
            before = (
                self.block.whole
            )  # what the decoder gave has a name in the loop until the next one is there
            self.held.phase = "backward"
            self.block.head_backward(units[-1], _head(units[-1]))
            self._backward(units, is_last=number == count - 1)
        self.held.give("activations", before)

    def _pipeline(self) -> None:
        """The actions of a pipeline's process in their order."""
        held, work, place = self.held, self.workload, self.place
        layout, stages = work.layout, dict(zip(work.stages_at(self.place), self.stages, strict=True))
        last = layout.stages - 1
        actions = order(layout, place, work.micro_batches)
        remaining = dict.fromkeys(stages, work.micro_batches)
        put_off: dict[tuple[int, int], int] = {}
        """Bytes that the backward of the inputs kept for that of the weights, by stage and micro-batch."""
        for kind, stage, number in actions:
            units = stages[stage]
            if kind == "forward":
                self._forward(units, is_first=stage == 0)
                if stage == last:
                    self.block.last_norm()
                continue
            held.phase = "backward"
            if kind != "backward" and layout.zero_stage == 3:
                for unit in units:  # a split backward gathers its stage as a whole
                    self._gather(unit)
                held.give("communication", self.flat)
                self.flat = 0
            if kind == "weights":
                remaining[stage] -= 1
                self._weights(units, put_off.pop((stage, number)), is_last=remaining[stage] == 0)
                continue
            if kind == "backward":
                remaining[stage] -= 1
            if stage == last:
                held.where = "head"
                self.block.head(_head(units[-1]), in_backward=True)
                self.block.head_backward(units[-1], _head(units[-1]), in_backward=True)
            else:
                held.take("working space", self.block.stream)
            self._puts_off = kind == "inputs"
            kept = self._backward(units, is_last=remaining[stage] == 0, is_first=stage == 0)
            if stage > 0:  # the first block's input stays: it lies where it was received
                held.take("activations", self.block.stream)
            if stage < last:  # what was sent on is let go
                held.give("activations", self.block.stream)
            if kind == "inputs":
                put_off[stage, number] = kept
                if layout.zero_stage == 3:
                    for unit in units[:-1]:
                        self._reshard(unit)
            self._puts_off = False

    def _weights(self, units: list[Unit], kept: int, *, is_last: bool) -> None:
        """The half of a backward that makes the gradients of the weights, from what the other half kept."""
        *inner, rest = units
        inner = [unit for unit in inner if unit.name != "embedding"]
        for unit in reversed(inner):
            self.held.where = unit.name
            for module in unit.made:
                self._made(unit, module)
            self.held.give("activations", kept // len(inner))
        self.held.give("activations", kept - kept // len(inner) * len(inner))
        for unit in (*inner, rest, *units[: len(units) - 1 - len(inner)]):
            self._reduce(unit, is_last=is_last)
        if is_last:
            self.held.give("communication", self.sent)
            self.sent = 0

    def _forward(self, units: list[Unit], *, is_first: bool = True) -> None:
        held, block = self.held, self.block
        held.phase = "forward"
        *inner, rest = units
        self._gather(rest)
        for unit in inner:
            held.where = unit.name
            self._gather(unit)
            if unit is inner[0]:
                block.begin(embeds=is_first)
            if unit.name != "embedding":
                block.forward(for_backward=unit in inner[self.first_trained(inner, is_first) :])
                held.give("activations", self._sent_away(unit))
            if self.is_sharded and self.workload.layout.zero_stage == 3:
                self._reshard(unit)
        held.give("communication", self.flat)
        self.flat = 0

    def _backward(self, units: list[Unit], *, is_last: bool, is_first: bool = True) -> int:
        """From the gradient of the stream behind the last block on; bytes that are kept where weights are put off."""
        held, block = self.held, self.block
        inner, rest = units[:-1], units[-1]
        begin = self.first_trained(inner, is_first)
        kept: list[int] = []
        for number, unit in reversed(list(enumerate(inner))[begin:]):
            held.where = unit.name
            self._gather_again(unit, ahead=inner[number - 1] if number else None)
            if unit.name == "embedding":
                continue
            held.take("activations", self._sent_away(unit))
            before = held.now["activations"]
            block.backward(unit)
            if self._puts_off:
                kept.append(before - held.now["activations"] + block.gradients_of_outputs)
                held.take("activations", kept[-1])
            else:
                self._reduce(unit, is_last=is_last)
        held.where = "embedding"
        embedding = inner[0] if inner[0].name == "embedding" else rest
        if is_first and begin == 0 and any(embedding.trained):
            block.embed_backward(embedding)
        else:
            held.give("working space", block.stream)
        held.give("activations", block.table, block.index)
        if self._puts_off:
            return sum(kept)
        self._reduce(rest, is_last=is_last)
        if embedding is not rest:
            self._reduce(embedding, is_last=is_last)
        if is_last:
            held.give("communication", self.sent)
            self.sent = 0
        return 0

    def _sent_away(self, unit: Unit) -> int:
        """Bytes of a block's input that are in the host's memory until the backward (`modelyard.model.offload`): of all but the
        last block, whose backward comes next."""
        last = f"layers.{self.workload.architecture.num_layers - 1}"
        is_away = self.workload.offload_activations and self.workload.on_gpu and unit.name != last
        return self.block.stream if is_away else 0

    def first_trained(self, inner: list[Unit], is_first: bool) -> int:
        """The first of a stage's units that a backward goes to: all of them, but that of the first stage ends where nothing
        before is trained."""
        if not is_first:
            return 0
        return next((number for number, unit in enumerate(inner) if any(unit.trained)), len(inner))

    # --- weights ----------------------------------------------------------------------------------------------------

    def _gather(self, unit: Unit) -> None:
        """In a forward."""
        if not self.is_sharded or unit.name in self.gathered:
            return
        held, size = self.held, unit.gathered(self.parts)
        if self.parts > 1:
            held.take("communication", *self._flat_of(unit))
            held.give("communication", self.flat, *self._flat_of(unit)[1:])
            self.flat = size
        held.take("weights to compute with", size)
        self.gathered.add(unit.name)

    def _flat_of(self, unit: Unit) -> tuple[int, int]:
        """What the weights of a unit are gathered into, and this process's part of it in the dtype to compute with."""
        size = unit.gathered(self.parts)
        return size, size // self.parts if self.is_mixed else 0

    def _gather_again(self, unit: Unit, *, ahead: Unit | None) -> None:
        """In a backward: the unit, unless that was done ahead, and ahead the one whose backward comes next."""
        if not self.is_sharded or unit.name in self.gathered:
            return
        held, size = self.held, unit.gathered(self.parts)
        if self.parts > 1 and not self.flat:
            held.take("communication", *self._flat_of(unit))
            held.give("communication", self._flat_of(unit)[1])
            self.flat = size
        held.take("weights to compute with", size)
        held.give("communication", self.flat)
        self.flat = 0
        if self.parts > 1 and ahead is not None:
            held.take("communication", *self._flat_of(ahead))
            held.give("communication", self._flat_of(ahead)[1])
            self.flat = self._flat_of(ahead)[0]
        self.gathered.add(unit.name)

    def _reshard(self, unit: Unit) -> None:
        if unit.name in self.gathered:
            self.held.give("weights to compute with", unit.gathered(self.parts))
            self.gathered.remove(unit.name)

    # --- gradients --------------------------------------------------------------------------------------------------

    def _made(self, unit: Unit, module: str, *, summed: bool = False) -> None:
        """The gradients of a module's parameters are there, in the dtype to compute with; one process alone adds them up as
        they come, and takes those that are `summed` in the masters' dtype already as they are."""
        held = self.held
        if self._puts_off and unit.name.startswith("layers."):
            return
        narrow, wide = unit.made.get(module, (0, 0))
        is_second = (unit.name, module) in self.made  # of a matrix that is the embedding and the head
        self.made.add((unit.name, module))
        if self.is_sharded or not self.is_mixed:
            held.take("gradients", narrow)
            before = self.whole if self.is_sharded else self.summed
            if is_second or (unit.name in before and not self.is_mixed):
                held.give("gradients", narrow)  # added to what is there
            return
        if not summed:
            held.take("gradients", narrow)
        if not is_second and unit.name not in self.summed:
            held.take("gradients", wide)
        if not summed:
            held.give("gradients", narrow)

    def _reduce(self, unit: Unit, *, is_last: bool) -> None:
        """What becomes of a unit's gradients when all of them are there."""
        self.made = {one for one in self.made if one[0] != unit.name}
        if not self.is_sharded:
            self.summed.add(unit.name)
            return
        held, stage = self.held, self.workload.layout.zero_stage
        narrow, wide = unit.gradient, unit.wide_gradient()
        if self.is_mixed:
            if unit.name in self.whole:  # added to what is there
                held.give("gradients", narrow)
                narrow = wide
            elif stage == 1 and not is_last:
                held.take("gradients", wide)
                held.give("gradients", narrow)
        if stage == 1 and not is_last:
            self.whole.add(unit.name)
            return
        self.whole.discard(unit.name)
        if is_last or stage == 3:
            self._reshard(unit)
        sent = unit.wide_gradient(self.parts)
        held.give("communication", self.sent)
        held.take("communication", sent)
        self.sent = sent
        held.give("gradients", narrow)
        held.take("gradients", sent // self.parts)
        if (
            unit.name in self.summed or self.workload.layout.offload
        ):  # added to what is there, here or on the host
            held.give("gradients", sent // self.parts)
        self.summed.add(unit.name)


def _head(rest: Unit) -> Parameter:
    """The matrix that the loss takes words from."""
    return next(p for p in rest.parameters if p.module in ("lm_head", "embed_tokens"))
