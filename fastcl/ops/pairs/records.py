"""The records that the backends of the pair sums receive and return."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.rows import accumulation_dtype
from ..contrastive.records import Rows
from ..pair_maps import KINDS


@dataclass(eq=False)
class Pairs:
    """One sweep over the logits ``s_ij = logit_scale * a_i * c_j * <x_i, y_j> + offset_i + bias_j``, or over the
    distances ``d_ij = |a_i x_i - c_j y_j|``, with one map for the positives of an anchor and one for its negatives.

    The anchors' `bias` is unused.
    """

    anchors: Rows  # N
    contrasts: Rows | None  # M; None: self-contrast, the anchors are the contrasts, without the diagonal
    logit_scale: Tensor  # []; 1 for distances
    offset: Tensor | None  # [], added to all logits, or of two sets [N], to those of each anchor; None for distances
    kind: str  # of `pair_maps.KINDS`
    pos_margin: float = 0.0
    neg_margin: float = 0.0
    only_positives: bool = False  # leaves out the negatives: their sums and counts are 0

    @property
    def others(self) -> Rows:
        """The rows that are contrasts; in self-contrast the anchors."""
        return self.anchors if self.contrasts is None else self.contrasts

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of logits and sums: float64 if a set of rows is float64, else float32."""
        return accumulation_dtype(self.anchors.values, None if self.contrasts is None else self.contrasts.values)

    @property
    def device(self) -> torch.device:
        return self.anchors.values.device

    @property
    def sizes(self) -> tuple[int, int]:
        """(N, M)"""
        return self.anchors.values.shape[0], self.others.values.shape[0]

    @property
    def of_distance(self) -> bool:
        return KINDS[self.kind].of_distance

    @property
    def bias(self) -> Tensor | None:
        """The contrasts' bias, -inf for contrasts that take no part; None in self-contrast."""
        return None if self.contrasts is None else self.contrasts.bias

    @property
    def margins(self) -> tuple[float, float]:
        return self.pos_margin, self.neg_margin


def two_sets(anchors: Rows, contrasts: Rows | None, needed: bool, first: int = 0) -> tuple[Rows, Rows | None]:
    """Anchors and contrasts. In self-contrast, if `needed`, the anchors are both sets, and their places are ids.

    A bias or an offset of rows breaks the symmetry of self-contrast. first: the place of the first anchor.
    """
    if contrasts is not None or not needed:
        return anchors, contrasts
    values, clusters, _, bias, *_, normalize = anchors
    own = torch.arange(first, first + values.shape[0], device=values.device)
    return Rows(values, clusters, own, normalize=normalize), Rows(values, clusters, own, bias, normalize=normalize)


class Sums(NamedTuple):
    """Sums of each anchor over its positives [0] and over its negatives [1]. All are [2, N], in `Pairs.dtype`."""

    values: Tensor  # of the maps
    active: Tensor  # number of pairs whose hinge is not 0; of softplus all
    counts: Tensor  # number of pairs


class Gradients(NamedTuple):
    """Gradients of ``sum(weights * values)`` for given weights [2, N]; unneeded ones are None.

    They are in `Pairs.dtype`; those of rows include the derivative of the normalisation.
    """

    anchors: Tensor | None = None  # [N, D]
    contrasts: Tensor | None = None  # [M, D]
    logit_scale: Tensor | None = None  # [], in `Pairs.dtype` or float64
    offset: Tensor | None = None  # [] or [N], likewise
    bias: Tensor | None = None  # [M]


class Needs(NamedTuple):
    """Which of `Gradients` are needed."""

    anchors: bool = False
    contrasts: bool = False
    logit_scale: bool = False
    offset: bool = False
    bias: bool = False


# Problems as arguments of an operator.

SCHEMA = (
    "Tensor anchors, Tensor? contrasts, Tensor logit_scale, Tensor? offset, Tensor? bias, Tensor? anchor_clusters, "
    "Tensor? contrast_clusters, Tensor? anchor_ids, Tensor? contrast_ids, bool normalize_anchors, "
    "bool normalize_contrasts, str kind, float pos_margin, float neg_margin, bool only_positives, str backend"
)
TENSORS = 9
LENGTH = 16
SOURCES = len(Gradients._fields)  # the first arguments are those that have gradients, in the order of `Gradients`


def flatten(p: Pairs, backend: str) -> tuple[Any, ...]:
    """The problem as the arguments of `SCHEMA`."""
    anchors, contrasts = p.anchors, p.contrasts
    own = None, None, None
    if contrasts is not None:
        own = contrasts.values, contrasts.clusters, contrasts.ids  # type: ignore[assignment]
    values, clusters, ids = own
    return (
        anchors.values, values, p.logit_scale, p.offset, p.bias, anchors.clusters, clusters, anchors.ids, ids,
        anchors.normalize, contrasts is not None and contrasts.normalize,
        p.kind, p.pos_margin, p.neg_margin, p.only_positives, backend,
    )  # fmt: skip


def unflatten(arguments: Sequence[Any]) -> Pairs:
    """The inverse of `flatten`, without the backend."""
    values, others, scale, offset, bias, clusters, other_clusters, ids, other_ids, normalize, other, *rest, _ = (
        arguments
    )
    anchors = Rows(values, clusters, ids, normalize=normalize)
    contrasts = None if others is None else Rows(others, other_clusters, other_ids, bias, normalize=other)
    return Pairs(anchors, contrasts, scale, offset, *rest)
