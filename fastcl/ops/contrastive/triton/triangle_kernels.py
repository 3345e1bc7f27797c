"""Triton kernels of the forward of self-contrast in which each two blocks of rows meet once.

s_ij = s_ji, so one exponential serves row i and row j. The blocks of BLOCK_N rows lie on a circle, and each meets those
up to half way around:

    offset        1  2  3                   of 7 blocks, block 5 meets 6, 0 and 1;
    block 5  ──►  6  0  1                   2, 3 and 4 meet block 5

Only whole blocks meet here, and only those without a positive between them: then every pair is an admissible negative.
`statistics_kernel` with MIXED_ONLY and square tiles of BLOCK_N rows finds everything else about the rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...backends.triton_kernels import (
    INF,
    LOG2E,
    base2_logits,
    fixed_shift,
    load_or,
    load_rows,
    product,
    similarities,
)
from .statistics_kernels import row_places


@triton.jit
def share_of_circle(program, programs, groups, full):
    """(group, span, begin, end, first): the meetings of a program with full blocks on the circle.

    Offsets are in groups of `span`, so that a program meets few blocks. `programs` is a multiple of `groups`. A group's
    meetings are numbered block * span + offset, and the program's are [begin, end), of the blocks from `first` on.
    """
    span = tl.cdiv(full // 2, groups)
    group = program % groups
    meetings = full * tl.cast(span, tl.int64)
    shares = programs // groups
    begin = meetings * (program // groups) // shares
    end = meetings * (program // groups + 1) // shares
    return group, span, begin, end, (begin // span).to(tl.int32)


@triton.jit
def met_rows(nearest, step, full, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The first row of a step: BLOCK_M rows of the blocks from `nearest` on, which go around the circle."""
    i0 = nearest * BLOCK_N + step * BLOCK_M
    return tl.where(i0 >= full * BLOCK_N, i0 - full * BLOCK_N, i0)


@triton.jit
def exponentials(
    x, y, a, c, scale, base, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    NORMED: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """2^(t_ij - base) [BLOCK_M, BLOCK_N] of x [BLOCK_M, D] and y [D, BLOCK_N], with inverse norms a and c."""
    dots = product(x, y, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION, INTERPRETED)
    return tl.exp2(base2_logits(similarities(dots, a, c, NORMED), scale, 0.0, 0.0, 0) - base)


@triton.jit
def halved(e, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Sums [BLOCK_M // 16, 8, BLOCK_N] of the rows of e that one thread holds: half as many registers as e."""
    return tl.sum(tl.reshape(e, [BLOCK_M // 16, 2, 8, BLOCK_N]), 1)


@triton.jit(do_not_specialize=["WIDTH", "GROUPS", "HELD", "N"])
def triangle_kernel(
    X, A, START, END, SCALE, LONGEST, PARTIAL_SUMS, WIDTH, GROUPS, HELD, N,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CLUSTERS: tl.constexpr, NORMED: tl.constexpr,
    AHEAD: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """PARTIAL_SUMS [programs, WIDTH], zeroed: the sums of 2^(t - shift) of each program's meetings, by row.

    First those of HELD blocks, from its first one on; then those of the blocks that they meet; the last BLOCK_N are of
    `remainder_kernel`. Only the program writes to its part, in a fixed order.

    A held block's rows are the columns of its tiles: their sums stay in registers until it has met all. The others are
    the tiles' rows, BLOCK_M at a time: as a warp holds whole rows, their sums need two shuffles. AHEAD: registers hold
    the rows of the next tile, for which shared memory has no room.
    """
    scale = tl.load(SCALE) * LOG2E
    shift, narrow = fixed_shift(scale, LONGEST, None)
    if narrow:
        full = N // BLOCK_N
        ratio: tl.constexpr = BLOCK_N // BLOCK_M
        program = tl.program_id(0)
        group, span, begin, end, first = share_of_circle(program, tl.num_programs(0), GROUPS, full)
        steps = tl.minimum(span, full // 2 - group * span)
        own = PARTIAL_SUMS + program.to(tl.int64) * WIDTH
        rows = tl.arange(0, BLOCK_M)
        columns = tl.arange(0, BLOCK_N)
        for block in range(first, tl.cdiv(end, span).to(tl.int32)):
            j0 = block * BLOCK_N
            from_ = tl.maximum(begin - block * tl.cast(span, tl.int64), 0).to(tl.int32)
            to = tl.minimum(end - block * tl.cast(span, tl.int64), steps).to(tl.int32)
            nearest = block + 1 + group * span  # of the group's offsets; counted on beyond the last block
            if (2 * block >= full) & (full % 2 == 0):  # two opposite blocks meet once
                to = tl.minimum(to, full // 2 - 1 - group * span)
            if CLUSTERS:
                low = tl.load(START + j0) // BLOCK_N
                high = tl.cdiv(tl.load(END + j0 + BLOCK_N - 1), BLOCK_N)
                from_ = tl.maximum(from_, tl.minimum(high, full) - nearest)
                to = tl.minimum(to, full + low - nearest)
            y = tl.trans(load_rows(X, j0, 0, N, D, BLOCK_N, D, False, PRECISION, INTERPRETED))
            sums = tl.zeros([BLOCK_M // 16, 8, BLOCK_N], tl.float32)
            met = own + (HELD + block - first) * BLOCK_N
            if AHEAD:
                i0 = met_rows(nearest, from_ * ratio, full, BLOCK_M, BLOCK_N)
                following = load_rows(X, i0, 0, N, D, BLOCK_M, D, False, PRECISION, INTERPRETED)
            for step in range(from_ * ratio, to * ratio):
                i0 = met_rows(nearest, step, full, BLOCK_M, BLOCK_N)
                if AHEAD:
                    x = following
                    i1 = met_rows(nearest, step + 1, full, BLOCK_M, BLOCK_N)
                    following = load_rows(X, i1, 0, N, D, BLOCK_M, D, False, PRECISION, INTERPRETED)
                else:
                    x = load_rows(X, i0, 0, N, D, BLOCK_M, D, False, PRECISION, INTERPRETED)
                place = met + step * BLOCK_M + rows
                before = tl.load(place)
                a = 0.0
                c = 0.0
                if NORMED:
                    a = tl.load(A + i0 + rows)
                    c = tl.load(A + j0 + columns)  # each time: it would take 32 registers
                e = exponentials(x, y, a, c, scale, shift, BLOCK_M, BLOCK_N, NORMED, PRECISION, INTERPRETED)
                sums += halved(e, BLOCK_M, BLOCK_N)
                tl.store(place, before + tl.sum(e, 1))
            tl.store(own + (block - first) * BLOCK_N + columns, tl.sum(tl.sum(sums, 0), 0))
            tl.debug_barrier()  # what one thread has stored, another may load for the next block


@triton.jit(do_not_specialize=["WIDTH", "N"])
def remainder_kernel(
    X, A, START, SCALE, LONGEST, PARTIAL_SUMS, WIDTH, N,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CLUSTERS: tl.constexpr, NORMED: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The last BLOCK_N of PARTIAL_SUMS [programs, WIDTH]: the sums of the rows beyond the last whole block.

    They are over the blocks before their first row's cluster. A program: a part of these blocks, and BLOCK_M rows.
    """
    scale = tl.load(SCALE) * LOG2E
    shift, narrow = fixed_shift(scale, LONGEST, None)
    if narrow:
        full = N // BLOCK_N
        last = full
        if CLUSTERS:
            last = tl.load(START + full * BLOCK_N) // BLOCK_N
        inside = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
        i0 = full * BLOCK_N + tl.program_id(1) * BLOCK_M
        is_row = full * BLOCK_N + inside < N
        base = tl.where(is_row, shift, INF)[:, None]
        x = load_rows(X, i0, 0, N, D, BLOCK_M, D, True, PRECISION, INTERPRETED)
        a = 0.0
        if NORMED:
            a = load_or(A, full * BLOCK_N + inside, is_row, 0.0)
        sums = tl.zeros([BLOCK_M], tl.float32)
        for block in tl.range(tl.program_id(0), last, tl.num_programs(0), num_stages=1):
            j0 = block * BLOCK_N
            y = tl.trans(load_rows(X, j0, 0, N, D, BLOCK_N, D, False, PRECISION, INTERPRETED))
            c = 0.0
            if NORMED:
                c = tl.load(A + j0 + tl.arange(0, BLOCK_N))
            e = exponentials(x, y, a, c, scale, base, BLOCK_M, BLOCK_N, NORMED, PRECISION, INTERPRETED)
            sums += tl.sum(e, 1)
        tl.store(PARTIAL_SUMS + tl.program_id(0).to(tl.int64) * WIDTH + (WIDTH - BLOCK_N) + inside, sums)


@triton.jit
def partial(own, start, inside, mask):
    """Sums [BLOCK] over programs of the numbers at `start` [programs] + `inside` [BLOCK] of their own parts."""
    places = own[:, None] + start[:, None] + inside[None, :]
    return tl.sum(tl.load(places, mask=mask[:, None] & (inside >= 0)[None, :], other=0.0), 0)


@triton.jit(do_not_specialize=["WIDTH", "PROGRAMS", "GROUPS", "HELD", "N"])
def triangle_total_kernel(
    SCALE, LONGEST, PARTIAL_SUMS, ORDER, TOTAL, WIDTH, PROGRAMS, GROUPS, HELD, N,
    BLOCK_N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """TOTAL [N] += the rows' PARTIAL_SUMS [PROGRAMS, WIDTH] of `triangle_kernel`, in order, 16 programs at a time.

    A program: BLOCK rows of one block.
    """
    _shift, narrow = fixed_shift(tl.load(SCALE) * LOG2E, LONGEST, None)
    if narrow:
        full = N // BLOCK_N
        i0 = tl.program_id(0) * BLOCK
        block = i0 // BLOCK_N
        i = i0 + tl.arange(0, BLOCK)
        is_row = i < N
        inside = i % BLOCK_N
        places = row_places(ORDER, i, N)
        total = tl.load(TOTAL + places, mask=is_row, other=0.0)
        for start in range(0, PROGRAMS, 16):
            program = start + tl.arange(0, 16)
            there = program < PROGRAMS
            group, span, _begin, end, first = share_of_circle(program, PROGRAMS, GROUPS, full)
            count = tl.cdiv(end, span).to(tl.int32) - first
            own = PARTIAL_SUMS + program.to(tl.int64) * WIDTH
            if block < full:
                held = block - first
                total += partial(own, held * BLOCK_N, inside, there & (held >= 0) & (held < count))
                met = (block - (first + 1 + group * span) + 2 * full) % full
                last = count + span - 1
                total += partial(own, (HELD + met) * BLOCK_N, inside, there & (met < last))
                met += full  # with few programs one may go around the circle more than once
                total += partial(own, (HELD + met) * BLOCK_N, inside, there & (met < last))
            else:
                total += partial(own, WIDTH - BLOCK_N + 0 * first, inside, there)
        tl.store(TOTAL + places, total, mask=is_row)
