"""Parametrisation that covers pairs: for options that go into one call, of which two may go wrong together."""

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any

import pytest
import torch


def chosen(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Combinations in which any two values of two axes meet at least once; the same ones each time.

    Triton's kernels have no float64, `chunked` computes it in their place: the two are not combined.
    """
    rows = [
        tuple(enumerate(row))
        for row in product(*(range(len(axis)) for axis in axes))
        if not {"triton", torch.float64} <= {axis[k] for axis, k in zip(axes, row, strict=True)}
    ]
    missing = {pair for row in rows for pair in combinations(row, 2)}
    found = []
    while missing:
        best = max(rows, key=lambda row: sum(pair in missing for pair in combinations(row, 2)))
        missing.difference_update(combinations(best, 2))
        found.append(tuple(axes[axis][value] for axis, value in best))
    return found


def pairs(*fixtures: str, **axes: Sequence[Any]) -> pytest.MarkDecorator:
    """`parametrize` by all pairs of values of these arguments, of which `backend` and others may be fixtures."""
    rows = chosen(*axes.values())
    ids = ["-".join(getattr(value, "__name__", str(value)).removeprefix("torch.") for value in row) for row in rows]
    return pytest.mark.parametrize(
        tuple(axes), rows, ids=ids, indirect=[name for name in axes if name in ("backend", *fixtures)]
    )
