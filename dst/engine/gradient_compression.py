"""A DDP communication hook that sends active gradients alone."""

# Annotations stay objects here: DistributedDataParallel checks those of its hooks by comparison.

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future

from dst.engine.sparsifier import Sparsifier
from dst.topology.sharding import world_size


class SparseAllReduce:
    """Averages gradients over processes, sending only active weights of sparse layers.

    All processes have the masks, so positions need not be sent. Values are packed, reduced and written back; inactive
    gradients are zero afterwards. Steps that need the dense gradient (topology updates by gradient, scores that observe
    every step, dense phases) send everything, as DDP does.

    ```python
    model = DistributedDataParallel(model)
    sparsifier = dst.Sparsifier(model, optimizer, method, total_steps=steps)
    hook = dst.engine.gradient_compression.SparseAllReduce(sparsifier)
    model.register_comm_hook(hook, dst.engine.gradient_compression.SparseAllReduce.reduce)
    ```

    Args:
        sparsifier: Owns the masks.
        group: The processes, by default all.

    Attributes:
        bytes_sent: Bytes that this process has handed to the reduction so far.
        bytes_dense: Bytes that plain DDP would have handed over.
    """

    def __init__(self, sparsifier: Sparsifier, group: dist.ProcessGroup | None = None) -> None:
        self.sparsifier = sparsifier
        self.group = group
        self.bytes_sent = 0
        self.bytes_dense = 0
        self._positions: dict[nn.Parameter, tuple[Tensor, Tensor]] = {}

    def reduce(self, bucket: dist.GradBucket) -> Future[Tensor]:
        """The communication hook: averages one bucket of gradients over processes."""
        buffer = bucket.buffer()
        chosen = [self._active_positions(p) for p in bucket.parameters()]  # type: ignore[arg-type]
        gradients = bucket.gradients()
        self.bytes_dense += buffer.nbytes
        if all(positions is None for positions in chosen):
            packed = buffer
        else:
            parts = zip(gradients, chosen, strict=True)
            packed = torch.cat([g.reshape(-1) if at is None else g.take(at) for g, at in parts])
        self.bytes_sent += packed.nbytes
        packed.div_(world_size(self.group))
        work = dist.all_reduce(packed, group=self.group, async_op=True)
        assert work is not None

        def unpack(done: Future[list[Tensor]]) -> Tensor:
            reduced = done.value()[0]
            if packed is buffer:
                return reduced
            buffer.zero_()
            sizes = [g.numel() if at is None else at.numel() for g, at in zip(gradients, chosen, strict=True)]
            for gradient, at, values in zip(gradients, chosen, reduced.split(sizes), strict=True):
                if at is None:
                    gradient.copy_(values.view_as(gradient))
                else:
                    gradient.put_(at, values)
            return buffer

        return work.get_future().then(unpack)

    def _active_positions(self, parameter: nn.Parameter) -> Tensor | None:
        """Row-major positions to send, or ``None`` for all."""
        mask = self.sparsifier.mask_of(parameter)
        if mask is None or self.sparsifier.needs_dense_gradient(parameter):
            return None
        known = self._positions.get(parameter)
        # An update replaces the mask tensor, so the same tensor means the same positions.
        if known is None or known[0] is not mask:
            known = (mask, mask.reshape(-1).nonzero().squeeze(1))
            self._positions[parameter] = known
        return known[1]
