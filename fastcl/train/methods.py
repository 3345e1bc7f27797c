"""Encoder, projector, and the methods that train them. A method is a subclass of `Method` and a line in `METHODS`."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor, nn

from fastcl import ClusterInfoNCE
from fastcl.train.data import ImageData, attributes, read_csv_clusters


class Encoder(nn.Sequential):
    """A small convolutional net: images float32 ``[B, C, H, W]`` in [0, 1] -> features ``[B, features]``.

    Halves the image until it is at most 4 pixels high or wide, then averages over it. GroupNorm, because BatchNorm's
    shared statistics would leak from one view to the other.
    """

    def __init__(self, channels: int, height: int, width: int, base: int = 32, widest: int = 256) -> None:
        depth, layers = base, self._block(channels, base, 1)
        while min(height, width) > 4 or depth == base:
            wider = min(2 * depth, widest)
            layers += self._block(depth, wider, 2) + self._block(wider, wider, 1)
            depth, height, width = wider, (height + 1) // 2, (width + 1) // 2
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.features = depth

    @staticmethod
    def _block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        return [convolution, nn.GroupNorm(8, outputs), nn.ReLU()]


class Method(nn.Module):
    """An encoder, a projector, and in ``forward`` the loss of a batch of views.

    State that a method adds (queue, momentum encoder, prototypes) goes into parameters and buffers: the checkpoint
    holds them all.
    """

    needs_clusters = False

    def __init__(self, image_shape: torch.Size, temperature: float, projection: int = 128) -> None:
        super().__init__()
        self.encoder = Encoder(*image_shape)
        features = self.encoder.features
        self.projector = nn.Sequential(nn.Linear(features, 256), nn.ReLU(), nn.Linear(256, projection))
        self.loss = ClusterInfoNCE(temperature=temperature)

    def project(self, views: Tensor) -> Tensor:
        """Views ``[B, V, C, H, W]`` -> projections ``[B, V, D]``."""
        projections: Tensor = self.projector(self.encoder(views.flatten(0, 1))).unflatten(0, views.shape[:2])
        return projections

    def forward(self, views: Tensor, clusters: Tensor | None) -> Tensor:
        """Loss (scalar) of views ``[B, V, C, H, W]`` and clusters int64 ``[B]`` (negative: none; None: not yet)."""
        raise NotImplementedError


class SimCLR(Method):
    """The positives of a view are the other views of its image."""

    def forward(self, views: Tensor, clusters: Tensor | None) -> Tensor:
        loss: Tensor = self.loss(self.project(views))
        return loss


class ClInfoNCE(Method):
    """The positives of a view are all views of its cluster. With the labels as clusters this is SupCon."""

    needs_clusters = True

    def forward(self, views: Tensor, clusters: Tensor | None) -> Tensor:
        loss: Tensor = self.loss(self.project(views), clusters)
        return loss


METHODS: dict[str, type[Method]] = {"simclr": SimCLR, "clinfonce": ClInfoNCE}


def fixed_clusters(option: str, images: ImageData) -> NDArray[np.int64]:
    """Training clusters ``[n]`` that are known beforehand: every kind of --clusters but kmeans."""
    if option == "labels":
        return images.train_labels
    if option == "attributes":
        return attributes(images.train_images)
    return read_csv_clusters(option, images.source_size)[images.source_index]


def kmeans(embeddings: NDArray[np.float32], n_clusters: int, seed: int) -> Any:
    """scikit-learn's KMeans fitted to embeddings ``[n, D]``, the same bits from run to run.

    One thread, because its threads add their partial sums in the order in which they finish.
    """
    with threadpool_limits(limits=1):
        return KMeans(n_clusters, n_init=3, random_state=seed).fit(embeddings)
