"""Encoder, projector, and the methods that train them. A method is a subclass of `Method` and a line in `METHODS`."""

from copy import deepcopy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor, nn

from fastcl import (
    ClusterInfoNCE,
    MemoryQueue,
    PMSNLoss,
    SwAVLoss,
    power_law_prior,
    prior_from_counts,
    sinkhorn,
    uniform_prior,
)
from fastcl.train import OptionError
from fastcl.train.data import ImageData, attributes, read_csv_clusters

from ..distributed import World


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
    instances_first = True  # until the first k-means each image is its own cluster

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

    def forward(self, views: Tensor, clusters: Tensor | None, index: Tensor) -> Tensor:
        """Loss (scalar) of views ``[B, V, C, H, W]``.

        clusters: int64 ``[B]`` (negative: none; None: not yet). index: int64 ``[B]``, which images these are.
        """
        raise NotImplementedError


class SimCLR(Method):
    """The positives of a view are the other views of its image."""

    def forward(self, views: Tensor, clusters: Tensor | None, index: Tensor) -> Tensor:
        loss: Tensor = self.loss(self.project(views))
        return loss


class ClInfoNCE(Method):
    """The positives of a view are all views of its cluster. With the labels as clusters this is SupCon."""

    needs_clusters = True

    def forward(self, views: Tensor, clusters: Tensor | None, index: Tensor) -> Tensor:
        loss: Tensor = self.loss(self.project(views), clusters)
        return loss


class SupCon(ClInfoNCE):
    """The positives of a view are all views of its label's images."""


class ClusterPrediction(Method):
    """The baseline: a linear classifier on the features predicts each view's cluster, trained by cross-entropy.

    Images without a cluster do not count. The classifier stands in the projector's place, so that ``project`` gives its
    logits ``[B, V, classes]``; there is no temperature.
    """

    needs_clusters = True
    instances_first = False  # its classes are clusters from the first step on: those of the untrained encoder

    def __init__(self, image_shape: torch.Size, temperature: float, classes: int) -> None:
        super().__init__(image_shape, temperature)
        self.projector = nn.Sequential(nn.Linear(self.encoder.features, classes))
        self.gather = False

    def forward(self, views: Tensor, clusters: Tensor | None, index: Tensor) -> Tensor:
        assert clusters is not None
        logits, targets = self.project(views).flatten(0, 1), clusters.repeat_interleave(views.shape[1])
        total = F.cross_entropy(logits.float(), targets, ignore_index=-1, reduction="sum")
        count, world = (targets >= 0).sum(), World.of(self.gather)
        if world is not None:  # each process's share of the mean over all of them, times their number
            total, count = total * world.size, world.total(count)
        return total / count.clamp(min=1)


def apart(projector: nn.Sequential, projection: int) -> nn.Sequential:
    """With batch normalisation: projections of untrained weights nearly coincide, the batch's statistics part them."""
    first, middle, last = projector
    return nn.Sequential(first, nn.BatchNorm1d(256), middle, last, nn.BatchNorm1d(projection, affine=False))


class QueueMethod(Method):
    """Keys come from a slowly moving copy of encoder and projector, and stay in a queue for later batches."""

    def __init__(self, image_shape: torch.Size, temperature: float, projection: int = 128) -> None:
        super().__init__(image_shape, temperature, projection)
        # Else keys of one time coincide, and being of now or of then is all that tells a positive from the queue.
        self.projector = apart(self.projector, projection)
        self.slow = deepcopy(nn.ModuleList([self.encoder, self.projector])).requires_grad_(False)
        self.queue = MemoryQueue(QUEUE, projection, ids=True)

    @torch.no_grad()
    def keys(self, views: Tensor) -> Tensor:
        """Projections ``[B, V, D]`` of the copy, which follows by one step first."""
        if self.training:
            quick = [*self.encoder.parameters(), *self.projector.parameters()]
            for own, other in zip(self.slow.parameters(), quick, strict=True):
                own.lerp_(other, 1 - MOMENTUM)
        encoder, projector = self.slow
        keys: Tensor = projector(encoder(views.flatten(0, 1))).unflatten(0, views.shape[:2])
        return keys

    def enqueue(self, keys: Tensor, index: Tensor) -> None:
        self.queue.enqueue(keys.flatten(0, 1), ids=index.repeat_interleave(keys.shape[1]))


class MoCo(QueueMethod):
    """The positive of a view is the key of the other view; the queue holds negatives, the image's own left out."""

    def forward(self, views: Tensor, clusters: Tensor | None, index: Tensor) -> Tensor:
        queries, keys = self.project(views), self.keys(views)
        loss: Tensor = self.loss(queries, positives=keys.flip(1), contrasts=self.queue, ids=index)
        self.enqueue(keys, index)
        return loss


class NNCLR(QueueMethod):
    """A head predicts from a view the neighbour in the queue of the other view's key, against the other predictions."""

    def __init__(self, image_shape: torch.Size, temperature: float, projection: int = 128) -> None:
        super().__init__(image_shape, temperature, projection)
        self.head = nn.Sequential(nn.Linear(projection, 256), nn.ReLU(), nn.Linear(256, projection))

    def forward(self, views: Tensor, clusters: Tensor | None, index: Tensor) -> Tensor:
        predictions, keys = self.head(self.project(views)), self.keys(views).flip(1)
        neighbours = keys
        if len(self.queue):
            neighbours = self.queue.nearest(keys.flatten(0, 1)).unflatten(0, keys.shape[:2])
        pairs = zip(predictions.unbind(1), neighbours.unbind(1), strict=True)
        losses = [self.loss(neighbour.contiguous(), contrasts=prediction) for prediction, neighbour in pairs]
        self.enqueue(keys, index)
        return torch.stack(losses).mean()


class PrototypeMethod(Method):
    """Views are assigned to learned prototypes, whose sizes follow a prior."""

    prior = "uniform"  # unless the option says otherwise
    masses: Tensor

    def __init__(self, image_shape: torch.Size, temperature: float, masses: Tensor, projection: int = 128) -> None:
        super().__init__(image_shape, temperature, projection)
        # All rows of scores would be alike at first, each assigned the prior, and predicting that is a fixed point.
        self.projector = apart(self.projector, projection)
        self.prototypes = nn.Parameter(F.normalize(torch.randn(len(masses), projection), dim=1))
        self.register_buffer("masses", masses)

    def scores(self, projections: Tensor) -> Tensor:
        """Cosine similarities ``[..., K]`` of projections ``[..., D]`` with the prototypes."""
        return F.normalize(projections.float(), dim=-1) @ F.normalize(self.prototypes, dim=1).T


class SwAV(PrototypeMethod):
    """Each view predicts the assignment of the other."""

    def __init__(self, image_shape: torch.Size, temperature: float, masses: Tensor) -> None:
        super().__init__(image_shape, temperature, masses)
        self.loss = SwAVLoss(temperature, prior=masses)

    def forward(self, views: Tensor, clusters: Tensor | None, index: Tensor) -> Tensor:
        scores = self.scores(self.project(views))
        loss: Tensor = self.loss(list(scores.unbind(1)))
        return loss


class PMSN(PrototypeMethod):
    """Each view predicts the sharpened assignment of the other, and the mean prediction follows the prior.

    The targets come from the encoder itself, without gradient: at this size it needs no momentum copy.
    """

    prior = "power_law"

    def __init__(self, image_shape: torch.Size, temperature: float, masses: Tensor) -> None:
        super().__init__(image_shape, temperature, masses)
        self.loss = PMSNLoss(temperature, prior=masses)

    def forward(self, views: Tensor, clusters: Tensor | None, index: Tensor) -> Tensor:
        projections = self.project(views)
        anchors, targets = projections.transpose(0, 1), projections.flip(1).transpose(0, 1)
        loss: Tensor = self.loss(anchors.flatten(0, 1), targets.flatten(0, 1), self.prototypes)
        return loss


class SinkhornClInfoNCE(PrototypeMethod):
    """The positives of a view are all views, each as much as Sinkhorn assigns both images to the same prototypes.

    An image is assigned by the mean scores of its views, so that they are positives of each other. The prototypes learn
    through the assignments.
    """

    needs_clusters = True

    def forward(self, views: Tensor, clusters: Tensor | None, index: Tensor) -> Tensor:
        projections = self.project(views)
        scores = self.scores(projections).mean(1)
        assignments = sinkhorn(scores, prior=self.masses).assignments
        loss: Tensor = self.loss(projections, assignments=assignments)
        return loss


METHODS: dict[str, type[Method]] = {
    "simclr": SimCLR, "clinfonce": ClInfoNCE, "supcon": SupCon, "cluster-ce": ClusterPrediction,
    "moco": MoCo, "nnclr": NNCLR, "swav": SwAV, "pmsn": PMSN,
}  # fmt: skip
QUEUE, MOMENTUM = 2048, 0.95  # rows, and what of the copy is kept at a step; both small, as the data is
PRIORS = ("uniform", "power_law", "counts")


def kind_of(method: str, clusters: str | None) -> type[Method]:
    """The class that --method trains with these --clusters."""
    if clusters == "sinkhorn":
        if METHODS[method] is not ClInfoNCE:
            raise OptionError(f"--clusters sinkhorn needs --method clinfonce; got --method {method}")
        return SinkhornClInfoNCE
    return METHODS[method]


def prototype_masses(prior: str, count: int, labels: NDArray[np.int64]) -> Tensor:
    """The prior ``[count]`` that --prior names, the largest mass first.

    ``counts`` knows the labels' frequencies: prototypes are dealt out to the classes in turn, and share their mass.
    """
    if prior == "uniform":
        return uniform_prior(count)
    if prior == "power_law":
        return power_law_prior(count)
    sizes = torch.from_numpy(np.bincount(labels)).sort(descending=True).values
    if count < len(sizes):
        raise OptionError(f"--prior counts needs --n-clusters of at least the number of classes, {len(sizes)}")
    owner = torch.arange(count) % len(sizes)
    return prior_from_counts((sizes / torch.bincount(owner))[owner]).sort(descending=True).values


def fixed_clusters(option: str, images: ImageData) -> NDArray[np.int64]:
    """Training clusters ``[n]`` that are known beforehand: every kind of --clusters but kmeans and sinkhorn."""
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


def renumbered(clusters: NDArray[np.int64], before: NDArray[np.int64]) -> NDArray[np.int64]:
    """Clusters ``[n]`` under other numbers, with which as many images as possible keep the one that they had before.

    k-means numbers its clusters at random, and what a classifier learned is of use as long as its classes stay.
    """
    shared = np.zeros([1 + max(clusters.max(), before.max())] * 2, dtype=np.int64)
    np.add.at(shared, (clusters, before), 1)
    numbers: NDArray[np.int64] = linear_sum_assignment(shared, maximize=True)[1]
    return numbers[clusters]
