"""What every backend receives and returns: plain records of tensors, and the arithmetic of row norms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.rows import accumulation_dtype

FIELDS = ("lse_all", "lse_pos", "lse_neg", "sum_pos")


@dataclass(frozen=True)
class Problem:
    """One sweep over the logits ``s_ij = logit_scale * a_i * c_j * <x_i, y_j> + bias_j``, S scales at once.

    Cluster and sample ids are int64; -1 equals nothing, not even itself.
    """

    anchors: Tensor  # [N, D]
    contrasts: Tensor | None  # [M, D]; None: the anchors themselves, without the diagonal
    paired: Tensor | None  # [N, D]: one more positive of each anchor, nobody else's contrast; no backend's business
    anchor_clusters: Tensor | None  # [N]; None: there are no positives
    contrast_clusters: Tensor | None  # [M]; None for self-contrast
    logit_scale: Tensor  # [S], of `dtype`
    contrast_bias: Tensor | None  # [M], of `dtype`; -inf leaves a contrast out of every set (`left_out`)
    anchor_ids: Tensor | None  # [N]; equal ids make a pair inadmissible
    contrast_ids: Tensor | None  # [M]
    normalize_anchors: bool
    normalize_contrasts: bool
    want: Sequence[str]  # of FIELDS, in that order
    both: bool  # also the statistics of each contrast over the anchors
    # The backward will ask for the anchors' gradient only: the forward may leave what makes a second sweep unnecessary.
    anchors_only: bool = False
    observe: bool = False  # also what `observed` describes, of each side
    partial: bool = False  # others will be added to the gradients of rows: they stay in `dtype`
    # In place of clusters: pair i, j is a positive of weight <r_i, r_j>. Then `want` is lse_all and sum_pos.
    anchor_assignments: Tensor | None = None  # [N, C], >= 0
    contrast_assignments: Tensor | None = None  # [M, C]; None for self-contrast

    @property
    def dtype(self) -> torch.dtype:
        """Of logits, sums and statistics: float64 where a set of rows is float64, else float32."""
        return accumulation_dtype(self.anchors, self.contrasts, self.paired)

    @property
    def device(self) -> torch.device:
        return self.anchors.device

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(S, N, M)"""
        contrasts = self.anchors if self.contrasts is None else self.contrasts
        return self.logit_scale.shape[0], self.anchors.shape[0], contrasts.shape[0]

    @property
    def left_out(self) -> Tensor | None:
        """Bool [M]: the contrasts that a bias of -inf leaves out of every set; None: there is none."""
        if self.contrast_bias is None:
            return None
        left_out = self.contrast_bias == -torch.inf
        return left_out if self.device.type != "cpu" or bool(left_out.any()) else None  # waits for no device

    @property
    def log_sums(self) -> tuple[str, ...]:
        """The wanted fields that are log-sum-exps."""
        return tuple(field for field in self.want if field != "sum_pos")


class Side(NamedTuple):
    """Statistics of one side: each anchor over the contrasts, or each contrast over the anchors."""

    fields: Tensor  # [W, S, N]: the wanted fields
    counts: Tensor  # [2, N]: positives, negatives; with assignments, the sum of weights, and all admissible pairs
    # [2, L, S, N]: for each wanted log-sum-exp a shift and the sum of exp(s_ij - shift). The backward needs them
    # apart: their log-sum rounds at the size of the logits, the quotient exp(s_ij - shift) / sum does not.
    parts: Tensor
    observed: Tensor | None = None  # [10, S, N]: see `observed`; None: not asked for


def new_side(p: Problem, size: int) -> Side:
    """A side of `size` rows to be filled in."""
    s, new = p.sizes[0], p.logit_scale.new_empty
    return Side(new(len(p.want), s, size), new(2, size), new(2, len(p.log_sums), s, size))


def empty_side(p: Problem) -> Side:
    """The side that is not wanted."""
    return new_side(p, 0)


class Statistics(NamedTuple):
    anchors: Side
    contrasts: Side  # of size 0 unless Problem.both
    anchor_inverse_norms: Tensor  # [N], or [0] where the rows are taken as they are
    contrast_inverse_norms: Tensor  # [M], or [0]
    saved: Tensor  # [R]: what else the backend wants to find again in the backward; R is its `saved_size`


class Gradients(NamedTuple):
    """None where not needed. Rows are still in the accumulation dtype and already projected."""

    anchors: Tensor | None  # [N, D]
    contrasts: Tensor | None  # [M, D]
    logit_scale: Tensor | None  # [S]; or float64
    contrast_bias: Tensor | None  # [M]
    paired: Tensor | None = None  # [N, D]


class Needs(NamedTuple):
    """Which gradients are needed."""

    anchors: bool
    contrasts: bool
    logit_scale: bool
    contrast_bias: bool
    paired: bool


def pair_weights(left: Tensor, right: Tensor) -> Tensor:
    """<r_i, r_j> [N, M] of assignments; what overflows is the largest number, so that 0 times it is 0."""
    weights = left @ right.T
    return weights.clamp_(max=torch.finfo(weights.dtype).max)


def largest_bias(bias: Tensor) -> Tensor:
    """The largest |bias| of a contrast that is not left out, [1]."""
    return bias.masked_fill(bias == -torch.inf, 0).abs().amax().reshape(1)


def largest_base(bases: Tensor, there: Tensor) -> Tensor:
    """Of the bases [B, S, N] of sums in B blocks that of their sum, [S, N]; 0 where no block has anything to sum.

    there: bool [B, N], where a block has.
    """
    largest = bases.masked_fill(~there[:, None], -torch.inf).amax(0)
    return largest.masked_fill(largest == -torch.inf, 0)


def merge_bases(found: Tensor, counts: Tensor, sums: Tensor | None) -> Tensor:
    """Bases of sums over all, negatives and positives, [B, 3, S, N] of B blocks, as one, [3, S, N].

    counts: the blocks' [B, 2, N]. sums: not looked at.
    """
    positives, negatives = (counts > 0).unbind(1)
    there = (positives | negatives, negatives, positives)
    return torch.stack([largest_base(found[:, k], those) for k, those in enumerate(there)])


def over_sets(p: Problem, grad: Tensor, counts: Tensor) -> Tensor:
    """Gradients [W, S, N] of fields whose set is empty do not count: the fields are constants there.

    A user's formula may well divide by a count of zero in a row that it masks out, and send NaN back.
    """
    positives, negatives = counts
    admissible = positives + negatives if p.anchor_assignments is None else negatives
    sizes = {"lse_all": admissible, "lse_pos": positives, "lse_neg": negatives, "sum_pos": positives}
    if grad.numel() == 0:
        return grad
    present = torch.stack([sizes[field] > 0 for field in p.want])
    return torch.where(present[:, None], grad, 0)
