"""Maps int64 ids to the int32 names that GPU kernels compare."""

from __future__ import annotations

import torch
from torch import Tensor


def places_of_ids(left: Tensor | None, right: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """int32 names of the ids of two sets: the id's position in the sorted right ids, or -1 if it is not among them.

    An id of -1 means none and gets -1. Never waits for the device.
    """
    if left is None or right is None:
        return None, None
    known = right.sort().values
    names = []
    for ids in (left,) if left is right else (left, right):
        place = torch.searchsorted(known, ids.contiguous(), out_int32=True)
        found = known[place.clamp(max=len(known) - 1)] == ids
        names.append(torch.where(found & (ids != -1), place, -1))
    return names[0], names[-1]
