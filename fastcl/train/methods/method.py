"""What all methods share: an encoder, a projector, and a loss of a batch of views."""

from copy import deepcopy

import torch
from torch import Tensor, nn

from fastcl import ClusterInfoNCE
from fastcl.train.methods.encoder import Encoder

from ...distributed import World

MOMENTUM = 0.95  # of a slow copy at a step; small, as the data is


class Method(nn.Module):
    """An encoder, a projector, and in ``forward`` the loss of a batch of views.

    State that a method adds (queue, momentum encoder, prototypes) goes into parameters and buffers: the checkpoint
    holds them all.
    """

    needs_clusters = False
    takes_tags = False
    instances_first = True  # until the first k-means each image is its own cluster
    gather = False  # whether the loss is that of all processes' rows

    def __init__(self, image_shape: torch.Size, temperature: float, projection: int = 128) -> None:
        super().__init__()
        self.encoder = Encoder(*image_shape)
        features = self.encoder.features
        self.projector = nn.Sequential(nn.Linear(features, 256), nn.ReLU(), nn.Linear(256, projection))
        self.loss: nn.Module = ClusterInfoNCE(temperature=temperature)

    def project(self, views: Tensor) -> Tensor:
        """Views ``[B, V, C, H, W]`` -> projections ``[B, V, D]``."""
        projections: Tensor = self.projector(self.encoder(views.flatten(0, 1))).unflatten(0, views.shape[:2])
        return projections

    def is_due(self, epoch: int, epochs: int, renew: int) -> bool:
        """Whether `renew` is called before this epoch of so many. renew: the option, epochs between two renewals."""
        return False

    def renew(self, projections: Tensor, seed: int) -> None:
        """Learn what is needed from the projections ``[n, D]`` of all training images."""
        raise NotImplementedError

    def partners(self, index: Tensor) -> Tensor:
        """The images ``[B]`` whose second views come beside the first views of these; both on the CPU."""
        return index

    def forward(self, views: Tensor, clusters: Tensor | None, index: Tensor) -> Tensor:
        """Loss (scalar) of views ``[B, V, C, H, W]``.

        clusters: int64 ``[B]`` (negative: none; None: not yet), or tags, bool ``[B, T]``. index: int64 ``[B]``, which
            images these are.
        """
        raise NotImplementedError


def share_of_mean(loss: Tensor, rows: int, gather: bool) -> Tensor:
    """A mean over this process's rows -> its share of the mean over all rows, times the number of processes."""
    world = World.of(gather)
    if world is None:
        return loss
    return loss * (rows * world.size / world.total(loss.new_tensor(rows)))


def slow_copy(*modules: nn.Module) -> nn.ModuleList:
    """Copies without gradients."""
    return deepcopy(nn.ModuleList(modules)).requires_grad_(False)


@torch.no_grad()
def follow(copies: nn.ModuleList, *modules: nn.Module) -> None:
    """Moves copies towards the modules, by a step."""
    for own, other in zip(copies.parameters(), nn.ModuleList(modules).parameters(), strict=True):
        own.lerp_(other, 1 - MOMENTUM)
