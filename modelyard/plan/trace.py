"""A dry run of one process of any layout: the real model takes real optimizer steps, with tensors that have no memory.

The other processes are not there (torch's fake process group), and what the model computes has no values
(`FakeTensorMode`), only shapes. What a batch says beside its words is real, though, and what follows from that alone:
where documents begin and which tokens are trained on decide about shapes.

What is counted is what tensors hold, from their making until nobody has them, and each collective, as torch dispatches
them. It is the program itself that runs: no formula of this package is used, so that the formulas can be held against it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from modelyard.data.batch import Batch
from modelyard.device import as_on_gpu
from modelyard.model import dropout, nf4
from modelyard.parallel.apply import Parallel, parallelize
from modelyard.parallel.mesh import Mesh, Totals
from modelyard.plan.meter import Key, Meter
from modelyard.plan.torch_private import (
    DispatchMode,
    ValueNeeded,
    device_of,
    fake_of,
    fake_processes,
    fake_tensors,
    for_real,
    is_fake,
)
from modelyard.plan.workload import Workload
from modelyard.train import blockwise
from modelyard.train.optimizer import Optimizer
from modelyard.train.step import LossOptions, train_step
from modelyard.train.weights import DTYPES

_REAL = 1 << 20
"""Elements of the largest tensor that is computed with values."""
_TABLES = (nf4._pairs, dropout._feature_words, blockwise._values, blockwise._nearest)
"""What is made once and kept: it counts for a process that has traced before as for one that has not."""
_LIVE = 40
"""Storages that `Traced.live` names."""


@dataclass(frozen=True)
class Live:
    """One storage that was held at the highest point."""

    bytes: int
    made_by: str
    """The operation that made it."""
    phase: str
    """In which it was made."""
    kind: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Traced:
    """What one process held and sent in an optimizer step."""

    peak_bytes: int
    """The most that all tensors held together."""
    at_rest_bytes: int
    """Between steps."""
    phase_peaks: dict[str, int]
    """The most in each of `forward`, `backward` and `optimizer`."""
    by_category: dict[str, int]
    """Of `peak_bytes`: `weights` (as the optimizer keeps them), `gathered` (as they are computed with), `gradients`,
    `optimizer` (moments), `forward` and `backward` (what else was made there), `other`."""
    calls: dict[Key, tuple[int, float]]
    """Calls, and bytes that the process sends in a ring, by (kind of parallelism, operation)."""
    live: list[Live]
    """The largest storages of the peak."""


def trace(workload: Workload, rank: int, *, steps: int = 2) -> Traced:
    """What process `rank` holds at most, and sends, in the last of `steps` optimizer steps.

    The first step makes the moments, so that the second is like all that follow. The pieces that are worked on at once, and
    the attention, are a GPU's if the workload is `on_gpu`. Nothing is compiled, and on_gpu activations are not offloaded.
    Raises RuntimeError where torch.distributed is in use already.
    """
    layout = workload.layout
    meter = Meter()
    with warnings.catch_warnings(), _processes(rank, layout.world):
        warnings.simplefilter("ignore")
        mesh = _Mesh(layout, torch.device("cpu"), alone=layout.world == 1)
        batch = batch_of(workload, mesh)
        with as_on_gpu(workload.on_gpu), fake_tensors() as fakes, _Host(fakes, meter), meter.counting():
            return measure(workload, mesh, batch, meter, steps=steps)


def measure(
    workload: Workload, mesh: Mesh, batch: Batch, meter: Meter, *, steps: int, fill: Any = None
) -> Traced:
    """Build the model in its layout and take `steps` steps on `batch`, within `meter`: what the last one held and sent."""
    layout = workload.layout
    for table in _TABLES:
        table.cache_clear()
    if layout.tensor > 1:
        meter.tensor_group = mesh.group("tensor").group_name
    run = parallelize(
        workload.architecture,
        mesh,
        compute_dtype=DTYPES[workload.dtype],
        recompute=workload.recompute,
        offload_activations=workload.offload_activations,
        compile=False,
        sequence_length=workload.sequence_length,
        fill=fill or (lambda model, write: None),
        frozen=workload.frozen,
        adapter=workload.adapter,
    )
    optimizer = Optimizer(
        run.weights.master,
        weight_decay=0.1,
        betas=(0.9, 0.95),
        epsilon=1e-8,
        scales={name: 0.0 for name, p in run.weights.master.items() if not p.requires_grad},
        state=workload.optimizer_state,
    )
    meter.mark([_local(p) for model in run.models for p in model.parameters()], "gathered")
    meter.mark(run.weights.master.values(), "weights")
    batch = run.local(batch)
    at_rest = 0
    for step in range(steps):
        if step == steps - 1:
            meter.start()
            at_rest = meter.now

        def begin(phase: str) -> None:
            _mark_gradients(meter, run)
            meter.begin(phase)

        train_step(
            run.model,
            run.weights,
            optimizer,
            batch,
            learning_rate=1e-3,
            micro_batch_size=workload.micro_rows,
            max_norm=1.0,
            loss_options=LossOptions(implementation=workload.cross_entropy),
            device=mesh.device,
            mesh=mesh,
            phase=begin,
        )
        meter.begin("rest")
        meter.mark((t for name in optimizer.trained for t in optimizer.held(name).values()), "optimizer")
    return _traced(meter, at_rest)


def batch_of(workload: Workload, mesh: Mesh) -> Batch:
    """The rows of this process's share: documents of the workload's length, every token trained on."""
    rows, length = workload.batch_rows // workload.layout.data, workload.sequence_length
    document = min(length, round(workload.document_length or length))
    ends = [*range(0, length, document), length]
    positions = (torch.arange(length) % document).repeat(rows, 1)
    ids = torch.zeros(rows, length, dtype=torch.int64)
    numbers = None
    if workload.adapter is not None and workload.adapter.dropout:
        numbers = dropout.token_numbers(0, 0, rows, length)
    return Batch(ids, ids, positions, torch.tensor([ends] * rows, dtype=torch.int32), None, numbers)


def _traced(meter: Meter, at_rest: int) -> Traced:
    held = sorted(meter.at_peak(), key=lambda pair: -pair[1])
    categories = dict.fromkeys(
        ("weights", "gathered", "gradients", "optimizer", "forward", "backward", "other"), 0
    )
    for storage, size in held:
        kind = storage.kind or storage.phase
        categories[kind if kind in categories else "other"] += size
    live = [Live(size, one.made_by, one.phase, one.kind, one.shape, one.dtype) for one, size in held[:_LIVE]]
    phases = {phase: meter.phase_peaks[phase] for phase in ("forward", "backward", "optimizer")}
    return Traced(meter.peak, at_rest, phases, categories, dict(meter.sent), live)


def _mark_gradients(meter: Meter, run: Parallel) -> None:
    parameters = [p for model in run.models for p in model.parameters()]
    meter.mark(
        (_local(p.grad) for p in [*parameters, *run.weights.master.values()] if p.grad is not None),
        "gradients",
    )


def _local(tensor: Tensor) -> Tensor:
    return getattr(tensor, "_local_tensor", tensor)


# --- a world without values -------------------------------------------------------------------------------------


@contextmanager
def _processes(rank: int, world: int) -> Iterator[None]:
    if world == 1:
        yield
    else:
        with fake_processes(rank, world):
            yield


class _Mesh(Mesh):
    """Sums that have no values are what a step goes on with: one of everything, and nothing to say."""

    def total(self, loss: Any, square: Any, targets: int, **words: bool) -> Totals:
        super().total(loss, square, targets, **words)
        return Totals(1.0, 1.0, max(targets, 1), notice=False, abandon=False)


class _Host(DispatchMode):
    """Within, what follows from a batch's numbers alone is computed, and all else has no values.

    Whole numbers made from nothing (`arange`) are real, as is whatever is made of real tensors, while it is small. Where
    such a tensor meets one without memory, so is the result.
    """

    def __init__(self, fakes: Any, meter: Meter):
        super().__init__()
        self._fakes, self._meter = fakes, meter

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if op is torch.ops.prim.device.default:  # asked of every result, often
            return device_of(args[0])
        if op is torch.ops.aten._local_scalar_dense.default and is_fake(args[0]):
            return 1.0 if args[0].dtype.is_floating_point else 1  # any number
        if op.namespace == "profiler":
            with for_real():
                return op(*args, **kwargs)
        there = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if any(is_fake(t) for t in there):
            if op.namespace == "aten" and not all(is_fake(t) for t in there):
                args, kwargs = tree_map_only(Tensor, self._fake, (args, kwargs))
            return op(*args, **kwargs)
        try:
            shape = op(*args, **kwargs)
        except ValueNeeded:
            shape = None
        from_real = bool(there) and all(t.device.type != "meta" for t in there)
        if all(self._is_real(t, from_real) for t in tree_leaves(shape) if isinstance(t, Tensor)):
            with for_real():
                result = op(*args, **kwargs)
                if op is torch.ops.c10d.recv_.default:
                    there[0].fill_(
                        1
                    )  # what the stages of a pipeline ask each other before the first step: yes
                return result
        return shape

    def _fake(self, tensor: Tensor) -> Tensor:
        if is_fake(tensor):
            return tensor
        fake = fake_of(tensor, self._fakes)
        self._meter.stands_for(fake)
        return fake

    def _is_real(self, result: Tensor, from_real: bool) -> bool:
        if result.device.type == "meta":  # a model that is being built
            return True
        return result.numel() <= _REAL and (from_real or result.dtype in _WHOLE)


_WHOLE = (torch.int64, torch.int32, torch.bool)
