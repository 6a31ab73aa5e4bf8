"""Sharded tensors, and collectives over the ranks that train together.

Under FSDP2 (``fully_shard``) parameters, gradients and optimizer state are DTensors, and each rank holds a shard. Every
rank gathers the whole tensors to decide a topology update, and keeps and applies the mask of its shard. For ordinary
tensors the functions for shards are the identity.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dst.errors import StateError


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor."""
    # Importing DTensor takes half as long as importing torch. Without the import there are no DTensors.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor. For a DTensor this is a collective that all ranks must enter."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """This rank's shard. It shares memory with the tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def part_of(full: Tensor, like: Tensor) -> Tensor:
    """This rank's shard of a whole tensor, in the layout of ``like``."""
    if not is_sharded(like):
        return full
    shape, offset = _box(like)
    return full[tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))]


def spread(part: Tensor, like: Tensor) -> Tensor:
    """The inverse of ``part_of``: a DTensor in the layout of ``like``, or the tensor itself. Does not communicate."""
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part,
        like.device_mesh,  # type: ignore[attr-defined]
        like.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def local_positions(positions: Tensor, like: Tensor) -> Tensor:
    """Row-major positions (int64) in this rank's shard of those positions of the whole tensor that it holds."""
    if not is_sharded(like):
        return positions
    shape, offset = _box(like)
    coordinates = torch.unravel_index(positions, like.shape)
    inside = torch.ones_like(positions, dtype=torch.bool)
    result = torch.zeros_like(positions)
    for coordinate, size, start in zip(coordinates, shape, offset, strict=True):
        inside &= (coordinate >= start) & (coordinate < start + size)
        result = result * size + (coordinate - start)
    return result[inside]


def _box(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and offset of this rank's shard."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape,
        tensor.device_mesh,  # type: ignore[attr-defined]
        tensor.placements,  # type: ignore[attr-defined]
    )
    return tuple(shape), tuple(offset)


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Number of ranks that train together; 1 without torch.distributed."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rank(group: dist.ProcessGroup | None = None) -> int:
    """This process's rank; 0 without torch.distributed."""
    return dist.get_rank(group) if world_size(group) > 1 else 0


def from_first(values: list[float], group: dist.ProcessGroup | None = None) -> list[float]:
    """Broadcast numbers (float64) from rank 0 to all ranks."""
    if world_size(group) == 1:
        return values
    source = 0 if group is None else dist.get_global_rank(group, 0)
    tensor = torch.tensor(values, dtype=torch.float64, device=_device(group))
    dist.broadcast(tensor, source, group=group)
    return tensor.tolist()


def all_agree(value: bool, group: dist.ProcessGroup | None = None) -> bool:
    """Whether ``value`` is true on all ranks."""
    if world_size(group) == 1:
        return value
    flag = torch.tensor(int(value), device=_device(group))
    dist.all_reduce(flag, dist.ReduceOp.MIN, group=group)
    return bool(flag.item())


def average_(tensor: Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Average a tensor over ranks, in place. A collective that all ranks must enter."""
    if world_size(group) > 1:
        dist.all_reduce(tensor, group=group)
        tensor.div_(world_size(group))


def mean_over_processes(tensors: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """Average copies of tensors; see `average_`."""
    if world_size(group) == 1:
        return list(tensors)
    means = [tensor.clone() for tensor in tensors]
    for mean in means:
        average_(mean, group)
    return means


def of_first_process(tensors: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """Broadcast tensors from rank 0. A collective that all ranks must enter with tensors of the same shapes."""
    if world_size(group) == 1:
        return list(tensors)
    copies = [tensor.clone() for tensor in tensors]
    for copy in copies:
        dist.broadcast(copy, dist.get_global_rank(group, 0) if group is not None else 0, group=group)
    return copies


def check_equal_masks(masks: Iterable[tuple[str, Tensor]], step: int, group: dist.ProcessGroup | None = None) -> None:
    """Check that the masks are equal on all ranks.

    Args:
        masks: Names, and whole masks or other tensors that identify them.
        step: The step, for the message.
        group: The process group.

    Raises:
        StateError: A mask differs between ranks. Raised on all ranks.
    """
    if world_size(group) == 1:
        return
    digests = {name: _digest(mask) for name, mask in masks}
    mine = torch.tensor(list(digests.values()), dtype=torch.int64, device=_device(group))
    everyone = [torch.empty_like(mine) for _ in range(world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    table = torch.stack(everyone)
    different = (table != table[0]).any(dim=0)
    if bool(different.any()):
        names = [name for name, d in zip(digests, different.tolist(), strict=True) if d]
        ranks = [r for r in range(table.shape[0]) if bool((table[r] != table[0]).any())]
        raise StateError(
            f"masks of {', '.join(names)} differ between rank 0 and ranks {ranks} after step {step}: gradients or weights "
            "are not the same on all ranks. Wrap the model in DistributedDataParallel (or use Lightning's ddp strategy), "
            "use the same seed on all ranks, and call before_step() after the gradients are reduced"
        )


def _digest(mask: Tensor) -> int:
    data = mask.detach().cpu().contiguous().numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def _device(group: dist.ProcessGroup | None) -> torch.device:
    """The device of tensors in a collective."""
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
