"""A part of a step, and what the counts of all of them begin with: how much of everything a process has. Arithmetic only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from modelyard.plan.rates import Direction
from modelyard.plan.units import Parameter, parameters_of, units_of
from modelyard.plan.workload import Workload

Kind = Literal["matmul", "attention", "memory", "update"]
"""What a part keeps busy: `update` is the optimizer's one pass, which is memory's, too."""
Phase = Literal["forward", "backward", "recompute", "optimizer"]
BLOCK = 1 << 20
"""Bytes that the softmax on a CPU, and what NF4 is looked up in, work on at once."""


@dataclass(frozen=True)
class Part:
    """Something that is done `times` times; the other numbers are of one time."""

    name: str
    phase: Phase
    kind: Kind
    times: float
    flops: float = 0.0
    bytes: float = 0.0
    """The fewest."""
    moved: float = 0.0
    """As this program does it."""
    calls: float = 1.0
    """Operations that are called for it."""
    shape: tuple[int, int, int] | None = None
    """Of a product: rows and columns of the result, inner length."""
    direction: Direction = "output"
    length: float = 0.0
    """Of attention: tokens of a segment."""
    exponentials: float = 0.0
    size: float = 0.0
    """Bytes of one of the tensors that are passed over: what the cache has to hold."""
    per_step: bool = False
    """Whether it is done once a step and not once a micro-batch."""

    @property
    def all_flops(self) -> float:
        return self.times * self.flops

    @property
    def all_bytes(self) -> float:
        return self.times * self.bytes

    @property
    def all_moved(self) -> float:
        return self.times * self.moved


class Share:
    """What one process has of a step, and the kinds of parts that come of it."""

    def __init__(self, workload: Workload, place: int):
        self.workload, self.shape, self.layout = workload, workload.architecture, workload.layout
        self.stages = workload.stages_at(place)
        self.layers = [layer for stage in self.stages for layer in workload.stage_layers[stage]]
        self.is_first, self.is_last = 0 in self.stages, self.layout.stages - 1 in self.stages
        self.alone = workload.adapter is not None and workload.adapter.freeze_others
        self.parameters = self._parameters(place)
        self.units = 2 + len(self.layers)
        """Groups that are gathered and reduced together, about."""
        self.tokens, self.width = workload.tokens, workload.width
        self.wide = 8 if self.width == 8 else 4
        self.is_narrow = self.width < self.wide
        self.own_tokens = self.tokens // (self.layout.tensor if self.layout.sequence_parallel else 1)
        """Those in the residual stream."""
        tensor = self.layout.tensor
        self.query = self.shape.num_attention_heads * self.shape.head_size // tensor
        self.key_value = self.shape.head_groups * self.shape.head_size // tensor
        self.inner = self.shape.ffn_hidden_size // tensor
        self.words = self.shape.vocab_size // tensor

    def _parameters(self, place: int) -> list[tuple[Parameter, int]]:
        """Those of this process, as tensor parallelism cut them, and of how many layers each is."""
        if self.workload.frozen and not self.alone:  # some layers may be frozen and others not
            units = [unit for units in units_of(self.workload, place) for unit in units]
            return [(parameter, 1) for unit in units for parameter in unit.parameters]
        tied = self.shape.tie_word_embeddings
        found = []
        for parameter in parameters_of(self.workload):
            begin = parameter.name.partition(".")[0]
            times = {
                "layers": len(self.layers),
                "embed_tokens": int(self.is_first or (self.is_last and tied)),
                "embed_positions": int(self.is_first),
            }.get(begin, int(self.is_last))
            if times:
                found.append((parameter, times))
        return found

    def _product(
        self, name: str, phase: Phase, direction: Direction, times: float, shape: tuple[int, int, int]
    ) -> Part:
        rows, columns, inner = shape
        size = self.width * (rows * columns + rows * inner + inner * columns)
        return Part(
            name,
            phase,
            "matmul",
            times,
            flops=2 * rows * columns * inner,
            bytes=size,
            moved=size,
            shape=shape,
            direction=direction,
        )

    def _pass(
        self,
        name: str,
        phase: Phase,
        times: float,
        elements: float,
        passes: tuple[float, float],
        *,
        calls: int = 1,
        exponentials: float = 0,
    ) -> Part:
        """Reads and writes of tensors of the compute dtype: the fewest, and those that are done."""
        fewest, eager = (count * self.width for count in passes)
        part = self._counted(name, phase, times, elements, fewest, eager, calls=calls)
        return replace(part, exponentials=exponentials * elements)

    def _counted(
        self,
        name: str,
        phase: Phase,
        times: float,
        elements: float,
        fewest: float,
        eager: float,
        *,
        calls: int,
    ) -> Part:
        """`fewest` and `eager` are bytes an element, over all reads and writes. Compiled, what stands between matrix
        products is one operation."""
        fused = self.workload.compiled
        return Part(
            name,
            phase,
            "memory",
            times,
            bytes=fewest * elements,
            moved=(fewest if fused else eager) * elements,
            calls=1 if fused else calls,
            size=elements * (self.wide if self.is_narrow and name == "norms" else self.width),
        )
