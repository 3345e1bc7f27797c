"""Rules of a call about pairs: tags, groups, a guide, hard negatives, and pairs that stay in spite of equal ids."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_flag, check_ids, check_rows, check_tensor
from ..distributed import World
from ..guide import Guide, check_guide, guide_problem, smallest, thresholds, with_guide
from ..ops.contrastive.records import Problem, Rows
from ..ops.library import uncompiled
from ..tags import are_tags, check_tags, packed, shared_tags, shared_words
from .batch import Batch, Tensors, of_pairs, per_row
from .gathered import gathered_statistics
from .options import LossOptions


def has_rules(given: Tensors) -> bool:
    return (
        given.groups is not None
        or given.contrast_groups is not None
        or given.guide is not None
        or given.hard_negatives is not None
        or given.keep_pairs is not False
        or (given.contrasts is None and given.ids is not None)
        or (given.clusters is not None and are_tags(given.clusters))
    )


def ruled(given: Tensors, found: Batch, options: LossOptions) -> Batch:
    """The batch with the call's rules. found: of `batch`, which takes tags for no clusters.

    `with_thresholds` comes after it, if a guide's thresholds depend on other processes' rows.
    """
    rows = len(found.anchors.values)
    stored = any(kind for _, kind in found.parts)
    count = sum(length for length, kind in found.parts if not kind)  # contrasts that are tensors
    tags, contrast_tags = _tags(given, found, rows, count, bool(options.gather))
    groups, contrast_groups = _groups(given, found, rows, count, stored)
    samples, contrast_samples = _samples(given, found, rows, count)
    own, other = found.anchors, found.contrasts
    anchors = Rows(own.values, own.clusters, own.ids, own.bias, None, tags, samples, groups, normalize=own.normalize)
    contrasts = None
    if other is not None:
        contrasts = Rows(
            other.values, other.clusters, other.ids, other.bias, None, contrast_tags, contrast_samples, contrast_groups,
            normalize=other.normalize,
        )  # fmt: skip
    if given.guide is not None:
        anchors, contrasts = _guided(given.guide, found, anchors, contrasts, options, stored)
    return Batch(
        anchors, contrasts, found.positives, found.shape, found.views, found.by_sample, found.aligned, found.parts,
        _hard_negatives(given, found),
    )  # fmt: skip


def _tags(given: Tensors, found: Batch, rows: int, count: int, gathered: bool) -> tuple[Tensor | None, Tensor | None]:
    """The packed tags of anchors and contrasts."""
    if not are_tags(given.clusters):
        return None, None
    own, n, device = given.clusters, found.shape[0], found.anchors.values.device
    assert own is not None
    check_tags("clusters", own, n, device)
    other = given.contrast_clusters
    if other is not None:
        check_tags("contrast_clusters", other, count, device, own.shape[1])
    stored = any(kind for _, kind in found.parts)
    if not gathered and not stored:  # other processes may share further tags; those of stored rows are packed
        own, other = shared_tags(own, other)
    own = per_row(packed(own), found.views)
    if found.contrasts is None:
        return own, own
    of_tensors = of_pairs(own, count, 0) if other is None else packed(other)
    if not stored:
        return own, of_tensors
    known = found.contrasts.tags
    if known is None:  # the stored rows are negatives only
        known = own.new_zeros(len(found.contrasts.values), own.shape[1])
    others = _with_tensors(known, of_tensors, found)
    return (own, others) if gathered else shared_words(own, others)


def _with_tensors(values: Tensor, of_tensors: Tensor, found: Batch) -> Tensor:
    """`values` [M, ...] of all contrasts, with those of tensors in their places."""
    pieces = iter(of_tensors.split([length for length, kind in found.parts if not kind]))
    parts = zip(values.split([length for length, _ in found.parts]), found.parts, strict=True)
    return torch.cat([piece if kind else next(pieces) for piece, (_, kind) in parts])


def _groups(given: Tensors, found: Batch, rows: int, count: int, stored: bool) -> tuple[Tensor | None, Tensor | None]:
    if given.groups is None:
        if given.contrast_groups is not None:
            raise ValueError("groups: expected a tensor, as contrast_groups is given, got None")
        return None, None
    n, device = found.shape[0], found.anchors.values.device
    check_ids("groups", given.groups, n, device)
    if stored:
        raise ValueError("groups: expected None with a queue or bank, which stores no groups, got a value")
    own = given.groups.to(torch.int64)
    own = per_row(torch.where(own < 0, torch.arange(-2, -2 - n, -1, device=device), own), found.views)
    if found.contrasts is None:
        if given.contrast_groups is not None:
            raise ValueError("contrast_groups: expected None for self-contrast (contrasts=None), got a value")
        return own, own
    if given.contrast_groups is None:
        if count != rows:
            raise ValueError(
                f"contrast_groups: expected a tensor, as there are {rows} anchor rows and {count} contrasts, got None"
            )
        return own, own
    check_ids("contrast_groups", given.contrast_groups, count, device)
    other = given.contrast_groups.to(torch.int64)
    private = per_row(torch.arange(-2, -2 - n, -1, device=device), found.views)
    return own, torch.where(other < 0, of_pairs(private, count), other)


def _samples(given: Tensors, found: Batch, rows: int, count: int) -> tuple[Tensor | None, Tensor | None]:
    """Numbers of samples whose pairs stay although their ids are equal."""
    device = found.anchors.values.device
    if found.contrasts is None:
        if given.ids is None or found.views == 1:  # the diagonal is left out in any case
            return None, None
        own = per_row(torch.arange(found.shape[0], device=device), found.views)
        return own, own
    if not given.keep_pairs:
        return None, None
    places = torch.arange(rows, device=device)
    none = places.new_full((len(found.contrasts.values),), -1)
    return places, _with_tensors(none, of_pairs(places, count), found)


def _guided(
    guide: Guide,
    found: Batch,
    anchors: Rows,
    contrasts: Rows | None,
    options: LossOptions,
    stored: bool,
) -> tuple[Rows, Rows | None]:
    """The rows with the guide's rows and, unless they depend on other processes' rows, thresholds."""
    check_guide(guide)
    if stored:
        raise ValueError("guide: expected None with a queue or bank, which stores no guide rows, got a Guide")
    if found.positives is not None and guide.threshold is None:
        raise ValueError("guide.threshold: expected a tensor with positives, whose guide rows are unknown, got None")
    if found.others().bias is not None and options.symmetric:
        raise ValueError("contrast_bias: expected None with guide and symmetric=True, got a value")
    paired = found.aligned and found.views == 1 and contrasts is not None and anchors.tags is None
    elsewhere = World.of(options.gather, options.group) is not None
    both = options.symmetric and contrasts is not None
    return with_guide(guide, anchors, contrasts, found.shape, both, paired, elsewhere)


def with_thresholds(guide: Guide | None, rows: Batch, options: LossOptions) -> Batch:
    """The batch of `ruled` with the guide's thresholds, for which all processes' rows are swept once more if needed.

    It is called after all of a process's own checks, as `World.agree` is.
    """
    if guide is None or rows.anchors.thresholds is not None:
        return rows
    world = World.of(options.gather, options.group)
    assert world is not None
    found: Batch = _over_processes(world, guide, rows, options)
    return found


@uncompiled  # processes could compile different graphs, with collectives that do not match
@torch.no_grad()
def _over_processes(world: World, guide: Guide, rows: Batch, options: LossOptions) -> Batch:
    anchors, contrasts = rows.anchors, rows.contrasts
    both = options.symmetric and contrasts is not None
    p = Problem(anchors, contrasts, None, anchors.values.new_ones(1), (), both)
    sweep = guide_problem(p)
    posed = rows._replace(anchors=sweep.anchors, contrasts=sweep.contrasts, positives=None, hard_negatives=None)
    _, observed = gathered_statistics(world, options.gather, sweep, posed, False, "Guide", {})
    assert observed is not None
    own, back = (thresholds(guide, cosines, p.dtype) for cosines in smallest(observed, len(anchors.values)))
    if contrasts is not None and both:
        contrasts = contrasts._replace(thresholds=back)
    return rows._replace(anchors=anchors._replace(thresholds=own), contrasts=contrasts)


def _hard_negatives(given: Tensors, found: Batch) -> Tensor | None:
    """[R, H, D]."""
    rows = given.hard_negatives
    if rows is None:
        return None
    (n, *views), embeddings = found.shape, given.embeddings
    shapes = [f"[{n}, H, {embeddings.shape[-1]}]"]
    if views:
        shapes.insert(0, f"[{n}, {views[0]}, H, {embeddings.shape[-1]}]")
    check_tensor("hard_negatives", rows)
    fits = rows.dim() == 3 and len(rows) == n
    fits = fits or (rows.dim() == 4 and bool(views) and list(rows.shape[:2]) == [n, *views])
    if not fits or rows.shape[-1] != embeddings.shape[-1]:
        raise ValueError(f"hard_negatives: expected shape {' or '.join(shapes)}, got {list(rows.shape)}")
    check_rows("hard_negatives", rows.flatten(0, -2), like=embeddings)
    return rows.flatten(0, 1) if rows.dim() == 4 else per_row(rows, found.views)


RULES = ("groups", "contrast_groups", "guide", "hard_negatives", "keep_pairs")


def check_rules(given: Tensors, options: LossOptions) -> None:
    """ValueError for rules that do not go with each other or with the options."""
    check_flag("keep_pairs", given.keep_pairs)
    if given.keep_pairs:  # checked to be a bool
        if given.contrasts is None:
            raise ValueError("keep_pairs: expected False for self-contrast (contrasts=None), got True")
        if given.contrast_clusters is not None:
            raise ValueError("keep_pairs: expected False with contrast_clusters, got True")
        if given.ids is None:
            raise ValueError("ids: expected a tensor with keep_pairs=True, got None")
    alone = given.contrasts is None and given.ids is not None
    if options.form == "pairs":
        raise ValueError(f"form: expected 'outside' or 'inside' with {_first(given)}, got 'pairs'")
    filters = given.groups is not None or given.guide is not None or given.keep_pairs or alone
    if options.label_smoothing and filters:
        raise ValueError(f"label_smoothing: expected 0 with {_first(given)}, got {options.label_smoothing}")


def _first(given: Tensors) -> str:
    """The name of a rule of the call."""
    for name in RULES:
        value = getattr(given, name)
        if value is not None and value is not False:
            return name
    return "tags as clusters" if are_tags(given.clusters) else "ids in self-contrast"
