"""The truth in float64, the definition of errors, and the errors that are allowed.

Nothing here uses fastcl: the formulas are plain PyTorch in blocks of rows, so no case is too large for float64. The
same formulas in float32 are "eager PyTorch", and their error sets the tolerance (`tests.support.tolerances`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cases import TEMPERATURE, Case, Inputs
from tests.support.tolerances import HALF_ROWS, error_bound

# A peer with a larger error, relative to the terms that cancel, is wrong. One that breaks the rule but stays below this
# is marked as imprecise.
IMPRECISE = 1e-4
BLOCK_BYTES = 2**28  # of logits in a block
MANY_PAIRS = 2**26  # larger cases use only one evaluation in float32


@dataclass(frozen=True)
class Evaluation:
    """Loss and gradients of a case, and the terms that cancel in them.

    In the loss this is the log-sum-exp. In gradients the terms of the positives and of the softmax cancel first; each
    has rows of about 1 / (N temperature |x|) (`terms`). The projection then cancels a part of their sum
    (`unprojected`).
    """

    loss: Tensor
    log_sum: Tensor
    gradients: tuple[Tensor, ...]  # in the order of Inputs.leaves
    unprojected: tuple[Tensor, ...]
    terms: tuple[float, ...]  # norms


@dataclass(frozen=True)
class Errors:
    """Relative errors in the norm (for gradients the worst one), and their limits.

    right: within the rule. near: within IMPRECISE of the terms that cancel, so the formula is right but less precise.
    """

    loss: float
    gradient: float
    loss_allowed: float
    gradient_allowed: float
    right: bool
    near: bool


@dataclass(frozen=True)
class Truth:
    """The evaluations with which results of a case are compared: one in float64, and a few in float32."""

    exact: Evaluation
    eager: tuple[Evaluation, ...]
    dtype: torch.dtype

    def judge(self, loss: Tensor, gradients: tuple[Tensor, ...]) -> Errors:
        exact, eager = self.exact, self.eager
        half_rows = self.dtype if self.dtype in HALF_ROWS else None
        losses = self._compare(loss, exact.loss, [e.loss for e in eager], exact.log_sum, abs(exact.log_sum.item()))
        worst = max(
            (
                self._compare(
                    gradient,
                    exact.gradients[i],
                    [e.gradients[i] for e in eager],
                    exact.unprojected[i],
                    exact.terms[i],
                    half_rows,
                )
                for i, gradient in enumerate(gradients)
            ),
            key=lambda c: c.error / c.allowed if c.error == c.error else math.inf,
        )
        return Errors(
            losses.error,
            worst.error,
            losses.allowed,
            worst.allowed,
            right=losses.error <= losses.allowed and worst.error <= worst.allowed,  # False for NaN
            near=losses.error <= losses.near and worst.error <= worst.near,
        )

    def _compare(
        self,
        got: Tensor,
        truth: Tensor,
        eager: list[Tensor],
        magnitude: Tensor,
        cancelling: float,
        half_rows: torch.dtype | None = None,
    ) -> _Comparison:
        size = truth.norm().item()
        allowed = error_bound(truth, eager, got.dtype, half_rows=half_rows, magnitude=magnitude) / size
        near = (IMPRECISE + HALF_ROWS.get(self.dtype, 0.0)) * cancelling / size
        error = (got.detach().to(truth) - truth).norm().item() / size
        return _Comparison(error, allowed, max(near, allowed))


class _Comparison(NamedTuple):
    """Relative to the norm of the truth."""

    error: float
    allowed: float
    near: float


def truth(case: Case, inputs: Inputs) -> Truth:
    draws = 1 if case.n * case.m > MANY_PAIRS else 3
    eager = tuple(_evaluate(inputs, torch.float32, order) for order in range(draws))
    return Truth(_evaluate(inputs, torch.float64), eager, case.dtype)


def _evaluate(inputs: Inputs, dtype: torch.dtype, order: int = 0) -> Evaluation:
    """order: seed of a permutation of the features, which rounds the same formula differently; 0: no permutation."""
    d = inputs.anchors.shape[1]
    features = torch.randperm(d, generator=torch.Generator().manual_seed(order)) if order else torch.arange(d)
    features = features.to(inputs.anchors.device)
    rows = [leaf.detach()[:, features].to(dtype) for leaf in inputs.leaves]
    unit = [F.normalize(r, dim=1).requires_grad_() for r in rows]
    n = len(rows[0])
    if inputs.queue is not None and inputs.keys is not None:
        key = F.normalize(inputs.keys[:, features].to(dtype), dim=1)
        losses = [_sweep(unit[0], F.normalize(inputs.queue[:, features].to(dtype), dim=1), key=key)]
    elif inputs.contrasts is not None:
        losses = [_sweep(unit[0], unit[1], weight=0.5), _sweep(unit[1], unit[0], weight=0.5)]
    else:
        losses = [_sweep(unit[0], unit[0], clusters=inputs.clusters)]
    loss, log_sums = (torch.stack(parts).sum() / n for parts in zip(*losses, strict=True))
    gradients, unprojected, terms = [], [], []
    for row, u in zip(rows, unit, strict=True):
        assert u.grad is not None
        before = u.grad / n / row.norm(dim=1, keepdim=True)
        projected = before - u.detach() * (u.detach() * before).sum(1, keepdim=True)
        gradients.append(projected[:, features.argsort()])
        unprojected.append(before)
        terms.append((1 / row.norm(dim=1)).norm().item() / (n * TEMPERATURE))
    return Evaluation(loss, log_sums, tuple(gradients), tuple(unprojected), tuple(terms))


def _sweep(
    x: Tensor, y: Tensor, *, clusters: Tensor | None = None, key: Tensor | None = None, weight: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Sums over the anchors x of their losses and of their log-sum-exps; gradients accumulate in x and y."""
    total, log_sums = x.new_zeros(()), x.new_zeros(())
    block = max(BLOCK_BYTES // (len(y) * x.element_size()), 1)
    for first in range(0, len(x), block):
        rows = x[first : first + block]
        place = torch.arange(len(rows), device=x.device)
        logits = rows @ y.T / TEMPERATURE
        if clusters is not None:
            logits = logits.index_put((place, place + first), logits.new_tensor(-torch.inf))
            positive = clusters[first : first + block, None] == clusters
            positive[place, place + first] = False
            mean_positive = torch.where(positive, logits, 0).sum(1) / positive.sum(1)
        elif key is not None:
            mean_positive = (rows * key[first : first + block]).sum(1) / TEMPERATURE
            logits = torch.cat((mean_positive[:, None], logits), 1)
        else:
            mean_positive = logits[place, place + first]
        log_sum = logits.logsumexp(1)
        loss = weight * (log_sum - mean_positive).sum()
        loss.backward()
        total += loss.detach()
        log_sums += weight * log_sum.detach().sum()
    return total, log_sums
