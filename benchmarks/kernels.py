"""How many bytes do the kernels in Triton move, beside the fewest possible and torch's, and how long do they take?

    python benchmarks/kernels.py            on a CUDA machine; writes benchmarks/results/kernels.json
    python benchmarks/kernels.py --predict  no GPU: bytes, and the milliseconds they would take at 4.3 TB/s

Shapes of Llama-3.1-8B, bf16, 8,192 tokens; for each part of a step forward and backward together. The kernels' bytes are
those of their docstrings; torch's are counted: what each operation of the twin in this program reads and writes. Where the
last reading of the logits is found in the cache is not known before it is measured: the prediction has both ends.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import write_result
from modelyard import kernels
from modelyard.loss.cross_entropy import _exponentials
from modelyard.model import elementwise
from modelyard.train.optimizer import Optimizer

BANDWIDTH = 4.3e12
"""Bytes a second of a large copy on an H200, read and written."""
TOKENS, HIDDEN, INNER, WORDS, LAYERS = 8192, 4096, 14336, 128256, 32
HEADS, GROUPS, HEAD = 32, 8, 128
PARAMETERS = 8_030_261_248


Call = Callable[[], object]
Wrap = Callable[[Any], Any]


def as_it_is(function: Any) -> Any:
    return function


class Part(NamedTuple):
    """One part of a training step."""

    name: str
    calls: float
    """Of it in a step."""
    fewest: int
    """Bytes of a call: every input read once, every output written once, in both directions."""
    moved: int
    """By the kernel, at most."""
    make: Callable[[torch.device, Wrap], Call]
    """The call, to be made again and again; `kernels.chosen` says who computes it. What is to be compiled is wrapped."""
    compiles: bool
    """Whether torch.compile is a third to compare with: it has no part in the loss and the optimizer."""


def normal(device: torch.device, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype)


def both_ways(function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: list[Tensor]) -> Call:
    inputs = [x.requires_grad_(x.dtype == torch.bfloat16) for x in inputs]
    trained = [x for x in inputs if x.requires_grad]

    def call() -> object:
        out = function(*inputs)
        outputs = out if isinstance(out, tuple) else (out,)
        # The outputs for their own gradients: as many bytes, and nothing to be made for it.
        return torch.autograd.grad(outputs, trained, [y.detach() for y in outputs])

    return call


def norm(device: torch.device, wrap: Wrap) -> Call:
    inputs = [normal(device, TOKENS, HIDDEN), normal(device, HIDDEN)]
    return both_ways(wrap(lambda x, w: elementwise.rms_norm(x, w, 1e-5)), inputs)


def norm_of_sum(device: torch.device, wrap: Wrap) -> Call:
    inputs = [normal(device, TOKENS, HIDDEN), normal(device, TOKENS, HIDDEN), normal(device, HIDDEN)]
    return both_ways(wrap(lambda x, a, w: elementwise.rms_norm_of_sum(x, a, w, 1e-5)), inputs)


def rotary(device: torch.device, wrap: Wrap) -> Call:
    inputs = [normal(device, TOKENS, HEADS, HEAD), normal(device, TOKENS, GROUPS, HEAD)]
    angle = normal(device, TOKENS, 1, HEAD // 2, dtype=torch.float32)
    return both_ways(wrap(elementwise.rotate_both), [*inputs, angle.cos(), angle.sin()])


def swiglu(device: torch.device, wrap: Wrap) -> Call:
    return both_ways(wrap(elementwise.swiglu), [normal(device, TOKENS, INNER), normal(device, TOKENS, INNER)])


CHUNK = (1 << 27) // WORDS  # tokens, as the loss takes them on a GPU


def softmax(device: torch.device, wrap: Wrap) -> Call:
    logits = normal(device, CHUNK, WORDS)
    targets = torch.zeros(CHUNK, 1, dtype=torch.int64, device=device)
    coefficient = torch.empty(CHUNK, 1, device=device)
    return lambda: _exponentials(logits, targets, coefficient, 1.0, 1.0, 0.0, None)


LAYER = {
    "q": (HIDDEN, HIDDEN),
    "k": (GROUPS * HEAD, HIDDEN),
    "v": (GROUPS * HEAD, HIDDEN),
    "o": (HIDDEN, HIDDEN),
    "gate": (INNER, HIDDEN),
    "up": (INNER, HIDDEN),
    "down": (HIDDEN, INNER),
    "norm": (HIDDEN,),
    "other": (HIDDEN,),
}
LAYER_SIZE = sum(torch.Size(shape).numel() for shape in LAYER.values())


def adamw(device: torch.device, wrap: Wrap) -> Call:
    masters = {name: nn.Parameter(normal(device, *s, dtype=torch.float32)) for name, s in LAYER.items()}
    copies = {name: normal(device, *s) for name, s in LAYER.items()}
    optimizer = Optimizer(masters, weight_decay=0.1, betas=(0.9, 0.95), epsilon=1e-8)
    for p in masters.values():
        p.grad = torch.randn_like(p)

    def call() -> None:
        optimizer.step(1e-4, factor=0.999, copies=copies)
        if left := [name for name in copies if name not in optimizer.published]:
            with torch.no_grad():
                torch._foreach_copy_([copies[name] for name in left], [masters[name] for name in left])

    return call


def parts() -> list[Part]:
    stream, heads, inner = 2 * TOKENS * HIDDEN, 2 * TOKENS * (HEADS + GROUPS) * HEAD, 2 * TOKENS * INNER
    inverse, sums = 4 * TOKENS, 264 * 4 * HIDDEN
    angles = 2 * 4 * TOKENS * HEAD // 2
    logits = 2 * CHUNK * WORDS
    # A norm's inverse goes out and comes back; its weight's partial sums, too, which the fewest bytes have not.
    return [
        Part("norm", LAYERS + 1, 5 * stream + 2 * inverse, 5 * stream + 2 * inverse + 2 * sums, norm, True),
        Part(
            "norm of a sum",
            LAYERS,
            8 * stream + 2 * inverse,
            8 * stream + 2 * inverse + 2 * sums,
            norm_of_sum,
            True,
        ),
        Part("rotary", LAYERS, 4 * heads + 2 * angles, 4 * heads + 2 * angles, rotary, True),
        Part("swiglu", LAYERS, 8 * inner, 8 * inner, swiglu, True),
        Part("cross-entropy", TOKENS / CHUNK, 2 * logits, 3 * logits, softmax, False),
        Part("adamw", PARAMETERS / LAYER_SIZE, 30 * LAYER_SIZE, 30 * LAYER_SIZE, adamw, False),
    ]


class Counted(TorchDispatchMode):
    """Adds up the bytes of what operations read and write; a view is neither."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.name():
            self.bytes += sum(t.nbytes for t in tree_iter((args, kwargs, _fresh(func, out))) if _is(t))
            if func._schema.is_mutable:  # what is written in place is read, too, but by a copy or a fill
                written = args[0] if not kwargs or "out" not in kwargs else ()
                if "copy" not in func.name() and "fill" not in func.name():
                    self.bytes += sum(t.nbytes for t in tree_iter(written) if _is(t))
        return out


def _is(value: object) -> bool:
    return isinstance(value, Tensor)


def _fresh(func: Any, out: Any) -> Any:
    return () if func._schema.is_mutable else out


def counted(part: Part) -> int:
    """The bytes that torch's operations of one call move."""
    if (
        part.name == "adamw"
    ):  # one operation's reads and writes are no tensors' whole count: masters, moments, gradients
        return (8 + 16 + 12 + 6) * LAYER_SIZE  # scaled; read and written by the update; copied
    call = part.make(torch.device("meta"), as_it_is)
    with Counted() as counter:
        call()
    return counter.bytes


def milliseconds(call: Callable[[], object]) -> float:
    """Median of single calls; each finds the cache full of something else."""
    other = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    for _ in range(5):
        call()
    times = []
    for _ in range(30):
        other.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def measured(part: Part, device: torch.device) -> dict[str, float]:
    """Milliseconds of a call by who computes it."""
    found = {}
    call = part.make(device, as_it_is)
    for choice in ("torch", "triton"):
        with kernels.chosen(choice):  # type: ignore[arg-type]
            found[choice] = milliseconds(call)
    if part.compiles:
        found["compiled"] = milliseconds(part.make(device, torch.compile))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--predict", action="store_true", help="measure nothing; needs no GPU")
    options = parser.parse_args()
    rows = []
    print(
        "part            calls   fewest MB  kernel MB  torch MB | a step, ms at 4.3 TB/s: fewest  kernel  torch"
    )
    for part in parts():
        torch_bytes = counted(part)
        floor, kernel, plain = (
            part.calls * moved / BANDWIDTH * 1e3 for moved in (part.fewest, part.moved, torch_bytes)
        )
        row: dict[str, Any] = {
            "part": part.name,
            "calls": round(part.calls, 2),
            "fewest_bytes": part.fewest,
            "kernel_bytes": part.moved,
            "torch_bytes": torch_bytes,
            "predicted_ms_a_step": {"fewest": floor, "triton": kernel, "torch": plain},
        }
        megabytes = "".join(f"{moved / 1e6:>11,.0f}" for moved in (part.fewest, part.moved, torch_bytes))
        print(
            f"{part.name:<14}{part.calls:>7.1f}{megabytes} {'':<24}{floor:>8.1f}{kernel:>8.1f}{plain:>8.1f}"
        )
        if not options.predict:
            row["measured_ms"] = measured(part, torch.device("cuda"))
            for who, ms in row["measured_ms"].items():
                share = part.fewest / BANDWIDTH * 1e3 / ms
                print(
                    f"    {who:<10} {ms:8.3f} ms a call, {part.calls * ms:8.1f} a step; floor / time {share:.2f}"
                )
        rows.append(row)
    if not options.predict:
        print(f"wrote {write_result('kernels', {'bandwidth': BANDWIDTH, 'parts': rows})}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
