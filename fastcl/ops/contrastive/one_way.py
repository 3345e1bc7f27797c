"""Both directions of a problem with a guide, as two problems of one direction each, for every backend.

Each row filters with its own threshold, so the pair (i, j) may be admissible for anchor i and not for contrast j. An
engine computes both directions from the same tiles and has one mask for both.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .backend import Backend
from .records import Gradients, Needs, Problem, Statistics, empty_side


def is_split(p: Problem) -> bool:
    return p.both and p.guided


def _directions(p: Problem) -> tuple[Problem, Problem]:
    assert p.contrasts is not None
    there = replace(p, both=False, partial=True)
    back = replace(there, anchors=p.contrasts, contrasts=p.anchors, positives=None, anchors_only=False)
    return there, back


def saved_size(p: Problem, backend: Backend) -> int:
    """`Backend.saved_size`."""
    return sum(map(backend.saved_size, _directions(p))) if is_split(p) else backend.saved_size(p)


def forward(p: Problem, backend: Backend) -> Statistics:
    """`Backend.forward`."""
    if not is_split(p):
        return backend.forward(p)
    there, back = map(backend.forward, _directions(p))
    saved = torch.cat((there.saved, back.saved))
    return Statistics(there.anchors, back.anchors, there.anchor_inverse_norms, back.anchor_inverse_norms, saved)


def backward(
    p: Problem, backend: Backend, saved: Statistics, grad: Tensor, grad_contrasts: Tensor, needs: Needs
) -> Gradients:
    """`Backend.backward`."""
    if not is_split(p):
        return backend.backward(p, saved, grad, grad_contrasts, needs)
    there, back = _directions(p)
    kept = saved.saved.split([backend.saved_size(there), backend.saved_size(back)])
    a, c = saved.anchor_inverse_norms, saved.contrast_inverse_norms
    nothing = grad.new_empty(len(p.want), len(p.logit_scale), 0)
    one = backend.backward(there, Statistics(saved.anchors, empty_side(p), a, c, kept[0]), grad, nothing, needs)
    swapped = needs._replace(anchors=needs.contrasts, contrasts=needs.anchors)
    known = Statistics(saved.contrasts, empty_side(p), c, a, kept[1])
    other = backend.backward(back, known, grad_contrasts, nothing, swapped)

    def total(first: Tensor | None, second: Tensor | None) -> Tensor | None:
        return second if first is None else first if second is None else first + second

    return Gradients(
        total(one.anchors, other.contrasts),
        total(one.contrasts, other.anchors),
        total(one.logit_scale, other.logit_scale),
        one.bias,
    )


def planes(p: Problem, backend: Backend, saved: Tensor) -> tuple[Tensor, Tensor]:
    """`Backend.planes`."""
    if not is_split(p):
        return backend.planes(p, saved)
    there, back = _directions(p)
    kept = saved.split([backend.saved_size(there), backend.saved_size(back)])
    return backend.planes(there, kept[0])[0], backend.planes(back, kept[1])[0]
