"""Batch normalisation of the projectors, over the rows of all processes."""

import torch
from torch import Tensor, nn

from ...distributed import World


class BatchNorm(nn.BatchNorm1d):
    """As its base class, for rows ``[n, features]``; with ``gather``, mean and variance, computed in float32, are those
    of the rows of all processes. PyTorch's SyncBatchNorm has no kernels for the CPU."""

    gather = False

    def forward(self, rows: Tensor) -> Tensor:
        world = World.of(self.gather) if self.training else None
        if world is None:
            return super().forward(rows)
        wide = rows.float()
        sums = world.total(torch.cat([wide.sum(0), wide.new_tensor([len(wide)])]))
        n = sums[-1].detach()
        centred = wide - sums[:-1] / n
        variance = world.total(centred.square().sum(0)) / n
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            assert self.momentum is not None
            self.num_batches_tracked += 1
            self.running_mean.lerp_(sums[:-1] / n, self.momentum)
            self.running_var.lerp_(variance * n / (n - 1), self.momentum)
        normal = centred * (variance + self.eps).rsqrt()
        return normal if self.weight is None else torch.addcmul(self.bias, normal, self.weight)


def normalised(projector: nn.Sequential) -> nn.Sequential:
    """With batch normalisation of the hidden layer."""
    first, middle, last = projector
    assert isinstance(first, nn.Linear)
    return nn.Sequential(first, BatchNorm(first.out_features), middle, last)


def apart(projector: nn.Sequential) -> nn.Sequential:
    """Also of the projections: untrained weights make them nearly coincide, the batch's statistics part them."""
    *layers, last = normalised(projector)
    assert isinstance(last, nn.Linear)
    return nn.Sequential(*layers, last, BatchNorm(last.out_features, affine=False))
