"""What distributed torch has only under private names, or calls otherwise in 2.11 and 2.13."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def default_store() -> dist.Store:
    """What the processes found each other by, for words that nobody waits for (no public door in torch 2.11, 2.13)."""
    return dist.distributed_c10d._get_default_store()


def flattened(mesh: DeviceMesh, dimensions: tuple[str, ...], name: str) -> DeviceMesh:
    """Several dimensions of a mesh as one, adjacent or not, known to the mesh as `name` (torch 2.11, 2.13)."""
    return mesh[dimensions]._flatten(name)


def local_slice(parameter: DTensor) -> tuple[slice, ...]:
    """Which part of the full tensor this process holds, also where FSDP split what tensor parallelism had split
    (`_StridedShard`; the function that knows is not exported in torch 2.11, 2.13)."""
    shape, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    return tuple(slice(begin, begin + length) for begin, length in zip(offset, shape, strict=True))


def part_like(local: Tensor, whole: DTensor) -> DTensor:
    """`local` as this process's part of a tensor that is split as `whole` is: the very storage, wherever it lies.
    `DTensor.from_local` would copy what the host keeps (offload) to the GPU (torch 2.11, 2.13)."""
    return DTensor(local, whole._spec, requires_grad=False)


def local_tensor(tensor: Tensor) -> Tensor:
    """This process's part of a DTensor, the very storage, outside of autograd; any other tensor as it is."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: DTensor) -> Tensor:
    """The whole of a DTensor on every process. Where it is split along several dimensions of the mesh torch 2.13 logs that
    it gathers along one after the other and might know a faster way; whole tensors are wanted once in a long while."""
    logger = logging.getLogger("torch.distributed.tensor._redistribute")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return tensor.full_tensor()
    finally:
        logger.setLevel(level)


def gather_into(whole: Tensor, part: Tensor, group: dist.ProcessGroup) -> None:
    """Every process's `part`, laid end to end along the first dimension, into `whole`, on every process.

    `all_gather_into_tensor` until 2.12, then `all_gather_single`; the old name warns.
    """
    getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(whole, part, group=group)


def reduce_scatter_into(part: Tensor, whole: Tensor, group: dist.ProcessGroup) -> None:
    """The sum over processes of `whole`, cut along the first dimension: this process's piece into `part`.

    `reduce_scatter_tensor` until 2.12, then `reduce_scatter_single`; the old name warns.
    """
    getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)(part, whole, group=group)


def finish_backward(module: FSDPModule) -> None:
    """What FSDP does with the gradients at the end of a backward, for one that autograd did not run as a whole: adds them
    up in the reduced dtype, reduces and reshards as `module` (a root) is set. torch's own pipeline schedules do it so,
    too (`PipelineStage.perform_reduce_grad`; torch 2.11, 2.13)."""
    module._get_fsdp_state()._root_post_backward_final_callback()


def held_graph(outputs: Iterable[Tensor]) -> list[Tensor]:
    """What keeps the graph behind `outputs` alive when they are detached in place, as torch's split backward does between
    its two halves. In torch 2.11 a Python reference to the node of a custom autograd function, which is all that is left
    then, does not keep that node (in 2.13 it does)."""
    return [output.view_as(output) for output in outputs]


def without_first_messages(stage: Any) -> None:
    """Keep a pipeline stage from exchanging a first message with its neighbours, for a group that has talked before: a
    neighbour may be on the same process, and gloo has no connection to itself (torch 2.11; 2.13 does not send it)."""
    stage._get_init_p2p_neighbors_ops = list
