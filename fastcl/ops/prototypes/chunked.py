"""The prototype losses in blocks of rows: by default in plain PyTorch on any device, `reference` for each block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..backends.rows import CPU_BLOCK, GPU_BLOCK
from . import reference
from .records import Crops, Incoming, Values, Wanted


def forward(p: Crops, wanted: Wanted, backend: Any = reference) -> Values:
    """backend: what computes a block."""
    k, parts = p.sizes[1], []
    column_sums = p.new(k if wanted.column_sums else 0).zero_()
    for rows in blocks(p, backend is reference):
        part = backend.forward(p.block(rows), wanted)
        column_sums += part.column_sums
        parts.append(part)
    if not parts:
        return reference.forward(p, wanted)
    values, entropies, _, kept = zip(*parts, strict=True)
    return Values(torch.cat(values), torch.cat(entropies), column_sums, torch.cat(kept, 2))


def backward(p: Crops, kept: Tensor, incoming: Incoming, outputs: list[Tensor], backend: Any = reference) -> None:
    values, entropies, column_sums = incoming
    for rows in blocks(p, backend is reference):
        part = Incoming(
            None if values is None else values[rows], None if entropies is None else entropies[rows], column_sums
        )
        backend.backward(p.block(rows), kept[:, :, rows].contiguous(), part, [output[rows] for output in outputs])


def blocks(p: Crops, several: bool = True) -> Iterator[slice]:
    """Rows whose temporaries are a few MB on a CPU. several: there are about 8 of the scores' size, else one."""
    n, k = p.sizes
    numbers = (CPU_BLOCK if p.device.type == "cpu" else GPU_BLOCK) // (8 if several else 1)
    step = max(numbers // max(k * (1 + len(p.teachers)), 1), 1)
    return (slice(start, min(start + step, n)) for start in range(0, n, step))
