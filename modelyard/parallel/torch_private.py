"""What distributed torch has only under private names, each with the versions it was tried on."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


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


def local_tensor(tensor: Tensor) -> Tensor:
    """This process's part of a DTensor, the very storage, outside of autograd; any other tensor as it is."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor
