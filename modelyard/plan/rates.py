"""How fast a device does the parts of a step: from a data sheet, or from what was measured on it. Arithmetic only."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol, TypeVar

_T = TypeVar("_T")
Direction = Literal["output", "input gradient", "weight gradient"]
"""Which of a linear layer's three products: x W^T, g W or g^T x. Libraries differ in how well they do each."""

TILE = 128, 256
"""Rows and columns of the output that one processor of a GPU makes at a time (cuBLAS's usual choice on Hopper)."""
PIPELINE = 128
"""Inner length that a tile's beginning and end cost: filling the pipeline, writing the result."""
SQUARE = 8192
"""The square product that counts as large: rates are of this size."""


class Rates(Protocol):
    """FLOP/s and bytes/s that programs get."""

    @property
    def together(self) -> float:
        """Share of these rates that is left when the parts run as one step."""
        ...

    @property
    def dispatch(self) -> float:
        """Seconds of the host for one operation."""
        ...

    @property
    def launch(self) -> float:
        """Seconds that the device's shortest operation takes."""
        ...

    def matmul(self, dtype: str, rows: int, columns: int, inner: int, direction: Direction) -> float:
        """FLOP/s of a product [rows, inner] x [inner, columns]."""
        ...

    def attention(self, dtype: str, head_size: int, length: float, *, backward: bool) -> float:
        """FLOP/s of causal attention of segments of `length` tokens."""
        ...

    def stream(self, size: float) -> float:
        """Bytes/s, read and written together, of a pass over tensors of `size` bytes each."""
        ...

    def update(self) -> float:
        """Bytes/s of the fused optimizer."""
        ...

    def exponentials(self, dtype: str) -> float:
        """Exponentials a second; infinite where they cost nothing beside the memory."""
        ...

    def send(self, rate: float, size: float, *, crosses: bool) -> float:
        """Bytes/s that come of a wire's `rate` where a process sends `size` bytes at a time; `crosses`: nodes."""
        ...

    def latency(self, inside: int, between: int) -> float:
        """Seconds before the first byte of a ring with so many steps inside of nodes and between them."""
        ...


@lru_cache(maxsize=1 << 14)
def shape_share(rows: int, columns: int, inner: int, processors: int) -> float:
    """Share of a GPU's rate that a product of this shape can have: 1 for none, less for small ones.

    Three losses that multiply. Tiles at the edges of the output are cut, and cost as whole ones. Tiles are dealt out to the
    processors in waves, the last of which is not full; libraries soften that by cutting along the inner length, so that half of
    it counts. And each tile has a beginning and an end, in which nothing is multiplied. Which side of the output is tiled by
    which length is the library's choice: the better one.
    """
    return max(_share(rows, columns, inner, processors), _share(columns, rows, inner, processors))


def _share(rows: int, columns: int, inner: int, processors: int) -> float:
    down, across = math.ceil(rows / TILE[0]), math.ceil(columns / TILE[1])
    edges = rows * columns / (down * TILE[0] * across * TILE[1])
    waves = down * across / processors
    # A product of less than a wave is cut along its inner length until all processors have a part.
    if waves < 1:
        splits = max(1, min(math.floor(1 / waves), inner // (4 * PIPELINE)))
        inner, waves = max(1, inner // splits), waves * splits
    full = waves / math.ceil(waves)
    return edges * (1 + full) / 2 * inner / (inner + PIPELINE)


@dataclass(frozen=True)
class Datasheet:
    """Rates of a GPU from its peaks, and the shares of them that are reached (`attainable.yaml`)."""

    peaks: Mapping[str, float]
    bandwidth: float
    processors: int
    matmul_share: float
    attention_share: float
    copied: float
    link: float
    network: float
    together: float
    launch: float
    dispatch: float
    base_latency: float
    link_latency: float
    network_latency: float

    def matmul(self, dtype: str, rows: int, columns: int, inner: int, direction: Direction) -> float:
        share = shape_share(rows, columns, inner, self.processors)
        return self._peak(dtype) * self.matmul_share * share / _large(self.processors)

    def attention(self, dtype: str, head_size: int, length: float, *, backward: bool) -> float:
        # Half of the blocks on the diagonal is computed for nothing.
        diagonal = length / (length + TILE[0])
        # A head of half the size has as many exponentials for half the products.
        narrow = min(1.0, (head_size / 128) ** 0.25)
        return self._peak(dtype) * self.attention_share * diagonal * narrow

    def stream(self, size: float) -> float:
        return self.bandwidth * self.copied

    def update(self) -> float:
        return self.bandwidth * self.copied

    def exponentials(self, dtype: str) -> float:
        return math.inf

    def send(self, rate: float, size: float, *, crosses: bool) -> float:
        return rate * (self.network if crosses else self.link)

    def latency(self, inside: int, between: int) -> float:
        return self.base_latency + inside * self.link_latency + between * self.network_latency

    def _peak(self, dtype: str) -> float:
        # fp64 has no peak of its own in the files; products in it are rare enough to be called half of fp32.
        return self.peaks.get(dtype) or self.peaks["float32"] / 2


@lru_cache
def _large(processors: int) -> float:
    return shape_share(SQUARE, SQUARE, SQUARE, processors)


LARGE = 16 << 20
"""Bytes of a matrix from which on its product counts as one that no cache holds."""
Curve = Sequence[tuple[float, float]]
"""(size, rate), sizes increasing."""


def at(curve: Curve, size: float) -> float:
    """The rate at a size, between the nearest two measured ones by their logarithms; beyond them that of the last."""
    sizes = [point[0] for point in curve]
    place = bisect_left(sizes, size)
    if place == 0 or place == len(curve):
        return curve[min(place, len(curve) - 1)][1]
    (low, before), (high, after) = curve[place - 1], curve[place]
    share = math.log(size / low) / math.log(high / low)
    return before ** (1 - share) * after**share


@dataclass(frozen=True)
class Measured:
    """Rates of one machine, as `modelyard.plan.machine` measured them."""

    products: Mapping[str, Mapping[Direction, Curve]]
    """By dtype and direction: FLOP/s by the shortest of a product's three lengths."""
    attentions: Mapping[str, Mapping[str, Curve]]
    """By dtype, `forward` and `backward`: FLOP/s by the length of segments in tokens."""
    large: Mapping[str, Mapping[Direction, float]]
    """Likewise, of products with a matrix of more than `LARGE` bytes, which no cache holds."""
    streams: Curve
    """Bytes/s of elementwise passes by the bytes of one tensor."""
    updates: float
    exponential: Mapping[str, float]
    """By dtype, a second."""
    messages: Curve = ()
    """Bytes/s that a process sends in an all-reduce of two, by the bytes sent; empty: not measured."""
    together: float = 1.0
    launch: float = 0.0
    dispatch: float = 0.0

    def matmul(self, dtype: str, rows: int, columns: int, inner: int, direction: Direction) -> float:
        rate = at(_of(self.products, dtype)[direction], min(rows, columns, inner))
        width = 2 if dtype in ("bfloat16", "float16") else 4
        if width * max(rows * columns, rows * inner, inner * columns) > LARGE:
            rate = min(rate, _of(self.large, dtype)[direction])
        return rate

    def attention(self, dtype: str, head_size: int, length: float, *, backward: bool) -> float:
        return at(_of(self.attentions, dtype)["backward" if backward else "forward"], length)

    def stream(self, size: float) -> float:
        return at(self.streams, size)

    def update(self) -> float:
        return self.updates

    def exponentials(self, dtype: str) -> float:
        return _of(self.exponential, dtype)

    def send(self, rate: float, size: float, *, crosses: bool) -> float:
        return at(self.messages, size) if self.messages else rate

    def latency(self, inside: int, between: int) -> float:
        return 0.0  # it is in what messages of each size were measured to take


def _of(table: Mapping[str, _T], dtype: str) -> _T:
    return table[dtype] if dtype in table else table["float32"]
