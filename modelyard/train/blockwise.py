"""Optimizer state in eight bits a value, in blocks that have a scale each (arXiv 2110.02861).

A block's values are divided by its scale, which makes the one of largest magnitude 1, and each is kept as the nearest of 256
numbers that are dense near 1 and reach down to a millionth in seven decades. The scale has that value's sign: so 1 is always
met, and what is read back and narrowed again does not change. The paper's scale has no sign, and its largest negative value
comes back 0.7% smaller each time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from modelyard.device import on_gpu

BLOCK = 256
"""Values that share a scale."""
_DECADES = 7
_PREFIX = 19
"""Bits of an fp32 number that say which of the 256 is the nearest: its sign, its exponent, ten of its mantissa."""


def dynamic_values(*, signed: bool) -> tuple[float, ...]:
    """The 256 numbers that codes stand for, rising, in [-1, 1] or [0, 1] (section 1.3 and appendix F of the paper).

    Each decade below 1 is cut into equal parts, whose middles they are: from the lowest decade to the highest 1, 2, 4, …, 64
    parts; with no sign twice as many. Beside them there are 0 and 1.
    """
    values = [0.0, 1.0]
    for decade in range(_DECADES):
        parts = (1 if signed else 2) << decade
        size = 10.0 ** (decade + 1 - _DECADES)
        middles = [size * (0.1 + 0.9 * (part + 0.5) / parts) for part in range(parts)]
        values += middles + ([-middle for middle in middles] if signed else [])
    return tuple(sorted(values))


class Blockwise:
    """A tensor of `length` values, flat, in eight bits each; zeros to begin with."""

    def __init__(self, length: int, *, signed: bool, dtype: torch.dtype, device: torch.device):
        """`dtype` is that of the values; of a tensor that is not `signed` none is below 0, and what is above 0 stays so."""
        blocks = math.ceil(length / BLOCK)
        self._length, self._signed = length, signed
        self.codes = torch.zeros(blocks * BLOCK, dtype=torch.uint8, device=device)
        """uint8, whole blocks."""
        self.scales = torch.zeros(blocks, dtype=dtype, device=device)
        """The value of largest magnitude of each block."""

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def pieces(self) -> Iterator[slice]:
        """The values in stretches that are worked on at once: whole blocks, but for the last. On a CPU they fit the cache, on a
        GPU they are enough to keep it busy."""
        step = 1 << (24 if on_gpu(self.codes) else 17)
        for begin in range(0, self._length, step):
            yield slice(begin, min(begin + step, self._length))

    def read(self, piece: slice) -> Tensor:
        """The values of one of `pieces`, in fp32 or wider."""
        blocks = self._blocks(piece)
        table = _values(self._signed, self.scales.dtype, self.scales.device)
        codes = self.codes[blocks.start * BLOCK : blocks.stop * BLOCK]
        values = table.index_select(0, codes.int()).unflatten(0, (-1, BLOCK))
        return values.mul_(self.scales[blocks, None]).flatten()[: piece.stop - piece.start]

    def write(self, piece: slice, values: Tensor) -> None:
        """Narrow the values of one of `pieces`, which are finite."""
        blocks = self._blocks(piece)
        whole = F.pad(values, (0, -len(values) % BLOCK)).unflatten(0, (-1, BLOCK))
        highest = scales = whole.amax(1)
        if self._signed:
            lowest = whole.amin(1)
            scales = torch.where(highest >= -lowest, highest, lowest)
        self.scales[blocks] = scales
        # A quotient and no product with the reciprocal, which a scale near 0 has none of.
        relative = (whole / scales.where(scales != 0, 1.0)[:, None]).float().flatten()
        prefix = (
            relative.view(torch.int32).bitwise_right_shift_(32 - _PREFIX).bitwise_and_((1 << _PREFIX) - 1)
        )
        nearest = _nearest(self._signed, prefix.device)
        torch.index_select(nearest, 0, prefix, out=self.codes[blocks.start * BLOCK : blocks.stop * BLOCK])

    @staticmethod
    def _blocks(piece: slice) -> slice:
        return slice(piece.start // BLOCK, math.ceil(piece.stop / BLOCK))


@lru_cache
def _values(signed: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(dynamic_values(signed=signed), dtype=dtype, device=device)


@lru_cache
def _nearest(signed: bool, device: torch.device) -> Tensor:
    """The code nearest to each number of fp32 in [-1, 1], by the first bits of it [2^19], uint8.

    A look-up takes a twentieth of the time of a search among the 256 (measured on a CPU). What lies nearer to the middle
    between two than those bits tell may go to the other one; the 256 themselves are far enough from there. With no sign
    nothing goes to 0: the update divides by the second moment's root, and a small one that vanished would make it large.
    """
    prefixes = torch.arange(1 << _PREFIX) << (32 - _PREFIX) | 1 << (31 - _PREFIX)
    numbers = prefixes.to(torch.int32).view(torch.float32)
    table = _values(signed, torch.float32, torch.device("cpu"))
    codes = torch.bucketize(numbers, (table[:-1] + table[1:]) / 2)
    return codes.clamp_(0 if signed else 1, 255).to(torch.uint8).to(device)
