"""From an architecture and a mesh to the model, or the part of it, that this process trains.

The order of application is torch's own: the model on the meta device, its pipeline stages, tensor and context
parallelism, recomputation, compilation, FSDP; only then is there memory, and only then values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from modelyard.config.architecture import Architecture
from modelyard.config.layout import Recompute
from modelyard.data.batch import Batch
from modelyard.model.compile import compile_blocks
from modelyard.model.decoder import Decoder
from modelyard.parallel.data import ShardedWeights, apply_data, write_shard
from modelyard.parallel.mesh import Mesh
from modelyard.train.step import LossOptions, Pipeline
from modelyard.train.weights import Weights

Write = Callable[[Tensor, Tensor], None]
"""(parameter, full tensor): put this process's part of it into the parameter."""


@dataclass
class Parallel:
    """A model in its layout."""

    mesh: Mesh
    model: Decoder | Pipeline
    models: list[Decoder]
    """The parts of the decoder that this process has: one, or the stages of its pipeline."""
    weights: Weights | ShardedWeights

    def local(self, batch: Batch) -> Batch:
        """What this process computes of its share of rows: all of it, or with context parallelism its chunks."""
        return batch

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Full tensors from this process's parts of them (parameters, gradients, moments), by name; every process of a
        stage must ask for the same ones."""
        if isinstance(self.weights, Weights):
            return dict(tensors)
        return {name: tensor.full_tensor() for name, tensor in self.weights.as_sharded(tensors).items()}


def parallelize(
    architecture: Architecture,
    mesh: Mesh,
    *,
    compute_dtype: torch.dtype,
    recompute: Recompute,
    compile: bool,
    sequence_length: int,
    micro_batches: int,
    loss_options: LossOptions,
    fill: Callable[[Decoder, Write], object],
    frozen: frozenset[str] = frozenset(),
) -> Parallel:
    """Build the model in its layout, `fill` each part's parameters (masters, in fp32 or fp64), freeze those named."""
    layout = mesh.layout
    with torch.device("meta"):
        models = [Decoder(architecture)]
    for model in models:
        if compile:
            compile_blocks(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)
        if mesh.is_distributed:
            apply_data(model, mesh, compute_dtype=compute_dtype)
        model.to_empty(device="cpu" if layout.offload else mesh.device)
        fill(model, write_shard)
    weights = ShardedWeights(models, mesh) if mesh.is_distributed else Weights(models[0], compute_dtype)
    return Parallel(mesh, models[0], models, weights)
