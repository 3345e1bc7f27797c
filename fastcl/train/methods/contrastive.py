"""Methods that contrast views with each other, with a queue, or with the classes of a classifier."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcl import ASCLLoss, MemoryBank, MemoryQueue, SampledNCELoss
from fastcl.distributed import gather_rows
from fastcl.train.methods.method import Method, follow, slow_copy
from fastcl.train.methods.normalisation import apart

from ...distributed import World
from ...losses.sampled import draw

QUEUE = 2048  # rows; small, as the data is
NEGATIVES = 256  # of PIRL, drawn for each view


class SimCLR(Method):
    """The positives of a view are the other views of its image."""

    def forward(self, views: Tensor, clusters: Tensor | None, index: Tensor) -> Tensor:
        loss: Tensor = self.loss(self.project(views))
        return loss


class ClInfoNCE(Method):
    """The positives of a view are all views of its cluster. With the labels as clusters this is SupCon.

    With tags in place of clusters they are all views of the images that share one.
    """

    needs_clusters = True
    takes_tags = True

    def forward(self, views: Tensor, clusters: Tensor | None, index: Tensor) -> Tensor:
        loss: Tensor = self.loss(self.project(views), clusters)
        return loss


class SupCon(ClInfoNCE):
    """The positives of a view are all views of its label's images."""

    takes_tags = False


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

    def forward(self, views: Tensor, clusters: Tensor | None, index: Tensor) -> Tensor:
        assert clusters is not None
        logits, targets = self.project(views).flatten(0, 1), clusters.repeat_interleave(views.shape[1])
        total = F.cross_entropy(logits.float(), targets, ignore_index=-1, reduction="sum")
        count, world = (targets >= 0).sum(), World.of(self.gather)
        if world is not None:  # each process's share of the mean over all of them, times their number
            total, count = total * world.size, world.total(count)
        return total / count.clamp(min=1)


class QueueMethod(Method):
    """Keys come from a slowly moving copy of encoder and projector, and stay in a queue for later batches."""

    def __init__(
        self, image_shape: torch.Size, temperature: float, projection: int = 128, tags: int | None = None
    ) -> None:
        super().__init__(image_shape, temperature, projection)
        # Else keys of one time coincide, and being of now or of then is all that tells a positive from the queue.
        self.projector = apart(self.projector)
        self.slow = slow_copy(self.encoder, self.projector)
        self.queue = MemoryQueue(QUEUE, projection, ids=True, tags=tags)

    @torch.no_grad()
    def keys(self, views: Tensor) -> Tensor:
        """Projections ``[B, V, D]`` of the copy, which follows by one step first."""
        if self.training:
            follow(self.slow, self.encoder, self.projector)
        encoder, projector = self.slow
        keys: Tensor = projector(encoder(views.flatten(0, 1))).unflatten(0, views.shape[:2])
        return keys

    def enqueue(self, keys: Tensor, index: Tensor, tags: Tensor | None = None) -> None:
        """The keys of all processes, so that their queues are the same."""
        own = [keys, index] if tags is None else [keys, index, tags]
        keys, index, *labels = gather_rows(*own)
        ids, *labels = (rows.repeat_interleave(keys.shape[1], 0) for rows in (index, *labels))
        self.queue.enqueue(keys.flatten(0, 1), labels[0] if labels else None, ids)


class MoCo(QueueMethod):
    """The positive of a view is the key of the other view; the queue holds negatives, the image's own left out.

    With tags the keys in the queue that share one with the image are positives too.
    """

    takes_tags = True

    def forward(self, views: Tensor, clusters: Tensor | None, index: Tensor) -> Tensor:
        queries, keys = self.project(views), self.keys(views)
        loss: Tensor = self.loss(queries, clusters, positives=keys.flip(1), contrasts=self.queue, ids=index)
        self.enqueue(keys, index, clusters)
        return loss


class ASCL(QueueMethod):
    """As MoCo; rows of the queue that a key finds similar are positives of its query too, in part."""

    def __init__(self, image_shape: torch.Size, temperature: float, projection: int = 128) -> None:
        super().__init__(image_shape, temperature, projection)
        self.loss = ASCLLoss(temperature, teacher_temperature=temperature / 2, neighbors=5)

    def forward(self, views: Tensor, clusters: Tensor | None, index: Tensor) -> Tensor:
        queries, keys = self.project(views), self.keys(views)
        loss: Tensor = self.loss(queries.flatten(0, 1), keys.flip(1).flatten(0, 1), self.queue)
        self.enqueue(keys, index)
        return loss


class PIRL(Method):
    """Both views are near the image's row in a bank, a mean of earlier views, and far from rows of other images."""

    def __init__(self, image_shape: torch.Size, temperature: float, images: int, projection: int = 128) -> None:
        super().__init__(image_shape, temperature, projection)
        self.projector = apart(self.projector)  # without it ended below the untrained encoder on the digits
        self.bank = MemoryBank(images, projection)
        self.loss = SampledNCELoss(temperature, num_negatives=NEGATIVES, form="pirl")

    def forward(self, views: Tensor, clusters: Tensor | None, index: Tensor) -> Tensor:
        projections = self.project(views)
        rows, places = gather_rows(projections[:, 0].float(), index)
        if len(self.bank) == 0:  # there is nothing to contrast with yet
            self.bank.update(places, rows)
        own, losses = torch.isin(places, index), []
        for view in projections.unbind(1):
            negatives = draw(self.bank, places, NEGATIVES)  # for all rows, as one process draws them
            losses.append(self.loss(view, index, self.bank, negatives=negatives[own]))
        self.bank.update(places, rows)
        return torch.stack(losses).mean()


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
