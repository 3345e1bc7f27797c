"""Methods with learned prototypes, and the priors of their sizes."""

import argparse
import contextlib
import math
import re

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fastcl import DINOLoss, MSNLoss, SwAVLoss, power_law_prior, prior_from_counts, sinkhorn, uniform_prior
from fastcl.train import OptionError
from fastcl.train.methods.method import Method, follow, slow_copy
from fastcl.train.methods.normalisation import apart

from ...distributed import World


def prior_name(text: str) -> str:
    """The type of --prior."""
    match = re.fullmatch(r"uniform|counts|power_law(:[0-9.]+)?", text)
    with contextlib.suppress(ValueError):
        if match and (match[1] is None or math.isfinite(float(match[1][1:]))):
            return text
    raise argparse.ArgumentTypeError(f"expected uniform, power_law, power_law:EXPONENT or counts, got {text!r}")


class PrototypeMethod(Method):
    """Views are assigned to learned prototypes, whose sizes follow a prior."""

    prior = "uniform"  # unless the option says otherwise
    masses: Tensor

    def __init__(self, image_shape: torch.Size, temperature: float, masses: Tensor, projection: int = 128) -> None:
        super().__init__(image_shape, temperature, projection)
        # All rows of scores would be alike at first, each assigned the prior, and predicting that is a fixed point.
        self.projector = apart(self.projector)
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


class MSN(PrototypeMethod):
    """Each view predicts the sharpened assignment of the other, and the mean prediction follows the prior.

    The targets come from the encoder itself, without gradient: at this size it needs no momentum copy.
    """

    def __init__(self, image_shape: torch.Size, temperature: float, masses: Tensor) -> None:
        super().__init__(image_shape, temperature, masses)
        self.loss = MSNLoss(temperature, prior=masses)

    def forward(self, views: Tensor, clusters: Tensor | None, index: Tensor) -> Tensor:
        projections = self.project(views)
        anchors, targets = projections.transpose(0, 1), projections.flip(1).transpose(0, 1)
        loss: Tensor = self.loss(anchors.flatten(0, 1), targets.flatten(0, 1), self.prototypes)
        return loss


class PMSN(MSN):
    """MSN with a power law for the prior."""

    prior = "power_law"


class DINO(PrototypeMethod):
    """Each view predicts the assignment of the other by a slowly moving copy of encoder, projector and prototypes.

    Assignments are Sinkhorn's, with the prior. No scores of a whole batch are stored.
    """

    def __init__(self, image_shape: torch.Size, temperature: float, masses: Tensor) -> None:
        super().__init__(image_shape, temperature, masses)
        self.loss = DINOLoss(len(masses), student_temperature=temperature, centering="sinkhorn", prior=masses)
        self.slow = slow_copy(self.encoder, self.projector, nn.ParameterList([self.prototypes]))

    def forward(self, views: Tensor, clusters: Tensor | None, index: Tensor) -> Tensor:
        if self.training:
            follow(self.slow, self.encoder, self.projector, nn.ParameterList([self.prototypes]))
        encoder, projector, prototypes = self.slow
        with torch.no_grad():
            projections = projector(encoder(views.flatten(0, 1))).unflatten(0, views.shape[:2])
            teacher = self.crops(projections, next(prototypes.parameters()))
        loss: Tensor = self.loss(self.crops(self.project(views), self.prototypes), teacher)
        return loss

    @staticmethod
    def crops(projections: Tensor, prototypes: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Unit features and prototypes of each view."""
        centres = F.normalize(prototypes, dim=1)
        return [(view, centres) for view in F.normalize(projections.float(), dim=-1).unbind(1)]


class SinkhornClInfoNCE(PrototypeMethod):
    """The positives of a view are all views, each as much as Sinkhorn assigns both images to the same prototypes.

    An image is assigned by the mean scores of its views, so that they are positives of each other. The prototypes learn
    through the assignments.
    """

    needs_clusters = True

    def forward(self, views: Tensor, clusters: Tensor | None, index: Tensor) -> Tensor:
        projections = self.project(views)
        scores = self.scores(projections).mean(1)
        world = World.of(self.gather)
        assignments = sinkhorn(scores, prior=self.masses, group=world and world.group).assignments
        loss: Tensor = self.loss(projections, assignments=assignments)
        return loss


def prototype_masses(prior: str, count: int, labels: NDArray[np.int64]) -> Tensor:
    """The prior ``[count]`` that --prior names, the largest mass first.

    ``counts`` knows the labels' frequencies: prototypes are dealt out to the classes in turn, and share their mass. One
    with a mass below 1 / batch size gets less than an image of a batch, and may be the nearest of none.
    """
    if prior == "uniform":
        return uniform_prior(count)
    if prior.startswith("power_law"):
        exponent = prior.partition(":")[2]
        return power_law_prior(count, *([float(exponent)] if exponent else []))
    sizes = torch.from_numpy(np.bincount(labels)).sort(descending=True).values
    if count < len(sizes):
        raise OptionError(f"--prior counts needs --n-clusters of at least the number of classes, {len(sizes)}")
    owner = torch.arange(count) % len(sizes)
    return prior_from_counts((sizes / torch.bincount(owner))[owner]).sort(descending=True).values
