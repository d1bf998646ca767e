"""Initial weights: a function of (seed, parameter name), whatever the layout of the run.

Every full tensor has its own generator and is drawn in fp32 whatever the model's dtype; a sharded run draws the same
tensor and keeps its part. CPU and CUDA generators give different numbers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from modelyard.config.architecture import Architecture

Limits = tuple[float | None, float | None]


@dataclass(frozen=True)
class InitStd:
    """Standard deviations of the normal distributions that weights are drawn from."""

    embedding: float
    """Embedding, learned positions and output head."""
    qkv: float
    attention_output: float
    mlp_in: float
    """Gate and up projections."""
    mlp_out: float
    limits: Mapping[str, Limits] = field(default_factory=dict)
    """By the names above: what lies outside (lowest, highest) after the draw is moved to the limit."""

    @classmethod
    def for_architecture(
        cls,
        architecture: Architecture,
        *,
        base: float | None = None,
        embedding: float | None = None,
        qkv: float | None = None,
        attention_output: float | None = None,
        mlp_in: float | None = None,
        mlp_out: float | None = None,
        limits: Mapping[str, Limits] | None = None,
    ) -> InitStd:
        """Those given, the others from `base` (default hidden_size^-0.5).

        The two projections that write to the residual stream default to base / sqrt(2 * num_layers), so that its
        variance does not grow with depth.
        """
        base = architecture.hidden_size**-0.5 if base is None else base
        output = base / math.sqrt(2 * architecture.num_layers)
        return cls(
            embedding=base if embedding is None else embedding,
            qkv=base if qkv is None else qkv,
            attention_output=output if attention_output is None else attention_output,
            mlp_in=base if mlp_in is None else mlp_in,
            mlp_out=output if mlp_out is None else mlp_out,
            limits=limits or {},
        )


_FIELD_OF_MODULE = {
    "embed_tokens": "embedding",
    "embed_positions": "embedding",
    "lm_head": "embedding",
    "q_proj": "qkv",
    "k_proj": "qkv",
    "v_proj": "qkv",
    "o_proj": "attention_output",
    "gate_proj": "mlp_in",
    "up_proj": "mlp_in",
    "down_proj": "mlp_out",
}


def key(seed: int, *names: str | int) -> int:
    """A generator's seed from the run's seed and what it is for; stable over processes and versions."""
    text = "/".join(str(name) for name in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def initial_tensor(
    name: str, shape: tuple[int, ...], std: InitStd, *, seed: int, device: torch.device | str = "cpu"
) -> Tensor:
    """The full initial tensor of the logical parameter `name`, fp32."""
    *_, module, kind = name.split(".")
    if kind == "bias":
        return torch.zeros(shape, device=device)
    if module.endswith("norm"):
        return torch.ones(shape, device=device)
    generator = torch.Generator(device).manual_seed(key(seed, "init", name))
    part = _FIELD_OF_MODULE[module]
    tensor = torch.empty(shape, device=device).normal_(0, getattr(std, part), generator=generator)
    lowest, highest = std.limits.get(part, (None, None))
    return tensor if lowest is None and highest is None else tensor.clamp_(lowest, highest)


class DrawnWeights:
    """Initial weights as a source of weights (`modelyard.model.formats.source`): each is drawn when it is asked for."""

    def __init__(self, architecture: Architecture, std: InitStd, seed: int, device: torch.device):
        """The numbers are drawn on `device`."""
        self._shapes, self._std, self._seed, self._device = architecture.parameter_shapes(), std, seed, device

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def load(self, name: str) -> Tensor:
        return initial_tensor(name, self._shapes[name], self._std, seed=self._seed, device=self._device)


@torch.no_grad()
def initialize(
    model: nn.Module,
    seed: int,
    std: InitStd,
    *,
    write: Callable[[Tensor, Tensor], object] = Tensor.copy_,
    device: torch.device | None = None,
) -> None:
    """Fill every parameter in place, in its own dtype. The model's memory exists (`to_empty` after the meta device).

    `write` puts a full tensor into a parameter, of which a process may hold a part. The numbers are drawn on `device`
    (None: where the parameter is): a parameter kept by the host is drawn where the same one would be without that.
    """
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        write(parameter, initial_tensor(name, shape, std, seed=seed, device=device or parameter.device))
