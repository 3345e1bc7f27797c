"""The mean loss and its derivative in the statistics, by `mean_kernel`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...backends import triton_launch
from ...backends.triton_launch import on_device
from ...backends.triton_tiles import ROWS_AT_ONCE
from ..records import Side

MOST_ROWS = 1 << 14  # one program visits all rows; with more rows PyTorch's operators take no longer


def scaled(values: Tensor, factor: Tensor) -> Tensor:
    """values * factor; the factor is []."""
    result, block = torch.empty_like(values), ROWS_AT_ONCE.block_m
    given = {"DERIVATIVES": values, "FACTOR": factor, "PRODUCTS": result, "SIZE": values.numel(), "BLOCK": block}
    with on_device(values.device):
        triton_launch.launch("scaled_kernel", ROWS_AT_ONCE, (triton_launch.blocks(values.numel(), block),), given)
    return result


def mean_loss(sides: Sequence[Side], want: Sequence[str]) -> tuple[Tensor, list[Tensor]]:
    """The mean of `direct.DirectMean` over one or two sides, and its derivatives in the fields [W, 1, N] of each."""
    loss = torch.empty((), dtype=torch.float32, device=sides[0].counts.device)
    derivatives = []
    for k, side in enumerate(sides):
        derivatives.append(torch.empty_like(side.fields))
        with on_device(loss.device):
            triton_launch.launch(
                "mean_kernel",
                ROWS_AT_ONCE,
                (1,),
                {
                    "FIELDS": side.fields,
                    "COUNTS": side.counts,
                    "PARTS": side.parts,
                    "LOSS": loss,
                    "DERIVATIVES": derivatives[-1],
                    "N": side.counts.shape[1],
                    "RATIO": want[0] != "lse_neg",
                    "SIDES": len(sides),
                    "ADD": int(k > 0),
                    "BLOCK": ROWS_AT_ONCE.block_m,
                },
            )
    return loss, derivatives
