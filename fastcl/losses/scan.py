"""SCAN: neighbours get the same cluster, and all clusters are used."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_flag, check_rows, finite_number
from ..distributed import Property, World, check_group, dtype_name, tell_others
from ..ops.backends.rows import accumulation_dtype
from .gathered import has_gradient
from .modules import GroupModule, loss_dtype


def scan_loss(
    anchors: Tensor, neighbors: Tensor, *, entropy_weight: float = 2.0, gather: bool = False, group: Any = None
) -> Tensor:
    """The stateless form of :class:`SCANLoss`, which describes formula, shapes and errors."""
    check_flag("gather", gather)
    try:
        entropy_weight = finite_number("entropy_weight", entropy_weight)
        check_rows("anchors", anchors)
        check_rows("neighbors", neighbors, like=anchors)
        if neighbors.shape != anchors.shape:
            raise ValueError(
                f"neighbors: expected shape {list(anchors.shape)}, as anchors, got {list(neighbors.shape)}"
            )
    except Exception as error:
        tell_others(gather, error, anchors, neighbors, group=group)
        raise
    wide = accumulation_dtype(anchors, neighbors)
    n, world = len(anchors), World.of(gather, group)
    if world is not None:
        alike: dict[str, Property] = {"clusters": anchors.shape[1], "dtype": dtype_name(wide)}
        alike |= {"entropy_weight": entropy_weight, "anchors with a gradient": has_gradient(anchors)}
        alike |= {"neighbors with a gradient": has_gradient(neighbors)}
        n = sum(world.agree("SCANLoss", {"rows": n}, alike, anchors.device)[0])
    of_anchors, of_neighbors = (scores.to(wide).log_softmax(1) for scores in (anchors, neighbors))
    sums = torch.cat([of_anchors.exp().sum(0), -(of_anchors + of_neighbors).logsumexp(1).sum()[None]])
    means = (sums if world is None else world.total(sums)) / max(n, 1)
    shares = means[:-1]
    # x log x has an infinite derivative at 0, which a share is if it underflows.
    negative_entropy = (shares * shares.clamp(min=torch.finfo(wide).tiny).log()).sum()
    return (means[-1] + entropy_weight * negative_entropy).to(loss_dtype(anchors))


class SCANLoss(GroupModule):
    r"""SCAN's clustering step (Van Gansbeke et al. 2020): neighbours get the same cluster, and all clusters are used.

    With p and q the softmax over C clusters of an anchor and of one of its neighbours, and :math:`\bar p` the mean of
    the anchors' p,

    .. math:: -\frac1N \sum_i \log \langle p_i, q_i \rangle + \lambda \sum_c \bar p_c \log \bar p_c

    ``SCANLoss()(anchors, neighbors)`` is the first of the authors' three values. The neighbours are rows that
    :func:`topk_similarity` finds among the features of a pretext task. The products are computed in the log domain.

    Args:
        entropy_weight: :math:`\lambda`, any finite number; the authors' code has 2 by default and 5 in its experiments.
        gather: the mean of p over the rows of all processes of a group; no effect without a group. Each process returns
            the loss of the whole batch, whose gradient DDP averages to that of one process with all rows.

    Shapes of ``forward(anchors, neighbors)``: scores before the softmax, ``[N, C]`` both; float64, float32, bfloat16 or
    float16. No rows have loss 0.

    Returns:
        A scalar, float32, or float64 for float64 scores.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    def __init__(self, entropy_weight: float = 2.0, *, gather: bool = False, group: Any = None) -> None:
        super().__init__()
        self.entropy_weight = finite_number("entropy_weight", entropy_weight)
        check_flag("gather", gather)
        check_group(group, gather)
        self.gather, self.group = gather, group

    def forward(self, anchors: Tensor, neighbors: Tensor) -> Tensor:
        """The loss. The class describes shapes and errors."""
        return scan_loss(anchors, neighbors, entropy_weight=self.entropy_weight, gather=self.gather, group=self.group)

    def extra_repr(self) -> str:
        gather = ", gather=True" if self.gather else ""
        return f"entropy_weight={self.entropy_weight:g}{gather}"
