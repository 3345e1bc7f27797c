"""The records that the backends of the prototype losses receive and return."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Crops:
    """Cross-entropies of the students' crops with the teachers' crops, of the same N samples and K prototypes.

    With p_b = softmax(S_b * student scale) for each student b, and q_a = softmax((T_a + potential_a) * teacher scale)
    for each teacher a, a sample's value is ``sum over the pairs of pairs[b][a] * - sum_k q_a log p_b``.
    """

    students: list[Tensor]  # [N, K] each, of any dtype and strides
    teachers: list[Tensor]  # likewise
    potentials: Tensor | None  # [teachers, P, K] in `dtype`: row i has those of position i % P
    scales: Tensor  # [2] float64: the inverse temperatures of students and teachers
    pairs: tuple[float, ...]  # [students * teachers], student by student; 0 leaves a pair out
    places: Tensor | None = None  # [N] int64: the teachers' row, and so the position, of each row; None: the same
    first: int = 0  # the number of the first row, if these are some rows of a larger problem

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of sums: float64 if a crop is float64, else float32."""
        return torch.float64 if torch.float64 in {x.dtype for x in self.all} else torch.float32

    @property
    def all(self) -> list[Tensor]:
        return [*self.students, *self.teachers]

    @property
    def device(self) -> torch.device:
        return self.students[0].device

    @property
    def sizes(self) -> tuple[int, int]:
        """(N, K)"""
        n, k = self.students[0].shape
        return n, k

    def pair(self, b: int, a: int) -> float:
        return self.pairs[b * len(self.teachers) + a]

    def block(self, rows: slice) -> Crops:
        """Some of the rows. With places, a copy of the teachers' rows."""
        students = [x[rows] for x in self.students]
        if self.places is None:
            return replace(
                self, students=students, teachers=[x[rows] for x in self.teachers], first=self.first + rows.start
            )
        places = self.places[rows]
        potentials = self.potentials
        if potentials is not None and potentials.shape[1] > 1:
            potentials = potentials[:, places % potentials.shape[1]]
        teachers = [x[places] for x in self.teachers]
        return replace(self, students=students, teachers=teachers, potentials=potentials, places=None)

    def new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def potential_rows(self, a: int) -> Tensor | None:
        """The potential of a teacher for each row, [N, K] or [1, K]."""
        if self.potentials is None:
            return None
        positions = self.potentials.shape[1]
        if positions == 1:
            return self.potentials[a]
        rows = torch.arange(self.first, self.first + self.sizes[0], device=self.device)
        return self.potentials[a][rows % positions]


class Wanted(NamedTuple):
    """What a forward computes besides the values."""

    entropies: bool = False
    column_sums: bool = False


class Values(NamedTuple):
    """What a forward returns. Unwanted fields are empty."""

    values: Tensor  # [N]: sum over the pairs
    entropies: Tensor  # [N]: of p_b, summed over the students
    column_sums: Tensor  # [K]: p_b summed over students and rows
    kept: Tensor  # [students + teachers, 2, N]: largest score, and the sum of exponentials with it as the shift


class Incoming(NamedTuple):
    """The gradients of `Values`; None: 0."""

    values: Tensor | None
    entropies: Tensor | None
    column_sums: Tensor | None


# Problems as arguments of an operator.

SCHEMA = "Tensor[] students, Tensor[] teachers, Tensor? potentials, Tensor scales, float[] pairs, Tensor? places"


def flatten(p: Crops) -> tuple[Any, ...]:
    """The problem as the arguments of `SCHEMA`."""
    return p.students, p.teachers, p.potentials, p.scales, list(p.pairs), p.places


def unflatten(arguments: Sequence[Any]) -> Crops:
    """The inverse of `flatten`."""
    students, teachers, potentials, scales, pairs, places = arguments
    return Crops(list(students), list(teachers), potentials, scales, tuple(pairs), places)
