"""Methods of two views without negatives, and regularised SimCLR."""

import torch
from torch import Tensor, nn

from fastcl import BarlowTwinsLoss, LDRegLoss, NegativeCosineSimilarity, VICRegLoss, WMSELoss
from fastcl.train.methods.method import Method, apart, follow, slow_copy


class TwoViews(Method):
    """A loss of the projections of the two views. It has no temperature."""

    def __init__(self, image_shape: torch.Size, temperature: float, projection: int = 128) -> None:
        super().__init__(image_shape, temperature, projection)
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
    """Views agree after each is whitened."""

    def criterion(self) -> nn.Module:
        return WMSELoss(eps=0.01)  # the last batch of an image set may have fewer rows than features


class SimSiam(Method):
    """A head predicts from a view the projection of the other, which is the target without gradient."""

    def __init__(self, image_shape: torch.Size, temperature: float, projection: int = 128) -> None:
        super().__init__(image_shape, temperature, projection)
        self.projector = apart(self.projector, projection)
        self.head = nn.Sequential(
            nn.Linear(projection, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, projection)
        )  # fmt: skip
        self.loss = NegativeCosineSimilarity()

    def targets(self, views: Tensor, projections: Tensor) -> Tensor:
        """What is predicted ``[B, V, D]``, without gradient."""
        return projections.detach()

    def forward(self, views: Tensor, clusters: Tensor | None, index: Tensor) -> Tensor:
        projections = self.project(views)
        targets = self.targets(views, projections).flip(1)
        loss: Tensor = self.loss(self.head(projections.flatten(0, 1)), targets.flatten(0, 1))
        return loss


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
