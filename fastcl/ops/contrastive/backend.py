"""What a backend of the contrastive statistics is: a module with these functions."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from .records import Gradients, Needs, Problem, Statistics


class Backend(Protocol):
    """A module that computes `Problem`s. Statistics and gradients are in `Problem.dtype`.

    Which backend takes a call, and why another one cannot, is decided in `ops.backends.choose`.
    """

    def saved_size(self, p: Problem) -> int:
        """How many numbers `forward` leaves in `Statistics.saved` for `backward`."""

    def forward(self, p: Problem) -> Statistics:
        """The wanted statistics of the anchors and, with ``both``, of the contrasts."""

    def backward(self, p: Problem, saved: Statistics, grad: Tensor, grad_contrasts: Tensor, needs: Needs) -> Gradients:
        """Gradients from those of the anchors' fields [W, S, N] and, with ``both``, of the contrasts' [W, S, M].

        saved: what `forward` returned; blocks of contrasts (`blocks`) replace its counts and parts by merged ones.
        """

    def plane_count(self, p: Problem) -> int:
        """P, how many numbers of each row in `saved` hold for one block of contrasts only, until blocks are merged."""

    def planes(self, p: Problem, saved: Tensor) -> tuple[Tensor, Tensor]:
        """These numbers as views of `saved`: [P, S, N] and, with ``both``, [P, S, M]."""

    def merge_planes(self, found: Tensor, counts: Tensor, sums: Tensor | None) -> Tensor:
        """Planes [B, P, S, N] of B blocks -> [P, S, N].

        counts: the blocks' [B, 2, N]. sums: over all contrasts, around one base, [B, S, N]; None without lse_all.
        """


# Of backends that keep nothing between forward and backward.


def saved_size(p: Problem) -> int:
    return 0


def plane_count(p: Problem) -> int:
    return 0


def planes(p: Problem, saved: Tensor) -> tuple[Tensor, Tensor]:
    s, n, m = p.sizes
    return saved.new_empty(0, s, n), saved.new_empty(0, s, m if p.both else 0)


def merge_planes(found: Tensor, counts: Tensor, sums: Tensor | None) -> Tensor:
    return found[0]
