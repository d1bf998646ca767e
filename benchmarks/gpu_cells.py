"""What `make gpu` measures, cell by cell: which model, how long, by which program; and what the planner says of each.

No pydantic here and nothing of transformers: machines with a GPU may have torch alone.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from benchmarks.contenders import Case
from modelyard import kernels
from modelyard.config.architecture import Architecture, Rotary
from modelyard.config.layout import Layout, Recompute
from modelyard.plan.duration import duration_of
from modelyard.plan.hardware import Cluster, Hardware
from modelyard.plan.memory import memory_of
from modelyard.plan.workload import Workload

LLAMA3 = Rotary("llama3", 500_000.0)
SHAPES = {
    "llama-3.2-1b": Architecture(128256, 2048, 16, 32, 8, 64, 8192, True, rotary=dataclasses.replace(LLAMA3, scale_factor=32.0)),
    "llama-3.1-8b": Architecture(128256, 4096, 32, 32, 8, 128, 14336, rotary=LLAMA3),
    "qwen-2.5-7b": Architecture(
        152064, 3584, 28, 28, 4, 128, 18944, norm_epsilon=1e-6, qkv_bias=True, rotary=Rotary(theta=1e6)
    ),
    "dmas-1.7b": Architecture(50304, 2048, 36, 32, 8, 64, 5120, rotary=Rotary(theta=500_000.0)),
    "smollm2-135m": Architecture(49152, 576, 30, 9, 3, 64, 1536, True, rotary=Rotary(theta=100_000.0)),
    "toy": Architecture(512, 64, 2, 4, 2, 16, 128, rotary=LLAMA3),
    "toy with biases": Architecture(512, 64, 2, 4, 2, 16, 128, qkv_bias=True),
}  # fmt: skip
FP8 = ("fp8 tensorwise compiled", "fp8 rowwise compiled")
OURS = ("eager", "compiled", "triton", "triton compiled", *FP8)
PEERS = ("transformers", "transformers compiled", "liger", "liger compiled")
ROOM = 0.9
"""Share of the GPU's memory that tensors may have where layers are chosen by it: the allocator has pieces between them."""
LIMIT = 540
"""Seconds that a part may take."""
CHECKS, CHIP = 105, 20
"""Seconds of the first part's checks and of the chip's own rates."""


@dataclass(frozen=True)
class Cell:
    """One process, one figure."""

    shape: str
    program: str
    rows: int
    sequence: int
    layers: int | Literal["all", "fit"] = "all"
    """`fit`: as many as the planner finds room for, with all of the optimizer's state in fp32."""
    documents: int = 1
    """In each row, isolated; 1: the row is one document."""
    saving: bool = False
    """Moments in 8 bits, full recomputation, the blocks' inputs in the host's memory."""
    seconds: int = 40
    """It may take, start included."""

    @property
    def key(self) -> str:
        """Its name in the results."""
        words = [self.shape]
        if self.layers != "all":
            words.append("as many layers as fit" if self.layers == "fit" else f"{self.layers} layers")
        words.append(f"{self.rows} x {self.sequence}")
        if self.documents > 1:
            words.append(f"{self.documents} documents")
        if self.saving:
            words.append("saving memory")
        return ", ".join([*words, self.program])

    @property
    def model(self) -> str:
        """The key without the program: what is to be compared."""
        return self.key.removesuffix(f", {self.program}")

    @property
    def is_compiled(self) -> bool:
        return self.program.endswith("compiled")

    @property
    def kernel_choice(self) -> Literal["torch", "triton"]:
        """What `training.kernels` says."""
        return "triton" if self.program.startswith("triton") else "torch"

    @property
    def fp8(self) -> Literal["tensorwise", "rowwise"] | None:
        """How the blocks' products are scaled into fp8; None: they are in bf16."""
        if self.program not in FP8:
            return None
        return "tensorwise" if "tensorwise" in self.program else "rowwise"

    @property
    def recompute(self) -> Recompute:
        return "full" if self.saving else "none"

    def rehearsed(self) -> Cell:
        """The same code at a size that the CPU has in no time."""
        program = self.program
        if (
            self.kernel_choice == "triton" and kernels.obstacle()
        ):  # their twins, so that the rest is rehearsed
            program = "compiled" if self.is_compiled else "eager"
        return dataclasses.replace(
            self,
            program=program,
            shape="toy with biases" if SHAPES[self.shape].qkv_bias else "toy",
            layers="fit" if self.layers == "fit" else "all",
            rows=2,
            sequence=16 * min(self.sequence // 4096, 4),
            documents=min(self.documents, 3),
        )

    def architecture(self, layers: int) -> Architecture:
        return dataclasses.replace(SHAPES[self.shape], num_layers=layers)

    def case(self) -> Case:
        """The batch."""
        shape = SHAPES[self.shape]
        return Case("", "bfloat16", shape.vocab_size, self.rows, self.sequence, self.documents)

    def workload(self, layers: int, *, on_gpu: bool = True) -> Workload:
        """The step, as the planner takes it."""
        return Workload(
            self.architecture(layers),
            Layout(),
            self.rows,
            self.rows,
            self.sequence,
            recompute=self.recompute,
            document_length=None if self.documents == 1 else self.sequence / self.documents,
            compiled=self.is_compiled,
            on_gpu=on_gpu,
            optimizer_state="8bit" if self.saving else "float32",
            offload_activations=self.saving,
        )


def _each(programs: tuple[str, ...], shape: str, rows: int, sequence: int, **options: Any) -> list[Cell]:
    """One cell a program; a compiler needs longer for a whole model than for a block."""
    return [
        Cell(shape, p, rows, sequence, seconds=65 if p in PEERS and p.endswith("compiled") else 40, **options)
        for p in programs
    ]


_ONE = "llama-3.2-1b", 4, 4096
_EIGHT = "llama-3.1-8b", 2, 4096
_AGAINST = ("compiled", "triton compiled", "transformers compiled")
PARTS: dict[int, list[Cell]] = {
    # The core: quick ones first, for what they leave over is the others'.
    0: [
        Cell(_ONE[0], "eager", *_ONE[1:], seconds=25),
        Cell(_ONE[0], "triton", *_ONE[1:], seconds=30),
        Cell(_ONE[0], "compiled", *_ONE[1:], seconds=40),
        Cell(_ONE[0], "triton compiled", *_ONE[1:], seconds=40),
        Cell(_EIGHT[0], "compiled", *_EIGHT[1:], layers=12, seconds=40),
        Cell(_EIGHT[0], "triton compiled", *_EIGHT[1:], layers=12, seconds=40),
        Cell(_EIGHT[0], "triton compiled", *_EIGHT[1:], layers="fit", seconds=40),
        Cell(_EIGHT[0], "triton compiled", *_EIGHT[1:], saving=True, seconds=50),
        Cell(_ONE[0], "transformers compiled", *_ONE[1:], seconds=50),
        Cell(_EIGHT[0], "transformers compiled", *_EIGHT[1:], layers=12, seconds=50),
    ],
    # Other shapes.
    1: [
        *_each(_AGAINST, "smollm2-135m", 16, 4096),
        *_each(_AGAINST, "dmas-1.7b", 4, 4096),
        *_each(_AGAINST, "qwen-2.5-7b", 2, 4096, layers=10),
        Cell("qwen-2.5-7b", "triton compiled", 2, 4096, layers="fit"),
    ],
    # Longer rows, whole and packed.
    2: [
        *_each(("compiled", "triton compiled"), "llama-3.2-1b", 2, 8192),
        *_each(_AGAINST, "llama-3.2-1b", 2, 8192, documents=16),
        *_each(("compiled", "triton compiled"), "llama-3.2-1b", 1, 32768),
        *_each(("triton compiled",), "llama-3.2-1b", 1, 32768, documents=64),
        *_each(("triton compiled", "transformers compiled"), "llama-3.1-8b", 1, 8192, layers=12),
        *_each(("triton compiled",), "llama-3.1-8b", 1, 8192, layers=12, documents=16),
    ],
    # All layers of the large ones, and the longest rows.
    3: [
        *_each(("compiled", "triton compiled"), "llama-3.1-8b", 4, 8192, saving=True),
        *_each(("triton compiled",), "llama-3.1-8b", 4, 8192, saving=True, documents=16),
        *_each(("triton compiled",), "llama-3.1-8b", 1, 32768, saving=True),
        *_each(("triton compiled",), "llama-3.1-8b", 1, 32768, saving=True, documents=64),
        *_each(("triton compiled",), "llama-3.1-8b", 1, 32768, layers=8),
        *_each(("triton compiled",), "qwen-2.5-7b", 4, 8192, saving=True),
        *_each(("triton compiled",), "qwen-2.5-7b", 1, 32768, saving=True),
        *_each(("triton compiled",), "dmas-1.7b", 1, 32768),
        *_each(("triton compiled",), "smollm2-135m", 2, 32768),
    ],
    # Products in fp8, and the peers' other forms.
    4: [
        *_each(FP8, *_ONE),
        *_each(FP8, *_EIGHT, layers=12),
        *_each(("transformers", "liger", "liger compiled"), *_ONE),
        *_each(("transformers", "liger compiled"), *_EIGHT, layers=12),
        Cell(_EIGHT[0], "eager", *_EIGHT[1:], layers=12, seconds=30),
        Cell(_EIGHT[0], "triton", *_EIGHT[1:], layers=12, seconds=30),
    ],
}  # fmt: skip


@lru_cache
def layers_of(cell: Cell, memory: int) -> int:
    """How many layers the cell's model has on a GPU with so many bytes. Raises ValueError where not even one fits."""
    most = SHAPES[cell.shape].num_layers
    if cell.layers != "fit":
        return most if cell.layers == "all" else cell.layers
    for layers in range(most, 0, -1):
        if memory_of(cell.workload(layers)).peak <= ROOM * memory:
            return layers
    raise ValueError(f"{memory / 2**30:.0f} GiB have room for no layer of {cell.shape}")


def planned(cell: Cell, layers: int, hardware: Hardware | None) -> dict[str, float]:
    """`peak_bytes` by the planner, and `tokens_per_second` where the hardware is known. Of our programs alone, and in bf16."""
    if cell.program in PEERS or cell.fp8:
        return {}
    workload = cell.workload(layers)
    found = {"peak_bytes": float(memory_of(workload).peak)}
    if hardware is not None:
        cluster = Cluster(hardware, 1, 1, hardware.network)
        found["tokens_per_second"] = duration_of(workload, cluster).tokens_per_second
    return found
