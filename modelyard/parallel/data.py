"""Data parallelism: processes see other tokens and keep one set of weights among them (ZeRO, by FSDP2).

What is communicated, per group of parameters (each block; the embedding; what is left of the decoder):
stage 1: one all-gather of the weights and one reduce-scatter of the summed gradients a step;
stage 2: one all-gather a step, a reduce-scatter each micro-batch; stage 3: an all-gather for each micro-batch's forward
and one for its backward, a reduce-scatter each. `replicate` adds an all-reduce of each process's own part of the
gradients. Gradients are summed, never averaged: the loss is a sum over tokens, divided once in the step.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Replicate

from modelyard.config.adapter import is_adapter_parameter
from modelyard.model.decoder import Decoder
from modelyard.parallel.mesh import Mesh
from modelyard.parallel.torch_private import finish_backward, local_slice, local_tensor
from modelyard.train.weights import master_dtype, require_gradients

EMBEDDING = "embed_tokens.weight"
# What the decoder returns is a view, and nothing writes into it.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module")


def apply_data(model: Decoder, mesh: Mesh, *, compute_dtype: torch.dtype) -> None:
    """Shard the parameters (on the meta device still) over the processes that keep one set of weights."""
    master = master_dtype(compute_dtype)
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
    for module in units_of(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def units_of(model: nn.Module) -> list[FSDPModule]:
    """What FSDP gathers and reduces together, the decoder itself first."""
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
        self._units = [unit for model in models for unit in units_of(model)]
        self._stage = mesh.layout.zero_stage
        self.sharded: dict[str, DTensor] = {}
        """The parameters as torch's distributed checkpoint takes them, by logical name."""
        self._twins: dict[str, DTensor] = {}
        for model in models:
            for name, parameter in model.named_parameters():
                assert isinstance(parameter, DTensor)
                if self.sharded.setdefault(name, parameter) is not parameter:
                    self._twins[name] = parameter
        # The matrix of tied embeddings is in the first stage of a pipeline and in the last.
        has_first, has_last = any(m.is_first for m in models), any(m.is_last for m in models)
        shared = {EMBEDDING} if models[0].architecture.tie_word_embeddings else set()
        self.copies = frozenset(shared if has_last and not has_first else ())
        """Names that another process has the first copy of: not to be counted, saved or exported here as well."""
        self._shared = shared if has_first != has_last else set()
        self._mesh = mesh
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
        shares = [
            0.0 if name in self.copies else 1 / (replicas * (tensor if _same_on_tensor_ranks(p) else 1))
            for name, p in self.sharded.items()
            if p.requires_grad
        ]
        device = next(iter(self.master.values())).device
        self._shares = torch.tensor(shares, dtype=torch.float64, device=device)
        """[trained parameters]: how much of each one's squared norm this process counts."""

    def copies_of_masters(self) -> dict[str, Tensor]:
        """None: FSDP casts."""
        return {}

    @torch.no_grad()
    def publish(self, *, but: Collection[str] = ()) -> None:
        """Refresh second copies; for the rest nothing: FSDP casts and gathers when a module runs."""
        for name, twin in self._twins.items():
            local_tensor(twin).copy_(self.master[name])

    def copied_along(self, name: str) -> tuple[str, ...]:
        """The dimensions along which other processes have the same part of this parameter, bit for bit."""
        same = {
            "replicate": self._mesh.size("replicate") > 1,
            "pipeline": name in self._shared,
            "tensor": self._mesh.size("tensor") > 1 and _same_on_tensor_ranks(self.sharded[name]),
        }
        return tuple(dimension for dimension, so in same.items() if so)

    def before_backward(self, *, last: bool) -> None:
        """Say whether the next forward and backward are the step's last: what is communicated then, see above."""
        for unit in self._units:
            unit.set_is_last_backward(last)
            if self._stage == 1:
                unit.set_requires_gradient_sync(last)
            if self._stage < 3:
                unit.set_reshard_after_backward(last)

    def finish_backward(self, model: Decoder) -> None:
        """Called after a backward that did not go into `model`, for its head's sake alone: FSDP reduces at the end of a
        backward, and hears of that from the hooks on what `model` returns."""
        finish_backward(units_of(model)[0])

    @torch.no_grad()
    def sum_copies(self) -> None:
        """Give both copies of a matrix that two stages of a pipeline have the sum of their gradients; once a step, when
        the gradients are complete. Both sums have the same bits, so both copies stay equal for ever."""
        for name, twin in self._twins.items():
            gradient = self.sharded[name].grad
            if gradient is not None and twin.grad is not None:
                local_tensor(gradient).add_(local_tensor(twin.grad))
            twin.grad = None
        pipeline = self._mesh.size("pipeline")
        for name in self._shared:
            gradient = self.sharded[name].grad
            if gradient is None:
                continue
            # Over the pipeline group, between its first process and its last, the shards of both alone.
            own = local_tensor(gradient)
            sent = own.to(self._mesh.device)
            received = torch.empty_like(sent)
            peer = 0 if name in self.copies else pipeline - 1
            group = self._mesh.group("pipeline")
            for work in dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.isend, sent, group=group, group_peer=peer),
                    dist.P2POp(dist.irecv, received, group=group, group_peer=peer),
                ]
            ):
                work.wait()
            own.copy_(sent + received)

    def finish_gradients(self) -> None:
        """Give the masters their gradients, once a step, after its last backward. With sequence parallelism or adapters that
        is an all-reduce over tensor. Raises RuntimeError where a trained parameter has none."""
        for name, sharded in self.sharded.items():
            if sharded.grad is not None:
                self.master[name].grad = local_tensor(sharded.grad)
        require_gradients((name, p) for name, p in self.master.items() if p.requires_grad)
        self._sum_over_tensor()

    def gradients(self) -> list[Tensor]:
        """The master gradients of this process's shards that exist, in the order of the parameters."""
        return [p.grad for p in self.master.values() if p.grad is not None]

    @torch.no_grad()
    def _sum_over_tensor(self) -> None:
        """Sum the gradients of what tensor-parallel processes have alike and each has only a summand of: of adapters, from
        its own part of the matrix; with sequence parallelism of norms and the like, too, from its own tokens. One
        all-reduce a step, of the shards, in the masters' dtype; FSDP would have made one for each parameter and
        micro-batch, in the dtype of the computation."""
        if self._mesh.size("tensor") == 1:
            return
        of_tokens = self._mesh.layout.sequence_parallel
        parts = [
            self.master[name].grad
            for name, p in self.sharded.items()
            if _same_on_tensor_ranks(p) and (of_tokens or is_adapter_parameter(name))
        ]
        gradients = [part for part in parts if part is not None and part.numel()]
        if not gradients:
            return
        total = torch.cat([gradient.flatten() for gradient in gradients]).to(self._mesh.device)
        dist.all_reduce(total, group=self._mesh.group("tensor"))
        sizes = [gradient.numel() for gradient in gradients]
        for gradient, summed in zip(gradients, total.split(sizes), strict=True):
            gradient.copy_(summed.view_as(gradient))

    def square_norm(self) -> Tensor:
        """This process's share of the squared norm of the gradient: what several processes hold counts once in all."""
        gradients = self.gradients()
        if not gradients:  # all that this process has is frozen
            return torch.zeros((), dtype=torch.float64, device=self._mesh.device)
        norms = torch.stack(torch._foreach_norm(gradients)).double()
        return norms.square() @ self._shares

    def zero_gradients(self) -> None:
        for name, sharded in self.sharded.items():
            sharded.grad = None
            self.master[name].grad = None


def _same_on_tensor_ranks(parameter: DTensor) -> bool:
    """Whether tensor-parallel processes all hold this parameter whole (a norm), rather than parts of it."""
    names = parameter.device_mesh.mesh_dim_names or ()
    return "tensor" not in names or isinstance(parameter.placements[names.index("tensor")], Replicate)
