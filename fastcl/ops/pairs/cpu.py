"""Backend ``cpu`` of the pair sums: calls the C++ engine with addresses of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import native
from ..backends.native import address
from ..contrastive import cpu as contrastive_cpu
from ..contrastive.records import Problem
from ..pair_maps import KINDS
from .records import Gradients, Needs, Pairs, Sums


def sweep(p: Pairs, weights: Tensor | None, needs: Needs, total: Tensor | None = None) -> tuple[Sums, Gradients]:
    """The sums and, with weights [2, N], the needed gradients of ``sum(weights * values)``, which `total` receives."""
    # Named, so that its tensors stay alive during the call.
    problem = contrastive_cpu.addressable(Problem(p.anchors, p.contrasts, None, p.logit_scale.reshape(1), ()))
    (n, m), dtype = p.sizes, p.dtype
    offset = None if p.offset is None else p.offset.resolve_neg().contiguous()
    weights = None if weights is None else weights.resolve_neg().contiguous()

    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=p.device)

    sums = Sums(new(2, n), new(2, n), new(2, n))
    found = Gradients()
    if weights is not None:
        found = Gradients(
            new(*p.anchors.values.shape) if needs.anchors else None,
            new(*p.others.values.shape) if needs.contrasts and p.contrasts is not None else None,
            new(dtype=torch.float64) if needs.logit_scale else None,
            new(*offset.shape, dtype=torch.float64) if needs.offset and offset is not None else None,
            new(m) if needs.bias and p.bias is not None else None,
        )
    numbers = (
        KINDS[p.kind].number, p.only_positives, address(offset), offset is not None and offset.dim() == 1,
        address(weights), *map(address, sums), *map(address, found),
    )  # fmt: skip
    described = contrastive_cpu.describe(problem, differentiated=any(needs))
    of_engine = native.native_module().pairs
    call = of_engine(native.engine()[0], described, numbers, p.pos_margin, p.neg_margin, address(total))
    native.run(call)
    return sums, found
