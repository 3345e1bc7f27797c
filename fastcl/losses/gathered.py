"""Statistics over the rows of all processes, for losses with `gather`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..distributed import Property, World, dtype_name, few
from ..exchange import Gathered, Ring
from ..ops.backends.choose import choose_backend
from ..ops.contrastive.block_mean import BlockMean, sent_bytes
from ..ops.contrastive.blocks import BlockStats, Call
from ..ops.contrastive.fields import FIELDS
from ..ops.contrastive.records import (
    OF_ROWS,
    TRAVELLING,
    Problem,
    Rows,
    flatten,
    flatten_rows,
    travelling,
    unflatten,
)
from ..swept import ContrastiveStats, named, statistics
from .batch import Batch, aligned_clusters, of_parts, offset
from .gathered_soft import assigned_statistics


def has_gradient(tensor: Tensor | None) -> bool:
    """Whether a backward through results computed now from this tensor would compute its gradient."""
    return torch.is_grad_enabled() and tensor is not None and tensor.requires_grad


class Travelling(NamedTuple):
    """The rows of a call with `gather`, on which all processes have agreed."""

    exchange: Gathered
    samples: list[int]  # of every process
    sizes: list[int]  # of every process, the number of travelling contrasts
    anchors: Rows  # with clusters that are unique over processes, as the following
    contrasts: Rows | None  # the contrasts that travel; None: self-contrast
    stored: Rows | None  # contrasts that stay in this process
    known: Mapping[str, Tensor]  # by field of `Rows`: data [M, ...] of all travelling contrasts that need not be sent
    needs: Mapping[str, bool]  # by tensor, whether it has a gradient
    backend: str


def agreed(
    world: World, gather: bool | str, p: Problem, batch: Batch, call: str, alike: Mapping[str, Property], family: str
) -> Travelling | None:
    """The rows that travel, after all processes have agreed on the call. None if none travel: only stored ones.

    call, alike: the name of the call, and further values that must be equal in all processes.
    """
    anchors, contrasts, bias, dtype = p.anchors, p.contrasts, p.others.bias, p.dtype
    stored = any(kind for _, kind in batch.parts)
    travels = contrasts is None or not stored or not all(kind for _, kind in batch.parts)
    rows: Tensor | None = anchors.values
    if contrasts is not None:
        rows = of_parts(contrasts.values, batch, False) if travels else None
    backend = choose_backend(p.device, dtype, family)
    tensors = {
        "anchors": anchors.values, "contrasts": rows, "positives": p.positives, "logit scale": p.logit_scale,
        "contrast_bias": bias, "assignments": anchors.assignments, "hard_negatives": p.hard_negatives,
        "contrast_assignments": None if contrasts is None else contrasts.assignments,
    }  # fmt: skip
    properties: dict[str, Property] = {
        "gather": str(gather),
        "contrasts": "none" if contrasts is None else "stored" if not travels else "both" if stored else "tensors",
        "views": batch.views,
        "dimension": anchors.values.shape[1],
        "dtype of anchors": dtype_name(anchors.values.dtype),
        "dtype of contrasts": "none" if rows is None else dtype_name(rows.dtype),
        "dtype of sums": dtype_name(dtype),
        "symmetric": p.both,
        "normalised anchors": anchors.normalize,
        "normalised contrasts": contrasts is not None and contrasts.normalize,
        "backend": backend,
        "clusters given": not batch.by_sample,
        "default clusters of contrasts": batch.aligned,
        **_given(p.others),
        "positives given": p.positives is not None,
        "hard_negatives given": p.hard_negatives is not None,
        "guide given": p.guided,
        "return_stats": p.observe,
        "rows of the queue": batch.shared[0],
        "rows of the queue (their checksum)": batch.shared[1],
        "assignments": -1 if anchors.assignments is None else anchors.assignments.shape[1],
    }
    # The backward's collectives wait for all processes, so all must need the same gradients.
    needs = {name: has_gradient(tensor) for name, tensor in tensors.items()}
    anchors, contrasts = offset(batch, anchors, contrasts, world.rank)
    if bias is not None:
        bias = bias.to(dtype)
        anchors = anchors if contrasts is not None else anchors._replace(bias=bias)
        contrasts = None if contrasts is None else contrasts._replace(bias=bias)

    def part_of_contrasts(of_stored: bool) -> Rows | None:
        """The stored contrasts, or those of tensors."""
        if contrasts is None or not (stored if of_stored else travels):
            return None
        data = {name: of_parts(values, batch, of_stored) for name, values in travelling(contrasts).items()}
        values = of_parts(contrasts.values, batch, of_stored)
        assert values is not None
        return Rows(values, normalize=contrasts.normalize, **data)

    own = anchors if contrasts is None else part_of_contrasts(False)
    sent: dict[str, Tensor] = {}
    if own is not None and rows is not None and anchors.assignments is None:
        sent = {name: values for name, values in travelling(own).items() if name != "clusters" or not batch.aligned}
        sent |= {} if gather == "ring" else {"values": rows}
    (samples, sizes), arrived = world.agree_and_gather(
        call,
        {"samples": batch.shape[0], "contrasts": 0 if rows is None else len(rows)},
        {**alike, **properties, **{f"{name} with a gradient": need for name, need in needs.items()}},
        p.device,
        {"contrasts": list(sent.values())},
    )
    if rows is None and anchors.assignments is None:
        return None
    known = {} if arrived is None else dict(zip(sent, arrived, strict=True))
    everyone = known.pop("values", None)
    if batch.aligned:
        known["clusters"] = aligned_clusters(samples, batch.views, sizes, p.device)
    return Travelling(
        Ring(world, sizes) if gather == "ring" else Gathered(world, sizes, everyone),
        samples,
        sizes,
        anchors,
        None if contrasts is None else own,
        part_of_contrasts(True),
        known,
        needs,
        backend,
    )


def _given(rows: Rows) -> dict[str, Property]:
    """What processes compare of the data that contrasts take along: whether it is given, and its width and dtype.

    Of clusters `agreed` compares more: processes number default ones, which are always there.
    """
    found: dict[str, Property] = {}
    for field, argument in TRAVELLING:
        values = getattr(rows, field)
        if field != "clusters":
            found[f"{argument} given"] = values is not None
        if field not in ("clusters", "ids", "bias"):  # those are vectors of one dtype
            found[f"width of {argument}"] = 1 if values is None or values.dim() < 2 else values.shape[1]
            found[f"dtype of {argument}"] = "none" if values is None else dtype_name(values.dtype)
    return found


def gathered_statistics(
    world: World, gather: bool | str, p: Problem, batch: Batch, exact: bool, call: str, alike: Mapping[str, Property]
) -> tuple[ContrastiveStats, Tensor | None]:
    """`statistics` over the contrast tensors of all processes, or in self-contrast over the anchors of all processes.

    call, alike: as in `agreed`.
    """
    return statistics_of(world, agreed(world, gather, p, batch, call, alike, p.family), p, batch, exact)


def statistics_of(
    world: World, rows: Travelling | None, p: Problem, batch: Batch, exact: bool
) -> tuple[ContrastiveStats, Tensor | None]:
    """`gathered_statistics` of rows on which the processes have agreed."""
    if rows is None:
        return statistics(p, exact)
    if p.anchors.assignments is not None:
        of_anchors = type(rows.exchange)(world, [n * batch.views for n in rows.samples])
        return assigned_statistics(of_anchors, rows.exchange, p, p.anchors.assignments), None
    called, arguments = _arguments(rows, p, exact)
    values = BlockStats.apply(called, *arguments)
    return (named(p, values[:-1]), values[-1]) if p.observe else (named(p, values), None)


def gathered_mean(world: World, rows: Travelling | None, p: Problem) -> Tensor | None:
    """This process's share of `swept.mean_loss` over the rows of all processes, times their number.

    None where it is not faster than the formula of `statistics_of`, the same in all processes.
    """
    if rows is None or p.observe or p.anchors.assignments is not None or isinstance(rows.exchange, Ring):
        return None
    called, arguments = _arguments(rows, p, False)
    if not few(world, sent_bytes(called, unflatten(arguments[:-OF_ROWS]))):
        return None
    found: Tensor = BlockMean.apply(called, *arguments)
    return found


def _arguments(rows: Travelling, p: Problem, exact: bool) -> tuple[Call, tuple[Any, ...]]:
    """The arguments of `BlockStats`."""
    called = Call(
        exchange=rows.exchange,
        backend=rows.backend,
        exact=exact,
        one_scale=p.logit_scale.dim() == 0,
        contrasts_need=rows.needs["contrasts"],
        bias_needs=rows.needs["contrast_bias"],
        known=rows.known,
    )
    scales = p.logit_scale.to(p.dtype).reshape(-1)
    want = [field for field in FIELDS if field in p.want]
    own = replace(p, anchors=rows.anchors, contrasts=rows.contrasts, logit_scale=scales, want=want)
    return called, (*flatten(own), *flatten_rows(rows.stored))
