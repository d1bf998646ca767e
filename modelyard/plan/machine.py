"""This machine as hardware of the planner: what it is, and how fast it does the parts of a step, measured on generic sizes.

About twenty seconds; kept in the user's cache with what the machine is, and measured again when that changes or when asked to.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from modelyard.config.architecture import Architecture
from modelyard.config.layout import Layout
from modelyard.files import replace_text
from modelyard.model.attention import attend
from modelyard.model.decoder import Decoder
from modelyard.model.init import InitStd, initialize
from modelyard.plan.hardware import THIS_MACHINE, Cluster, Hardware, hardware_names, load_hardware
from modelyard.plan.rates import Curve, Direction, Measured
from modelyard.plan.workload import Workload
from modelyard.train.allocator import keep_freed_memory
from modelyard.train.optimizer import Optimizer
from modelyard.train.step import LossOptions, train_step
from modelyard.train.weights import DTYPES, Weights

FORMAT = 1
"""Of the file; another one is measured again."""


@dataclass(frozen=True)
class Sizes:
    """What is measured with, in elements, tokens or bytes. Nothing of it is a size that anybody trains."""

    tokens: int
    widths: tuple[int, ...]
    large: tuple[int, int, int]
    """Tokens, width and outputs of a product whose output no cache holds."""
    lengths: tuple[int, ...]
    stream: tuple[int, ...]
    update: int
    dtypes: tuple[str, ...]
    seconds: float
    """For each figure."""


CPU_SIZES = Sizes(
    1024, (32, 64, 128, 256, 512, 1024), (768, 384, 24_576), (64, 256, 1024, 2048),
    tuple(1 << n for n in (18, 20, 22, 24, 26, 28)), 1 << 23, ("float32", "bfloat16"), 0.12,
)  # fmt: skip
GPU_SIZES = Sizes(
    8192, (128, 512, 1024, 2048, 4096, 8192), (8192, 4096, 32_768), (256, 1024, 4096, 8192),
    tuple(1 << n for n in (20, 24, 28, 30)), 1 << 28, ("bfloat16", "float32"), 0.12,
)  # fmt: skip
_ALL = 1 << 20
"""Processes that are all on one machine."""
_LONG_AGO = 64 << 20
"""Bytes after which a processor's own cache has forgotten what it had."""
SMALL = Architecture(512, 32, 4, 4, 2, 8, 64)
"""A model in which nothing takes time but to say what is to be done."""
MIDDLE = Architecture(6144, 640, 2, 10, 5, 64, 1664), 3, 320
MIDDLE_OF_GPU = Architecture(32_000, 4096, 2, 32, 8, 128, 14_336), 4, 2048
"""Models, rows and lengths whose step is held against the sum of its parts."""


def this_machine(*, again: bool = False) -> Hardware:
    """This machine, as it was measured before or as it is now.

    `again`: measure in any case.
    """
    if not again and (kept := known_machine()) is not None:
        return kept
    found = {"format": FORMAT, "machine": fingerprint(), "date": date.today().isoformat(), **measure()}
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(found, indent=1) + "\n")
    return hardware_from(found)


def known_machine() -> Hardware | None:
    """This machine as it was measured before; None where it was not, or was another one."""
    try:
        kept = json.loads(cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_this = kept.get("format") == FORMAT and kept.get("machine") == fingerprint()
    return hardware_from(kept) if is_this else None


def cache_file() -> Path:
    """Where what was measured is kept."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modelyard"
    digest = hashlib.sha256(json.dumps(fingerprint(), sort_keys=True).encode()).hexdigest()[:12]
    return folder / f"machine-{digest}.json"


def fingerprint() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "gpus": torch.cuda.device_count(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    """Name and instructions of the processor: a virtual machine may have the name without them."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor() or platform.machine()
    lines = path.read_text(encoding="utf-8").splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return " ".join(
        [name, *(flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags)]
    )


def hardware_from(kept: dict[str, Any]) -> Hardware:
    """What `measure` found, as the planner takes it."""
    rates, machine = dict(kept["rates"]), kept["machine"]
    for name in ("streams", "messages"):
        rates[name] = _curve(rates[name])
    for name in ("products", "attentions"):
        rates[name] = {
            dtype: {key: _curve(curve) for key, curve in table.items()}
            for dtype, table in rates[name].items()
        }
    measured = Measured(**rates)
    gpu = machine["gpu"]
    known = None if gpu is None else known_gpu(gpu, kept["memory"])
    peaks = known.peaks if known else kept["peaks"]
    network = measured.messages[-1][1] if measured.messages else kept["bandwidth"] / 4
    return Hardware(
        THIS_MACHINE,
        gpu or f"{machine['processor']}, {machine['threads']} threads",
        memory=kept["memory"],
        peaks=peaks,
        bandwidth=kept["bandwidth"],
        link=known.link if known else network,
        network=known.network if known else network,
        gpus_per_node=machine["gpus"] if gpu else _ALL,
        processors=known.processors if known else machine["cores"],
        rates=measured,
        is_gpu=gpu is not None,
        overlaps=gpu is not None,
        sources={"all": f"measured on {kept['date']}, torch {machine['torch']}"},
    )


def _curve(points: Any) -> Curve:
    return tuple((size, rate) for size, rate in points)


def known_gpu(torch_name: str, memory: int) -> Hardware | None:
    """The data sheet of a GPU by torch's name for it and the bytes that it has; None where there is no file."""
    found = [
        hardware for name in hardware_names() if (hardware := load_hardware(name)).torch_name in torch_name
    ]
    return min(found, key=lambda hardware: abs(hardware.memory - memory), default=None)


# --- measuring ------------------------------------------------------------------------------------------------


class _Clock:
    """Seconds of calls on a device, as often as fits the time given."""

    def __init__(self, device: torch.device, seconds: float, now: Callable[[], float]):
        self._device, self._seconds, self._now = device, seconds, now

    def __call__(self, function: Callable[[], object], least: int = 3) -> float:
        """The fastest of several calls after the first: what else the machine does only adds to them."""
        function()
        self._wait()
        times: list[float] = []
        end = self._now() + self._seconds
        while len(times) < least or self._now() < end:
            begin = self._now()
            function()
            self._wait()
            times.append(self._now() - begin)
        return min(times)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def measure(sizes: Sizes | None = None, *, now: Callable[[], float] = time.perf_counter) -> dict[str, Any]:
    """Every figure of this machine: of its GPU where there is one, else of its processor with torch's threads.

    `now`: what tells the time [seconds]; on a machine that others use `time.process_time` does, for one thread.
    """
    is_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if is_gpu else "cpu")
    sizes = sizes or (GPU_SIZES if is_gpu else CPU_SIZES)
    if not is_gpu:
        keep_freed_memory()  # as a run does it
    clock = _Clock(device, sizes.seconds, now)
    with _quietly():
        rates: dict[str, Any] = {
            "products": {dtype: _products(clock, sizes, dtype, device) for dtype in sizes.dtypes},
            "large": {dtype: _large_products(clock, sizes, dtype, device) for dtype in sizes.dtypes},
            "attentions": {dtype: _attentions(clock, sizes, dtype, device) for dtype in sizes.dtypes},
            "streams": _streams(clock, sizes, device),
            "updates": _update(clock, sizes, device),
            "messages": _messages(device) if dist.is_initialized() else [],
        }
        rates["exponential"] = {
            dtype: _exponentials(clock, dtype, device, dict(rates["streams"])) for dtype in sizes.dtypes
        }
        main = sizes.dtypes[0]
        memory = torch.cuda.get_device_properties(0).total_memory if is_gpu else _host_memory()
        found: dict[str, Any] = {
            "memory": memory,
            "bandwidth": rates["streams"][-1][1],
            "peaks": {
                dtype: max(r for _, r in table["output"]) for dtype, table in rates["products"].items()
            },
            "rates": rates,
        }
        whole = {"format": FORMAT, "machine": fingerprint(), "date": date.today().isoformat(), **found}
        rates["dispatch"] = _dispatch(clock, main, device)
        rates["together"] = _together(clock, hardware_from(whole), main, device)
    return found


@contextmanager
def _quietly() -> Iterator[None]:
    """Without gradients' bookkeeping where nothing asks for it."""
    generator = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(generator)


def _random(*shape: int, dtype: str = "float32", device: torch.device) -> Tensor:
    return torch.randn(*shape, device=device).to(DTYPES[dtype])


def _three(
    clock: _Clock, tokens: int, into: int, out: int, dtype: str, device: torch.device
) -> dict[Direction, float]:
    """FLOP/s of a linear layer's three products."""
    flops = 2.0 * tokens * into * out

    def rate(product: Callable[[Tensor, Tensor, Tensor, Tensor], object]) -> float:
        sets = _sets((tokens, into), (tokens, out), (out, into), (out, into), dtype=dtype, device=device)
        return flops / clock(lambda: product(*next(sets)))

    return {
        "output": rate(lambda x, g, w, dw: torch.mm(x, w.t(), out=g)),
        "input gradient": rate(lambda x, g, w, dw: torch.mm(g, w, out=x)),
        "weight gradient": rate(lambda x, g, w, dw: torch.mm(g.t(), x, out=dw)),
    }


def _sets(*shapes: tuple[int, ...], dtype: str = "float32", device: torch.device) -> Iterator[list[Tensor]]:
    """Tensors of these shapes, for ever, other ones each time until it is long ago: in a step nothing lies in the nearest
    cache either, but what was made just before."""
    size = sum(math.prod(shape) for shape in shapes) * DTYPES[dtype].itemsize
    count = max(1, min(64, _LONG_AGO // size))
    return itertools.cycle(
        [[_random(*shape, dtype=dtype, device=device) for shape in shapes] for _ in range(count)]
    )


def _products(
    clock: _Clock, sizes: Sizes, dtype: str, device: torch.device
) -> dict[Direction, list[tuple[float, float]]]:
    found: dict[Direction, list[tuple[float, float]]] = {}
    for width in sizes.widths:
        out = max(width, sizes.widths[len(sizes.widths) // 2])
        for direction, rate in _three(clock, sizes.tokens, width, out, dtype, device).items():
            found.setdefault(direction, []).append((width, rate))
    return found


def _large_products(clock: _Clock, sizes: Sizes, dtype: str, device: torch.device) -> dict[Direction, float]:
    return _three(clock, *sizes.large, dtype, device)


def _attentions(
    clock: _Clock, sizes: Sizes, dtype: str, device: torch.device
) -> dict[str, list[tuple[float, float]]]:
    """FLOP/s of causal attention by the length of its segments, heads of 64, two queries to a key."""
    heads, groups, head_size = 6, 3, 64
    found: dict[str, list[tuple[float, float]]] = {"forward": [], "backward": []}
    for length in sizes.lengths:
        tokens = max(sizes.lengths[-1] // 2, length)
        q, k, v = (
            _random(tokens, n, head_size, dtype=dtype, device=device).requires_grad_()
            for n in (heads, groups, groups)
        )
        direction = torch.randn_like(q)
        cu = torch.arange(0, tokens + 1, length, dtype=torch.int32, device=device)

        def forward(q: Tensor = q, k: Tensor = k, v: Tensor = v, cu: Tensor = cu, n: int = length) -> Tensor:
            return attend(q, k, v, cu, cu, n, n)

        def both(direction: Tensor = direction, forward: Callable[[], Tensor] = forward) -> None:
            forward().backward(direction)

        flops = 2.0 * tokens * length / 2 * heads * head_size
        there = clock(forward)
        back = max(clock(both) - there, there)
        found["forward"].append((length, 2 * flops / there))
        found["backward"].append((length, 5 * flops / back))
    return found


def _streams(clock: _Clock, sizes: Sizes, device: torch.device) -> list[tuple[float, float]]:
    """Bytes/s of a product of two tensors into a third, by the bytes of one."""
    found = []
    for size in sizes.stream:
        sets = _sets(*[(size // 4,)] * 3, device=device)

        def product(sets: Iterator[list[Tensor]] = sets) -> None:
            a, b, out = next(sets)
            torch.mul(a, b, out=out)

        found.append((float(size), 3 * size / clock(product)))
    return found


def _update(clock: _Clock, sizes: Sizes, device: torch.device) -> float:
    """Bytes/s of torch's fused AdamW: weights, gradients and moments read, all but the gradients written."""
    weight = torch.nn.Parameter(_random(sizes.update, device=device))
    weight.grad = torch.randn_like(weight)
    adamw = torch.optim.AdamW([weight], fused=True)
    return 28 * sizes.update / clock(adamw.step)


def _exponentials(clock: _Clock, dtype: str, device: torch.device, streams: dict[float, float]) -> float:
    """Exponentials a second, beside the passes over the memory."""
    size = 1 << 20
    x = _random(size // 4, dtype=dtype, device=device)
    out = torch.empty_like(x)
    passes = 2 * x.nbytes / streams.get(float(size), min(streams.values()))
    seconds = clock(lambda: torch.exp(x, out=out))
    return x.numel() / max(seconds - passes, seconds / 20)


def _messages(device: torch.device) -> list[tuple[float, float]]:
    """Bytes/s that this process sends in an all-reduce among all, by the bytes of the message; all of them call it."""
    found = []
    ring = 2 * (dist.get_world_size() - 1) / dist.get_world_size()
    for size in (1 << 12, 1 << 16, 1 << 20, 1 << 24):
        tensor = torch.zeros(size // 4, device=device)
        times = []
        for _ in range(12):
            dist.barrier()
            begin = time.perf_counter()
            dist.all_reduce(tensor)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        found.append((ring * size, ring * size / statistics.median(times[2:])))
    return found


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# --- whole steps ----------------------------------------------------------------------------------------------


def step_of(
    architecture: Architecture, rows: int, length: int, dtype: str, device: torch.device
) -> tuple[Workload, Callable[[], object]]:
    """A training step of one process on random tokens, eager: what the planner takes of it, and the step."""
    from modelyard.data.batch import Batch

    model = Decoder(architecture)
    model.to_empty(device=device)
    initialize(model, 0, InitStd.for_architecture(architecture))
    weights = Weights(model, DTYPES[dtype])
    optimizer = Optimizer(weights.master, weight_decay=0.1, betas=(0.9, 0.95), epsilon=1e-8)
    tokens = torch.randint(architecture.vocab_size, (rows, length + 1))
    batch = Batch(
        tokens[:, :-1].contiguous(),
        tokens[:, 1:].contiguous(),
        torch.arange(length).expand(rows, -1).contiguous(),
        torch.tensor([[0, length]] * rows, dtype=torch.int32),
    )

    def step() -> object:
        return train_step(
            model,
            weights,
            optimizer,
            batch,
            learning_rate=1e-4,
            micro_batch_size=rows,
            max_norm=1.0,
            loss_options=LossOptions(),
            device=device,
        )

    workload = Workload(architecture, Layout(), rows, rows, length, dtype=dtype, on_gpu=device.type == "cuda")
    return workload, step


def _dispatch(clock: _Clock, dtype: str, device: torch.device) -> float:
    """Seconds of the host for an operation: a step in which nothing else takes time, over the operations in it."""
    from modelyard.plan.parts import parts_of

    workload, step = step_of(SMALL, 1, 32, dtype, device)
    calls = sum(part.times * part.calls for part in parts_of(workload))
    seconds = clock(step, 8)
    return seconds / calls


def _together(clock: _Clock, hardware: Hardware, dtype: str, device: torch.device) -> float:
    """What is left of the parts' own rates in a step of a model of a middle size."""
    from modelyard.plan.duration import duration_of

    workload, step = step_of(*(MIDDLE_OF_GPU if hardware.is_gpu else MIDDLE), dtype, device)
    expected = duration_of(workload, Cluster(hardware, 1, 1, hardware.network)).step
    return expected / clock(step, 5)
