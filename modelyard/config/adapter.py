"""Low-rank adapters: which matrices of a decoder have one, and what follows from that by arithmetic. No torch, no pydantic."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from modelyard.config.architecture import Architecture

LAYERS: dict[str, tuple[str, ...]] = {
    "query": ("q_proj",),
    "key": ("k_proj",),
    "value": ("v_proj",),
    "key_value": ("k_proj", "v_proj"),
    "dense": ("o_proj",),
    "mlp_1": ("gate_proj", "up_proj"),
    "mlp_2": ("down_proj",),
}
"""The words of `peft.layers`, and the matrices that each one means."""

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The matrices of a block, in the model's order."""


@dataclass(frozen=True)
class Quantization:
    """How the frozen matrices of the blocks are kept: NF4 (arXiv 2305.14314), see `modelyard.model.nf4`."""

    block: int = 64
    """Values that share a scale; they lie side by side in a row of the matrix."""
    double: bool = False
    """Whether scales are kept in 8 bits, too."""


@dataclass(frozen=True)
class Adapter:
    """A low-rank update of some matrices of every block: y = W x + scale * B (A x) (LoRA, arXiv 2106.09685).

    With `dora` (arXiv 2402.09353) the rows of W + scale * B A are given the length `lora_magnitude` instead of their own.
    """

    rank: int
    alpha: float
    modules: tuple[str, ...]
    """Some of `MODULES`, in that order."""
    dropout: float = 0.0
    """Share of the inputs of A that are left out in training."""
    rank_stabilized: bool = False
    """Whether alpha is divided by the root of the rank (rsLoRA, arXiv 2312.03732) and not by the rank."""
    dora: bool = False
    freeze_others: bool = True
    """Whether nothing but the adapter is trained."""
    quantization: Quantization | None = None
    """Of the base; None: it is kept as it is."""

    @property
    def scale(self) -> float:
        """Factor on what B gives."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def shapes(self, architecture: Architecture) -> dict[str, tuple[int, ...]]:
        """The adapter's own parameters, by logical name: `<matrix>.lora_A` [rank, in], `<matrix>.lora_B` [out, rank] and,
        with `dora`, `<matrix>.lora_magnitude` [out]."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, (out_features, in_features) in self.matrices(architecture).items():
            shapes[f"{name}.lora_A"] = (self.rank, in_features)
            shapes[f"{name}.lora_B"] = (out_features, self.rank)
            if self.dora:
                shapes[f"{name}.lora_magnitude"] = (out_features,)
        return shapes

    def matrices(self, architecture: Architecture) -> dict[str, tuple[int, int]]:
        """Name (`layers.0.self_attn.q_proj`) and [out, in] of every matrix that has an adapter."""
        return {
            name: shape
            for name, shape in block_matrices(architecture).items()
            if name.rpartition(".")[2] in self.modules
        }

    def parameter_count(self, architecture: Architecture) -> int:
        """Number of the adapter's own parameters."""
        return sum(math.prod(shape) for shape in self.shapes(architecture).values())


def matmul_flops_per_token(architecture: Architecture, adapter: Adapter | None) -> int:
    """Forward and backward FLOPs of the matrix products with weights, per token.

    Of frozen matrices the forward and the gradient of what goes in (2 + 2 a weight), of trained ones also their own (6).
    """
    base = architecture.matmul_flops_per_token()
    if adapter is None:
        return base
    own = 6 * sum(adapter.rank * (rows + width) for rows, width in adapter.matrices(architecture).values())
    return own + (base // 6 * 4 if adapter.freeze_others else base)


def block_matrices(architecture: Architecture) -> dict[str, tuple[int, int]]:
    """Name (`layers.0.self_attn.q_proj`) and [out, in] of every matrix of every block."""
    found: dict[str, tuple[int, int]] = {}
    for name, shape in architecture.parameter_shapes().items():
        module, _, kind = name.rpartition(".")
        if kind == "weight" and module.rpartition(".")[2] in MODULES:
            out_features, in_features = shape
            found[module] = (out_features, in_features)
    return found


def is_adapter_parameter(name: str) -> bool:
    """Whether a logical name is one that `Adapter.shapes` gives."""
    return name.rpartition(".")[2].startswith("lora_")


def adapter_to_dict(adapter: Adapter) -> dict[str, Any]:
    """Plain values, as checkpoints keep them."""
    return asdict(adapter)


def adapter_from(fields: Mapping[str, Any]) -> Adapter:
    """The adapter that `adapter_to_dict` made `fields` of."""
    quantization = fields.get("quantization")
    return Adapter(
        **{
            **fields,
            "modules": tuple(fields["modules"]),
            "quantization": None if quantization is None else Quantization(**quantization),
        }
    )
