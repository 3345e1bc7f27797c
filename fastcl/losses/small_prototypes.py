"""SwAV of few scores on a CPU, around calls of the engine: see `ops.at_once`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ..ops.at_once import Gradients, at_once
from ..ops.backends.choose import chooses_cpu
from ..ops.library import intercepted
from ..ops.prototypes.small import cross_entropies
from ..ops.sinkhorn.small import FEW, col_potential
from ..ops.small import MOST_ROWS, are_floats, are_plain
from ..sinkhorn import LARGEST_EPSILON


def swav(high: Any, low: Any, temperature: Any, epsilon: Any, n_iters: Any) -> Tensor | None:
    """The loss of a valid call without queue, prior and other processes; None for others, which are then checked."""
    if torch.compiler.is_compiling() or type(high) not in (list, tuple) or type(low) not in (list, tuple):
        return None
    crops = (*high, *low)
    if not high or len(crops) < 2 or not are_plain(*crops):
        return None
    shape, dtype = crops[0].shape, crops[0].dtype
    # The gradients of half-precision scores would be rounded before the loss's own gradient scales them.
    if dtype.itemsize == 2 or crops[0].numel() > FEW or max(shape) > MOST_ROWS:
        return None
    for crop in crops:
        if crop.shape != shape or crop.dtype != dtype:
            return None
    if not (are_floats(temperature, epsilon, positive=True) and chooses_cpu()) or intercepted(*crops):
        return None
    if not (epsilon <= LARGEST_EPSILON and type(n_iters) is int and n_iters > 0):
        return None
    work = partial(_swav, len(high), temperature, epsilon, n_iters)
    return at_once(work, "prototype_cross_entropy", *crops)


def _swav(
    high: int, temperature: float, epsilon: float, n_iters: int, needs: Sequence[bool], *crops: Tensor
) -> tuple[Tensor, Gradients]:
    detached = [crop.detach() for crop in crops]
    found = [col_potential([crop], epsilon, n_iters, LARGEST_EPSILON) for crop in detached[:high]]
    potentials = [potential for potential in found if potential is not None]
    assert len(potentials) == high
    pairs, scales = _shares(high, len(crops)), _inverses(temperature, epsilon)
    values, gradients = cross_entropies(detached, detached[:high], torch.stack(potentials), pairs, scales, any(needs))
    loss = values.sum().div_(len(values))
    return loss, [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]


@lru_cache(maxsize=32)
def _shares(high: int, crops: int) -> Tensor:
    """[crops * high] float64: the factor of each crop with each target; 0 for its own. It is only read."""
    with torch.inference_mode(False):
        share = 1 / (high * (crops - 1))
        pairs = [0.0 if c == h else share for c in range(crops) for h in range(high)]
        return torch.tensor(pairs, dtype=torch.float64, device="cpu")


@lru_cache(maxsize=32)
def _inverses(temperature: float, epsilon: float) -> Tensor:
    """[2] float64. It is only read."""
    with torch.inference_mode(False):
        return torch.tensor([temperature, epsilon], dtype=torch.float64, device="cpu").reciprocal()
