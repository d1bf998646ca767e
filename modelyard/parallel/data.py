"""Data parallelism: processes see other tokens and keep one set of weights among them (ZeRO, by FSDP2).

What is communicated, per group of parameters (each block; the embedding; what is left of the decoder):
stage 1: one all-gather of the weights and one reduce-scatter of the summed gradients a step;
stage 2: one all-gather a step, a reduce-scatter each micro-batch; stage 3: an all-gather for each micro-batch's forward
and one for its backward, a reduce-scatter each. `replicate` adds an all-reduce of each process's own part of the
gradients. Gradients are summed, never averaged: the loss is a sum over tokens, divided once in the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Replicate

from modelyard.model.decoder import Decoder
from modelyard.parallel.mesh import Mesh
from modelyard.parallel.torch_private import local_slice, local_tensor


def apply_data(model: Decoder, mesh: Mesh, *, compute_dtype: torch.dtype) -> None:
    """Shard the parameters (on the meta device still) over the processes that keep one set of weights."""
    master = torch.float64 if compute_dtype == torch.float64 else torch.float32
    model.to(master)
    stage = mesh.layout.zero_stage
    policy = MixedPrecisionPolicy(
        param_dtype=None if compute_dtype == master else compute_dtype,
        reduce_dtype=master,
        # A block's inputs have their dtypes already; the rotary table is wider on purpose.
        cast_forward_inputs=False,
    )
    offload = (
        CPUOffloadPolicy(pin_memory=mesh.device.type == "cuda") if mesh.layout.offload else OffloadPolicy()
    )
    tied = model.architecture.tie_word_embeddings
    units: list[nn.Module] = list(model.layers.values())
    if model.is_first and not tied:
        units.insert(0, model.embed_tokens)
    for unit in units:
        fully_shard(
            unit,
            mesh=mesh.weights,
            mp_policy=policy,
            offload_policy=offload,
            reshard_after_forward=stage == 3,
        )
    # The rest is the decoder itself: norm, head (the embedding where they are tied). The loss reads the head's matrix
    # after the forward and the backward begins there: it stays gathered in between.
    fully_shard(
        model, mesh=mesh.weights, mp_policy=policy, offload_policy=offload, reshard_after_forward=False
    )
    for module in _units(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def _units(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def write_shard(parameter: Tensor, full: Tensor) -> None:
    """Copy this process's part of `full` into `parameter`, whether that is split over processes or not."""
    if isinstance(parameter, DTensor):
        full = full[local_slice(parameter)]
    local_tensor(parameter).copy_(full)


class ShardedWeights:
    """What `Weights` is for one process: here FSDP holds the masters in shards and makes the copies to compute with.

    The optimizer sees each shard as a plain parameter. `models` are the stages of the pipeline that this process has.
    """

    def __init__(self, models: Sequence[Decoder], mesh: Mesh):
        self._units = [unit for model in models for unit in _units(model)]
        self._stage = mesh.layout.zero_stage
        self.sharded: dict[str, DTensor] = {}
        """The parameters as torch's distributed checkpoint takes them, by logical name."""
        for model in models:
            for name, parameter in model.named_parameters():
                assert isinstance(parameter, DTensor)
                self.sharded.setdefault(name, parameter)
        for unit in self._units:
            # FSDP pads its shards once, at first use; from then on their storage stays.
            unit.unshard()
            unit.reshard()
        self.master = {
            name: nn.Parameter(local_tensor(p.detach()), requires_grad=p.requires_grad)
            for name, p in self.sharded.items()
        }
        replicas = mesh.layout.replicate
        tensor = mesh.layout.tensor
        self._shares = {
            name: 1 / (replicas * (tensor if _same_on_tensor_ranks(p) else 1))
            for name, p in self.sharded.items()
        }

    def publish(self) -> None:
        """Nothing: FSDP casts and gathers when a module runs."""

    def before_backward(self, *, last: bool) -> None:
        """Say whether the next forward and backward are the step's last: what is communicated then, see above."""
        for unit in self._units:
            unit.set_is_last_backward(last)
            if self._stage == 1:
                unit.set_requires_gradient_sync(last)
            if self._stage < 3:
                unit.set_reshard_after_backward(last)

    def gradients(self) -> list[Tensor]:
        """The master gradients of this process's shards that exist, in the order of the parameters."""
        found = []
        for name, sharded in self.sharded.items():
            if sharded.grad is not None:
                gradient = local_tensor(sharded.grad)
                self.master[name].grad = gradient
                found.append(gradient)
        return found

    def square_norm(self) -> Tensor:
        """This process's share of the squared norm of the gradient: what several processes hold counts once in all."""
        shares, gradients = [], []
        for name, p in self.master.items():
            if p.grad is not None:
                shares.append(self._shares[name])
                gradients.append(p.grad)
        norms = torch.stack(torch._foreach_norm(gradients)).double()
        return norms.square() @ norms.new_tensor(shares)

    def zero_gradients(self) -> None:
        for name, sharded in self.sharded.items():
            sharded.grad = None
            self.master[name].grad = None

    def as_sharded(self, tensors: Mapping[str, Tensor]) -> dict[str, DTensor]:
        """Tensors shaped as this process's parts of the parameters (moments, for instance), as parts of whole ones."""
        return {
            name: DTensor.from_local(
                tensor,
                self.sharded[name].device_mesh,
                self.sharded[name].placements,
                run_check=False,
                shape=self.sharded[name].shape,
                stride=self.sharded[name].stride(),
            )
            for name, tensor in tensors.items()
        }


def _same_on_tensor_ranks(parameter: DTensor) -> bool:
    """Whether tensor-parallel processes all hold this parameter whole (a norm), rather than parts of it."""
    names = parameter.device_mesh.mesh_dim_names or ()
    return "tensor" not in names or isinstance(parameter.placements[names.index("tensor")], Replicate)
