"""Statistics of contrastive logits. Every loss is a formula of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import (
    LARGEST,
    check_assignments,
    check_bias,
    check_device,
    check_flag,
    check_floating,
    check_ids,
    check_rows,
    finite_number,
    scalar_tensor,
    shown,
    values_visible,
)
from .guide import Guide, check_guide, with_guide
from .ops.backends.rows import accumulation_dtype
from .ops.contrastive.fields import OBSERVED, PAIR_FIELDS, TABLE
from .ops.contrastive.records import Problem, Rows
from .ops.pair_maps import KINDS
from .ops.pairs.op import pair_sums
from .ops.pairs.records import Pairs, Sums, two_sets
from .swept import ContrastiveStats, statistics
from .tags import are_tags, check_tags, packed, shared_tags


def contrastive_stats(
    anchors: Tensor,
    contrasts: Tensor | None = None,
    anchor_clusters: Tensor | None = None,
    contrast_clusters: Tensor | None = None,
    *,
    logit_scale: float | Tensor = 1.0,
    normalize_anchors: bool = False,
    normalize_contrasts: bool = False,
    contrast_bias: Tensor | None = None,
    anchor_ids: Tensor | None = None,
    contrast_ids: Tensor | None = None,
    want: Iterable[str] = ("lse_all", "sum_pos"),
    both: bool = False,
    anchor_assignments: Tensor | None = None,
    contrast_assignments: Tensor | None = None,
    pos_margin: float = 0.0,
    neg_margin: float = 0.0,
    anchor_groups: Tensor | None = None,
    contrast_groups: Tensor | None = None,
    guide: Guide | None = None,
) -> ContrastiveStats:
    r"""Statistics of contrastive logits, in one pass that never stores the logits.

    The logits are

    .. math:: s_{ij} = \text{logit\_scale} \cdot a_i \, c_j \, \langle x_i, y_j \rangle + \text{bias}_j

    :math:`a_i` and :math:`c_j` are 1 or, for cosine similarity, the inverse norms of the rows. Norms are floored at
    1e-12; a row of zeros has similarity 0 and gradient 0. The admissible contrasts A_i of anchor i are all j != i in
    self-contrast, and with two sets all j without the anchor's sample id. Its positives P_i are the contrasts in A_i
    of the anchor's cluster; its negatives N_i are the rest of A_i.

    A contrastive loss is a formula of the result. SupCon, for instance::

        s = contrastive_stats(z, anchor_clusters=labels, logit_scale=1 / 0.07, normalize_anchors=True)
        loss = (s.lse_all - s.sum_pos / s.num_pos)[s.valid].mean()

    Args:
        anchors: ``[N, D]``; float64, float32, bfloat16 or float16.
        contrasts: ``[M, D]``, or None for self-contrast: the anchors are the contrasts too.
        anchor_clusters: ``[N]`` integers. A negative number means no cluster. None: there are no positives. Or bool
            ``[N, T]``: tags, of which a positive shares at least one.
        contrast_clusters: ``[M]`` integers, or bool ``[M, T]``. With two sets, give both clusters or neither.
        logit_scale: 1 / temperature; a number, a tensor ``[]``, or ``[S]`` scales at once.
        normalize_anchors, normalize_contrasts: cosine similarity.
        contrast_bias: ``[M]``, added to the contrast's logits (for instance minus a log frequency). -inf leaves the
            contrast out of every set and count; in the other direction it has no admissible anchors.
        anchor_ids, contrast_ids: ``[N]`` and ``[M]`` integers. A pair of equal ids is inadmissible. A negative number
            means no id.
        want: any of ``"lse_all"``, ``"lse_pos"``, ``"lse_neg"``, ``"sum_pos"``, ``"sum_all"``, and of the fields
            without a gradient, ``"max_pos"``, ``"max_neg"``, ``"sum_neg"``, ``"entropy"``. Only these are computed.
            Sums of a function of each pair: ``"softplus_pos"``, ``"hinge_pos"``, ``"distance_pos"``, ``"squared_pos"``
            and the same with ``_neg``; each of the four kinds takes a sweep of its own, with ``both`` two, and one per
            scale. :class:`ContrastiveStats` has the formulas. Distances know no scale and no bias.
        both: with two sets, ``.reverse`` holds each contrast's statistics over the anchors, from the same sweep.
        anchor_assignments: ``[N, C]`` floating, >= 0, in place of clusters. Contrast j is then a positive of weight
            w_ij = <r_i, r_j>: ``sum_pos`` is the sum of w_ij s_ij over A_i, ``num_pos`` is the sum of w_ij, and
            ``lse_all`` does not change. ``want`` may name only ``"lse_all"`` and ``"sum_pos"``, and there is one scale.
        contrast_assignments: ``[M, C]``, with two sets.
        pos_margin, neg_margin: margins of the hinges: of logits, or of distances.
        anchor_groups, contrast_groups: ``[N]`` and, with two sets, ``[M]`` integers. A pair of different groups is
            inadmissible; a row with a negative number has no admissible pair. Other tiles are not visited.
        guide: a :class:`Guide`, which makes pairs inadmissible that it finds too similar and that are no positives.
            Tags, groups and a guide go neither with assignments, sums of a function of each pair, nor ``"sum_all"``.

    Returns:
        :class:`ContrastiveStats`, differentiable once in anchors, contrasts, logit_scale, contrast_bias and
        assignments. float32, or float64 if a set of rows is float64. Rows of two dtypes are multiplied in the wider
        one. With assignments, in rows whose weights sum to 0, gradients of ``sum_pos`` and ``num_pos`` that are not
        finite are ignored: a formula divides by ``num_pos``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: on a second derivative.
    """
    check_rows("anchors", anchors)
    n = anchors.shape[0]
    for name, flag in (
        ("normalize_anchors", normalize_anchors), ("normalize_contrasts", normalize_contrasts), ("both", both)
    ):  # fmt: skip
        check_flag(name, flag)
    if contrasts is not None:
        check_rows("contrasts", contrasts, like=anchors)
        m = contrasts.shape[0]
    else:
        m = n
        for name, value in (
            ("contrast_clusters", contrast_clusters), ("anchor_ids", anchor_ids), ("contrast_ids", contrast_ids),
            ("contrast_groups", contrast_groups),
        ):  # fmt: skip
            if value is not None:
                raise ValueError(f"{name}: expected None for self-contrast (contrasts=None), got a value")
        if both:
            raise ValueError("both: expected False for self-contrast (contrasts=None), got True")
        if normalize_contrasts and not normalize_anchors:
            raise ValueError(
                "normalize_contrasts: expected False for self-contrast (contrasts=None) with normalize_anchors=False, "
                "got True"
            )
    if anchor_assignments is not None or contrast_assignments is not None:
        for name, value in (("anchor_clusters", anchor_clusters), ("contrast_clusters", contrast_clusters)):
            if value is not None:
                raise ValueError(f"{name}: expected None with assignments, got a value")
        check_assignments("anchor_assignments", anchor_assignments, (n,), anchors.device)
        if contrasts is not None:
            check_assignments("contrast_assignments", contrast_assignments, (m,), anchors.device, anchor_assignments)
        elif contrast_assignments is not None:
            raise ValueError("contrast_assignments: expected None for self-contrast (contrasts=None), got a value")
    tags = _tags(anchor_clusters, contrast_clusters, n, None if contrasts is None else m, anchors.device)
    if tags is not None:
        anchor_clusters = contrast_clusters = None
    ids: dict[str, Tensor | None] = {}
    for left, right, values in (
        ("anchor_clusters", "contrast_clusters", (anchor_clusters, contrast_clusters)),
        ("anchor_groups", "contrast_groups", (anchor_groups, contrast_groups)),
        ("anchor_ids", "contrast_ids", (anchor_ids, contrast_ids)),
    ):
        if contrasts is not None and (values[0] is None) != (values[1] is None):
            given, absent = (left, right) if values[1] is None else (right, left)
            raise ValueError(f"{absent}: expected a tensor, as {given} is given, got None")
        for name, value, length in zip((left, right), values, (n, m), strict=True):
            if value is not None:
                check_ids(name, value, length, anchors.device)
            ids[name] = None if value is None else value.to(torch.int64).clamp(min=-1)
    if contrast_bias is not None:
        check_bias(contrast_bias, m, anchors.device)
    scale, wanted = _scale_tensor(logit_scale, anchors, accumulation_dtype(anchors, contrasts)), _check_want(want)
    if anchor_assignments is not None:
        if scale.dim():
            raise ValueError(f"logit_scale: expected one scale with assignments, got shape {list(scale.shape)}")
        if not {"lse_all", "sum_pos"}.issuperset(wanted):
            raise ValueError(f"want: expected some of 'lse_all', 'sum_pos' with assignments, got {wanted!r}")
    clusters, sample_ids, bias = ids["anchor_clusters"], ids["anchor_ids"], contrast_bias if contrasts is None else None
    ruled = tags is not None or anchor_groups is not None or guide is not None
    if ruled:
        _check_ruled(wanted, anchor_assignments, guide, contrast_bias if both else None)
    own_tags, other_tags = tags or (None, None)
    own = Rows(
        anchors, clusters, sample_ids, bias, anchor_assignments, own_tags, groups=ids["anchor_groups"],
        normalize=normalize_anchors,
    )  # fmt: skip
    others = None
    if contrasts is not None:
        clusters, sample_ids = ids["contrast_clusters"], ids["contrast_ids"]
        others = Rows(
            contrasts, clusters, sample_ids, contrast_bias, contrast_assignments, other_tags,
            groups=ids["contrast_groups"], normalize=normalize_contrasts,
        )  # fmt: skip
    if guide is not None:
        own, others = with_guide(guide, own, others, (n,), both, False)
    margins = finite_number("pos_margin", pos_margin), finite_number("neg_margin", neg_margin)
    kinds = tuple(dict.fromkeys(TABLE[field].pair_map for field in wanted if field in PAIR_FIELDS))
    if any(KINDS[kind].of_distance for kind in kinds):
        if isinstance(logit_scale, Tensor) or logit_scale != 1:
            raise ValueError(f"logit_scale: expected 1 for sums of distances, got {shown(logit_scale)}")
        if contrast_bias is not None:
            raise ValueError("contrast_bias: expected None for sums of distances, got a value")
    rest = tuple(field for field in wanted if field not in PAIR_FIELDS)
    observe = any(field in OBSERVED for field in rest)
    problem = Problem(own, others, None, scale, rest, both, observe=observe)
    found = statistics(problem)[0] if rest or not kinds else None
    return with_pair_sums(found, problem, wanted, kinds, margins) if kinds else found  # type: ignore[return-value]


def _tags(
    own: Tensor | None, other: Tensor | None, n: int, m: int | None, device: torch.device
) -> tuple[Tensor, Tensor] | None:
    """The packed tags of anchors and contrasts, or None. m: None for self-contrast."""
    if not are_tags(own):
        return None
    assert own is not None
    check_tags("anchor_clusters", own, n, device)
    if m is not None:
        check_tags("contrast_clusters", other, m, device, own.shape[1])
    own, other = shared_tags(own, other)
    words = packed(own)
    return words, words if other is None else packed(other)


def _check_ruled(
    wanted: Sequence[str], assignments: Tensor | None, guide: Guide | None, bias_both_ways: Tensor | None
) -> None:
    """ValueError for what tags, groups and a guide do not support."""
    if assignments is not None:
        raise ValueError("anchor_assignments: expected None with tags, groups or a guide, got a value")
    for field in wanted:
        if field in PAIR_FIELDS or field == "sum_all":
            raise ValueError(f"want: expected other fields with tags, groups or a guide, got {field!r}")
    if guide is not None:
        check_guide(guide)
        if bias_both_ways is not None:
            raise ValueError("contrast_bias: expected None with guide and both=True, got a value")


def with_pair_sums(
    found: ContrastiveStats | None,
    p: Problem,
    wanted: Sequence[str],
    kinds: Sequence[str],
    margins: tuple[float, float],
) -> ContrastiveStats:
    """`found`, or new statistics, with the wanted sums over pairs."""
    sides = _pair_sums(p, kinds, margins)
    of_hinge = [kind for kind in kinds if KINDS[kind].margins]

    def fields(side: dict[str, list[Sums]], known: ContrastiveStats | None) -> dict[str, Any]:
        def of_scales(values: list[Tensor]) -> Tensor:
            return torch.stack(values) if p.logit_scale.dim() else values[0]

        counts = next(iter(side.values()))[0].counts
        by_name: dict[str, Any] = {"num_pos": counts[0], "num_neg": counts[1]}
        for name in () if known is None else ("num_pos", "num_neg", *TABLE):
            if name not in PAIR_FIELDS:
                by_name[name] = getattr(known, name)
        for name in wanted:
            if name in PAIR_FIELDS:
                k = int(name.endswith("_neg"))
                by_name[name] = of_scales([sums.values[k] for sums in side[TABLE[name].pair_map]])
        if len(of_hinge) == 1:
            for k, name in enumerate(("active_pos", "active_neg")):
                by_name[name] = of_scales([sums.active[k] for sums in side[of_hinge[0]]])
        return by_name

    reverse = None
    if p.both:
        reverse = ContrastiveStats(**fields(sides[1], None if found is None else found.reverse))
    return ContrastiveStats(**fields(sides[0], found), reverse=reverse)


def _pair_sums(p: Problem, kinds: Sequence[str], margins: tuple[float, float]) -> list[dict[str, list[Sums]]]:
    """By kind the sums for each scale: of the anchors and, with `both`, of the contrasts."""
    anchors, contrasts = two_sets(p.anchors, p.contrasts, p.anchors.bias is not None)
    scales = p.logit_scale.reshape(-1).unbind()

    def side(left: Rows, right: Rows | None, offset: Tensor | None) -> dict[str, list[Sums]]:
        return {kind: [pair_sums(Pairs(left, right, s, offset, kind, *margins)) for s in scales] for kind in kinds}

    sides = [side(anchors, contrasts, None)]
    if p.both and contrasts is not None:
        left_out = None if contrasts.bias is None else contrasts.bias == -torch.inf
        values, clusters, ids, bias, *_, normalize = contrasts
        if bias is not None and left_out is not None:  # a contrast that takes no part has no sums
            values, bias = values.masked_fill(left_out[:, None], 0), bias.masked_fill(left_out, 0)
        found = side(Rows(values, clusters, ids, normalize=normalize), anchors, bias)
        if left_out is not None:
            found = {
                kind: [Sums(*(part.masked_fill(left_out, 0) for part in sums)) for sums in of_scales]
                for kind, of_scales in found.items()
            }
        sides.append(found)
    return sides


def _check_want(want: Iterable[str]) -> tuple[str, ...]:
    known = tuple(TABLE)
    expected = f"want: expected some of {', '.join(map(repr, known))}"
    if isinstance(want, (str, Tensor)) or not isinstance(want, Iterable):
        raise TypeError(f"{expected} in a tuple or list, got {shown(want)}")
    fields = tuple(want)
    if not all(isinstance(field, str) and field in known for field in fields):
        raise ValueError(f"{expected}, got {shown(fields)}")
    return fields


def _scale_tensor(value: float | Tensor, anchors: Tensor, dtype: torch.dtype) -> Tensor:
    if isinstance(value, Tensor):
        check_floating("logit_scale", value)
        if value.dim() > 1 or value.numel() == 0:
            raise ValueError(f"logit_scale: expected shape [] or [S], got {list(value.shape)}")
        if values_visible(value) and not bool((value.abs() <= LARGEST).all()):
            raise ValueError(f"logit_scale: expected finite numbers in the range of float32, got {value.tolist()}")
        if value.dim() == 1:
            check_device("logit_scale", value, anchors.device)
            return value
    else:
        value = finite_number("logit_scale", value)
    return scalar_tensor("logit_scale", value, anchors.device, dtype)
