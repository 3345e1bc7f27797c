"""The prototype losses on backend ``cpu``: the C++ engines of ``csrc/cpu/prototypes``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import native
from ..backends.native import address, describe_rows
from . import chunked
from .records import Crops, Incoming, Values, Wanted


def forward(p: Crops, wanted: Wanted) -> Values:
    n, k = p.sizes
    if n == 0:
        return chunked.forward(p, wanted)
    found = Values(
        p.new(n),
        p.new(n if wanted.entropies else 0),
        p.new(k if wanted.column_sums else 0),
        p.new(len(p.all), 2, n),
    )
    outputs = found.kept, *(value if value.numel() else None for value in found[:3])
    _call(p, outputs, (None, None, None), None)
    return found


def backward(p: Crops, kept: Tensor, incoming: Incoming, outputs: list[Tensor]) -> None:
    """outputs: contiguous."""
    if p.sizes[0]:
        _call(p, (kept, None, None, None), incoming, outputs)


def _call(
    p: Crops,
    results: tuple[Tensor | None, ...],
    incoming: tuple[Tensor | None, ...],
    outputs: list[Tensor] | None,
) -> None:
    # In variables, so that the tensors live until the call ends.
    students, teachers = ([x.resolve_neg() for x in crops] for crops in (p.students, p.teachers))
    potentials = _plain(p.potentials)
    pairs, scales = torch.tensor(p.pairs, dtype=torch.float64), p.scales.resolve_neg().contiguous()
    given = [_plain(value) for value in (results[0], *incoming)]
    if p.first and potentials is not None:  # the first row is that of position 0
        potentials = potentials.roll(-p.first, 1)
    n, k = p.sizes
    numbers = (
        n, k, address(potentials), 1 if potentials is None else potentials.shape[1], pairs.data_ptr(),
        scales.data_ptr(), p.dtype == torch.float64,
        min(native.threads(n * k * len(p.all), native.SCORES), n),
        address(given[0]), *map(address, results[1:]), *map(address, given[1:]),
    )  # fmt: skip
    call = native.native_module().prototypes(
        native.engine()[0],
        tuple(map(describe_rows, students)),
        tuple(map(describe_rows, teachers)),
        numbers,
        None if outputs is None else tuple(map(address, outputs)),
    )
    native.run(call)


def _plain(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.resolve_neg().contiguous()
