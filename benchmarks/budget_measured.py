"""What torch's profiler says of each part of a training step: for budget.py.

While it is measured, ranges stand around the parts of the step, put there from outside. An operation of the forward belongs to
the innermost range around it; one of the backward to the part whose operation made its node: autograd numbers both alike. What
sums two gradients of one tensor has no operation of the forward: beside matrices that read the same input (queries, keys and
values; gate and up) it is a row of its own, everywhere else it is the residual stream's. Inside compiled stretches matrix
products are told apart by their shapes; everything else there is one row.

On a CPU an operation's time is its own time there, the host's work included; on a GPU that of its kernels.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.budget import FUSED
from modelyard.data.batch import Batch
from modelyard.errors import UserError
from modelyard.model import attention, decoder, elementwise
from modelyard.model.compile import compile_blocks
from modelyard.model.decoder import Decoder
from modelyard.model.init import InitStd, initialize
from modelyard.model.recompute import recompute_blocks
from modelyard.plan.workload import Workload
from modelyard.train import step as training
from modelyard.train.allocator import keep_freed_memory
from modelyard.train.optimizer import Optimizer
from modelyard.train.step import LossOptions, train_step
from modelyard.train.weights import DTYPES, Weights

MARK = "part: "
HEAD = "head and loss"
SUMS = "sums of inputs' gradients"
NODE = "autograd::engine::evaluate_function: "
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "mkl::_mkl_linear", "mkldnn::_linear_pointwise")
MATRICES = ("projections", "feed-forward", FUSED)


@dataclass(frozen=True)
class Measured:
    """Of one step, in seconds: the fastest, for what else the machine does only adds to it."""

    seconds: float
    """Of the fastest step without the profiler."""
    profiled: float
    """Of the fastest with it, to which all else belongs; on a GPU what its kernels take."""
    parts: dict[tuple[str, str], float]
    """(row, phase) → time; phases are forward, backward, recompute, optimizer."""
    unattributed: dict[str, float]
    """Operation → time of what belongs to no part, the longest first."""


def marked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        with record_function(MARK + name):
            return function(*arguments, **options)

    return call


@contextmanager
def ranges(model: Decoder, weights: Weights, optimizer: Optimizer, compiled: bool) -> Iterator[None]:
    """Ranges around the parts, for as long as this lasts."""
    patches = [
        (attention.Segments, "__call__", "attention"),
        (decoder, "rotary_table", "rotary"),
        (model, "embed", "embedding"),
        (training, "head_loss", HEAD),
        (weights, "square_norm", "gradient norm and scale"),
        (optimizer, "step", "optimizer"),
        (weights, "publish", "publish"),
        (weights, "zero_gradients", "gradients given back"),
    ]
    blocks = list(model.layers.values())
    if compiled:
        patches += [(b, name, FUSED) for b in blocks for name in ("before_attention", "after_attention")]
        patches.append((model.norm, "forward", FUSED))
    else:
        patches += [
            (decoder, "rms_norm", "norms"),
            (elementwise, "rms_norm", "norms"),  # the one inside of the sum and its norm
            (decoder, "rms_norm_of_sum", "residual"),
            (decoder, "rotate_both", "rotary"),
            (decoder, "swiglu", "activation"),
        ]
        for block in blocks:
            heads, inner = block.self_attn, block.mlp
            patches += [(getattr(heads, f"{n}_proj"), "forward", "projections") for n in "qkvo"]
            names = [n for n in ("gate_proj", "up_proj", "down_proj") if getattr(inner, n) is not None]
            patches += [(getattr(inner, n), "forward", "feed-forward") for n in names]
            patches += [(block, "after_attention", "residual")]
            if hasattr(inner, "activation"):  # a feed-forward of another kind
                patches += [(inner, "gate", "activation"), (inner, "activation", "activation")]
    whole = []
    try:
        for owner, name, part in patches:
            old = getattr(owner, name)
            if isinstance(owner, type):
                patch = mock.patch.object(owner, name, _method(part, old))
            elif isinstance(owner, torch.nn.Module):
                # Past what a module does with its attributes.
                patch = mock.patch.dict(owner.__dict__, {name: marked(part, old)})
            else:
                patch = mock.patch.object(owner, name, marked(part, old))
            patch.start()
            whole.append(patch)
        yield
    finally:
        for patch in reversed(whole):
            patch.stop()


def _method(part: str, old: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        with record_function(MARK + part):
            return old(self, *arguments, **options)

    return call


def measured_step(workload: Workload, steps: int, *, backend: str = "inductor") -> Measured:
    """Run the workload's step on the device that is here, compiled by `backend` if it says so. Raises UserError where one process alone cannot."""
    if workload.layout.world > 1 or workload.adapter is not None or workload.frozen:
        raise UserError(
            "--measure: one process that trains every weight; this config has others, or adapters"
        )
    if workload.offload_activations:
        raise UserError("--measure: without activations in the host's memory")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        keep_freed_memory()
    shape = workload.architecture
    with torch.device("meta"):
        model = Decoder(shape)
    model.to_empty(device=device)
    recompute_blocks(model, workload.recompute)
    if workload.compiled:
        compile_blocks(model, backend=backend)
    initialize(model, 0, InitStd.for_architecture(shape))
    weights = Weights(model, DTYPES[workload.dtype])
    weights.publish()
    optimizer = Optimizer(
        weights.master, weight_decay=0.1, betas=(0.9, 0.95), epsilon=1e-8, state=workload.optimizer_state
    )
    batch = _batch(workload)

    def step() -> None:
        train_step(
            model, weights, optimizer, batch,
            learning_rate=1e-4, micro_batch_size=workload.micro_rows, max_norm=1.0,
            loss_options=LossOptions(implementation=workload.cross_entropy), device=device,
        )  # fmt: skip

    step()
    step()
    times = []
    for _ in range(max(steps, 3)):
        begin = time.perf_counter()
        step()  # reads the loss: the device is done
        times.append(time.perf_counter() - begin)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    profilers = []
    with ranges(model, weights, optimizer, workload.compiled):
        for _ in range(steps):
            step()  # what the last profile took is the process's own again
            with profile(activities=activities, record_shapes=True) as profiler, record_function("step"):
                step()
            profilers.append(profiler)
    # Looked at when all is done: that takes memory, and a step that has to ask the system for other pages is slower.
    found = [attribute(p.events(), workload, on_gpu=device.type == "cuda") for p in profilers]
    parts, rest = min(found, key=lambda one: sum(one[0].values()))
    profiled = sum(parts.values()) + sum(rest.values())
    rest = dict(sorted(rest.items(), key=lambda item: -item[1])[:8])
    return Measured(min(times), profiled, parts, rest)


def _batch(workload: Workload) -> Batch:
    rows, length = workload.batch_rows, workload.sequence_length
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(workload.architecture.vocab_size, (rows, length + 1), generator=generator)
    each = round(min(workload.document_length or length, length))
    ends = torch.tensor([*range(0, length, each), length], dtype=torch.int32)
    return Batch(
        tokens[:, :-1].contiguous(),
        tokens[:, 1:].contiguous(),
        (torch.arange(length) % each).expand(rows, -1).contiguous(),
        ends.expand(rows, -1).contiguous(),
    )


# --- whose is an operation? -----------------------------------------------------------------------------------------


def attribute(
    events: Any, workload: Workload, *, on_gpu: bool
) -> tuple[dict[tuple[str, str], float], dict[str, float]]:
    """Seconds of one step by (row, phase), and by operation of what belongs to none."""
    on_host = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    makers = _makers(on_host)
    parts: dict[tuple[str, str], float] = defaultdict(float)
    rest: dict[str, float] = defaultdict(float)
    for event in on_host:
        spent = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) * 1e-6
        if not spent:
            continue
        part, phase = _owner(event, makers)
        if part is None:
            rest[event.name] += spent
        else:
            parts[_row(part, event, workload), phase] += spent
    return dict(parts), dict(rest)


def _makers(events: list[Any]) -> dict[int, str]:
    """Number of an autograd node → the range in which it was made: that of the last operation before it was counted."""
    found: dict[int, tuple[float, str]] = {}
    for event in events:
        number = event.sequence_nr
        if number < 0 or event.name.startswith(NODE):
            continue
        part, in_backward = None, False
        above = event
        while above is not None:
            if part is None and above.name.startswith(MARK):
                part = above.name[len(MARK) :]
            in_backward |= above.name.startswith(NODE) and "Checkpoint" not in above.name
            above = above.cpu_parent
        if part is not None and (number not in found or event.time_range.start >= found[number][0]):
            if in_backward and number in found:
                continue
            found[number] = event.time_range.start, part
    return {number: part for number, (_, part) in found.items()}


def _owner(event: Any, makers: dict[int, str]) -> tuple[str | None, str]:
    """The part that an operation belongs to, and the phase in which it runs."""
    below = None
    part: str | None = None
    above = event
    while above is not None:
        name = above.name
        if part is None and name.startswith(MARK):
            part = name[len(MARK) :]
        elif name.startswith(NODE):
            if part is not None:
                return part, "recompute"
            if "AccumulateGrad" in name:
                return "gradient accumulation", "backward"
            part = makers.get(above.sequence_nr)
            if below is not None and below.name.startswith("aten::add") and part is not None:
                part = SUMS if part in MATRICES else "residual"
            return part, "backward"
        below, above = above, above.cpu_parent
    return part, "optimizer" if part in _OPTIMIZER else "forward"


_OPTIMIZER = ("gradient norm and scale", "optimizer", "publish", "gradients given back")


def _row(part: str, event: Any, workload: Workload) -> str:
    shape = workload.architecture
    sizes = [list(size) for size in event.input_shapes or [] if isinstance(size, list | tuple)]
    if part == HEAD:
        is_head = event.name in PRODUCTS or [shape.vocab_size, shape.hidden_size] in sizes[:1]
        return "head" if is_head else "loss"
    if part == FUSED and event.name in PRODUCTS:
        return "feed-forward" if any(shape.ffn_hidden_size in size for size in sizes) else "projections"
    if part == "optimizer" and "_foreach_mul" in event.name:
        return "gradient norm and scale"
    if workload.compiled and part in ("norms", "rotary", "activation", "residual"):
        return FUSED
    return part
