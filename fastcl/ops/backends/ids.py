"""Ids as the GPU's kernels compare them: int32 names in place of any int64."""

from __future__ import annotations

import torch
from torch import Tensor


def places_of_ids(left: Tensor | None, right: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """int32 names of the ids of two sets: places among the right ones in ascending order, -1 for an id not among them.

    -1 is no id. Found without asking the device how many there are.
    """
    if left is None or right is None:
        return None, None
    known = right.sort().values
    names = []
    for ids in (left, right):
        place = torch.searchsorted(known, ids.contiguous(), out_int32=True)
        found = known[place.clamp(max=len(known) - 1)] == ids
        names.append(torch.where(found & (ids != -1), place, -1))
    return names[0], names[1]
