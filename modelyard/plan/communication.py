"""What a process sends in one optimizer step: calls and bytes, by what they are for. Arithmetic; no torch.

Bytes are those that a process sends in a ring: an all-gather or reduce-scatter of B bytes among n sends B * (n - 1) / n, an
all-reduce twice that. The formulas are exact: `modelyard.plan.trace` and runs on gloo count the same calls and the same bytes
(`benchmarks/plan_traced.py`, `benchmarks/communication.py`), for processes that have equal shares of everything. Where rows do
not divide evenly, `share` says which process is meant: the first has the most.

What is sent goes by what has a gradient: a block below everything that is trained has nothing to sum in the backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, prod

from modelyard.config.adapter import is_adapter_parameter
from modelyard.config.layout import SPLIT_BACKWARD
from modelyard.parallel.cuts import cut_along
from modelyard.parallel.stages import process_of
from modelyard.plan.schedules import order
from modelyard.plan.units import Parameter, Unit, units_of
from modelyard.plan.workload import Workload

Key = tuple[str, str]
"""(kind of parallelism: `weights`, `replicate`, `tensor`, `context`, `pipeline` or `step`; operation)."""

AGAIN = "recomputed blocks sum again (all but the last sum)"
OF_THE_LOSS = "loss: 3 numbers a trained token"
"""Of all tokens: where some are not trained on, it is less by as much."""


@dataclass(frozen=True)
class Term:
    """Some calls of one process in a step, all alike."""

    key: Key
    dimension: str
    """Which processes they are among: one of `modelyard.config.layout.DIMENSIONS`, `weights` (shard and context) or `world`."""
    group: int
    """How many those are."""
    calls: int
    bytes: float
    """That the process sends in all."""
    why: str = ""
    """Empty: it is in the textbook's formula."""

    @property
    def message_bytes(self) -> float:
        """Sent in one call, on average."""
        return self.bytes / self.calls


def communication_of(workload: Workload, place: int = 0, share: int = 0) -> list[Term]:
    """Of a process at `place` along the pipeline; `share`: its number among those that keep one set of weights."""
    return [term for term in _Process(workload, place, share).terms() if term.calls]


def loss_chunk(workload: Workload) -> int:
    """Tokens whose logits are alive at once (`modelyard.loss.cross_entropy`)."""
    if workload.cross_entropy == "torch":
        return workload.tokens
    elements = 1 << 27 if workload.on_gpu else 1 << 24
    return max(256, elements * workload.layout.tensor // workload.architecture.vocab_size)


def _ring(size: int) -> float:
    return (size - 1) / size


@dataclass(frozen=True)
class _Layer:
    """Where in a block there are gradients."""

    index: int
    normed: bool
    """Of what the first norm gives."""
    keys: bool
    """Of keys or values."""
    attended: bool
    """Of what the output projection gives, before it is summed."""
    normed_again: bool
    """Of what the second norm gives."""
    given: bool
    """Of what the down projection gives, before it is summed."""
    output: bool
    keeps_first: bool
    """Whether a matrix keeps what the first norm gave, for its own gradient."""
    keeps_second: bool
    """The same of the second norm."""


@dataclass
class _Process:
    workload: Workload
    place: int
    share: int

    @cached_property
    def stages(self) -> list[int]:
        return self.workload.stages_at(self.place)

    @cached_property
    def stage_units(self) -> list[list[Unit]]:
        return units_of(self.workload, self.place)

    def terms(self) -> Iterator[Term]:
        layout = self.workload.layout
        yield from self._weights()
        if layout.tensor > 1:
            for stage, units in zip(self.stages, self.stage_units, strict=True):
                yield from self._tensor(stage, self._layers(stage, units))
            yield from self._summed_gradients()
        if layout.context > 1:
            for stage, units in zip(self.stages, self.stage_units, strict=True):
                yield from self._context(self._layers(stage, units))
        if layout.pipeline > 1:
            yield from self._pipeline()
        if layout.world > 1:
            sent = 2 * 5 * 8 * _ring(layout.world)
            yield Term(("step", "all-reduce"), "world", layout.world, 1, sent, "loss, norm, targets, stop")

    # --- which gradients there are --------------------------------------------------------------------------------

    def _layers(self, stage: int, units: list[Unit]) -> list[_Layer]:
        """The blocks of a stage; what comes from another stage always has a gradient."""
        by_name = {unit.name: unit for unit in units}
        stream = stage > 0 or any(p.trained for unit in units for p in unit.parameters if "embed_" in p.name)
        layers = []
        for index in self.workload.stage_layers[stage]:
            layer = _layer(index, stream, by_name[f"layers.{index}"].parameters)
            layers.append(layer)
            stream = layer.output
        return layers

    # --- weights ----------------------------------------------------------------------------------------------------

    def _weights(self) -> Iterator[Term]:
        """Parameters gathered as they are computed with, gradients reduced as they are kept, by groups of parameters."""
        layout = self.workload.layout
        size = layout.shard * layout.context
        for stage, units in zip(self.stages, self.stage_units, strict=True):
            gathers = self._gathers(stage, units)
            for unit in units:
                if not unit.parameters:
                    continue
                if size > 1:
                    sent = unit.gathered(size) * _ring(size)
                    key = "weights", "all-gather"
                    for times, why in gathers[unit.name]:
                        yield Term(key, "weights", size, times, times * sent, why)
                for times, wide in self._reductions(stage, unit, is_rest=unit is units[-1]):
                    if size > 1:
                        sent = wide * _ring(size)
                        yield Term(("weights", "reduce-scatter"), "weights", size, times, times * sent)
                    if layout.replicate > 1:
                        sent = 2 * wide / size * _ring(layout.replicate)
                        key = "replicate", "all-reduce"
                        yield Term(key, "replicate", layout.replicate, times, times * sent)

    def _gathers(self, stage: int, units: list[Unit]) -> dict[str, list[tuple[int, str]]]:
        """How often in a step each group is gathered, and why."""
        layout, count = self.workload.layout, self.workload.micro_batches
        if layout.zero_stage < 3:
            return {unit.name: [(1, "")] for unit in units}
        is_pipeline = layout.pipeline > 1
        *inner, rest = units
        # Head and last norm stay gathered: until the backward, in a pipeline for the whole step.
        stays = (1 if is_pipeline else count) - 2 * count
        found = {rest.name: [(2 * count, ""), (stays, "head and last norm stay gathered until the backward")]}
        has_backward = {f"layers.{layer.index}": layer.output for layer in self._layers(stage, units)}
        for unit, following in zip(inner, [*inner[1:], rest], strict=True):
            if has_backward.get(unit.name, any(unit.trained)):
                found[unit.name] = [(2 * count, "")]
                # Torch leaves the inputs' half out where nothing comes before.
                if is_pipeline and layout.schedule in SPLIT_BACKWARD and stage > 0:
                    found[unit.name].append((count, "the two halves of a backward gather each"))
            elif has_backward.get(following.name):
                # The first group of the backward has the one before gathered, as if its turn came next. It stays for the
                # next forward.
                found[unit.name] = [(count, ""), (1, "gathered for a backward that it has not")]
            else:
                found[unit.name] = [(count, "")]
        return found

    def _reductions(self, stage: int, unit: Unit, *, is_rest: bool) -> Iterator[tuple[int, int]]:
        """How often the gradients of a group are reduced in a step, and of how many bytes."""
        work, layout = self.workload, self.workload.layout
        size = layout.shard * layout.context
        wide = unit.wide_gradient(size)
        count = work.micro_batches if layout.zero_stage > 1 else 1
        is_last = stage == layout.stages - 1
        if not wide:
            return
        if not (
            is_rest and is_last and count > 1 and layout.pipeline > 1 and layout.schedule in SPLIT_BACKWARD
        ):
            yield count, wide
            return
        # The loss makes the head's gradient in the inputs' half; the weights' half reduces what there is by then.
        head = [p for p in unit.parameters if p.name in ("lm_head.weight", "embed_tokens.weight")]
        others = replace(unit, parameters=tuple(p for p in unit.parameters if p not in head))
        together = self._reduced_with_head(stage)
        yield together, wide
        if without := others.wide_gradient(size):
            yield count - together, without

    def _reduced_with_head(self, stage: int) -> int:
        """In how many of the weights' halves of the last stage's backward there is a gradient of the head."""
        there, found = False, 0
        for action in order(self.workload.layout, self.place, self.workload.micro_batches):
            if action.stage != stage:
                continue
            if action.kind == "inputs":
                there = True
            elif action.kind == "weights":
                found, there = found + there, False
        return found

    # --- tensor -----------------------------------------------------------------------------------------------------

    def _tensor(self, stage: int, layers: list[_Layer]) -> Iterator[Term]:
        """[tokens, hidden] as it is computed with: two sums a layer in the forward and two in the backward."""
        work, layout = self.workload, self.workload.layout
        count, group = work.micro_batches, layout.tensor
        sent = work.width * work.tokens * work.architecture.hidden_size * _ring(group)
        is_first, is_last = stage == 0, stage == layout.stages - 1

        def term(operation: str, times: int, why: str = "") -> Term:
            each = 2 * sent if operation == "all-reduce" else sent
            return Term(("tensor", operation), "tensor", group, times * count, times * count * each, why)

        normed = sum(layer.normed + layer.normed_again for layer in layers)
        summed = sum(layer.attended + layer.given for layer in layers)
        again = sum(layer.output for layer in layers) if work.recompute == "full" else 0
        last_norm = is_last and self._last_norm_has_gradient(layers)
        embedding = is_first and self._embedding_is_trained(stage)
        outside = "embedding and last norm"
        if layout.sequence_parallel:
            yield term("all-gather", 2 * len(layers) + summed)
            yield term("reduce-scatter", 2 * len(layers) + normed)
            yield term("all-gather", is_last + embedding, outside)
            yield term("reduce-scatter", is_first + last_norm, outside)
            made_again = 2 * again
            if work.recompute == "selective":
                made_again = sum(layer.keeps_first + layer.keeps_second for layer in layers)
            yield term("all-gather", made_again, "what norms give is gathered again")
            yield term("reduce-scatter", again, AGAIN)
        else:
            yield term("all-reduce", 2 * len(layers) + normed)
            yield term("all-reduce", is_first + last_norm, outside)
            yield term("all-reduce", again, AGAIN)
        yield from self._lengths(layers)
        if is_last:
            # The highest logit of each trained token, then two more numbers.
            chunks = ceil(work.tokens / loss_chunk(work))
            numbers = 2 * _ring(group) * 3 * work.master_width * work.tokens
            key = "tensor", "all-reduce"
            yield Term(key, "tensor", group, 2 * chunks * count, numbers * count, OF_THE_LOSS)

    def _lengths(self, layers: list[_Layer]) -> Iterator[Term]:
        """DoRA: the lengths of the rows of what is cut by columns."""
        work, adapter = self.workload, self.workload.adapter
        if adapter is None or not adapter.dora:
            return
        matrices = len({"o_proj", "down_proj"} & set(adapter.modules))
        forwards = len(layers) + (sum(layer.output for layer in layers) if work.recompute == "full" else 0)
        times, group = matrices * forwards * work.micro_batches, work.layout.tensor
        sent = 2 * work.master_width * work.architecture.hidden_size * _ring(group)
        why = "lengths of rows (DoRA)"
        yield Term(("tensor", "all-reduce"), "tensor", group, times, times * sent, why)

    def _summed_gradients(self) -> Iterator[Term]:
        """Of what tensor-parallel processes have alike and each has a summand of: one message a step."""
        layout = self.workload.layout
        size, elements = layout.shard * layout.context, 0
        for p in (p for units in self.stage_units for unit in units for p in unit.trained):
            if cut_along(*p.name.rsplit(".", 1)) is None and (
                layout.sequence_parallel or is_adapter_parameter(p.name)
            ):
                elements += _own(p, size, self.share)
        sent = 2 * _ring(layout.tensor) * self.workload.master_width * elements
        why = "gradients of norms, once a step" if self.workload.adapter is None else "gradients, once a step"
        yield Term(("tensor", "all-reduce"), "tensor", layout.tensor, int(elements > 0), sent, why)

    def _embedding_is_trained(self, stage: int) -> bool:
        units = self.stage_units[self.stages.index(stage)]
        return any(p.trained for unit in units for p in unit.parameters if p.name == "embed_tokens.weight")

    def _last_norm_has_gradient(self, layers: list[_Layer]) -> bool:
        rest = self.stage_units[-1][-1].parameters
        return layers[-1].output or any(p.trained for p in rest if p.name.startswith("norm."))

    # --- context and pipeline ---------------------------------------------------------------------------------------

    def _context(self, layers: list[_Layer]) -> Iterator[Term]:
        """Keys and values of all tokens as they are computed with; gradients of both back."""
        work, layout, shape = self.workload, self.workload.layout, self.workload.architecture
        count, group = work.micro_batches, layout.context
        keys_and_values = 2 * shape.head_groups // layout.tensor * shape.head_size
        sent = work.width * work.tokens * group * keys_and_values * _ring(group)

        def term(operation: str, times: int, why: str = "") -> Term:
            return Term(("context", operation), "context", group, times * count, times * count * sent, why)

        yield term("all-gather", len(layers))
        yield term("reduce-scatter", sum(layer.keys for layer in layers))
        if work.recompute == "full":
            again = sum(layer.output for layer in layers)
            yield term("all-gather", again, "recomputed blocks gather again")

    def _pipeline(self) -> Iterator[Term]:
        work, layout, shape = self.workload, self.workload.layout, self.workload.architecture
        key, last = ("pipeline", "send"), layout.stages - 1
        # Between two stages of one process, at the bottom of a V, nothing is sent.
        neighbours = [
            other
            for stage in self.stages
            for other in (stage + 1, stage - 1)
            if 0 <= other <= last and process_of(other, layout) != self.place
        ]
        width = max(work.width, 4) if shape.full_precision_residual else work.width
        tokens = work.tokens // (layout.tensor if layout.sequence_parallel else 1)
        calls = len(neighbours) * work.micro_batches
        yield Term(key, "pipeline", layout.pipeline, calls, calls * width * tokens * shape.hidden_size)
        has_first, has_last = 0 in self.stages, last in self.stages
        if shape.tie_word_embeddings and has_first != has_last:
            own = [
                p for units in self.stage_units for p in units[-1].trained if p.name == "embed_tokens.weight"
            ]
            size = layout.shard * layout.context
            why = "the tied matrix's gradient, first stage to last and back"
            for p in own:
                sent = work.master_width * _own(p, size, self.share)
                yield Term(key, "pipeline", layout.pipeline, int(sent > 0), sent, why)


def _layer(index: int, stream: bool, parameters: tuple[Parameter, ...]) -> _Layer:
    """A block whose input has a gradient or not."""

    def trained(*modules: str, but: tuple[str, ...] = ()) -> bool:
        return any(p.trained for p in parameters if p.module in modules and not p.name.endswith(but))

    # A bias of o or down is added to the sum, once; no bias and no magnitude needs the matrix's input for its gradient.
    added, needless = (".bias",), (".bias", ".lora_magnitude")
    normed = stream or trained("input_layernorm")
    keys = normed or trained("k_proj", "v_proj")
    attended = keys or trained("q_proj") or trained("o_proj", but=added)
    middle = stream or attended or trained("o_proj")
    normed_again = middle or trained("post_attention_layernorm")
    given = normed_again or trained("gate_proj", "up_proj") or trained("down_proj", but=added)
    return _Layer(
        index,
        normed=normed,
        keys=keys,
        attended=attended,
        normed_again=normed_again,
        given=given,
        output=middle or given or trained("down_proj"),
        keeps_first=trained("q_proj", "k_proj", "v_proj", but=needless),
        keeps_second=trained("gate_proj", "up_proj", but=needless),
    )


def _own(parameter: Parameter, processes: int, share: int) -> int:
    """Numbers of a parameter that process `share` of so many keeps: rows in equal stretches, what is left to the last."""
    rows, width = parameter.shape[0], prod(parameter.shape[1:])
    each = ceil(rows / processes)
    return max(0, min(rows, (share + 1) * each) - share * each) * width
