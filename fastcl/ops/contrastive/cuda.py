"""Backend ``cuda``: the contrastive statistics by the CUDA C++ kernels of ``csrc/cuda``.

One call of the native module launches all kernels of a forward or backward on the current stream. Nothing here waits
for the device: sizes come from shapes, the device decides everything that depends on values, and scalars are tensors,
so that a CUDA graph can replay the calls with other values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..backends import cuda_runtime
from ..backends.native import DTYPES, address
from . import chunked
from .cuda_rows import KEPT, arrange, find_clusters, find_names, wanted
from .kept import plane_count
from .records import Gradients, Needs, Problem, Side, Statistics, empty_side, merge_bases, new_side

__all__ = ["backward", "forward", "merge_planes", "plane_count", "planes", "saved_size"]

# Rows and columns share one exponential if their log-sums (to base 2) spread over at most this much. float32's range
# would allow 120, but an exponent of 60 is rounded to 2^-19, a relative error of 1e-6 where terms cancel.
ONE_EXPONENTIAL = 16.0


saved_size, planes, merge_planes = KEPT.size, KEPT.planes, merge_bases


def forward(p: Problem) -> Statistics:
    s, n, m = p.sizes
    if n == 0 or m == 0:
        return chunked.forward(p)._replace(saved=p.logit_scale.new_zeros(saved_size(p)))
    new = p.logit_scale.new_empty
    saved = new(saved_size(p))
    parts = KEPT.parts(p, saved)
    find_clusters(p, parts)
    find_names(p, parts)
    a = new(n if p.anchors.normalize else 0)
    c = new(m if p.contrasts is not None and p.contrasts.normalize else 0)
    arranged = arrange(p, parts, a, c)
    anchors, contrasts = new_side(p, n), new_side(p, m) if p.both else empty_side(p)
    kernels, where = cuda_runtime.kernels(), cuda_runtime.where(p.device)
    statistics, others = new(s, 7, n), new(s, 7, m if p.both else 0)
    lines = new(kernels.line_count(n, where), 2, m) if p.both else None
    own = _side(anchors, parts["bases"], statistics)
    other = _side(contrasts, parts["contrast_bases"], others) if p.both else _NO_SIDE
    description = arranged.numbers, wanted(p.want), own, other, address(lines), address(parts.get("weighted"))
    cuda_runtime.run("contrast_forward", p.device, *description)
    if p.observe:  # no kernel: a sweep of its own in plain PyTorch
        swept = chunked.forward(replace(p, want=()))
        anchors = anchors._replace(observed=swept.anchors.observed)
        contrasts = contrasts._replace(observed=swept.contrasts.observed)
    return Statistics(anchors, contrasts, a, c, saved)


def backward(p: Problem, saved: Statistics, grad: Tensor, grad_contrasts: Tensor, needs: Needs) -> Gradients:
    """Gradients from those of the anchors' fields [W, S, N] and, with `both`, of the contrasts' fields [W, S, M]."""
    s, n, m = p.sizes
    if n == 0 or m == 0:
        return chunked.backward(p, saved, grad, grad_contrasts, needs)
    new = p.logit_scale.new_empty
    kernels = cuda_runtime.kernels()
    parts = KEPT.parts(p, saved.saved)
    arranged = arrange(p, parts, None, None)

    def weights(size: int) -> tuple[Tensor, Tensor, Tensor]:
        stride = -(-size // 4) * 4
        return new(s, 7, size), new(4, s, kernels.extreme_blocks(size)), new(s, 5, stride)

    def rows(source: Tensor | None, needed: bool) -> tuple[Tensor | None, Tensor | None]:
        """Buffers of the summed gradient and of the result, rounded unless more is added to it."""
        if source is None or not needed:
            return None, None
        dtype = p.dtype if p.unrounded else source.dtype
        out = torch.empty(source.shape, dtype=dtype, device=p.device)
        return new(len(source), arranged.width), out

    anchors = saved.anchors._replace(fields=grad.contiguous())
    contrasts = saved.contrasts._replace(fields=grad_contrasts.contiguous())
    of_anchors, of_contrasts = weights(n), weights(m) if p.both else ()
    own = _side(anchors, parts["bases"], None, of_anchors)
    other = _side(contrasts, parts["contrast_bases"], None, of_contrasts) if p.both else _NO_SIDE
    anchor_sums, anchor_rows = rows(p.anchors.values, needs.anchors)
    contrast_sums, contrast_rows = rows(None if p.contrasts is None else p.contrasts.values, needs.contrasts)
    similarity_sums = new(s, n) if needs.logit_scale else None
    bias = new(m) if needs.bias and p.others.bias is not None else None
    scalars = new(4, s)
    alone = needs.anchors and not (needs.contrasts or needs.logit_scale)
    weighted = parts.get("weighted") if alone else None
    outputs = (
        *map(address, (scalars, anchor_sums, contrast_sums, anchor_rows, contrast_rows)),
        *(DTYPES[p.dtype if out is None else out.dtype] for out in (anchor_rows, contrast_rows)),
        address(saved.anchor_inverse_norms) if p.anchors.normalize else 0,
        address(saved.contrast_inverse_norms) if p.contrasts is not None and p.contrasts.normalize else 0,
        arranged.folded,
        address(similarity_sums),
        address(bias),
        address(weighted),
    )
    description = arranged.numbers, wanted(p.want), own, other, outputs, ONE_EXPONENTIAL
    cuda_runtime.run("contrast_backward", p.device, *description)
    scale = None
    if similarity_sums is not None:  # as training converges they cancel
        scale = similarity_sums.sum(1, dtype=torch.float64)
        if p.contrasts is None and not arranged.folded:
            scale = scale / 2
    return Gradients(anchor_rows, contrast_rows, scale, bias)


_NO_SIDE = (0,) * 8


def _side(side: Side, bases: Tensor, statistics: Tensor | None, weights: Sequence[Tensor] = ()) -> tuple[int, ...]:
    """As csrc/bindings reads it."""
    others = [address(tensor) for tensor in weights] or [0, 0, 0]
    return *map(address, (*side[:3], bases, statistics)), *others
