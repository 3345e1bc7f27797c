"""The prototype losses, dense: the specification in code.

Distances from a row's largest score are exact where the softmax has mass, and a cross-entropy is the sum of two
non-negative numbers: ``log(sum of exponentials) + scale * mean distance``. A score of -inf is infinitely far; where the
mass is 0 it contributes 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .records import Crops, Incoming, Values, Wanted


class Softmax(NamedTuple):
    """The softmax of a crop's rows."""

    shift: Tensor  # [N]
    sum: Tensor  # [N]
    distances: Tensor  # [N, K]: of the scores from the shift, <= 0
    masses: Tensor  # [N, K]

    @classmethod
    def of(cls, scores: Tensor, scale: Tensor) -> Softmax:
        shift = scores.amax(1)
        distances = scores - shift[:, None]
        exponentials = (distances * scale).exp()
        total = exponentials.sum(1)
        return cls(shift, total, distances, exponentials / total[:, None])

    def cross_entropies(self, masses: Tensor, scale: Tensor) -> Tensor:
        """[N]: of this softmax with the rows of masses [N, K]."""
        return self.sum.log() - torch.where(masses == 0, masses, masses * self.distances).sum(1) * scale

    def entropies(self, scale: Tensor) -> Tensor:
        """[N]"""
        return self.cross_entropies(self.masses, scale)


def student(p: Crops, b: int) -> Softmax:
    return Softmax.of(p.students[b].to(p.dtype), p.scales[0].to(p.dtype))


def teacher(p: Crops, a: int) -> Softmax:
    scores, potential = p.teachers[a].to(p.dtype), p.potential_rows(a)
    return Softmax.of(scores if potential is None else scores + potential, p.scales[1].to(p.dtype))


def forward(p: Crops, wanted: Wanted) -> Values:
    scale, (n, k) = p.scales[0].to(p.dtype), p.sizes
    teachers = [teacher(p, a) for a in range(len(p.teachers))]
    values, kept = p.new(n).zero_(), []
    entropies = p.new(n if wanted.entropies else 0).zero_()
    column_sums = p.new(k if wanted.column_sums else 0).zero_()
    for b in range(len(p.students)):
        own = student(p, b)
        kept.append(torch.stack((own.shift, own.sum)))
        for a, other in enumerate(teachers):
            if p.pair(b, a):
                values += p.pair(b, a) * own.cross_entropies(other.masses, scale)
        if wanted.entropies:
            entropies += own.entropies(scale)
        if wanted.column_sums:
            column_sums += own.masses.sum(0)
    kept += [torch.stack((other.shift, other.sum)) for other in teachers]
    return Values(values, entropies, column_sums, torch.stack(kept))


def backward(p: Crops, kept: Tensor, incoming: Incoming, outputs: list[Tensor]) -> None:
    """Writes the gradients of the students' scores, in their dtypes, into `outputs`, which may be the scores."""
    scale = p.scales[0].to(p.dtype)
    targets: list[Tensor] = []
    if incoming.values is not None:
        targets = [teacher(p, a).masses for a in range(len(p.teachers))]
    for b, output in enumerate(outputs):
        own = student(p, b)
        masses, gradient = own.masses, torch.zeros_like(own.masses)
        for a, target in enumerate(targets):
            if p.pair(b, a) and incoming.values is not None:
                gradient += p.pair(b, a) * incoming.values[:, None] * (masses - target)
        if incoming.column_sums is not None:
            mean = (masses * incoming.column_sums).sum(1, keepdim=True)
            gradient += masses * (incoming.column_sums - mean)
        if incoming.entropies is not None:
            surprise = own.distances * scale - own.sum.log()[:, None] + own.entropies(scale)[:, None]
            gradient -= incoming.entropies[:, None] * masses * torch.where(masses == 0, 0, surprise)
        output.copy_(gradient * scale)
