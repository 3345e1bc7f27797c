"""The interface of a backend of the contrastive statistics: a module with these functions."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from .records import Gradients, Needs, Problem, Statistics


class Backend(Protocol):
    """A module that computes statistics and gradients of `Problem`s, in `Problem.dtype`.

    `ops.backends.choose` decides which backend takes a call.
    """

    def saved_size(self, p: Problem) -> int:
        """The length of `Statistics.saved`, which `forward` leaves for `backward`."""

    def forward(self, p: Problem) -> Statistics:
        """The wanted statistics of the anchors and, with ``both``, of the contrasts."""

    def backward(self, p: Problem, saved: Statistics, grad: Tensor, grad_contrasts: Tensor, needs: Needs) -> Gradients:
        """The needed gradients.

        saved: what `forward` returned. With blocks of contrasts (`blocks`), counts and parts are the merged ones.
        grad, grad_contrasts: gradients of the anchors' fields [W, S, N] and, with ``both``, of the contrasts' fields
            [W, S, M].
        """

    def plane_count(self, p: Problem) -> int:
        """P, the number of planes: numbers of each row and scale in `saved` that depend on the block of contrasts."""

    def planes(self, p: Problem, saved: Tensor) -> tuple[Tensor, Tensor]:
        """The planes as views of `saved`: [P, S, N] and, with ``both``, [P, S, M]."""

    def merge_planes(self, found: Tensor, counts: Tensor, sums: Tensor | None) -> Tensor:
        """Merges the planes [B, P, S, N] of B blocks into [P, S, N].

        counts: [B, 2, N], of the blocks. sums: [B, S, N], each block's sum of exponentials over all contrasts, with one
        shift for all blocks; None without lse_all.
        """


# For backends that keep nothing between forward and backward.


def saved_size(p: Problem) -> int:
    return 0


def plane_count(p: Problem) -> int:
    return 0


def planes(p: Problem, saved: Tensor) -> tuple[Tensor, Tensor]:
    s, n, m = p.sizes
    return saved.new_empty(0, s, n), saved.new_empty(0, s, m if p.both else 0)


def merge_planes(found: Tensor, counts: Tensor, sums: Tensor | None) -> Tensor:
    return found[0]
