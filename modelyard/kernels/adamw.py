"""AdamW (arXiv 1711.05101) over all parameters in one launch, the copies to compute with included.

Bytes for each parameter: 16 read (master, gradient and both moments in fp32), 12 written, and 2 or 4 for the copy in the
compute dtype: the fewest possible. In torch's calls it is 12 more: the pass that scales the gradients reads and writes them,
and the one that makes the copies reads the masters again.

Programs know their tensors by a table of addresses. It is made anew every step, for gradients are: some bytes a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
WARPS = 8
CHUNK = 32 * BLOCK
"""Values of a program, a block after the other: four of each thread, 16 bytes of each tensor."""


class Update(NamedTuple):
    """One parameter of a step; all but the copy fp32, all of one shape and on one device."""

    master: Tensor
    gradient: Tensor
    mean: Tensor
    square: Tensor
    copy: Tensor | None
    """What gets the new values in its own dtype."""
    scale: float
    """Factor on the learning rate."""
    decay: float
    """Weight decay."""


@triton.jit
def adamw_kernel(
    addresses,
    numbers,
    chunks,
    rate,
    factor,
    beta_1,
    beta_2,
    correction_1,
    root_correction_2,
    epsilon,
    HAS_COPY: tl.constexpr,
    COPY_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    tensor = tl.load(chunks + program * 2).to(tl.int64)
    first = tl.load(chunks + program * 2 + 1).to(tl.int64) * CHUNK
    master = tl.load(addresses + tensor * 6).to(tl.pointer_type(tl.float32)) + first
    gradient = tl.load(addresses + tensor * 6 + 1).to(tl.pointer_type(tl.float32)) + first
    mean = tl.load(addresses + tensor * 6 + 2).to(tl.pointer_type(tl.float32)) + first
    square = tl.load(addresses + tensor * 6 + 3).to(tl.pointer_type(tl.float32)) + first
    copy = tl.load(addresses + tensor * 6 + 4).to(tl.pointer_type(COPY_DTYPE)) + first
    left = tl.load(addresses + tensor * 6 + 5) - first
    if ALIGNED:  # an address from a table says nothing of that by itself, and accesses would have 4 bytes
        master = tl.multiple_of(master, 16)
        gradient = tl.multiple_of(gradient, 16)
        mean = tl.multiple_of(mean, 16)
        square = tl.multiple_of(square, 16)
        copy = tl.multiple_of(copy, 16)
        left = tl.multiple_of(left, 16)
    own_rate = rate * tl.load(numbers + tensor * 2)
    kept = 1.0 - own_rate * tl.load(numbers + tensor * 2 + 1)
    step = own_rate / correction_1
    for begin in range(0, CHUNK, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        inside = at < left
        g = tl.load(gradient + at, mask=inside, other=0.0) * factor
        m = tl.load(mean + at, mask=inside, other=0.0)
        v = tl.load(square + at, mask=inside, other=0.0)
        p = tl.load(master + at, mask=inside, other=0.0)
        m += (g - m) * (1.0 - beta_1)
        v = v * beta_2 + g * g * (1.0 - beta_2)
        p = p * kept - step * (m / (tl.sqrt(v) / root_correction_2 + epsilon))
        tl.store(mean + at, m, mask=inside)
        tl.store(square + at, v, mask=inside)
        tl.store(master + at, p, mask=inside)
        if HAS_COPY:
            tl.store(copy + at, p, mask=inside)


COPY_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@torch.no_grad()
def adamw_(
    updates: Sequence[Update],
    *,
    rate: float,
    factor: float,
    betas: tuple[float, float],
    epsilon: float,
    steps: int,
) -> None:
    """The `steps`th update, counted from 1, in place: masters, moments and copies; gradients stay as they are.

    The gradients count `factor` times. One launch for each dtype of copies, and one more for tensors of odd sizes. Raises
    ValueError for tensors that are not as `Update` says.
    """
    kinds: dict[tuple[torch.dtype | None, bool], list[Update]] = {}
    for update in updates:
        if update.master.numel():
            _require_layout(update)
            # Here, for it stays alive until the launch.
            update = update._replace(gradient=_like(update.gradient, update.master))
            dtype = None if update.copy is None else update.copy.dtype
            kinds.setdefault((dtype, is_aligned(update)), []).append(update)
    beta_1, beta_2 = betas
    for (dtype, aligned), members in kinds.items():
        device = members[0].master.device
        chunks = _chunks(tuple(update.master.numel() for update in members), device)
        adamw_kernel[(len(chunks),)](
            _moved(torch.tensor([_row(update) for update in members], dtype=torch.int64), device),
            _moved(torch.tensor([[u.scale, u.decay] for u in members], dtype=torch.float32), device),
            chunks,
            rate,
            factor,
            beta_1,
            beta_2,
            1 - beta_1**steps,
            (1 - beta_2**steps) ** 0.5,
            epsilon,
            HAS_COPY=dtype is not None,
            COPY_DTYPE=tl.float32 if dtype is None else COPY_DTYPES[dtype],
            ALIGNED=aligned,
            CHUNK=CHUNK,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )


def _row(update: Update) -> list[int]:
    """What the kernel knows a parameter by: five addresses and the number of values."""
    tensors = (update.master, update.gradient, update.mean, update.square)
    copy = 0 if update.copy is None else update.copy.data_ptr()
    return [*(tensor.data_ptr() for tensor in tensors), copy, update.master.numel()]


def is_aligned(update: Update) -> bool:
    """Whether accesses of 16 bytes are possible, at the beginnings and up to the end."""
    return all(number % 16 == 0 for number in _row(update))


def _like(tensor: Tensor, other: Tensor) -> Tensor:
    """With its values in the order that `other` has them in memory."""
    return tensor if tensor.stride() == other.stride() else torch.empty_like(other).copy_(tensor)


def _require_layout(update: Update) -> None:
    """Raise ValueError where values would be taken for others: all are read by their place in memory."""
    master = update.master
    others = [update.mean, update.square, *([] if update.copy is None else [update.copy])]
    if not master.is_contiguous() or any(
        other.shape != master.shape or not other.is_contiguous() or other.device != master.device
        for other in others
    ):
        raise ValueError(f"a parameter {list(master.shape)} whose moments or copy lie in another order")
    if any(t.dtype != torch.float32 for t in (master, update.gradient, update.mean, update.square)):
        raise ValueError("masters, gradients and moments must be fp32")


@lru_cache(maxsize=8)
def _chunks(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Of each program: which tensor, and which chunk of it; int32 [programs, 2]."""
    counts = torch.tensor([-(-size // CHUNK) for size in sizes])
    tensors = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    begins = (counts.cumsum(0) - counts)[tensors]
    return torch.stack([tensors, torch.arange(len(tensors)) - begins], 1).to(device, torch.int32)


def _moved(table: Tensor, device: torch.device) -> Tensor:
    # From pinned memory nothing waits for the device.
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table
