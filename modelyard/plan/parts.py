"""What one process computes in a step, part by part: FLOPs, and the bytes that go through memory. Arithmetic only.

Of every part two counts of bytes: the fewest that it needs, each input read once and each output written once; and those that
this program moves, operation by operation, which are more where nothing is compiled. `modelyard.plan.duration` makes seconds
of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain

from modelyard.config.adapter import MODULES
from modelyard.plan.part import BLOCK, Kind, Part, Phase, Share
from modelyard.plan.parts_of_ends import Ends
from modelyard.plan.workload import Workload


def parts_of(workload: Workload, place: int = 0) -> list[Part]:
    """Of the process at `place` along the pipeline: one micro-batch, forward and backward, and what comes once a step."""
    found = chain(Blocks(workload, place).all(), Ends(workload, place).all())
    return [part for part in found if part.times and (part.flops or part.moved)]


def step_flops(workload: Workload, *, kinds: Iterable[Kind] = ("matmul", "attention")) -> float:
    """FLOPs that all processes together execute in a step, recomputation included."""
    layout, wanted = workload.layout, tuple(kinds)
    alike = layout.data * layout.context * layout.tensor
    return alike * sum(
        part.all_flops * (1 if part.per_step else workload.micro_batches)
        for place in range(layout.pipeline)
        for part in parts_of(workload, place)
        if part.kind in wanted
    )


class Blocks(Share):
    """Of one process."""

    def all(self) -> Iterator[Part]:
        if blocks := len(self.layers):
            yield from self._matrices()
            yield from self._attention()
            yield from self._between(blocks)

    def _matrices(self) -> Iterator[Part]:
        shape, blocks = self.shape, len(self.layers)
        hidden, groups = shape.hidden_size, (("q_proj", self.query), ("k_proj", self.key_value))
        products = [(name, hidden, out) for name, out in (*groups, ("v_proj", self.key_value))]
        products.append(("o_proj", self.query, hidden))
        if shape.gated:
            products.append(("gate_proj", hidden, self.inner))
        products += [("up_proj", hidden, self.inner), ("down_proj", self.inner, hidden)]
        for module, into, out in products:
            name = _PROJECTIONS.get(module, "feed-forward")
            home = "mlp" if module in MODULES[4:] else "self_attn"
            names = (f"layers.{layer}.{home}.{module}.weight" for layer in self.layers)
            frozen = self.workload.frozen
            trained = sum(name not in frozen for name in names) if frozen else blocks
            yield from self._linear(name, blocks, trained, into, out)
            if self.workload.recompute == "full" and module != "down_proj":  # torch stops before the last
                yield self._product(name, "recompute", "output", blocks, (self.tokens, out, into))
            yield from self._adapter(module, blocks, into, out)
            if self.alone and self.workload.adapter and self.workload.adapter.quantization:
                yield from self._dequantize(module, blocks, into * out)

    def _linear(self, name: str, times: int, trained: int, into: int, out: int) -> Iterator[Part]:
        """The three products of a layer [out, into]."""
        tokens = self.tokens
        yield self._product(name, "forward", "output", times, (tokens, out, into))
        yield self._product(name, "backward", "input gradient", times, (tokens, into, out))
        yield self._product(name, "backward", "weight gradient", trained, (out, into, tokens))

    def _adapter(self, module: str, blocks: int, into: int, out: int) -> Iterator[Part]:
        adapter, tokens = self.workload.adapter, self.tokens
        if adapter is None or module not in adapter.modules:
            return
        rank = adapter.rank
        for phase, direction, shape in (
            ("forward", "output", (tokens, rank, into)),
            ("forward", "output", (tokens, out, rank)),
            ("backward", "input gradient", (tokens, rank, out)),
            ("backward", "input gradient", (tokens, into, rank)),
            ("backward", "weight gradient", (rank, into, tokens)),
            ("backward", "weight gradient", (rank, out, tokens)),
        ):
            yield self._product("adapter", phase, direction, blocks, shape)  # type: ignore[arg-type]
            if phase == "forward" and self.workload.recompute == "full":
                yield self._product("adapter", "recompute", "output", blocks, shape)
        if adapter.dora:
            # The lengths of the rows of W + scale B A, in the forward: a matrix in fp32, a product onto it, its squares.
            product = self._product("adapter", "forward", "output", blocks, (out, into, rank))
            size = into * out * self.wide
            yield replace(product, bytes=into * out * self.width, moved=6 * size, calls=6, size=size)
            yield self._pass("adapter", "forward", blocks, tokens * out, (3, 5), calls=2)
            yield self._pass("adapter", "backward", blocks, tokens * out, (3, 6), calls=4)

    def _dequantize(self, module: str, blocks: int, count: int) -> Iterator[Part]:
        """A byte of codes is looked up as two numbers in fp32, scaled in place, and copied to where it is wanted."""
        phases: list[Phase] = ["forward", "backward"]
        if self.workload.recompute == "full" and module != "down_proj":
            phases.append("recompute")
        fewest = count * (0.5 + self.width)
        eager = count * (0.5 + 2 + 2 + 4 + 8 + 4 + self.width)
        moved = fewest if self.workload.compiled else eager
        for phase in phases:
            size = float(min(BLOCK, 4 * count)) if not self.workload.on_gpu else 4.0 * count
            yield Part("NF4", phase, "memory", blocks, 0.0, fewest, moved, calls=6, size=size)

    def _attention(self) -> Iterator[Part]:
        """Flash attention: two products forward, five backward, two of them the forward's again."""
        workload, shape, tokens = self.workload, self.shape, self.tokens
        length = min(workload.document_length or workload.sequence_length, workload.sequence_length)
        windows: dict[int | None, int] = {}
        for layer in self.layers:
            window = shape.window_of(layer)
            window = None if window is None or window >= length else window
            windows[window] = windows.get(window, 0) + 1
        for window, times in windows.items():
            pairs = tokens * (
                keys_of(length, window)
                if workload.on_gpu
                else _keys_on_cpu(length, window, workload.sequence_length, self.layout.context)
            )
            each = 2 * pairs * self.query
            streams = self.width * tokens * (self.query + self.key_value)
            # Rates are those of whole causal segments, where a query sees half of the keys.
            seen = 2 * pairs / tokens
            for phase, products, passes in (("forward", 2, 2), ("backward", 5, 4), ("recompute", 2, 2)):
                if phase == "recompute" and workload.recompute != "full":
                    continue
                yield Part(
                    "attention",
                    phase,  # type: ignore[arg-type]
                    "attention",
                    times,
                    flops=products * each,
                    bytes=passes * streams,
                    moved=passes * streams,
                    calls=1 if workload.on_gpu else _SEGMENT_CALLS * max(1.0, tokens / length),
                    length=seen,
                    size=streams,
                )
            if self.layout.context > 1:
                yield from self._gathered_keys(times)
            if workload.on_gpu and self.query > self.key_value:
                # Flash attention's backward makes the gradients of keys and values for each head, and sums them afterwards.
                keys = tokens * self.layout.context
                size = 2 * self.width * keys * (2 * self.query + self.key_value)
                yield Part("attention", "backward", "memory", times, 0, 0, size, calls=2, size=size / 4)

    def _gathered_keys(self, times: int) -> Iterator[Part]:
        """Keys and values laid together for the gather, and those of all processes put in order."""
        both = 2 * self.key_value * self.tokens
        whole = both * self.layout.context
        again = self.workload.recompute == "full"
        phases: list[tuple[Phase, int]] = [("forward", 2), ("backward", 4)]
        for phase, passes in [*phases, ("recompute", 2)] if again else phases:
            moved = self.width * (2 * both + passes * whole)
            size = self.width * whole
            yield Part("keys of others", phase, "memory", times, 0, moved, moved, calls=4, size=size)

    def _between(self, blocks: int) -> Iterator[Part]:
        """Norms, rotation, activation, residual sums."""
        workload, shape = self.workload, self.shape
        stream, features = self.own_tokens * shape.hidden_size, self.tokens * self.inner
        rotated = self.tokens * (self.query + self.key_value)
        selective, full = workload.recompute == "selective", workload.recompute == "full"
        rms = shape.norm_type == "rms_norm"
        norms = 2 * blocks + self.is_last
        for phase, times in (
            ("forward", norms),
            ("recompute", 2 * blocks if selective or full else 0),
        ):
            yield self._norm(phase, times, stream, rms)  # type: ignore[arg-type]
        yield self._norm("backward", norms, stream, rms)
        if shape.rotary.type != "none":
            for phase, times in (
                ("forward", blocks),
                ("backward", blocks),
                ("recompute", blocks if full else 0),
            ):
                cast = 2 * (self.width + self.wide) if self.is_narrow else 0
                yield self._counted(
                    "rotary",
                    phase,  # type: ignore[arg-type]
                    times,
                    rotated,
                    2 * self.width,
                    7 * self.wide + cast,
                    calls=18 if not self.is_narrow else 22,
                )
        forward, backward = self._activation_passes()
        yield self._pass("activation", "forward", blocks, features, forward, calls=2, exponentials=1)
        yield self._pass("activation", "backward", blocks, features, backward, calls=4, exponentials=2)
        again = blocks if selective or full else 0
        yield self._pass("activation", "recompute", again, features, forward, calls=2, exponentials=1)
        yield self._pass("residual", "forward", 2 * blocks, stream, (2, 3))
        yield self._pass("residual", "recompute", blocks if full else 0, stream, (2, 3))
        yield self._pass("residual", "backward", 2 * blocks, stream, (1, 3))

    def _activation_passes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Reads and writes forward and backward: the fewest, and those that are done.

        SwiGLU: silu(gate) into a new tensor, times up in place; backward that again, two products, silu's own backward. Others
        are left to autograd.
        """
        if not self.shape.gated:
            return (2, 2), (3, 3)
        return ((3, 5), (5, 11)) if self.shape.activation == "silu" else ((3, 5), (5, 9))

    def _norm(self, phase: Phase, times: float, elements: float, rms: bool) -> Part:
        width, wide = self.width, self.wide
        if phase == "backward":
            fewest, eager, calls = 3 * width, 12 * wide, 9
            casts = 2 * (width + wide) + wide + width
        else:
            fewest, eager, calls = 2 * width, 7 * wide, 6
            casts = width + wide
        if not rms:  # one kernel each way
            eager = (3 if phase != "backward" else 5) * width
            casts = 0
        moved = eager + (casts if self.is_narrow else 0)
        return self._counted("norms", phase, times, elements, fewest, moved, calls=calls)


_SEGMENT_CALLS = 6
"""Operations that one segment takes on a CPU, where each is a call of its own: cut out, turned, attended to, laid back."""
_PROJECTIONS = dict.fromkeys(MODULES[:4], "projections")


def keys_of(length: float, window: int | None) -> float:
    """Keys that a query sees on average, in documents of `length` tokens: half of them, or what the window leaves."""
    if window is None or window >= length:
        return length / 2
    return window - window * window / (2 * length)


def _keys_on_cpu(length: float, window: int | None, sequence: int, context: int) -> float:
    """Keys that a query is multiplied with on average where attention is torch's for CPUs, which skips the keys after a query
    in squares and computes what a mask hides."""
    if window is not None:
        # Blocks of queries; all but the first also see the window before them.
        block = max(window, 64)
        blocks = length / block
        return min(block + (1 - 1 / blocks) * (window - 1), length) if blocks > 1 else length / 2
    chunk = sequence / (2 * context)
    if context > 1 and length > chunk:
        return length * (2 * context + 1) / (4 * context)
    return length / 2
