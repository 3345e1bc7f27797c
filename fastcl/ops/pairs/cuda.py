"""Backend ``cuda`` of the pair sums of logits, by the CUDA C++ kernels of ``csrc/cuda``; one call launches them all."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import cuda_runtime
from ..backends.native import address
from ..contrastive.cuda_rows import KEPT, arrange, find_clusters, find_names
from ..pair_maps import KINDS
from .records import Gradients, Needs, Pairs, Sums
from .sorted_rows import as_problem, in_order, is_symmetric, marked


def sweep(p: Pairs, weights: Tensor | None, needs: Needs) -> tuple[Sums, Gradients]:
    """The sums and, with weights [2, N], the needed gradients of ``sum(weights * values)``."""
    problem, (n, m), new = as_problem(p), p.sizes, p.logit_scale.new_empty
    parts = KEPT.parts(problem, new(KEPT.size(problem)))
    find_clusters(problem, parts)
    find_names(problem, parts)
    norms = [new(n) if p.anchors.normalize else None]
    norms.append(new(m) if p.contrasts is not None and p.contrasts.normalize else None)
    arranged = arrange(problem, parts, *norms)
    order, other_order = parts.get("order"), parts.get("contrast_order")
    offset = None if p.offset is None else _aligned(in_order(p.offset.expand(n), order))
    bias = None if p.bias is None else in_order(marked(p.bias), other_order)
    symmetric = is_symmetric(p)
    sums, workspace = new(3, 2, n), []
    rows: list[Tensor | None] = [None, None]
    similarity_sums = slope_sums = of_bias = None
    if weights is not None:
        weights = _aligned(in_order(weights, order))
        for k, (source, needed) in enumerate(((p.anchors, needs.anchors), (p.contrasts, needs.contrasts))):
            rows[k] = new(source.values.shape) if needed and source is not None else None
        similarity_sums = new(n) if needs.logit_scale else None
        slope_sums = new(n) if needs.offset and p.offset is not None else None
        of_bias = new(m) if needs.bias and p.bias is not None else None
    workspace = [None if part is None else new(len(part), arranged.width) for part in rows]
    numbers = (
        KINDS[p.kind].number, p.only_positives, symmetric,
        *map(address, (offset, bias, weights, sums, *workspace, *rows, *norms, similarity_sums, slope_sums, of_bias)),
    )  # fmt: skip
    cuda_runtime.run("pair_sums", p.device, arranged.numbers, numbers, p.pos_margin, p.neg_margin)
    if weights is None:
        return Sums(*sums), Gradients()
    twice = 2 if symmetric else 1
    scale = None if similarity_sums is None else similarity_sums.sum(dtype=torch.float64) / twice
    of_offset = None
    if slope_sums is not None and p.offset is not None:
        of_offset = slope_sums.double() if p.offset.dim() else slope_sums.sum(dtype=torch.float64) / twice
    return Sums(*sums), Gradients(rows[0], rows[1], scale, of_offset, of_bias)


def _aligned(values: Tensor) -> Tensor:
    """With the last dimension padded to a multiple of 4: the kernels load two neighbours at once."""
    return torch.nn.functional.pad(values, (0, -values.shape[-1] % 4))
