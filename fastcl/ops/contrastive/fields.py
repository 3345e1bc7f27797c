"""The table of statistics: every field that can be wanted, and what it sums over which set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

ALL, POSITIVES, NEGATIVES = "all", "positives", "negatives"  # A_i, P_i and N_i = A_i without P_i


class Field(NamedTuple):
    """One statistic of the logits of a row."""

    over: str  # the set that it runs over: ALL, POSITIVES or NEGATIVES
    log_sum: bool = False  # log-sum-exp of the logits, kept as a shift and a sum; else their plain sum
    # False: the sum is linear in the contrasts, so `linear` finds it from sums of rows and no backend sees it.
    swept: bool = True
    # False: for reading only, without a gradient; a backend that is asked to `observe` returns it.
    differentiable: bool = True


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
}
"""By name. A backend keeps the fields that it sweeps in this order, log-sums first."""

FIELDS = tuple(name for name, field in TABLE.items() if field.differentiable)
SWEPT = tuple(name for name in FIELDS if TABLE[name].swept)
OBSERVED = tuple(name for name, field in TABLE.items() if not field.differentiable)
LOG_SUMS = frozenset(name for name, field in TABLE.items() if field.log_sum)


def log_sums(want: Sequence[str]) -> tuple[str, ...]:
    """The wanted fields that are log-sum-exps."""
    return tuple(name for name in want if name in LOG_SUMS)
