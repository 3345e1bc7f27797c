"""Methods that learn from the projections of all images: clusters at several granularities, or neighbours."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcl import ProtoNCELoss, SCANLoss, cluster_concentrations, kmeans, topk_similarity
from fastcl.train.methods.contrastive import QueueMethod
from fastcl.train.methods.method import Method, share_of_mean

FINER = (1, 2, 4)  # times --n-clusters
NEIGHBOURS = 5  # of an image in SCAN; few, as a class has few images


class Clustered(Method):
    """Clusters of the training images by number: assignments, centroids and concentrations are buffers."""

    renews_first = True  # before the first epoch too

    def add_clusterings(self, images: int, n_clusters: int, projection: int = 128) -> None:
        """Room for the clusterings of so many images."""
        self.counts = sorted({min(times * n_clusters, images) for times in FINER})
        for k in self.counts:
            self.register_buffer(f"assignments_{k}", torch.full((images,), -1))
            self.register_buffer(f"centroids_{k}", torch.zeros(k, projection))
            self.register_buffer(f"concentrations_{k}", torch.ones(k))

    def clusterings(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Assignments ``[n]``, centroids ``[k, D]`` and concentrations ``[k]`` for each k."""
        names = ("assignments", "centroids", "concentrations")
        return [(*(getattr(self, f"{name}_{k}") for name in names),) for k in self.counts]

    def is_due(self, epoch: int, epochs: int, renew: int) -> bool:
        return epoch % renew == 0 and (epoch > 0 or self.renews_first)

    def renew(self, projections: Tensor, seed: int) -> None:
        rows = F.normalize(projections, dim=1)
        for k, (assignments, centroids, concentrations) in zip(self.counts, self.clusterings(), strict=True):
            found = kmeans(rows, k, spherical=True, generator=torch.Generator().manual_seed(seed))
            assignments.copy_(found.assignments)
            centroids.copy_(found.centroids)
            concentrations.copy_(cluster_concentrations(rows, found))


class DeepCluster(Clustered):
    """A view is classified: which centroid of each clustering is its image's."""

    def __init__(self, image_shape: torch.Size, temperature: float, images: int, n_clusters: int) -> None:
        super().__init__(image_shape, temperature)
        self.loss, self.temperature = ProtoNCELoss(), temperature
        self.add_clusterings(images, n_clusters)

    def forward(self, views: Tensor, clusters: Tensor | None, index: Tensor) -> Tensor:
        rows, own = self.project(views).flatten(0, 1), index.repeat_interleave(views.shape[1])
        losses = []
        for assignments, centroids, _ in self.clusterings():
            temperatures = torch.full((len(centroids),), self.temperature, device=rows.device)
            losses.append(self.loss(rows, assignments[own], centroids, temperatures))
        return share_of_mean(torch.stack(losses).mean(), len(views), self.gather)


class PCL(Clustered, QueueMethod):
    """MoCo, and each view lies near the centroids of its image's clusters, from the first renewal on."""

    renews_first = False

    def __init__(self, image_shape: torch.Size, temperature: float, images: int, n_clusters: int) -> None:
        super().__init__(image_shape, temperature)
        self.prototypical = ProtoNCELoss()
        self.add_clusterings(images, n_clusters)

    def forward(self, views: Tensor, clusters: Tensor | None, index: Tensor) -> Tensor:
        queries, keys = self.project(views), self.keys(views)
        loss: Tensor = self.loss(queries, positives=keys.flip(1), contrasts=self.queue, ids=index)
        self.enqueue(keys, index)
        own = index.repeat_interleave(views.shape[1])
        terms = [self.prototypical(queries.flatten(0, 1), ids[own], *found) for ids, *found in self.clusterings()]
        return loss + share_of_mean(torch.stack(terms).mean(), len(views), self.gather)


class SCAN(Method):
    """SimCLR for half of the epochs; then neighbours by its projections get the same cluster, and all are used."""

    neighbours: Tensor

    def __init__(self, image_shape: torch.Size, temperature: float, images: int, n_clusters: int) -> None:
        super().__init__(image_shape, temperature)
        self.head = nn.Linear(self.encoder.features, n_clusters)
        self.clustering = SCANLoss(5.0)  # the weight of the authors' experiments
        self.register_buffer("neighbours", torch.full((images, min(NEIGHBOURS, images - 1)), -1))

    @property
    def pretrained(self) -> bool:
        """Whether the neighbours are known."""
        return bool(self.neighbours[0, 0] >= 0)

    def is_due(self, epoch: int, epochs: int, renew: int) -> bool:
        return epoch == epochs // 2

    def renew(self, projections: Tensor, seed: int) -> None:
        rows = F.normalize(projections, dim=1)
        count = self.neighbours.shape[1]
        found = topk_similarity(rows, rows, count + 1)[1]
        own = found == torch.arange(len(rows), device=rows.device)[:, None]
        # Equal images may push the image itself out of its own list.
        own[~own.any(1), -1] = True
        self.neighbours.copy_(found[~own].view(-1, count))

    def partners(self, index: Tensor) -> Tensor:
        """A neighbour each. Drawn for all images, so that several processes draw what one does."""
        if not self.pretrained:
            return index
        chosen = torch.randint(self.neighbours.shape[1], (len(self.neighbours),))
        return self.neighbours.cpu()[index, chosen[index]]

    def forward(self, views: Tensor, clusters: Tensor | None, index: Tensor) -> Tensor:
        if not self.pretrained:
            loss: Tensor = self.loss(self.project(views))
            return loss
        anchors, neighbours = self.head(self.encoder(views.flatten(0, 1))).unflatten(0, views.shape[:2]).unbind(1)
        clustering: Tensor = self.clustering(anchors, neighbours)
        return clustering
