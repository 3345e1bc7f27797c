"""Statistics over the rows of all processes, as gathered losses ask for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..distributed import Gathered, Property, Ring, World, dtype_name
from ..ops.backends.choose import choose_backend
from ..ops.backends.rows import accumulation_dtype
from ..ops.contrastive.blocks import BlockStats, Call, Set
from ..ops.contrastive.records import FIELDS
from ..statistics import ContrastiveStats, Sweep
from .batch import Posed, of_parts, offset, paired_clusters

# What losses do with all of it.


def has_gradient(tensor: Tensor | None) -> bool:
    """Whether a backward of what is computed with it now would want to know its gradient."""
    return torch.is_grad_enabled() and tensor is not None and tensor.requires_grad


def statistics(
    world: World, gather: bool | str, sweep: Sweep, posed: Posed, exact: bool, call: str, alike: Mapping[str, Property]
) -> ContrastiveStats:
    """`Sweep.statistics` where tensors of the contrasts, or the anchors in self-contrast, are those of all processes.

    call, alike: what is called, and what else processes have to agree upon.
    """
    anchors, contrasts, bias = sweep.anchors, sweep.contrasts, sweep.contrast_bias
    dtype = accumulation_dtype(anchors, contrasts, sweep.positives)
    stored = any(kind for _, kind in posed.parts)
    nothing_travels = contrasts is not None and stored and all(kind for _, kind in posed.parts)
    rows: Tensor | None = anchors
    if contrasts is not None:
        rows = None if nothing_travels else of_parts(contrasts, posed, False)
    backend = choose_backend(anchors.device, dtype)
    tensors = {
        "anchors": anchors, "contrasts": rows, "positives": sweep.positives, "logit scale": sweep.logit_scale,
        "contrast_bias": bias, "assignments": sweep.anchor_assignments,
        "contrast_assignments": sweep.contrast_assignments,
    }  # fmt: skip
    properties: dict[str, Property] = {
        "gather": str(gather),
        "contrasts": "none" if contrasts is None else "stored" if nothing_travels else "both" if stored else "tensors",
        "views": posed.views,
        "dimension": anchors.shape[1],
        "dtype of anchors": dtype_name(anchors.dtype),
        "dtype of contrasts": "none" if rows is None else dtype_name(rows.dtype),
        "dtype of sums": dtype_name(dtype),
        "symmetric": sweep.both,
        "normalised anchors": sweep.normalize_anchors,
        "normalised contrasts": sweep.normalize_contrasts,
        "backend": backend,
        "clusters given": not posed.by_sample,
        "default clusters of contrasts": posed.paired,
        "ids given": sweep.contrast_ids is not None,
        "positives given": sweep.positives is not None,
        "contrast_bias given": bias is not None,
        "assignments": -1 if sweep.anchor_assignments is None else sweep.anchor_assignments.shape[1],
    }
    # Who needs a gradient of anything takes part in the backward, whose collectives wait for all.
    needs = {name: has_gradient(tensor) for name, tensor in tensors.items()}
    samples, sizes = world.agree(
        call,
        {"samples": posed.shape[0], "contrasts": 0 if rows is None else len(rows)},
        {**alike, **properties, **{f"{name} with a gradient": need for name, need in needs.items()}},
        anchors.device,
    )
    if sweep.anchor_assignments is not None:
        return _assigned(world, [n * posed.views for n in samples], sizes, sweep, sweep.anchor_assignments, exact)
    if rows is None:
        return sweep.statistics(exact)[0]
    if sweep.both and stored:
        raise ValueError("symmetric: expected False for gathered contrasts beside a queue or bank, got True")
    travelling_bias = None if bias is None else of_parts(bias.to(dtype), posed, False)
    order = [field for field in FIELDS if field in sweep.want]
    first = sum(samples[: world.rank])
    clusters, contrast_clusters = offset(posed, first)

    def set_of(of_stored: bool) -> Set:
        if contrasts is None or (of_stored and not stored):
            return Set(None, None, None, None if of_stored else travelling_bias)
        parts = (
            of_parts(values, posed, of_stored) for values in (contrasts, contrast_clusters, sweep.contrast_ids, bias)
        )
        of_rows, of_clusters, of_ids, of_bias = parts
        return Set(of_rows, of_clusters, of_ids, None if of_bias is None else of_bias.to(dtype))

    called = Call(
        exchange=(Ring if gather == "ring" else Gathered)(world, sizes),
        normalize_anchors=sweep.normalize_anchors,
        normalize_contrasts=sweep.normalize_contrasts,
        want=tuple(order),
        both=sweep.both,
        backend=backend,
        exact=exact,
        one_scale=sweep.logit_scale.dim() == 0,
        contrasts_need=needs["contrasts"],
        bias_needs=needs["contrast_bias"],
        clusters=paired_clusters(samples, posed.views, sizes, anchors.device) if posed.paired else None,
    )
    scales = sweep.logit_scale.to(dtype).reshape(-1)
    values = BlockStats.apply(
        called, anchors, sweep.positives, clusters, sweep.anchor_ids, scales, *set_of(False), *set_of(True)
    )
    return sweep.named(values, order)


class _AllRows(torch.autograd.Function):
    """Contrasts' rows, or numbers, of all processes; back comes the sum over processes of their gradients.

    Each is the other's derivative, of any order.
    """

    @staticmethod
    def forward(ctx: Any, exchange: Gathered, rows: Tensor) -> Tensor:
        ctx.exchange = exchange
        return exchange.world.all_rows(rows, exchange.sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, _SummedRows.apply(ctx.exchange, grad)


class _SummedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: Gathered, values: Tensor) -> Tensor:
        ctx.exchange = exchange
        return exchange.summed(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, _AllRows.apply(ctx.exchange, grad)


def _assigned(
    world: World, rows: list[int], sizes: list[int], sweep: Sweep, own: Tensor, exact: bool
) -> ContrastiveStats:
    """`statistics` of assignments: sums of weights, which have derivatives, are not merged but swept over all rows."""
    # In the dtype of the sums, so that gradients are rounded after they have been added.
    dtype = accumulation_dtype(sweep.anchors, sweep.contrasts)
    anchors, own = sweep.anchors.to(dtype), own.to(dtype)
    contrasts = anchors if sweep.contrasts is None else sweep.contrasts.to(dtype)
    theirs = own if sweep.contrast_assignments is None else sweep.contrast_assignments.to(dtype)
    bias = None if sweep.contrast_bias is None else sweep.contrast_bias.to(dtype)
    by_row, by_contrast = Gathered(world, rows), Gathered(world, sizes)

    def everywhere(exchange: Gathered, values: Tensor) -> Tensor:
        found: Tensor = _AllRows.apply(exchange, values)
        return found

    ids, contrast_ids = sweep.anchor_ids, sweep.contrast_ids
    if sweep.contrasts is None:  # every row but itself
        contrast_ids = torch.arange(by_row.total, device=anchors.device)
        ids = contrast_ids[by_row.own]
    elif contrast_ids is not None:
        contrast_ids = by_contrast.spread(contrast_ids)
    found = sweep._replace(
        anchors=anchors,
        contrasts=everywhere(by_contrast, contrasts),
        anchor_assignments=own,
        contrast_assignments=everywhere(by_contrast, theirs),
        contrast_bias=None if bias is None else everywhere(by_contrast, bias),
        anchor_ids=ids,
        contrast_ids=contrast_ids,
        normalize_contrasts=sweep.normalize_anchors,
        both=False,
    ).statistics(exact)[0]
    if not sweep.both:
        return found
    # A contrast's bias is alike in all of its logits, and no loss of assignments sees it; but it may be left out.
    if sweep.contrast_bias is not None:
        left_out = (sweep.contrast_bias == -torch.inf)[:, None]
        contrasts, theirs = contrasts.masked_fill(left_out, 0), theirs.masked_fill(left_out, 0)
    reverse = sweep._replace(
        anchors=contrasts,
        contrasts=everywhere(by_row, anchors),
        anchor_assignments=theirs,
        contrast_assignments=everywhere(by_row, own),
        contrast_bias=None,
        anchor_ids=sweep.contrast_ids,
        contrast_ids=None if sweep.anchor_ids is None else by_row.spread(sweep.anchor_ids),
        normalize_anchors=sweep.normalize_contrasts,
        normalize_contrasts=sweep.normalize_anchors,
        both=False,
    )
    return replace(found, reverse=reverse.statistics(exact)[0])
