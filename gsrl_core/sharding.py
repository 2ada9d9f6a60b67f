"""Weights of which every process holds a part (FSDP2), and what reads or writes such weights as a whole.

Plain tensors pass through unchanged, so callers need not know whether anything is sharded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(modules: nn.Module | Sequence[nn.Module], mesh: DeviceMesh, compute_dtype: torch.dtype | None = None) -> None:
    """Divide the parameters of ``modules`` that are not yet sharded over ``mesh``, as one unit of communication.

    Args:
        modules: their forward passes gather the unit's weights, so all processes must run the same ones.
        mesh: one-dimensional; the weights move to its devices.
        compute_dtype: of the gathered weights; None for that of the parameters. Gradients are summed in float32.
    """
    policy = MixedPrecisionPolicy(compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    target = modules if isinstance(modules, nn.Module) else list(modules)
    fully_shard(target, mesh=mesh, mp_policy=policy)  # type: ignore[call-overload]


def shard_root(root: nn.Module, mesh: DeviceMesh) -> FSDPModule:
    """Shard what is left over in ``root``; from now on a backward pass sums gradients over all processes."""
    shard(root, mesh)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            # A sum, not a mean: losses are already divided by the samples of all processes.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return cast(FSDPModule, root)


def reduce_gradients(root: FSDPModule, now: bool) -> None:
    """Whether the next backward pass through ``root`` sums gradients over processes, or each adds up its own so far."""
    for module in cast(nn.Module, root).modules():
        # Units without gradients may never have been gathered, which torch takes for granted of those that wait.
        if isinstance(module, FSDPModule) and any(parameter.requires_grad for parameter in module.parameters()):
            module.set_requires_gradient_sync(now, recurse=False)


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, on its device. Every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(value: Tensor, like: Tensor) -> Tensor:
    """``value``, complete and the same in every process, divided as ``like`` is."""
    if not isinstance(like, DTensor) or isinstance(value, DTensor):
        return value
    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def memory_of(tensor: Tensor) -> int:
    """Address of the memory that holds this process's part: the same for a parameter and its detached twin."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.untyped_storage().data_ptr()
