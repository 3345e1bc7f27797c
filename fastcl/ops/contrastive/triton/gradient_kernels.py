"""Triton kernel of the backward: the gradient of the rows that a program owns, over all columns.

`gradient_kernel` forms the logits again, with the forward's roundings, and from them G, a logit's gradient as far as
it concerns rows and columns: the owner's share (its softmax over the columns), the others' share (each column's softmax
over the rows), or both, as in self-contrast. G meets its positive term in float32, and is rounded once, norms
included, for the product with the columns. No two programs write to the same place.

What a side brings is [5, N], 0 where it has nothing to say:

    0, 1  base and weight of the negatives: 2^(t - base) * weight
    2, 3  the same of the positives
    4     what a positive gets on top: the gradient of the sum of positives' logits
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...backends.triton_kernels import (
    AS_THE_KERNEL,
    LOG2E,
    admissible_pairs,
    base2_logits,
    column_walk,
    in_cluster,
    inner_products,
    interior_tile,
    load_names,
    load_or,
    load_rows,
    masked_logits,
    mixed_tile,
    product,
    rounded,
    share_of,
    similarities,
)


@triton.jit
def load_side(SIDE, k: tl.constexpr, size, places, mask, MASKED: tl.constexpr):
    """Row k of a side's [5, size]."""
    values = SIDE + tl.cast(size, tl.int64) * k + places
    if MASKED:
        loaded = tl.load(values, mask=mask, other=0.0)
    else:
        loaded = tl.load(values)
    return loaded


@triton.jit
def share(t, base, weight, positive_base, positive_weight, extra, pairs, MIXED: tl.constexpr):
    """One side's share of G. All but t and pairs are [BLOCK_M, 1] or [1, BLOCK_N]."""
    if MIXED:
        base = tl.where(pairs, positive_base, base)
        weight = tl.where(pairs, positive_weight, weight)
    g = tl.exp2(t - base) * weight
    if MIXED:
        g += tl.where(pairs, extra, 0.0)
    return g


@triton.jit
def tile_gradient(
    t, j, is_column, pairs, middle, own_base, own_weight, own_positive_base, own_positive_weight, own_extra, OTHER, M,
    OWN: tl.constexpr, OTHERS: tl.constexpr, ONE_EXPONENTIAL: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """G of a tile [BLOCK_M, BLOCK_N] in float32. ONE_EXPONENTIAL: the weights belong to one base, `middle`."""
    other_weight = 0.0
    other_base = 0.0
    other_positive_base = 0.0
    other_positive_weight = 0.0
    other_extra = 0.0
    if OTHERS:
        other_weight = load_side(OTHER, 1, M, j, is_column, MIXED)[None, :]
        if not ONE_EXPONENTIAL:
            other_base = load_side(OTHER, 0, M, j, is_column, MIXED)[None, :]
        if MIXED:
            other_positive_weight = load_side(OTHER, 3, M, j, is_column, MIXED)[None, :]
            other_extra = load_side(OTHER, 4, M, j, is_column, MIXED)[None, :]
            if not ONE_EXPONENTIAL:
                other_positive_base = load_side(OTHER, 2, M, j, is_column, MIXED)[None, :]
    if ONE_EXPONENTIAL:
        weight = own_weight[:, None] + other_weight
        if MIXED:
            weight = tl.where(pairs, own_positive_weight[:, None] + other_positive_weight, weight)
        g = tl.exp2(t - middle) * weight
        if MIXED:
            g += tl.where(pairs, own_extra[:, None] + other_extra, 0.0)
    else:
        g = tl.zeros(t.shape, tl.float32)
        if OWN:
            g += share(
                t, own_base[:, None], own_weight[:, None], own_positive_base[:, None], own_positive_weight[:, None],
                own_extra[:, None], pairs, MIXED,
            )  # fmt: skip
        if OTHERS:
            g += share(
                t, other_base, other_weight, other_positive_base, other_positive_weight, other_extra, pairs, MIXED
            )
    return g


@triton.jit
def sweep_gradient(
    X, Y, A, C, ROW_BIAS, COLUMN_BIAS, START, END, ROW_NAMES, COLUMN_NAMES, SCALE, SIDE, OTHER, MIDDLE,
    GRADIENT, SIMILARITY_SUMS, SUMS, N, M,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    SELF: tl.constexpr, CLUSTERS: tl.constexpr, IDS: tl.constexpr, NORMED: tl.constexpr, BIAS: tl.constexpr,
    OWN: tl.constexpr, OTHERS: tl.constexpr, ONE_EXPONENTIAL: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One program's part of the gradient; SPLIT: summed over one part of the columns (`share_of`)."""
    part = tl.program_id(2)
    parts = tl.num_programs(2)
    dtype: tl.constexpr = Y.dtype.element_ty
    bits: tl.constexpr = Y.dtype.element_ty.primitive_bitwidth
    i0 = tl.program_id(0) * BLOCK_M
    d0 = tl.program_id(1) * BLOCK_D
    i = i0 + tl.arange(0, BLOCK_M)
    is_row = i < N
    scale = tl.load(SCALE) * LOG2E
    a = load_or(A, i, is_row, 0.0)
    row_bias = load_or(ROW_BIAS, i, is_row, 0.0)
    row_names = load_names(ROW_NAMES, i, is_row, IDS)
    middle = 0.0
    if ONE_EXPONENTIAL:
        middle = tl.load(MIDDLE)
    base = tl.zeros([BLOCK_M], tl.float32)
    weight = base
    positive_base = base
    positive_weight = base
    extra = base
    if OWN:
        base = load_side(SIDE, 0, N, i, is_row, True)
        weight = load_side(SIDE, 1, N, i, is_row, True)
    interior, mixed, first, hole, last, full = column_walk(START, END, i0, N, M, BLOCK_M, BLOCK_N, SELF, CLUSTERS, IDS)
    x = 0.0
    if BLOCK_K == D:
        x = load_rows(X, i0, 0, N, D, BLOCK_M, BLOCK_K, True, PRECISION, INTERPRETED)
    gradient = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    similarity_sums = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M], tl.float32)

    from_, to = share_of(interior, part, parts, SPLIT)
    for step in range(from_, to):
        j0 = interior_tile(step, first, hole) * BLOCK_N
        j = j0 + tl.arange(0, BLOCK_N)
        y = 0.0
        if BLOCK_K == D:
            y = load_rows(Y, j0, 0, M, D, BLOCK_N, BLOCK_K, False, PRECISION, INTERPRETED)
        c = 0.0
        if NORMED:
            c = tl.load(C + j)
        column_bias = 0.0
        if BIAS == 1:
            column_bias = tl.load(COLUMN_BIAS + j)
        dots = inner_products(X, Y, x, y, i0, j0, N, M, D, BLOCK_M, BLOCK_N, BLOCK_K, False, PRECISION, INTERPRETED)
        similarity = similarities(dots, a, c, NORMED)
        t = base2_logits(similarity, scale, row_bias, column_bias, BIAS)
        g = tile_gradient(
            t, j, j, t, middle, base, weight, positive_base, positive_weight, extra, OTHER, M,
            OWN, OTHERS, ONE_EXPONENTIAL, False,
        )  # fmt: skip
        if SIMILARITY_SUMS is not None:
            similarity_sums += tl.sum(g * similarity, 1)
        if SUMS is not None:
            sums += tl.sum(g, 1)
        if NORMED:
            g = g * c[None, :]
        if BLOCK_D == D and BLOCK_K == D:
            columns = y
        else:
            columns = load_rows(Y, j0, d0, M, D, BLOCK_N, BLOCK_D, False, PRECISION, INTERPRETED)
        gradient = product(rounded(g, dtype, PRECISION, INTERPRETED), columns, gradient, PRECISION, INTERPRETED)

    # Loaded here, not above, so that they take no registers in the loop over interior tiles.
    start = tl.zeros([BLOCK_M], tl.int32)
    end = start
    if CLUSTERS:
        start = tl.load(START + i, mask=is_row, other=0)
        end = tl.load(END + i, mask=is_row, other=0)
    if OWN:
        positive_base = load_side(SIDE, 2, N, i, is_row, True)
        positive_weight = load_side(SIDE, 3, N, i, is_row, True)
        extra = load_side(SIDE, 4, N, i, is_row, True)
    from_, to = share_of(mixed, part, parts, SPLIT)
    # Whole 16-bit rows are copied ahead: on their way through registers they would spill.
    for step in tl.range(
        from_, to, num_stages=AS_THE_KERNEL if IDS or (BLOCK_K == D and (D > 256 and bits == 16)) else 1
    ):
        j0 = mixed_tile(step, first, last, full) * BLOCK_N
        j = j0 + tl.arange(0, BLOCK_N)
        is_column = j < M
        y, c, column_bias, column_names, similarity, t = masked_logits(
            X, Y, C, COLUMN_BIAS, COLUMN_NAMES, x, a, row_bias, scale, i0, j0, N, M,
            D, BLOCK_M, BLOCK_N, BLOCK_K, IDS, NORMED, BIAS, PRECISION, INTERPRETED,
        )  # fmt: skip
        admissible = admissible_pairs(i, j, N, M, row_names, column_names, row_bias, column_bias, SELF, IDS, BIAS)
        pairs = admissible & in_cluster(j, start, end)
        g = tile_gradient(
            t, j, is_column, pairs, middle, base, weight, positive_base, positive_weight, extra, OTHER, M,
            OWN, OTHERS, ONE_EXPONENTIAL, True,
        )  # fmt: skip
        g = tl.where(admissible, g, 0.0)
        if SIMILARITY_SUMS is not None:
            similarity_sums += tl.sum(g * similarity, 1)
        if SUMS is not None:
            sums += tl.sum(g, 1)
        if NORMED:
            g = g * c[None, :]
        if BLOCK_D == D and BLOCK_K == D:
            columns = y
        else:
            columns = load_rows(Y, j0, d0, M, D, BLOCK_N, BLOCK_D, True, PRECISION, INTERPRETED)
        gradient = product(rounded(g, dtype, PRECISION, INTERPRETED), columns, gradient, PRECISION, INTERPRETED)

    first_row = tl.cast(0, tl.int64)
    if SPLIT:
        first_row = part.to(tl.int64) * N
    d = d0 + tl.arange(0, BLOCK_D)
    r = tl.arange(0, BLOCK_M)
    stored = is_row
    if D > 256:  # the compiler would keep what it compared for the load of x, and spill it
        stored = r < N - i0
    places = GRADIENT + (first_row + i0) * D + (r[:, None] * D + d[None, :])
    tl.store(places, gradient, mask=stored[:, None])
    if d0 == 0:
        if SIMILARITY_SUMS is not None:
            tl.store(SIMILARITY_SUMS + first_row + i0 + r, similarity_sums, mask=stored)
        if SUMS is not None:
            tl.store(SUMS + first_row + i0 + r, sums, mask=stored)


@triton.jit(do_not_specialize=["N", "M"])
def gradient_kernel(
    X, Y, A, C, ROW_BIAS, COLUMN_BIAS, START, END, ROW_NAMES, COLUMN_NAMES, SCALE, SIDE, OTHER, MIDDLE, ONE,
    GRADIENT, SIMILARITY_SUMS, SUMS, N, M,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    SELF: tl.constexpr, CLUSTERS: tl.constexpr, IDS: tl.constexpr, NORMED: tl.constexpr, BIAS: tl.constexpr,
    OWN: tl.constexpr, OTHERS: tl.constexpr, ONE_EXPONENTIAL: tl.constexpr, SOME: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A program: rows [i0, i0 + BLOCK_M) and columns [d0, d0 + BLOCK_D) of the gradient, sum_j G_ij c_j y_j.

    GRADIENT [N, D] float32. SIMILARITY_SUMS, SUMS [N], where there are any: sum_j of G_ij times similarity, and of G.
    ONE [1]: 1 where one exponential serves both sides. Of the two kernels launched, the other one then does nothing.
    SPLIT: a program has one part of the columns, and GRADIENT [parts, N, D] and both sums [parts, N] one part each.
    SOME: the gradient of row blocks without a positive is there already.
    """
    needed = tl.load(ONE) == ONE_EXPONENTIAL
    if SOME:
        i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        range_ = tl.load(END + i, mask=i < N, other=0) - tl.load(START + i, mask=i < N, other=0)
        needed = needed & (tl.max(range_, 0) > 0)
    if needed:
        sweep_gradient(
            X, Y, A, C, ROW_BIAS, COLUMN_BIAS, START, END, ROW_NAMES, COLUMN_NAMES, SCALE, SIDE, OTHER, MIDDLE,
            GRADIENT, SIMILARITY_SUMS, SUMS, N, M,
            D, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_D, SELF, CLUSTERS, IDS, NORMED, BIAS,
            OWN, OTHERS, ONE_EXPONENTIAL, SPLIT, PRECISION, INTERPRETED,
        )  # fmt: skip
