"""The table of statistics: for every field its set and its kind of sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..pair_maps import KINDS

ALL, POSITIVES, NEGATIVES = "all", "positives", "negatives"  # A_i, P_i and N_i = A_i without P_i


class Field(NamedTuple):
    """One statistic of the logits of a row."""

    over: str  # the set that it runs over: ALL, POSITIVES or NEGATIVES
    log_sum: bool = False  # log-sum-exp of the logits, kept as a shift and a sum; else a plain sum
    # False: the sum is linear in the contrasts. `linear` computes it from sums of rows, and backends never see it.
    swept: bool = True
    # False: has no gradient; backends return it in `Side.observed`.
    differentiable: bool = True
    # Of `pair_maps.KINDS`: a sum of a function of each pair alone, which the operators of `ops.pairs` compute.
    pair_map: str = ""


TABLE = {
    "lse_all": Field(ALL, log_sum=True),
    "lse_pos": Field(POSITIVES, log_sum=True),
    "lse_neg": Field(NEGATIVES, log_sum=True),
    "sum_pos": Field(POSITIVES),
    "sum_all": Field(ALL, swept=False),
    "max_pos": Field(POSITIVES, differentiable=False),
    "max_neg": Field(NEGATIVES, differentiable=False),
    "sum_neg": Field(NEGATIVES, differentiable=False),
    "entropy": Field(ALL, differentiable=False),
    **{
        f"{kind}_{side}": Field(over, pair_map=kind)
        for kind in KINDS
        for side, over in (("pos", POSITIVES), ("neg", NEGATIVES))
    },
}
"""The fields by name. Their order, log-sums first, is the order in which backends return them."""

FIELDS = tuple(name for name, field in TABLE.items() if field.differentiable and not field.pair_map)
SWEPT = tuple(name for name in FIELDS if TABLE[name].swept)
OBSERVED = tuple(name for name, field in TABLE.items() if not field.differentiable)
PAIR_FIELDS = tuple(name for name, field in TABLE.items() if field.pair_map)
LOG_SUMS = frozenset(name for name, field in TABLE.items() if field.log_sum)


def log_sums(want: Sequence[str]) -> tuple[str, ...]:
    """The wanted fields that are log-sum-exps."""
    return tuple(name for name in want if name in LOG_SUMS)
