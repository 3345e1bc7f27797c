"""Prototypical NCE: each embedding against the prototypes of a clustering, which have a concentration each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..checks import (
    LARGEST,
    SMALLEST,
    check_count,
    check_ids,
    check_indices,
    check_option,
    check_rows,
    check_vector,
    extremes,
    values_visible,
)
from ..ops.backends.rows import accumulation_dtype, unit
from ..statistics import contrastive_stats
from .modules import loss_dtype
from .options import REDUCTIONS


def proto_nce_loss(
    embeddings: Tensor,
    clusters: Tensor,
    prototypes: Tensor,
    concentrations: Tensor,
    *,
    num_negatives: int | None = None,
    negatives: Tensor | None = None,
    generator: torch.Generator | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The stateless form of :class:`ProtoNCELoss`, which describes formula, shapes and errors."""
    if num_negatives is not None:
        num_negatives = check_count("num_negatives", num_negatives, least=0)
    check_option("reduction", reduction, REDUCTIONS)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
    check_rows("embeddings", embeddings)
    check_rows("prototypes", prototypes, like=embeddings)
    n, k, device = embeddings.shape[0], prototypes.shape[0], embeddings.device
    check_ids("clusters", clusters, n, device)
    if n and values_visible(clusters) and (most := extremes(clusters)[1]) >= k:
        raise ValueError(f"clusters: expected numbers below {k}, or negative ones for no cluster, got {most}")
    _check_concentrations(concentrations, k, device)
    clusters = clusters.to(torch.int64)
    rows = unit(prototypes) / concentrations.to(accumulation_dtype(prototypes, concentrations))[:, None]
    bias, classes = None, torch.arange(k, device=device)
    if negatives is not None:
        check_indices("negatives", negatives, k, device)
        if negatives.dim() != 1:
            raise ValueError(f"negatives: expected shape [r], got {list(negatives.shape)}")
    if k and (negatives is not None or num_negatives is not None):
        classes, takes_part = _selected(clusters, k, num_negatives, negatives, generator)
        rows, bias = rows[classes], rows.new_zeros(classes.shape[0]).masked_fill(~takes_part, -torch.inf)
    stats = contrastive_stats(
        embeddings, rows, clusters, classes, contrast_bias=bias, normalize_anchors=True, want=("lse_neg", "sum_pos")
    )
    assert stats.lse_neg is not None
    assert stats.sum_pos is not None
    counted = stats.num_pos > 0
    log_ratio = (stats.lse_neg - stats.sum_pos).masked_fill(~counted, 0)
    terms = torch.logaddexp(log_ratio, torch.zeros_like(log_ratio)).masked_fill(~counted, 0).to(loss_dtype(embeddings))
    if reduction == "none":
        return terms
    return terms.sum() if reduction == "sum" else terms.sum() / counted.count_nonzero().clamp(min=1)


class ProtoNCELoss(nn.Module):
    r"""Prototypical NCE (Li et al. 2021): cross-entropy over prototypes, each with a concentration as its temperature.

    With prototypes :math:`c_k` of concentrations :math:`\phi_k`, and cluster k(i) of embedding i,

    .. math:: l_i = -\log \frac{e^{\langle \hat x_i, \hat c_{k(i)} \rangle / \phi_{k(i)}}}
              {\sum_k e^{\langle \hat x_i, \hat c_k \rangle / \phi_k}}

    The paper's loss is the sum of an instance loss (:class:`MoCoLoss`) and the mean of this one over several
    clusterings, one call for each.

    Args:
        num_negatives: None: the sum runs over all prototypes. r: over the prototypes of the batch's clusters, each
            once, and r of the others, drawn anew in each call without replacement (all others, if there are fewer).
        reduction: ``"mean"``, ``"sum"`` or ``"none"``, over the embeddings that have a cluster.

    Shapes of ``forward(embeddings, clusters, prototypes, concentrations, *, negatives=None, generator=None)``:

    - embeddings: ``[N, D]``; float64, float32, bfloat16 or float16.
    - clusters: ``[N]`` integers below K. A negative number means no cluster: the embedding does not count.
    - prototypes: ``[K, D]``. Gradients flow into them and into the concentrations where required.
    - concentrations: ``[K]`` floating, > 0.
    - negatives: ``[r]`` indices of prototypes, used instead of random ones.
    - generator: random generator of the draw, on the prototypes' device.

    Returns:
        A scalar, or ``[N]`` with ``reduction="none"``: 0 where an embedding does not count. float32, or float64 for
        float64 embeddings.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: on a second derivative.
    """

    def __init__(self, num_negatives: int | None = None, *, reduction: str = "mean") -> None:
        super().__init__()
        self.num_negatives = None if num_negatives is None else check_count("num_negatives", num_negatives, least=0)
        check_option("reduction", reduction, REDUCTIONS)
        self.reduction = reduction

    def forward(
        self,
        embeddings: Tensor,
        clusters: Tensor,
        prototypes: Tensor,
        concentrations: Tensor,
        *,
        negatives: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The loss. The class describes shapes and errors."""
        return proto_nce_loss(
            embeddings, clusters, prototypes, concentrations,
            num_negatives=self.num_negatives, negatives=negatives, generator=generator, reduction=self.reduction,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"num_negatives={self.num_negatives}, reduction={self.reduction!r}"


def _selected(
    clusters: Tensor, k: int, num_negatives: int | None, negatives: Tensor | None, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Prototypes without repetition, of a number that follows from shapes alone, and which of them take part."""
    count = num_negatives if negatives is None else negatives.shape[0]
    assert count is not None
    there = clusters.new_zeros(k + 1, dtype=torch.bool).index_fill_(0, clusters.clamp(min=-1) % (k + 1), True)[:k]
    if negatives is None:
        if generator is None:  # torch.compile takes no generator, not even None
            order = torch.rand(k, device=clusters.device)
        else:
            order = torch.rand(k, device=clusters.device, generator=generator)
        limit = there.count_nonzero() + count
    else:
        order = clusters.new_zeros(k, dtype=torch.float32).index_fill_(0, negatives.to(torch.int64), 1)
        limit = (there | (order > 0)).count_nonzero()
    order = torch.where(there, 2, order).argsort(descending=True, stable=True)[: min(k, clusters.shape[0] + count)]
    return order, torch.arange(order.shape[0], device=order.device) < limit


def _check_concentrations(value: Tensor, k: int, device: torch.device) -> None:
    check_vector("concentrations", value, k, device)
    if k and values_visible(value):
        least, most = (float(number) for number in value.detach().double().aminmax())
        if not (least >= SMALLEST and most <= LARGEST):
            got = least if not least >= SMALLEST else most
            raise ValueError(f"concentrations: expected positive numbers in the range of float32, got {got}")
