"""KoLeo and the hypersphere loss of few rows on a CPU, around calls of the engine: see `ops.at_once`.

The formulas are those of `regularisers`. `koleo` and `hypersphere` return None for a call that takes the usual way: one
that is unusual, large or wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..ops.at_once import Gradients, Units, are_few, at_once, through_norms, units_of, weight_of
from ..ops.backends.choose import chooses_cpu
from ..ops.small import are_floats, constant
from ..ops.topk.small import nearest_other

LARGEST_T = 20.0  # of potentials exp(-t |x - y|²) that float32 can hold at the largest distance, 2


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
    if not (are_floats(t, positive=True) and are_floats(lam) and t <= LARGEST_T and chooses_cpu()):
        return None
    n, d = z_a.shape
    if not 2 <= n <= 2 * d:  # the potentials of a view are no more than the numbers in both views
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
    views, n, pairs = units.rows.unbind(0), len(z_a), len(z_a) * (len(z_a) - 1)
    apart = views[0] - views[1]
    loss = apart.square().sum().div_(n)
    grads: list[Tensor | None] = [None, None]
    for k, view in enumerate(views):
        # On the sphere |x - y|² = 2 - 2 <x, y>.
        potentials = torch.addmm(constant(-2 * t, view.dtype), view, view.T, alpha=2 * t).exp_().fill_diagonal_(0)
        total = potentials.sum()
        loss.add_((total / pairs).log_(), alpha=lam / 2)
        if needs[k]:
            grad = (potentials.div_(total) @ view).mul_(2 * lam * t)
            grad.add_(apart, alpha=(2 if k == 0 else -2) / n)
            grads[k] = through_norms(grad, Units(view, units.norms[k]))
    return loss, grads
