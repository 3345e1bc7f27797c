"""What every backend receives and returns, and a problem as arguments of an operator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from ..backends.rows import accumulation_dtype
from .fields import ALL, NEGATIVES, POSITIVES, TABLE, log_sums


class Rows(NamedTuple):
    """One set of rows, and what belongs to each row. Ids are int64; -1 equals nothing, not even itself."""

    values: Tensor  # [N, D]
    clusters: Tensor | None = None  # [N]; None in both sets: there are no positives
    ids: Tensor | None = None  # [N]; a pair of equal ids is inadmissible
    bias: Tensor | None = None  # [N], added to the logits in which these rows are contrasts; -inf leaves a row out
    assignments: Tensor | None = None  # [N, C], >= 0, in place of clusters: <r_i, r_j> is the weight of positive i, j
    normalize: bool = False  # cosine similarity: rows enter the logits with norm 1


@dataclass(eq=False)
class Problem:
    """One sweep over the logits ``s_ij = logit_scale * a_i * c_j * <x_i, y_j> + bias_j``, S scales at once."""

    anchors: Rows  # N
    contrasts: Rows | None  # M; None: self-contrast, the anchors are the contrasts, without the diagonal
    positives: Tensor | None  # [N, D]: one more positive of each anchor; a contrast of that anchor only
    logit_scale: Tensor  # [S]; in the front also []
    want: Sequence[str]  # of FIELDS, in that order; with assignments lse_all and sum_pos
    both: bool = False  # also the statistics of each contrast over the anchors
    # The backward will ask for the anchors' gradient only: the forward may leave what makes a second sweep unnecessary.
    anchors_only: bool = False
    observe: bool = False  # also what `observed` describes, of each side
    partial: bool = False  # more will be added to the gradients of rows, so they stay in `dtype`

    @property
    def others(self) -> Rows:
        """The rows that are contrasts; in self-contrast the anchors."""
        return self.anchors if self.contrasts is None else self.contrasts

    @property
    def dtype(self) -> torch.dtype:
        """Of logits, sums and statistics: float64 where a set of rows is float64, else float32."""
        return accumulation_dtype(self.anchors.values, self.others.values, self.positives)

    @property
    def device(self) -> torch.device:
        return self.anchors.values.device

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(S, N, M)"""
        return self.logit_scale.shape[0], self.anchors.values.shape[0], self.others.values.shape[0]

    @property
    def left_out(self) -> Tensor | None:
        """Bool [M]: the contrasts that a bias of -inf leaves out of every set; None: there are none."""
        if (bias := self.others.bias) is None:
            return None
        left_out = bias == -torch.inf
        return left_out if self.device.type != "cpu" or bool(left_out.any()) else None  # waits for no device

    @property
    def log_sums(self) -> tuple[str, ...]:
        """The wanted fields that are log-sum-exps."""
        return log_sums(self.want)


# Problems as arguments of an operator.

_SCHEMA = {Tensor: "Tensor", Tensor | None: "Tensor?", bool: "bool", Sequence[str]: "str[]"}
OF_ROWS = len(Rows._fields) - 1  # tensors of a set of rows; the last field of `Rows` is a flag


def _arguments() -> dict[str, str]:
    """The type of each argument that `flatten` makes, by name; the tensors come first."""
    found = {}
    for side in ("anchor", "contrast"):
        for name, kind in get_type_hints(Rows).items():
            found[f"{side}_{name}"] = "Tensor?" if side == "contrast" and kind is Tensor else _SCHEMA[kind]
    others = ("anchors", "contrasts", "partial")
    found |= {name: _SCHEMA[kind] for name, kind in get_type_hints(Problem).items() if name not in others}
    return dict(sorted(found.items(), key=lambda item: "Tensor" not in item[1]))  # stable


ARGUMENTS = _arguments()
SCHEMA = ", ".join(f"{kind} {name}" for name, kind in ARGUMENTS.items())
TENSORS = sum("Tensor" in kind for kind in ARGUMENTS.values())
PLACES = {name: k for k, name in enumerate(ARGUMENTS)}


def flatten_rows(rows: Rows | None) -> tuple[Any, ...]:
    """The tensors of a set of rows."""
    if rows is None:
        return (None,) * OF_ROWS
    *tensors, _ = rows  # not a slice, which torch 2.6 does not compile
    return tuple(tensors)


def unflatten_rows(tensors: Sequence[Any], normalize: bool) -> Rows | None:
    """The set of rows that was flattened."""
    return None if tensors[0] is None else Rows(*tensors, normalize)  # type: ignore[call-arg]


def flatten(p: Problem) -> tuple[Any, ...]:
    """The problem as `ARGUMENTS`."""
    anchors, contrasts = p.anchors, p.contrasts
    return (
        *flatten_rows(anchors),
        *flatten_rows(contrasts),
        p.positives,
        p.logit_scale,
        anchors.normalize,
        contrasts is not None and contrasts.normalize,
        p.want,
        p.both,
        p.anchors_only,
        p.observe,
    )


def unflatten(arguments: Sequence[Any]) -> Problem:
    """The problem that was flattened."""
    k = OF_ROWS
    positives, logit_scale, normalize, normalize_contrasts, *rest = arguments[2 * k :]
    anchors = Rows(*arguments[:k], normalize)  # type: ignore[call-arg]
    contrasts = unflatten_rows(arguments[k : 2 * k], normalize_contrasts)
    return Problem(anchors, contrasts, positives, logit_scale, *rest)


class Side(NamedTuple):
    """Statistics of one side: each anchor over the contrasts, or each contrast over the anchors."""

    fields: Tensor  # [W, S, N]: the wanted fields
    counts: Tensor  # [2, N]: positives, negatives; with assignments, the sum of weights, and all admissible pairs
    # [2, L, S, N]: for each wanted log-sum-exp a shift and the sum of exp(s_ij - shift). The backward needs them
    # apart: their log-sum rounds at the size of the logits, the quotient exp(s_ij - shift) / sum does not.
    parts: Tensor
    observed: Tensor | None = None  # [10, S, N]: see `observed`; None: not asked for


def new_side(p: Problem, size: int) -> Side:
    """A side of `size` rows to be filled in."""
    s, new = p.sizes[0], p.logit_scale.new_empty
    return Side(new(len(p.want), s, size), new(2, size), new(2, len(p.log_sums), s, size))


def empty_side(p: Problem) -> Side:
    """The side that is not wanted."""
    return new_side(p, 0)


class Statistics(NamedTuple):
    anchors: Side
    contrasts: Side  # of size 0 unless Problem.both
    anchor_inverse_norms: Tensor  # [N], or [0] where the rows are taken as they are
    contrast_inverse_norms: Tensor  # [M], or [0]
    saved: Tensor  # [R]: what else the backend wants to find again in the backward; R is its `saved_size`


class Gradients(NamedTuple):
    """None where not needed. Rows are still in the accumulation dtype and already projected."""

    anchors: Tensor | None  # [N, D]
    contrasts: Tensor | None  # [M, D]
    logit_scale: Tensor | None  # [S]; or float64
    bias: Tensor | None  # [M]
    positives: Tensor | None = None  # [N, D]
    anchor_assignments: Tensor | None = None  # [N, C]
    contrast_assignments: Tensor | None = None  # [M, C]


class Needs(NamedTuple):
    """Which gradients are needed, as in `Gradients`."""

    anchors: bool = False
    contrasts: bool = False
    logit_scale: bool = False
    bias: bool = False
    positives: bool = False
    anchor_assignments: bool = False
    contrast_assignments: bool = False


def _gradient_places(contrasts: bool) -> tuple[int, ...]:
    names = {name: name for name in Gradients._fields}
    names |= {"anchors": "anchor_values", "contrasts": "contrast_values"}
    names["bias"] = "contrast_bias" if contrasts else "anchor_bias"
    return tuple(PLACES[names[name]] for name in Gradients._fields)


_GRADIENT_PLACES = _gradient_places(False), _gradient_places(True)


def gradient_places(arguments: Sequence[Any]) -> tuple[int, ...]:
    """Among `ARGUMENTS` the place of what each of `Gradients` is the gradient of."""
    return _GRADIENT_PLACES[arguments[OF_ROWS] is not None]


def pair_weights(left: Tensor, right: Tensor) -> Tensor:
    """<r_i, r_j> [N, M] of assignments; what overflows is the largest number, so that 0 times it is 0."""
    weights = left @ right.T
    return weights.clamp_(max=torch.finfo(weights.dtype).max)


def largest_bias(bias: Tensor) -> Tensor:
    """The largest |bias| of a contrast that is not left out, [1]."""
    return bias.masked_fill(bias == -torch.inf, 0).abs().amax().reshape(1)


def largest_base(bases: Tensor, there: Tensor) -> Tensor:
    """Of the bases [B, S, N] of sums in B blocks that of their sum, [S, N]; 0 where no block has anything to sum.

    there: bool [B, N], where a block has.
    """
    largest = bases.masked_fill(~there[:, None], -torch.inf).amax(0)
    return largest.masked_fill(largest == -torch.inf, 0)


def merge_bases(found: Tensor, counts: Tensor, sums: Tensor | None) -> Tensor:
    """Bases of sums over all, negatives and positives, [B, 3, S, N] of B blocks, as one, [3, S, N].

    counts: the blocks' [B, 2, N]. sums: ignored.
    """
    positives, negatives = (counts > 0).unbind(1)
    there = (positives | negatives, negatives, positives)
    return torch.stack([largest_base(found[:, k], those) for k, those in enumerate(there)])


def over_sets(p: Problem, grad: Tensor, counts: Tensor) -> Tensor:
    """Gradients [W, S, N] of fields whose set is empty become zero: the fields are constants there.

    A user's formula may well divide by a count of zero in a row that it masks out, and send NaN back.
    """
    if grad.numel() == 0:
        return grad
    positives, negatives = counts
    admissible = positives + negatives if p.anchors.assignments is None else negatives
    sizes = {ALL: admissible, POSITIVES: positives, NEGATIVES: negatives}
    present = torch.stack([sizes[TABLE[name].over] > 0 for name in p.want])
    return torch.where(present[:, None], grad, 0)
