"""KoLeo and the hypersphere loss of few rows on a CPU, around calls of the engine: see `ops.at_once`.

The formulas are those of `regularisers`. `koleo` and `hypersphere` return None for a call that takes the usual way: one
that is unusual, large or wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..ops.at_once import Gradients, Units, are_few, at_once, through_norms, units_of, weight_of
from ..ops.backends.choose import chooses_cpu
from ..ops.contrastive.small_statistics import LogSums
from ..ops.small import are_floats, constant
from ..ops.topk.small import nearest_other


def koleo(embeddings: Any, p: Any, eps: Any, reduction: Any, further: Callable[..., Tensor]) -> Tensor | None:
    """further: the usual way, for second derivatives."""
    if not are_few(embeddings, pairs=True) or type(p) is not float or p != 2 or len(embeddings) < 2:
        return None
    if not (are_floats(eps, positive=True) and chooses_cpu()):
        return None
    weight, units = weight_of(reduction, len(embeddings)), units_of(embeddings)
    if weight is None or units is None:
        return None
    return at_once(partial(_koleo, [units], eps, weight), further, embeddings)


def hypersphere(z_a: Any, z_b: Any, t: Any, lam: Any, alpha: Any) -> Tensor | None:
    if not are_few(z_a, z_b, pairs=True) or type(alpha) is not float or alpha != 2:
        return None
    if len(z_a) < 2 or not (are_floats(t, positive=True) and are_floats(lam) and chooses_cpu()):
        return None
    if (units := units_of(torch.stack((z_a.detach(), z_b.detach())))) is None:
        return None
    return at_once(partial(_hypersphere, [units], t, lam), "contrastive_stats", z_a, z_b)


# first: has the unit rows that the call has made, until they are used. Another backward makes them again.


def _koleo(
    first: list[Units], eps: float, weight: float, needs: Sequence[bool], embeddings: Tensor
) -> tuple[Tensor, Gradients]:
    units = first.pop() if first else units_of(embeddings)
    assert units is not None
    unit = units.rows
    nearest = nearest_other(unit)
    apart = unit - unit.index_select(0, nearest)
    distances = torch.linalg.vector_norm(apart, dim=1)
    shifted = distances + eps
    loss = shifted.log().sum().mul_(-weight)
    if not needs[0]:
        return loss, (None,)
    slope = torch.full_like(shifted, -weight).div_(shifted).div_(distances).masked_fill_(distances == 0, 0)
    apart.mul_(slope.unsqueeze_(1))
    return loss, (through_norms(apart.index_add(0, nearest, apart, alpha=-1), units),)


def _hypersphere(
    first: list[Units], t: float, lam: float, needs: Sequence[bool], z_a: Tensor, z_b: Tensor
) -> tuple[Tensor, Gradients]:
    units = first.pop() if first else units_of(torch.stack((z_a, z_b)))  # [2, N, D]
    assert units is not None
    views = units.rows.unbind(0)
    n = len(z_a)
    scale = constant(2 * t, units.rows.dtype, (1,))
    # On the sphere |x - y|² = 2 - 2 <x, y>, so each row's sum is a log-sum-exp at logit scale 2 t.
    sums = [LogSums(view, None, None, None, scale, False, ("lse_all",)) for view in views]
    lse = torch.stack([found.fields[0, 0] for found in sums])
    uniformity = lse.sub_(2 * t).logsumexp(1)
    apart = views[0] - views[1]
    loss = apart.square().sum().div_(n).add_(uniformity.sum().sub_(2 * math.log(n * (n - 1))), alpha=lam / 2)
    if not (needs[0] or needs[1]):
        return loss, (None, None)
    weights = lse.sub_(uniformity[:, None]).exp_().mul_(lam / 2)
    found: list[Tensor | None] = []
    for k, (view, of_rows) in enumerate(zip(views, sums, strict=True)):
        if not needs[k]:
            found.append(None)
            continue
        grad = of_rows.gradients(weights[k].view(1, 1, n), (True, False))[0]
        assert grad is not None
        grad.add_(apart, alpha=(2 if k == 0 else -2) / n)
        found.append(through_norms(grad, Units(view, units.norms[k])))
    return loss, found
