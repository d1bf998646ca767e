"""The processes of a run, arranged by what they share."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from modelyard.config.layout import DIMENSIONS, Layout
from modelyard.parallel.stages import process_of
from modelyard.parallel.torch_private import flattened


class Totals(NamedTuple):
    """What `Mesh.total` adds up, and whether any process passed the rest."""

    loss: float
    square: float
    targets: int
    notice: bool
    abandon: bool


class Mesh:
    """Where this process stands among the processes of a layout, and what it can ask of the others.

    With one process nothing is asked, and torch.distributed need not be initialised.
    """

    def __init__(self, layout: Layout, device: torch.device, *, alone: bool = False):
        """`alone`: one process that talks to no other, even where torch.distributed is initialised."""
        self.layout, self.device = layout, device
        self._root: DeviceMesh | None = None
        if alone or (layout.world == 1 and not dist.is_initialized()):
            return
        if dist.get_world_size() != layout.world:
            raise ValueError(f"{dist.get_world_size()} processes cannot have the layout {layout}")
        self._root = init_device_mesh(device.type, layout.sizes, mesh_dim_names=DIMENSIONS)
        self._weights = flattened(self._root, ("shard", "context"), "weights")

    @property
    def is_distributed(self) -> bool:
        return self._root is not None

    def place(self, dimension: str) -> int:
        """This process's number along `dimension` (one of `DIMENSIONS`)."""
        return 0 if self._root is None else self._root.get_local_rank(dimension)

    def size(self, dimension: str) -> int:
        """Processes along `dimension`."""
        return getattr(self.layout, dimension)

    def __getitem__(self, dimension: str) -> DeviceMesh:
        """The processes along one dimension, this one among them, as torch wants them."""
        assert self._root is not None
        return self._root[dimension]

    def group(self, dimension: str) -> dist.ProcessGroup:
        """The same as a group for collectives."""
        return self[dimension].get_group()

    @property
    def weights(self) -> DeviceMesh:
        """Processes that FSDP keeps one set of weights in: those along `shard` and `context`, which both see other tokens
        with the same weights. Two dimensions, (replicate, weights), where there are several copies."""
        assert self._root is not None
        return self._root["replicate", "weights"] if self.layout.replicate > 1 else self._weights

    @property
    def share(self) -> int:
        """Which of the batch's `layout.data` shares of rows this process trains on."""
        return self.place("replicate") * self.layout.shard + self.place("shard")

    @property
    def has_loss(self) -> bool:
        """Whether this process has the loss of its tokens, and no other process has the same."""
        last = process_of(self.layout.stages - 1, self.layout)
        return self.place("pipeline") == last and self.place("tensor") == 0

    @property
    def has_tokens(self) -> bool:
        """Whether this process speaks for its tokens: each token of the batch has one such process."""
        return self.place("pipeline") == 0 and self.place("tensor") == 0

    def all_have(self, batch: bool) -> bool:
        """Whether every process that this one shares its rows with by tensor parallelism has its `batch`: what they
        exchange depends on what is in it. Only the host waits."""
        if self.size("tensor") == 1 or not self.is_distributed:
            return batch
        there = torch.tensor(int(batch))
        dist.all_reduce(there, dist.ReduceOp.MIN, group=self.group("tensor"))
        return bool(there)

    def total(
        self,
        loss: Tensor | float,
        square: Tensor | float,
        targets: int,
        *,
        notice: bool = False,
        abandon: bool = False,
    ) -> Totals:
        """The sums over all processes of a step's loss, squared gradient and trained tokens, in one message.

        `loss` counts where `has_loss`, `targets` where `has_tokens`; `square` is already each process's own share.
        """
        sums = torch.zeros(5, dtype=torch.float64, device=self.device)
        sums[0] += loss if self.has_loss else 0.0
        sums[1] += square
        sums[2] += targets if self.has_tokens else 0
        sums[3] += notice
        sums[4] += abandon
        if self.is_distributed:
            dist.all_reduce(sums)
        total_loss, total_square, total_targets, notices, abandons = sums.tolist()
        return Totals(total_loss, total_square, round(total_targets), notices > 0, abandons > 0)

    def total_of_losses(self, sums: Tensor) -> Tensor:
        """The sum over all processes of what each has summed over the losses of its tokens; it counts where `has_loss`."""
        total = sums.clone() if self.has_loss else torch.zeros_like(sums)
        if self.is_distributed:
            dist.all_reduce(total)
        return total


def alone(device: torch.device | str = "cpu") -> Mesh:
    """The mesh of one process."""
    return Mesh(Layout(), torch.device(device), alone=True)
