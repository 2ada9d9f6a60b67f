"""What processes that train together do together, and the trivial form of it for a single process."""

from __future__ import annotations

import socket
from datetime import timedelta

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from gsrl_core.errors import WorkerError


class SingleProcess:
    """World of one: everything is the identity."""

    rank = 0
    world_size = 1

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensor with a leading axis of one."""
        return tensor[None]

    def broadcast(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def close(self) -> None:
        """Nothing to do."""


class ProcessGroup:
    """torch.distributed between ``world_size`` processes: NCCL for CUDA tensors if asked for, Gloo otherwise."""

    def __init__(self, rank: int, world_size: int, address: str, *, nccl: bool, timeout_s: float = 600.0) -> None:
        """Join the group; blocks until all have.

        Args:
            rank: of this process, from 0.
            world_size: processes that will join.
            address: ``host:port`` of rank 0, from :func:`free_address`.
            nccl: gradients live on GPUs, and no two processes share one.
            timeout_s: after which a missing partner is an error.

        Raises:
            WorkerError: the group did not form.
        """
        self.rank, self.world_size = rank, world_size
        try:
            distributed.init_process_group(
                "cpu:gloo,cuda:nccl" if nccl else "gloo",
                init_method=f"tcp://{address}",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=timeout_s),
            )
        except (RuntimeError, ValueError) as error:
            raise WorkerError(
                f"process {rank} of {world_size} could not join the group at {address}: {error}"
            ) from error

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        distributed.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """The equally shaped tensors of all processes, stacked by rank."""
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        distributed.all_gather(parts, tensor.contiguous())
        return torch.stack(parts)

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's values, in place."""
        distributed.broadcast(tensor, src=0)
        return tensor

    def mesh(self, device_type: str) -> DeviceMesh:
        """All processes in a row, each with its current device of this type (``cpu`` or ``cuda``)."""
        return init_device_mesh(device_type, (self.world_size,))

    def close(self) -> None:
        """Leave the group."""
        if distributed.is_initialized():
            distributed.destroy_process_group()


def free_address(host: str = "127.0.0.1") -> str:
    """``host:port`` of this machine that nobody listens on now; ``host`` is how the partners reach it."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return f"{host}:{probe.getsockname()[1]}"
