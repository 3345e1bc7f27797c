"""Adaptive soft contrastive learning: a queue's rows are positives as far as the key finds them similar."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..checks import check_count, check_flag, check_option, check_rows, plain_number
from ..distributed import Property, World, check_group, dtype_name, tell_others
from ..memory import MemoryQueue
from ..neighbors import topk_similarity
from ..ops.backends.rows import accumulation_dtype, unit
from ..statistics import contrastive_stats
from .gathered import has_gradient
from .modules import GroupModule, reduced
from .options import REDUCTIONS
from .prototype_cross_entropy import prototype_cross_entropy
from .sampled import sampled_similarity


def ascl_loss(
    query: Tensor,
    key: Tensor,
    queue: Tensor | MemoryQueue,
    *,
    temperature: float = 0.1,
    teacher_temperature: float = 0.05,
    neighbors: int = 1,
    reduction: str = "mean",
    gather: bool = False,
    group: Any = None,
) -> Tensor:
    """The stateless form of :class:`ASCLLoss`, which describes formula, shapes and errors."""
    check_flag("gather", gather)
    try:
        temperature = plain_number("temperature", temperature)
        teacher_temperature = plain_number("teacher_temperature", teacher_temperature)
        neighbors = check_count("neighbors", neighbors)
        check_option("reduction", reduction, REDUCTIONS)
        check_rows("query", query)
        check_rows("key", key, like=query)
        if key.shape != query.shape:
            raise ValueError(f"key: expected shape {list(query.shape)}, as query, got {list(key.shape)}")
        if not isinstance(queue, (Tensor, MemoryQueue)):
            raise TypeError(f"queue: expected a tensor or a MemoryQueue, got {type(queue).__name__}")
        rows = queue.embeddings if isinstance(queue, MemoryQueue) else queue.detach()
        check_rows("queue", rows, like=query)
    except Exception as error:
        tell_others(gather, error, query, group=group)
        raise
    world, n = World.of(gather, group), len(query)
    if world is not None:
        alike: dict[str, Property] = {"dimension": query.shape[1], "dtype": dtype_name(accumulation_dtype(query, rows))}
        alike |= {"temperature": temperature, "teacher_temperature": teacher_temperature, "neighbors": neighbors}
        alike |= {"reduction": reduction, "queue's rows": len(rows), "query with a gradient": has_gradient(query)}
        n = sum(world.agree("ASCLLoss", {"rows": n}, alike, query.device)[0])
    terms = _terms(query, key.detach(), rows, temperature, teacher_temperature, neighbors)
    if world is None or reduction == "none":
        return reduced(terms, reduction, query)
    return reduced(terms, "sum", query) * world.size / (max(n, 1) if reduction == "mean" else 1)


def _terms(
    query: Tensor, key: Tensor, rows: Tensor, temperature: float, teacher_temperature: float, neighbors: int
) -> Tensor:
    """The loss [N] of each query."""
    x, y = unit(query), unit(key)
    own = (x * y).sum(1) / temperature
    if len(rows) == 0:
        return own * 0
    lse = contrastive_stats(x, rows, logit_scale=1 / temperature, want=("lse_all",)).lse_all
    assert lse is not None
    # Of the labels min(1, c p) the part c p is a cross-entropy with p; what is above 1 are few of the largest.
    expected = lse - _cross_entropy(x, y, rows, temperature, teacher_temperature)
    factor, excess, nearest = _labels(y, rows, teacher_temperature, neighbors)
    above = (excess * sampled_similarity(x, rows, nearest)).sum(1) / temperature
    mass = 1 + factor - excess.sum(1)
    return torch.logaddexp(lse, own) - (own + factor * expected - above) / mass


def _cross_entropy(x: Tensor, y: Tensor, rows: Tensor, temperature: float, teacher_temperature: float) -> Tensor:
    """Of the softmax over the rows of each query with that of its key, [N]."""
    return prototype_cross_entropy(
        (x, rows), (y, rows),
        student_temperature=temperature, teacher_temperature=teacher_temperature, reduction="none",
    )  # fmt: skip


def _labels(y: Tensor, rows: Tensor, temperature: float, neighbors: int) -> tuple[Tensor, Tensor, Tensor]:
    """c K [N], and by how much c K p is above 1 at the K nearest rows [N, K], with these rows.

    Not more than c K of the p, which sum to 1, are above 1 / (c K).
    """
    with torch.no_grad():
        entropy = _cross_entropy(y, y, rows, temperature, temperature)
        # The entropy of a single row is 0, and so is the logarithm of 1. Rounding may take it above its bound.
        confidence = (1 - entropy / max(math.log(len(rows)), 1e-30)).clamp(min=0)
        lse = contrastive_stats(y, rows, logit_scale=1 / temperature, want=("lse_all",)).lse_all
        assert lse is not None
        values, nearest = topk_similarity(y, rows, min(neighbors, len(rows)))
        factor = neighbors * confidence
        shares = (values / temperature - lse[:, None]).exp()
        return factor, (factor[:, None] * shares - 1).clamp(min=0), nearest


class ASCLLoss(GroupModule):
    r"""Adaptive soft contrastive learning (Feng and Patras 2022): MoCo's loss with soft labels for the queue's rows.

    With the queue's rows :math:`u_j`, j = 1 to M, a query x, its key y and the temperatures T and T',

    .. math:: p = \operatorname{softmax}_j \langle \hat y, u_j \rangle / T', \qquad
              c = 1 - \frac{H(p)}{\log M}, \qquad w_j = \min(1, c K p_j)

    .. math:: l = \log\Big( e^{s_0} + \sum_j e^{s_j} \Big) - \frac{s_0 + \sum_j w_j s_j}{1 + \sum_j w_j}, \qquad
              s_0 = \langle \hat x, \hat y \rangle / T, \quad s_j = \langle \hat x, u_j \rangle / T

    The labels have no gradient. No N x M matrix is stored: the labels but for what is cut off at 1 are a softmax, as
    :func:`prototype_cross_entropy` has it, and only the K nearest rows may reach 1.

    Args:
        temperature: T > 0.
        teacher_temperature: T' > 0.
        neighbors: K >= 1, the largest sum of the labels of a query.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        gather: the mean over the queries of all processes of a group; no effect without a group. Each process returns W
            times its share. Each process has its own queue. Queues that are filled with gathered rows are equal
            (:func:`fastcl.distributed.gather_rows`): the neighbours are then among all processes' rows.
        group: the process group of ``gather``; None: the default group.

    Shapes of ``forward(query, key, queue)``:

    - query, key: ``[N, D]``; float64, float32, bfloat16 or float16, normalised. The key gets no gradient.
    - queue: :class:`MemoryQueue`, or ``[M, D]`` unit rows, without gradient. With an empty queue the loss is 0.

    Returns:
        A scalar, or ``[N]`` with ``reduction="none"``. float32, or float64 for float64 queries.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: on a second derivative.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        teacher_temperature: float = 0.05,
        neighbors: int = 1,
        reduction: str = "mean",
        gather: bool = False,
        group: Any = None,
    ) -> None:
        super().__init__()
        self.temperature = plain_number("temperature", temperature)
        self.teacher_temperature = plain_number("teacher_temperature", teacher_temperature)
        self.neighbors = check_count("neighbors", neighbors)
        check_option("reduction", reduction, REDUCTIONS)
        check_flag("gather", gather)
        check_group(group, gather)
        self.reduction, self.gather, self.group = reduction, gather, group

    def forward(self, query: Tensor, key: Tensor, queue: Tensor | MemoryQueue) -> Tensor:
        """The loss. The class describes shapes and errors."""
        return ascl_loss(
            query, key, queue, temperature=self.temperature, teacher_temperature=self.teacher_temperature,
            neighbors=self.neighbors, reduction=self.reduction, gather=self.gather, group=self.group,
        )  # fmt: skip

    def extra_repr(self) -> str:
        temperatures = f"temperature={self.temperature:g}, teacher_temperature={self.teacher_temperature:g}"
        gather = ", gather=True" if self.gather else ""
        return f"{temperatures}, neighbors={self.neighbors}, reduction={self.reduction!r}{gather}"
