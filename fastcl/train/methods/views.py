"""Methods of two views without negatives, and regularised SimCLR."""

import torch
from torch import Tensor, nn

from fastcl import BarlowTwinsLoss, LDRegLoss, NegativeCosineSimilarity, VICRegLoss, WMSELoss
from fastcl.train.methods.method import Method, follow, share_of_mean, slow_copy
from fastcl.train.methods.normalisation import BatchNorm, apart, normalised


class TwoViews(Method):
    """A loss of the projections of the two views. It has no temperature.

    As in the papers, the projector has batch normalisation. Without it, short trainings of VICReg and W-MSE ended below
    the untrained encoder.
    """

    projection = 128

    def __init__(self, image_shape: torch.Size, temperature: float) -> None:
        super().__init__(image_shape, temperature, self.projection)
        self.projector = normalised(self.projector)
        self.loss = self.criterion()

    def criterion(self) -> nn.Module:
        raise NotImplementedError

    def forward(self, views: Tensor, clusters: Tensor | None, index: Tensor) -> Tensor:
        loss: Tensor = self.loss(*self.project(views).unbind(1))
        return loss


class VICReg(TwoViews):
    """Views agree, each feature varies, and features do not covary."""

    def criterion(self) -> nn.Module:
        return VICRegLoss()


class BarlowTwins(TwoViews):
    """The correlations of the features of one view with those of the other approach the identity."""

    def criterion(self) -> nn.Module:
        return BarlowTwinsLoss()


class WMSE(TwoViews):
    """Views agree after each is whitened. The smaller the projections, the better a batch tells their covariances."""

    projection = 32

    def criterion(self) -> nn.Module:
        return WMSELoss(eps=1e-4)  # a batch may have fewer rows than features


class SimSiam(Method):
    """A head predicts from a view the projection of the other, which is the target without gradient."""

    def __init__(self, image_shape: torch.Size, temperature: float, projection: int = 128) -> None:
        super().__init__(image_shape, temperature, projection)
        self.projector = apart(self.projector)
        self.head = nn.Sequential(
            nn.Linear(projection, 64), BatchNorm(64), nn.ReLU(), nn.Linear(64, projection)
        )  # fmt: skip
        self.loss = NegativeCosineSimilarity()

    def targets(self, views: Tensor, projections: Tensor) -> Tensor:
        """What is predicted ``[B, V, D]``, without gradient."""
        return projections.detach()

    def forward(self, views: Tensor, clusters: Tensor | None, index: Tensor) -> Tensor:
        projections = self.project(views)
        targets = self.targets(views, projections).flip(1)
        loss: Tensor = self.loss(self.head(projections.flatten(0, 1)), targets.flatten(0, 1))
        return share_of_mean(loss, len(views), self.gather)


class BYOL(SimSiam):
    """The targets are projections of a slowly moving copy of encoder and projector."""

    def __init__(self, image_shape: torch.Size, temperature: float, projection: int = 128) -> None:
        super().__init__(image_shape, temperature, projection)
        self.slow = slow_copy(self.encoder, self.projector)

    @torch.no_grad()
    def targets(self, views: Tensor, projections: Tensor) -> Tensor:
        follow(self.slow, self.encoder, self.projector)
        encoder, projector = self.slow
        found: Tensor = projector(encoder(views.flatten(0, 1))).unflatten(0, views.shape[:2])
        return found


class LDReg(Method):
    """SimCLR, and the features of a view have a high local dimensionality."""

    def __init__(self, image_shape: torch.Size, temperature: float, projection: int = 128) -> None:
        super().__init__(image_shape, temperature, projection)
        self.regulariser = LDRegLoss()

    def forward(self, views: Tensor, clusters: Tensor | None, index: Tensor) -> Tensor:
        features = self.encoder(views.flatten(0, 1))
        projections = self.projector(features).unflatten(0, views.shape[:2])
        loss: Tensor = self.loss(projections) + 0.01 * self.regulariser(features)
        return loss
