"""From an architecture and a mesh to the model, or the part of it, that this process trains.

The order of application is torch's own: the model on the meta device, its pipeline stages, tensor and context
parallelism, recomputation, compilation, FSDP; only then is there memory, and only then values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from modelyard.config.adapter import Adapter, is_adapter_parameter
from modelyard.config.architecture import Architecture
from modelyard.config.layout import Recompute
from modelyard.data.batch import Batch
from modelyard.model.adapter import adapt, is_quantized_part
from modelyard.model.compile import compile_blocks
from modelyard.model.decoder import Decoder
from modelyard.model.fp8 import Scaling, use_fp8
from modelyard.model.offload import offload_on
from modelyard.model.recompute import recompute_blocks
from modelyard.parallel.context import apply_context, split
from modelyard.parallel.data import ShardedWeights, apply_data, units_of, write_shard
from modelyard.parallel.mesh import Mesh
from modelyard.parallel.stages import split_layers, stages_of
from modelyard.parallel.tensor import apply_tensor
from modelyard.parallel.torch_private import full_tensor, part_like
from modelyard.train.step import Pipeline
from modelyard.train.weights import Weights, set_dtypes

Write = Callable[[Tensor, Tensor], None]
"""(parameter, full tensor): put this process's part of it into the parameter."""
Fill = Callable[[Decoder, Write], object]
"""(part of the decoder, how to write): gives every parameter its first value."""


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
        return split(batch, self.mesh)

    def release(self) -> None:
        """Give back what a forward without a backward gathered, so that the next one gathers what the weights are then."""
        for model in self.models:
            for unit in units_of(model):
                unit.reshard()

    @property
    def architecture(self) -> Architecture:
        """Of the whole model."""
        return self.models[0].architecture

    @property
    def own(self) -> list[str]:
        """The parameters that this process saves: all it has but a second copy, which lies in another stage too."""
        weights = self.weights
        copies = weights.copies if isinstance(weights, ShardedWeights) else ()
        return [name for name in weights.master if name not in copies]

    def parts(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This process's parts of parameters or moments, by parameter name, as parts of whole tensors (DTensors) with
        the same storage."""
        if isinstance(self.weights, Weights):
            return dict(tensors)
        return {name: part_like(tensor, self.weights.sharded[name]) for name, tensor in tensors.items()}

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Full tensors from this process's parts of them (parameters, gradients, moments), by name; every process of a
        stage must ask for the same ones."""
        if isinstance(self.weights, Weights):
            return dict(tensors)
        # The host may keep them, but gathers nothing.
        device, sharded = self.mesh.device, self.weights.sharded
        return {name: full_tensor(part_like(t.to(device), sharded[name])) for name, t in tensors.items()}


def parallelize(
    architecture: Architecture,
    mesh: Mesh,
    *,
    compute_dtype: torch.dtype,
    recompute: Recompute,
    offload_activations: bool = False,
    compile: bool,
    sequence_length: int,
    fill: Fill,
    frozen: frozenset[str] = frozenset(),
    adapter: Adapter | None = None,
    fp8: Scaling | None = None,
) -> Parallel:
    """Build the model in its layout, `fill` each part's parameters (masters, in fp32 or fp64), freeze those named.

    With an `adapter` that alone is trained, what is frozen has no masters: it is filled in the compute dtype. `fp8`: how the
    blocks' products are scaled into fp8; None: they are in the compute dtype. Not both.
    """
    layout = mesh.layout
    offload = offload_on(mesh.device) if offload_activations else None
    with torch.device("meta"):
        parts = parts_of(architecture, mesh, sequence_length)
        models = [Decoder(architecture, layers=layers) for layers in parts]
    for model in models:
        if adapter is not None:
            adapt(model, adapter, compute_dtype)
        if fp8 is not None:
            use_fp8(model, fp8)
        apply_tensor(model, mesh)
        apply_context(model, mesh)
        recompute_blocks(model, recompute, offload)
        if compile:
            compile_blocks(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen and not is_quantized_part(name))
        has_no_master = adapter is not None and adapter.freeze_others
        narrow = {
            name
            for name, parameter in model.named_parameters()
            if has_no_master and not parameter.requires_grad and not is_adapter_parameter(name)
        }
        set_dtypes(model, compute_dtype, narrow)
        if mesh.is_distributed:
            apply_data(model, mesh, compute_dtype=compute_dtype)
        model.to_empty(device="cpu" if layout.offload else mesh.device)
        fill(model, write_shard)
    weights = ShardedWeights(models, mesh) if mesh.is_distributed else Weights(models[0], compute_dtype)
    whole = models[0] if layout.pipeline == 1 else _pipeline(models, mesh, compute_dtype)
    return Parallel(mesh, whole, models, weights)


def parts_of(architecture: Architecture, mesh: Mesh, sequence_length: int) -> list[range]:
    """The layers of each part of the decoder that this process has: all, or those of its stages."""
    layout = mesh.layout
    if layout.pipeline == 1:
        return [range(architecture.num_layers)]
    split = split_layers(architecture, layout.stages, sequence_length)
    return [split[stage] for stage in stages_of(mesh.place("pipeline"), layout)]


def _pipeline(models: list[Decoder], mesh: Mesh, compute_dtype: torch.dtype) -> Pipeline:
    from modelyard.parallel import pipeline  # torch's schedules take a while to import

    return pipeline.Pipeline(models, mesh, compute_dtype)
