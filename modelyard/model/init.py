"""Initial weights: a function of (seed, parameter name), whatever the layout of the run.

Every full tensor has its own generator and is drawn in fp32 whatever the model's dtype; a sharded run draws the same
tensor and keeps its part. CPU and CUDA generators give different numbers.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from modelyard.config.architecture import Architecture


@dataclass(frozen=True)
class InitStd:
    """Standard deviations of the normal distributions that weights are drawn from; None takes the default.

    Names are those of the schema's `init_method_std*` keys.
    """

    base: float | None = None
    """hidden_size^-0.5; what the others default to."""
    embed: float | None = None
    """Embedding and output head."""
    qkv: float | None = None
    mlp_1: float | None = None
    """Gate and up projections."""
    attn_proj: float | None = None
    """base / sqrt(2 * num_layers), so that the residual stream's variance does not grow with depth."""
    mlp_2: float | None = None
    """Down projection; as `attn_proj`."""

    def resolve(self, architecture: Architecture) -> InitStd:
        """The same with every default filled in."""
        base = architecture.hidden_size**-0.5 if self.base is None else self.base
        output = base / math.sqrt(2 * architecture.num_layers)
        defaults = {"base": base, "attn_proj": output, "mlp_2": output}
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        return InitStd(**{n: defaults.get(n, base) if v is None else v for n, v in given.items()})


_FIELD_OF_MODULE = {
    "embed_tokens": "embed",
    "lm_head": "embed",
    "q_proj": "qkv",
    "k_proj": "qkv",
    "v_proj": "qkv",
    "o_proj": "attn_proj",
    "gate_proj": "mlp_1",
    "up_proj": "mlp_1",
    "down_proj": "mlp_2",
}


def key(seed: int, *names: str | int) -> int:
    """A generator's seed from the run's seed and what it is for; stable over processes and versions."""
    text = "/".join(str(name) for name in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def initial_tensor(
    name: str, shape: tuple[int, ...], std: InitStd, *, seed: int, device: torch.device | str = "cpu"
) -> Tensor:
    """The full initial tensor of the logical parameter `name`, fp32. `std` is resolved."""
    *_, module, kind = name.split(".")
    if kind == "bias":
        return torch.zeros(shape, device=device)
    if module.endswith("norm"):
        return torch.ones(shape, device=device)
    generator = torch.Generator(device).manual_seed(key(seed, "init", name))
    return torch.empty(shape, device=device).normal_(
        0, getattr(std, _FIELD_OF_MODULE[module]), generator=generator
    )


@torch.no_grad()
def initialize(
    model: nn.Module,
    architecture: Architecture,
    *,
    seed: int,
    std: InitStd | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """Fill the model's parameters in place; a model on the meta device gets memory on `device` first."""
    if any(parameter.is_meta for parameter in model.parameters()):
        model.to_empty(device=device)
    resolved = (std or InitStd()).resolve(architecture)
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        parameter.copy_(initial_tensor(name, shape, resolved, seed=seed, device=parameter.device))
