"""Quality measures of embeddings: alignment of positive pairs and uniformity on the sphere, and the effective rank."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .checks import LARGEST, check_rows, plain_number
from .ops.backends.rows import unit
from .statistics import contrastive_stats


def alignment(x: Tensor, y: Tensor, alpha: float = 2.0) -> Tensor:
    r"""Mean distance of positive pairs (Wang and Isola 2020): :math:`\frac1N \sum_i |\hat x_i - \hat y_i|^\alpha`.

    Args:
        x, y: ``[N, D]``, N >= 1; row i of x and row i of y are a positive pair. Any floating dtype, normalised
            internally.
        alpha: > 0.

    Returns:
        A differentiable scalar; float32, float64 for float64 rows. 0 is best; random pairs have 2 at ``alpha=2``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_rows("x", x)
    check_rows("y", y, like=x)
    if x.shape != y.shape:
        raise ValueError(f"y: expected shape {list(x.shape)}, as x, got {list(y.shape)}")
    if x.shape[0] == 0:
        raise ValueError(f"x: expected at least one row, got shape {list(x.shape)}")
    alpha = plain_number("alpha", alpha)
    squared = (unit(x) - unit(y)).square().sum(1)
    if alpha == 2:
        return squared.mean()
    apart = squared != 0  # at 0 the derivative of the power may be infinite
    return torch.where(apart, torch.where(apart, squared, 1) ** (alpha / 2), 0).mean()


def uniformity(embeddings: Tensor, t: float = 2.0) -> Tensor:
    r"""Logarithm of the mean Gaussian potential of all pairs (Wang and Isola 2020), without storing the distances.

    .. math:: \log \frac{1}{N (N - 1)} \sum_{i \neq j} e^{-t |\hat x_i - \hat x_j|^2}

    Args:
        embeddings: ``[N, D]``, N >= 2; float64, float32, bfloat16 or float16, normalised internally.
        t: > 0.

    Returns:
        A scalar, differentiable once; float32, float64 for float64 rows. Lower is more uniform; 0 means that all unit
        rows are equal.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_rows("embeddings", embeddings)
    n = embeddings.shape[0]
    if n < 2:
        raise ValueError(f"embeddings: expected at least two rows, got shape {list(embeddings.shape)}")
    t = plain_number("t", t)
    if 2 * t > LARGEST:
        raise ValueError(f"t: expected at most half of float32's largest number, got {t}")
    # On the sphere |x - y|^2 = 2 - 2 <x, y>, so each row's sum is a log-sum-exp at logit_scale 2 t.
    stats = contrastive_stats(embeddings, logit_scale=2 * t, normalize_anchors=True, want=("lse_all",))
    assert stats.lse_all is not None
    total = (stats.lse_all - 2 * t).logsumexp(0)
    if isinstance(n, int):
        return total - math.log(n * (n - 1))
    count = torch.ones_like(stats.lse_all).sum()  # torch.export would make the logarithm of a dynamic size a constant
    return total - count.log() - (count - 1).log()


def rankme(embeddings: Tensor) -> Tensor:
    r"""RankMe (Garrido et al. 2023): the effective rank of embeddings, which falls when dimensions collapse.

    With the singular values :math:`\sigma_k` of the N x D embeddings, not centred and not normalised,

    .. math:: \exp\Big( -\sum_k p_k \log p_k \Big), \qquad p_k = \sigma_k / \sum_l \sigma_l

    where 0 log 0 is 0; the paper adds 1e-7 to each p instead.

    Args:
        embeddings: ``[N, D]``; float64, float32, bfloat16 or float16. The paper takes about 25,000 rows. Gather rows of
            several processes before (:func:`fastcl.distributed.gather_rows`).

    Returns:
        A scalar without gradient, from 1 (all rows on a line) to min(N, D); 0 if there is no row but zeros, NaN if a
        number is not finite. float32, float64 for float64 rows; computed in float64.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_rows("embeddings", embeddings)
    rows = embeddings.detach().double()
    broken = ~rows.isfinite().all()
    values = torch.linalg.svdvals(rows.masked_fill(broken, 0))
    total = values.sum()
    rank = torch.special.entr(values / total.clamp(min=torch.finfo(torch.float64).tiny)).sum().exp()
    rank = torch.where(total > 0, rank, 0).masked_fill(broken, torch.nan)
    return rank.to(torch.float64 if embeddings.dtype == torch.float64 else torch.float32)
