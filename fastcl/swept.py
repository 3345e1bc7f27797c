"""Statistics of a checked problem, from one sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .ops.backends.choose import choose_backend
from .ops.contrastive.direct import DirectMean, DirectStats, taken_apart
from .ops.contrastive.fields import ALL, FIELDS, NEGATIVES, OBSERVED, POSITIVES, TABLE
from .ops.contrastive.observed import part as observed_part
from .ops.contrastive.op import forward_op
from .ops.contrastive.records import Problem, Rows, flatten
from .ops.library import intercepted
from .ops.soft import op as soft_op


@dataclass(frozen=True, eq=False)
class ContrastiveStats:
    """Statistics of each anchor over its contrasts, or of each contrast over its anchors. Unwanted fields are None.

    Fields are ``[N]``, or ``[S, N]`` for ``[S]`` scales; counts are always ``[N]``. Logarithms are natural. An empty
    set has log-sum-exp ``-inf`` and sum 0; incoming gradients of such entries are ignored.
    """

    num_pos: Tensor
    """number of positives, in the fields' dtype; with assignments the sum of the weights, which has a gradient"""
    num_neg: Tensor
    """number of negatives, in the fields' dtype; with assignments admissible contrasts minus ``num_pos``"""
    lse_all: Tensor | None = None
    """log-sum-exp of the logits over all admissible contrasts"""
    lse_pos: Tensor | None = None
    """log-sum-exp over the positives"""
    lse_neg: Tensor | None = None
    """log-sum-exp over the negatives"""
    sum_pos: Tensor | None = None
    """sum of the logits over the positives"""
    sum_all: Tensor | None = None
    """sum of the logits over all admissible contrasts, found without a tile: it adds O((N + M) D) to the sweep"""
    max_pos: Tensor | None = None
    """largest logit of the positives, -inf if there are none; this field and the next three are detached"""
    max_neg: Tensor | None = None
    """largest logit of the negatives, -inf if there are none"""
    sum_neg: Tensor | None = None
    """sum of the logits over the negatives"""
    entropy: Tensor | None = None
    """entropy in nats of the softmax over all admissible contrasts; 0 if there are none"""
    softplus_pos: Tensor | None = None
    """sum over the positives of log(1 + exp(-s)); this field and the following sums have a sweep of their own"""
    softplus_neg: Tensor | None = None
    """sum over the negatives of log(1 + exp(s))"""
    hinge_pos: Tensor | None = None
    """sum over the positives of max(0, pos_margin - s)"""
    hinge_neg: Tensor | None = None
    """sum over the negatives of max(0, s - neg_margin)"""
    distance_pos: Tensor | None = None
    """sum over the positives of max(0, d - pos_margin), d the distance of the rows, normalised if they are"""
    distance_neg: Tensor | None = None
    """sum over the negatives of max(0, neg_margin - d)"""
    squared_pos: Tensor | None = None
    """sum over the positives of half the squares of max(0, d - pos_margin)"""
    squared_neg: Tensor | None = None
    """sum over the negatives of half the squares of max(0, neg_margin - d)"""
    active_pos: Tensor | None = None
    """number of positives whose hinge is not 0, detached; for calls with hinges of one kind"""
    active_neg: Tensor | None = None
    """number of negatives whose hinge is not 0, detached"""
    reverse: ContrastiveStats | None = None
    """with ``both=True`` the statistics of each contrast over the anchors, ``[M]``"""

    @property
    def valid(self) -> Tensor:
        """Bool ``[N]``: whether the sets of all wanted fields are non-empty in this row."""
        sizes = {ALL: self.num_pos + self.num_neg, POSITIVES: self.num_pos, NEGATIVES: self.num_neg}
        valid = torch.ones_like(self.num_pos, dtype=torch.bool)
        for over in {field.over for name, field in TABLE.items() if getattr(self, name, None) is not None}:
            valid = valid & (sizes[over] > 0)
        return valid


def statistics(p: Problem, exact: bool = False, quotients: bool = False) -> tuple[ContrastiveStats, Tensor | None]:
    """The wanted statistics of a checked problem, and the observed ones or None.

    Observed statistics are [10, S, N], or [10, S, N + M] with `both`.

    exact: fields are float64, and log-sum-exps are not rounded to the dtype of their sums. For formulas in which
        log-sum-exps cancel.
    quotients: with assignments, the caller uses only quotients of sum_pos and num_pos. Both then keep a common scale
        factor, so that they stay in float32's range.
    """
    if p.anchors.assignments is not None:
        return _soft_statistics(p, quotients), None
    order = [field for field in FIELDS if field in p.want]
    args = arguments(p, order, only_anchors(p))
    one_scale = p.logit_scale.dim() == 0
    if _is_intercepted(p):
        *outputs, observed = forward_op(*args)
        values = taken_apart(outputs, one_scale, order, p.both, exact)
    else:
        *values, observed = DirectStats.apply(*args, one_scale, exact)
    if not p.observe:
        return named(p, values), None
    return named(p, values, observed), observed


def mean_loss(p: Problem) -> tuple[Tensor, Tensor | None] | None:
    """The loss of `DirectMean`, one node of autograd's graph, and the observed statistics as `statistics` returns them.

    None if the formula itself has to be traced, or if there are no anchors or no contrasts.
    """
    if 0 in (p.anchors.values.shape[0], p.others.values.shape[0]) or _is_intercepted(p):
        return None
    found = DirectMean.apply(*arguments(p, list(p.want), only_anchors(p)), torch.is_grad_enabled())
    return found if p.observe else (found, None)


def named(p: Problem, values: Sequence[Tensor], observed: Tensor | None = None) -> ContrastiveStats:
    """The wanted fields by name, from values in the order of `taken_apart` and from observed statistics."""
    n, scale = p.anchors.values.shape[0], 0 if p.logit_scale.dim() == 0 else slice(None)
    order = [field for field in FIELDS if field in p.want]

    def side(values: Sequence[Tensor], rows: slice, reverse: ContrastiveStats | None) -> ContrastiveStats:
        *fields, num_pos, num_neg = values
        by_name = dict(zip(order, fields, strict=True))
        for name in OBSERVED:
            if observed is not None and name in p.want:
                by_name[name] = observed_part(observed, name)[scale, rows]
        return ContrastiveStats(num_pos, num_neg, **by_name, reverse=reverse)

    size = len(order) + 2
    other = side(values[size:], slice(n, None), None) if p.both else None
    return side(values[:size], slice(n), other)


def _soft_statistics(p: Problem, quotients: bool) -> ContrastiveStats:
    """The statistics of a problem with assignments."""
    dtype = p.dtype
    units = []

    def at_unit(rows: Rows) -> Rows:
        assert rows.assignments is not None
        assignments, unit = soft_op.at_unit(rows.assignments)
        units.append(unit)
        bias = None if rows.bias is None else rows.bias.to(dtype)
        return Rows(rows.values, None, rows.ids, bias, assignments, normalize=rows.normalize)

    anchors, contrasts = at_unit(p.anchors), None if p.contrasts is None else at_unit(p.contrasts)
    problem = Problem(anchors, contrasts, None, p.logit_scale.to(dtype).reshape(1), ["lse_all", "sum_pos"], p.both)
    own, other = soft_op.statistics(problem, choose_backend(p.device, dtype, "soft_assignments"))
    unit = units[0] * units[-1]

    def side(found: soft_op.SoftSide, reverse: ContrastiveStats | None) -> ContrastiveStats:
        lse_all, *sums = found.fields.unbind(0)
        if not quotients:
            sums = [(value.double() * unit).to(dtype) for value in sums]
        sum_pos, num_pos = sums
        fields = {"lse_all": lse_all, "sum_pos": sum_pos}
        wanted = {name: field for name, field in fields.items() if name in p.want}
        return ContrastiveStats(num_pos, found.size - num_pos, **wanted, reverse=reverse)

    return side(own, side(other, None) if p.both else None)


def only_anchors(p: Problem) -> bool:
    """Whether of both sets and the scale only the anchors need a gradient."""
    others = p.logit_scale.requires_grad or (p.contrasts is not None and p.contrasts.values.requires_grad)
    return torch.is_grad_enabled() and p.anchors.values.requires_grad and not others


def arguments(p: Problem, want: list[str], only_anchors: bool, backend: str | None = None) -> tuple[Any, ...]:
    """The operator's arguments. backend: None: the chosen one."""
    anchors, contrasts = p.anchors, p.contrasts
    dtype = p.dtype
    scales, bias = p.logit_scale.to(dtype).reshape(-1), p.others.bias
    # If only the anchors need a gradient, as with a queue, the forward can save the backward its sweep.
    family = p.family
    unusual = family == "pair_rules" or p.hard_negatives is not None
    anchors_only = only_anchors and contrasts is not None and not (unusual or p.both or bias is not None)
    if bias is not None and bias.dtype != dtype:  # torch 2.6 cannot compile _replace
        values, clusters, ids, _, _, *rules, normalize = p.others
        others = Rows(values, clusters, ids, bias.to(dtype), None, *rules, normalize)  # type: ignore[arg-type, call-arg]
        anchors, contrasts = (others, None) if contrasts is None else (anchors, others)
    hard = p.hard_negatives
    problem = Problem(
        anchors, contrasts, p.positives, scales, want, p.both, anchors_only, p.observe, hard_negatives=hard
    )
    return *flatten(problem), backend or choose_backend(p.device, dtype, family)


def _is_intercepted(p: Problem) -> bool:
    contrasts = None if p.contrasts is None else p.contrasts.values
    found = intercepted(p.anchors.values, contrasts, p.positives, p.logit_scale, p.others.bias, p.hard_negatives)
    if found and not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None:
        raise NotImplementedError(
            "fastcl.contrastive_stats: torch.jit.trace is not supported, torch.export and torch.compile are"
        )
    return found
