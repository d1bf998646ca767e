"""Random adapters in memory, in checkpoints and in PEFT's hands."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from modelyard.config.adapter import MODULES, Adapter, adapter_to_dict
from modelyard.config.architecture import Architecture
from modelyard.model.formats import WeightSource
from modelyard.train.checkpoint import save_checkpoint
from modelyard.train.models_on_disk import base_fingerprint

ALL = Adapter(rank=3, alpha=5.0, modules=MODULES)
KINDS = {
    "lora": {},
    "rslora": {"rank_stabilized": True},
    "dora": {"dora": True},
}


class InMemory:
    """Tensors as a source of weights."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        self.tensors = dict(tensors)

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def load(self, name: str) -> torch.Tensor:
        return self.tensors[name]


def random_adapter(
    adapter: Adapter, architecture: Architecture, base: WeightSource, *, strength: float = 0.3
) -> InMemory:
    """Values as training might leave them: B not 0, magnitudes near the lengths of the base's rows."""
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for name, shape in adapter.shapes(architecture).items():
        tensors[name] = torch.randn(shape, generator=generator) * strength
        if name.endswith("magnitude"):
            weight = base.load(name.replace("lora_magnitude", "weight"))
            tensors[name] = (tensors[name] + 1) * weight.float().norm(dim=1)
    return InMemory(tensors)


def adapter_checkpoint(
    folder: Path,
    adapter: Adapter,
    architecture: Architecture,
    tensors: Mapping[str, torch.Tensor],
    base: Path | None,
    *,
    iteration: int = 4,
    config: dict[str, Any] | None = None,
) -> Path:
    """A checkpoint as a run that trains an adapter saves it; `base` None where the base is trained with it."""
    save_checkpoint(
        folder,
        parameters=tensors,
        moments={},
        state={
            "progress": {"iteration": iteration},
            "architecture": dataclasses.asdict(architecture),
            "adapter": adapter_to_dict(adapter),
            "base": base and {"path": str(base.resolve()), "fingerprint": base_fingerprint(base)},
        },
        config=config or {"training": {"export": {"format": None}}},
    )
    return folder
