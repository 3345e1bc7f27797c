"""The prototype losses on backend ``triton``: launches of the kernels in `triton_kernels`.

A launch has one student and at most two teachers. Column sums are those of a pass of Sinkhorn. Tiles are not yet
measured on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import triton_launch
from ..backends.triton_launch import launch, on_device
from ..backends.triton_tiles import Tile
from ..sinkhorn import triton as sinkhorn
from ..sinkhorn.reference import Scores
from . import chunked
from .records import Crops, Incoming, Values, Wanted

MOST_TEACHERS = 2  # of one student


def tile_for(k: int, interpreted: bool) -> Tile:
    """Shape of a program: one row, in pieces of at most 2048 columns."""
    columns = max(64, min(2048, 1 << (k - 1).bit_length()))
    return Tile(1, 128 if interpreted else columns, 0, 0, 8 if columns > 1024 else 4, 1)


def forward(p: Crops, wanted: Wanted) -> Values:
    n, k = p.sizes
    if n == 0:
        return chunked.forward(p, wanted)
    kept = p.new(len(p.all), 2, n)
    values = p.new(n).zero_()
    entropies = p.new(n if wanted.entropies else 0).zero_()
    column_sums = p.new(k if wanted.column_sums else 0).zero_()
    for b, student in enumerate(p.students):
        groups = _groups(p, b) or [[0]]
        for number, teachers in enumerate(groups):
            given = {"VALUES": values, "ENTROPIES": entropies if wanted.entropies and number == 0 else None}
            _launch("prototype_forward_kernel", p, b, teachers, kept, given)
        if wanted.column_sums:
            x = Scores(student[None], p.scales[0].float())
            none = torch.zeros(1, k, dtype=torch.float64, device=p.device)
            masses = sinkhorn.row_pass(x, none, None, p.new(1, n).fill_(1), False)[1]
            assert masses is not None
            column_sums += masses[0]
    return Values(values, entropies, column_sums, kept)


def backward(p: Crops, kept: Tensor, incoming: Incoming, outputs: list[Tensor]) -> None:
    groups = [_groups(p, b) or [[0]] for b in range(len(p.students))]
    if any(len(group) > 1 for group in groups):  # a gradient is written once
        chunked.backward(p, kept, incoming, outputs)
        return
    for b, output in enumerate(outputs):
        given = {
            "VALUES": incoming.values,
            "ENTROPIES": incoming.entropies,
            "COLUMN_SUMS": incoming.column_sums,
            "GRADIENT": output,
        }
        given = {name: None if value is None else value.contiguous() for name, value in given.items()}
        _launch("prototype_backward_kernel", p, b, groups[b][0], kept, given)


def _groups(p: Crops, b: int) -> list[list[int]]:
    """The teachers of a student, a launch's together."""
    teachers = [a for a in range(len(p.teachers)) if p.pair(b, a)]
    return [teachers[i : i + MOST_TEACHERS] for i in range(0, len(teachers), MOST_TEACHERS)]


def _launch(name: str, p: Crops, b: int, teachers: list[int], kept: Tensor, given: dict[str, Any]) -> None:
    n, k = p.sizes
    if n == 0:
        return
    kept = kept.contiguous()
    interpreted = triton_launch.INTERPRETED
    shape = tile_for(k, interpreted)
    positions = 1 if p.potentials is None else p.potentials.shape[1]
    potentials = p.potentials
    if potentials is not None:
        potentials = potentials.roll(-p.first, 1) if p.first else potentials.contiguous()
    student = p.students[b].resolve_neg()
    arguments: dict[str, Any] = {
        "STUDENT": student,
        "STUDENT_KEPT": kept[b],
        "STUDENT_ROW": student.stride(0),
        "STUDENT_COLUMN": student.stride(1),
        "SCALES": p.scales.contiguous(),
        "FACTORS": torch.tensor([p.pair(b, a) for a in teachers], dtype=torch.float32, device=p.device),
        "N": n,
        "K": k,
        "POSITIONS": positions,
        "COLUMNS": shape.block_n,
        "INTERPRETED": interpreted,
    }
    for place, side in enumerate(("FIRST", "SECOND")):
        a = teachers[place] if place < len(teachers) else None
        scores = None if a is None else p.teachers[a].resolve_neg()
        arguments |= {
            side: scores,
            f"{side}_POTENTIAL": None if a is None or potentials is None else potentials[a],
            f"{side}_KEPT": None if a is None else kept[len(p.students) + a],
            f"{side}_ROW": 0 if scores is None else scores.stride(0),
            f"{side}_COLUMN": 0 if scores is None else scores.stride(1),
        }
    with on_device(p.device):
        launch(name, shape, (n,), {**arguments, **given})
