"""The prototype losses as Triton kernels. A program owns a row and reads it in pieces, with running largest scores.

A launch has one student and one or two teachers. Scores have any strides; all other tensors are contiguous.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..backends.triton_kernels import LOG2E, rounded

NOTHING = tl.constexpr(-3.4028234663852886e38)  # finite, so that differences are never NaN


@triton.jit
def score_piece(S, POTENTIAL, i, j, K, PER_ROW, PER_COLUMN, POSITIONS):
    """Columns j of row i as float32, plus its position's potential; -inf beyond the last column."""
    inside = j < K
    places = i * PER_ROW + j.to(tl.int64) * PER_COLUMN
    x = tl.load(S + places, mask=inside, other=float("-inf")).to(tl.float32)
    if POTENTIAL is not None:
        x += tl.load(POTENTIAL + (i % POSITIONS) * K + j, mask=inside, other=0.0)
    return x


@triton.jit
def mass_times(mass, distance):
    """0 for mass 0, although the distance from a score of -inf is infinite."""
    return tl.where(mass == 0.0, mass, mass * distance)


@triton.jit
def teacher_step(x, most, total, cross, scale):
    """One piece of a teacher's row: its exponentials, and the row's sums so far with the new largest score."""
    larger = tl.maximum(most, tl.max(x, 0))
    factor = tl.exp2((most - larger) * scale)
    return tl.exp2((x - larger) * scale), larger, total * factor, cross * factor


@triton.jit(do_not_specialize=["N", "POSITIONS"])
def prototype_forward_kernel(
    STUDENT,
    FIRST,
    SECOND,  # None: one teacher
    FIRST_POTENTIAL,  # [POSITIONS, K] or None
    SECOND_POTENTIAL,
    SCALES,  # [2] float64
    FACTORS,  # [2]: of the cross-entropies
    STUDENT_KEPT,  # [2, N], as the following
    FIRST_KEPT,
    SECOND_KEPT,
    VALUES,  # [N]: added to
    ENTROPIES,  # [N]: added to; None: not wanted
    N,
    K,
    POSITIONS,
    STUDENT_ROW,
    STUDENT_COLUMN,
    FIRST_ROW,
    FIRST_COLUMN,
    SECOND_ROW,
    SECOND_COLUMN,
    COLUMNS: tl.constexpr,
):
    i = tl.cast(tl.program_id(0), tl.int64)
    scale = tl.load(SCALES).to(tl.float32)
    by = (tl.load(SCALES) * LOG2E).to(tl.float32)
    teacher_by = (tl.load(SCALES + 1) * LOG2E).to(tl.float32)
    zero = tl.program_id(0).to(tl.float32) * 0.0
    most, total, less = zero + NOTHING, zero, zero
    first_most, first_total, first_cross = zero + NOTHING, zero, zero
    second_most, second_total, second_cross = zero + NOTHING, zero, zero
    for start in range(0, K, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        s = score_piece(STUDENT, None, i, j, K, STUDENT_ROW, STUDENT_COLUMN, POSITIONS)
        larger = tl.maximum(most, tl.max(s, 0))
        distances = tl.where(j < K, larger - s, 0.0)
        e = tl.where(j < K, tl.exp2(-distances * by), 0.0)
        further = larger - most
        factor = tl.exp2(-further * by)
        less = (less + further * total) * factor + tl.sum(mass_times(e, distances), 0)
        total = total * factor + tl.sum(e, 0)
        most = larger
        x = score_piece(FIRST, FIRST_POTENTIAL, i, j, K, FIRST_ROW, FIRST_COLUMN, POSITIONS)
        e, first_most, first_total, first_cross = teacher_step(x, first_most, first_total, first_cross, teacher_by)
        first_cross += further * first_total + tl.sum(mass_times(e, distances), 0)
        first_total += tl.sum(e, 0)
        if SECOND is not None:
            x = score_piece(SECOND, SECOND_POTENTIAL, i, j, K, SECOND_ROW, SECOND_COLUMN, POSITIONS)
            e, second_most, second_total, second_cross = teacher_step(
                x, second_most, second_total, second_cross, teacher_by
            )
            second_cross += further * second_total + tl.sum(mass_times(e, distances), 0)
            second_total += tl.sum(e, 0)
    log_sum = tl.log(total)
    value = tl.load(FACTORS) * (log_sum + first_cross / first_total * scale)
    tl.store(FIRST_KEPT + i, first_most)
    tl.store(FIRST_KEPT + N + i, first_total)
    if SECOND is not None:
        value += tl.load(FACTORS + 1) * (log_sum + second_cross / second_total * scale)
        tl.store(SECOND_KEPT + i, second_most)
        tl.store(SECOND_KEPT + N + i, second_total)
    tl.store(STUDENT_KEPT + i, most)
    tl.store(STUDENT_KEPT + N + i, total)
    tl.store(VALUES + i, tl.load(VALUES + i) + value)
    if ENTROPIES is not None:
        tl.store(ENTROPIES + i, tl.load(ENTROPIES + i) + log_sum + less / total * scale)


@triton.jit(do_not_specialize=["N", "POSITIONS"])
def prototype_backward_kernel(
    STUDENT,
    FIRST,
    SECOND,
    FIRST_POTENTIAL,
    SECOND_POTENTIAL,
    SCALES,
    FACTORS,
    STUDENT_KEPT,
    FIRST_KEPT,
    SECOND_KEPT,
    VALUES,  # gradients; None: 0
    ENTROPIES,
    COLUMN_SUMS,
    GRADIENT,  # [N, K], contiguous; may be the student
    N,
    K,
    POSITIONS,
    STUDENT_ROW,
    STUDENT_COLUMN,
    FIRST_ROW,
    FIRST_COLUMN,
    SECOND_ROW,
    SECOND_COLUMN,
    COLUMNS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    i = tl.cast(tl.program_id(0), tl.int64)
    scale = tl.load(SCALES).to(tl.float32)
    by = (tl.load(SCALES) * LOG2E).to(tl.float32)
    teacher_by = (tl.load(SCALES + 1) * LOG2E).to(tl.float32)
    most = tl.load(STUDENT_KEPT + i)
    total = tl.load(STUDENT_KEPT + N + i)
    log_sum = tl.log(total)
    weighted = total * 0.0
    entropy = total * 0.0
    if (ENTROPIES is not None) or (COLUMN_SUMS is not None):
        for start in range(0, K, COLUMNS):
            j = start + tl.arange(0, COLUMNS)
            s = score_piece(STUDENT, None, i, j, K, STUDENT_ROW, STUDENT_COLUMN, POSITIONS)
            distances = tl.where(j < K, most - s, 0.0)
            e = tl.where(j < K, tl.exp2(-distances * by), 0.0)
            entropy += tl.sum(mass_times(e, distances), 0)
            if COLUMN_SUMS is not None:
                weighted += tl.sum(e * tl.load(COLUMN_SUMS + j, mask=j < K, other=0.0), 0)
        entropy = log_sum + entropy / total * scale
        weighted = weighted / total
    for start in range(0, K, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        s = score_piece(STUDENT, None, i, j, K, STUDENT_ROW, STUDENT_COLUMN, POSITIONS)
        distances = tl.where(j < K, most - s, 0.0)
        p = tl.where(j < K, tl.exp2(-distances * by), 0.0) / total
        gradient = p * 0.0
        if VALUES is not None:
            x = score_piece(FIRST, FIRST_POTENTIAL, i, j, K, FIRST_ROW, FIRST_COLUMN, POSITIONS)
            q = tl.exp2((x - tl.load(FIRST_KEPT + i)) * teacher_by) / tl.load(FIRST_KEPT + N + i)
            gradient += tl.load(FACTORS) * (p - q)
            if SECOND is not None:
                x = score_piece(SECOND, SECOND_POTENTIAL, i, j, K, SECOND_ROW, SECOND_COLUMN, POSITIONS)
                q = tl.exp2((x - tl.load(SECOND_KEPT + i)) * teacher_by) / tl.load(SECOND_KEPT + N + i)
                gradient += tl.load(FACTORS + 1) * (p - q)
            gradient *= tl.load(VALUES + i)
        if COLUMN_SUMS is not None:
            gradient += p * (tl.load(COLUMN_SUMS + j, mask=j < K, other=0.0) - weighted)
        if ENTROPIES is not None:
            surprise = entropy - log_sum - distances * scale
            gradient -= tl.load(ENTROPIES + i) * tl.where(p == 0.0, p, p * surprise)
        written = rounded(gradient * scale, GRADIENT.dtype.element_ty, "ieee", INTERPRETED)
        tl.store(GRADIENT + i * K + j, written, mask=j < K)
