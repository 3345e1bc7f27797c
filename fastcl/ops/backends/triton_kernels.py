"""Shared parts of the Triton kernels: the walk over tiles, masks, products, logits.

Only this file decides which tiles are visited, which of their places count, and how numbers are rounded to the rows'
dtype. `tests/ops/contrastive/test_triton_maps.py` checks walk and masks against lists of pairs.

Rows are contiguous, with D numbers each (a multiple of 16), and sorted by cluster. Row i's positives are then the
columns [start_i, end_i), and both bounds grow with i, so no kernel compares cluster ids.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))
# Marks the bias of a contrast that is left out. -inf cannot: a finite bias times log2(e) may become -inf.
LEFT_OUT = tl.constexpr(float("inf"))
# To base 2. HEADROOM: largest logit after the shift. WIDE: bound on logits above which running maxima are used at once.
HEADROOM, WIDE = tl.constexpr(64.0), tl.constexpr(150.0)
# Stages of a loop that is pipelined as the kernel says; Triton before 3.3 takes no None.
AS_THE_KERNEL = tl.constexpr(None if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3) else 2)
LOWEST = tl.constexpr(-1e38)  # initial running maximum: finite, so that differences are never NaN


# Which tiles are visited.


@triton.jit
def column_walk(
    START,
    END,
    i0,
    N,
    M,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SELF: tl.constexpr,
    CLUSTERS: tl.constexpr,
    IDS: tl.constexpr,
):
    """The tiles of columns for the rows [i0, i0 + BLOCK_M): (interior, mixed, first, hole, last, full).

    interior, mixed: numbers of tiles; `interior_tile` and `mixed_tile` enumerate them. A mixed tile holds a positive,
    the diagonal, or the ragged end. An interior tile is a whole tile of admissible negatives. With ids every tile is
    mixed, because equal ids can be anywhere.

    The mixed tiles are [first, last), and the ragged last tile if it is not among them. There are `full` whole tiles,
    and `hole` of them are in [first, last).
    """
    full = M // BLOCK_N
    low = 0
    high = 0
    if IDS:
        high = M
    elif CLUSTERS:  # in self-contrast a row's range contains the row itself, and so the diagonal
        low = tl.load(START + i0)
        high = tl.load(END + tl.minimum(i0 + BLOCK_M, N) - 1)
    elif SELF:
        low = i0
        high = tl.minimum(i0 + BLOCK_M, N)
    first = low // BLOCK_N
    last = tl.where(high > low, tl.cdiv(high, BLOCK_N), first)
    hole = tl.minimum(last, full) - tl.minimum(first, full)
    ragged = ((full * BLOCK_N < M) & (last <= full)).to(tl.int32)
    return full - hole, last - first + ragged, first, hole, last, full


@triton.jit
def interior_tile(t, first, hole):
    """The interior tile visited at step t: those before the run of mixed tiles, then those after it."""
    return t + tl.where(t >= first, hole, 0)


@triton.jit
def mixed_tile(t, first, last, full):
    """The mixed tile visited at step t: the run, then the ragged last tile."""
    return tl.where(first + t < last, first + t, full)


@triton.jit
def share_of(steps, part, parts, SPLIT: tl.constexpr):
    """[from, to): the steps of one of the programs that share a row block's columns; all steps without SPLIT."""
    from_ = 0
    to = steps
    if SPLIT:
        span = tl.cdiv(steps, parts)
        from_ = tl.minimum(part * span, steps)
        to = tl.minimum(from_ + span, steps)
    return from_, to


# Which places of a mixed tile count.


@triton.jit
def admissible_pairs(
    i, j, N, M, names_i, names_j, bias_i, bias_j, SELF: tl.constexpr, IDS: tl.constexpr, BIAS: tl.constexpr
):  # fmt: skip
    """Bool [BLOCK_M, BLOCK_N]: i and j exist, and j is a contrast of i. The names are of sample ids; 0 means none.

    Excludes contrasts that are left out (`LEFT_OUT`). Contrasts are the columns (BIAS 1) or the rows (BIAS 2).
    """
    pairs = (j < M)[None, :] & (i < N)[:, None]
    if SELF:
        pairs = pairs & (i[:, None] != j[None, :])
    if IDS:
        pairs = pairs & ((names_i[:, None] != names_j[None, :]) | (names_i == 0)[:, None])
    if BIAS == 1:
        pairs = pairs & (bias_j != LEFT_OUT)[None, :]
    if BIAS == 2:
        pairs = pairs & (bias_i != LEFT_OUT)[:, None]
    return pairs


@triton.jit
def in_cluster(j, start, end):
    """Bool [BLOCK_M, BLOCK_N]: start_i <= j < end_i, with a single comparison."""
    return (j[None, :] - start[:, None]).to(tl.uint32, bitcast=True) < (end - start).to(tl.uint32, bitcast=True)[
        :, None
    ]


# Products.


@triton.jit
def rounded(x, dtype: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """x rounded to nearest in `dtype`, as an operand of a product or for a store.

    The interpreter stores bfloat16 as integers: its products multiply bit patterns, and its casts to bfloat16 truncate.
    There x stays float32 but is rounded to a value of `dtype`, the value that hardware computes with.
    """
    if not INTERPRETED:
        x = x.to(dtype)
    else:
        x = x.to(tl.float32)
        if dtype == tl.float16:
            x = x.to(tl.float16).to(tl.float32)
        if dtype == tl.bfloat16:
            bits = x.to(tl.uint32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
        if dtype == tl.float32:
            if PRECISION == "tf32":
                bits = x.to(tl.uint32, bitcast=True) & 0xFFFFE000  # the hardware ignores the lower bits
                x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x


@triton.jit
def large_part(x):
    """x rounded to nearest in tf32. What remains has a random sign, so that products of two remainders cancel."""
    return ((x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)


@triton.jit
def small_part(x, large, INTERPRETED: tl.constexpr):
    """What remains of x, as tensor cores read it: they ignore the lower bits."""
    small = x - large
    if INTERPRETED:
        bits = small.to(tl.uint32, bitcast=True) & 0xFFFFE000
        small = tl.where(small == small, bits.to(tl.float32, bitcast=True), small)
    return small


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """acc + a @ b in float32; a and b come from `rounded`.

    "tf32x3": each operand is the sum of two tf32 numbers, and only small x small is left out. Tensor cores truncate
    when they add to a sum, so `acc` is added outside. The two mixed products are sums of their own, which are added to
    each other first: exchanging a and b gives the same bits.
    """
    if PRECISION == "tf32x3":
        a_large = large_part(a)
        b_large = large_part(b)
        small = tf32_product(small_part(a, a_large, INTERPRETED), b_large, INTERPRETED)
        small += tf32_product(a_large, small_part(b, b_large, INTERPRETED), INTERPRETED)
        acc += tf32_product(a_large, b_large, INTERPRETED) + small
    elif INTERPRETED:
        acc += tl.dot(a, b, input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def tf32_product(a, b, INTERPRETED: tl.constexpr):
    """a @ b of tf32 numbers, which the interpreter multiplies exactly."""
    if INTERPRETED:
        result = tl.dot(a, b, input_precision="ieee")
    else:
        result = tl.dot(a, b, input_precision="tf32")
    return result


@triton.jit
def load_rows(
    X,
    row,
    column,
    N,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """X[row : row + ROWS, column : column + COLUMNS], 0 beyond row N. D is padded, so columns need no mask."""
    r = tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)
    places = X + (tl.cast(row, tl.int64) * D + column) + (r[:, None] * D + c[None, :])
    if MASKED:
        x = tl.load(places, mask=(row + r < N)[:, None], other=0.0)
    else:
        x = tl.load(places)
    return rounded(x, X.dtype.element_ty, PRECISION, INTERPRETED)


@triton.jit
def inner_products(
    X,
    Y,
    x,
    y,
    i0,
    j0,
    N,
    M,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """<x_i, y_j> [BLOCK_M, BLOCK_N]: from the loaded tiles x and y if they hold all of D, else streamed along D."""
    dots = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if BLOCK_K == D:
        dots = product(x, tl.trans(y), dots, PRECISION, INTERPRETED)
    else:
        for k in range(0, D, BLOCK_K):
            a = load_rows(X, i0, k, N, D, BLOCK_M, BLOCK_K, True, PRECISION, INTERPRETED)
            b = load_rows(Y, j0, k, M, D, BLOCK_N, BLOCK_K, MASKED, PRECISION, INTERPRETED)
            dots = product(a, tl.trans(b), dots, PRECISION, INTERPRETED)
    return dots


# Logits.


@triton.jit
def fixed_shift(scale, LONGEST, LARGEST_BIAS):
    """The shift to subtract from all logits (to base 2), and whether it keeps their sums in range.

    The bound is an upper bound of all logits. scale: includes log2(e). LONGEST [1]: product of the norms of both sides'
    longest rows, if not all rows are normalised. A bound of NaN counts as out of range.
    """
    bound = tl.abs(scale) * 1.002
    if LONGEST is not None:
        bound = bound * tl.load(LONGEST)
    if LARGEST_BIAS is not None:
        bound += tl.load(LARGEST_BIAS) * LOG2E
    return tl.maximum(bound - HEADROOM, 0.0), bound <= WIDE


@triton.jit
def similarities(dots, a, c, NORMED: tl.constexpr):
    """a_i c_j <x_i, y_j> from inner products. a_i c_j is formed first, so exchanging i and j gives the same bits."""
    if NORMED:
        dots = dots * (a[:, None] * c[None, :])
    return dots


@triton.jit
def base2_logits(similarity, scale, bias_i, bias_j, BIAS: tl.constexpr):
    """s_ij log2(e). BIAS: 0 none, 1 of the columns, 2 of the rows. scale and bias already include log2(e)."""
    t = similarity * scale
    if BIAS == 1:
        t = t + tl.where(bias_j == LEFT_OUT, -INF, bias_j)[None, :]
    if BIAS == 2:
        t = t + tl.where(bias_i == LEFT_OUT, -INF, bias_i)[:, None]
    return t


@triton.jit
def load_or(P, places, mask, default: tl.constexpr):
    """P[places]; `default` outside of the mask, or everywhere if P is None."""
    if P is not None:
        values = tl.load(P + places, mask=mask, other=default)
    else:
        values = tl.zeros(places.shape, tl.float32) + default
    return values


@triton.jit
def load_names(P, places, mask, IDS: tl.constexpr):
    if IDS:
        values = tl.load(P + places, mask=mask, other=0)
    else:
        values = tl.zeros(places.shape, tl.int32)
    return values


@triton.jit
def masked_logits(
    X, Y, C, COLUMN_BIAS, COLUMN_NAMES, x, a, row_bias, scale, i0, j0, N, M,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    IDS: tl.constexpr, NORMED: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A tile in which any pair may be inadmissible: (y, c, column bias, column names, similarities, logits to base 2).

    Its rows are [i0, i0 + BLOCK_M), with x, a and row_bias; its columns are [j0, j0 + BLOCK_N). y is 0 if rows are
    streamed along D.
    """
    j = j0 + tl.arange(0, BLOCK_N)
    is_column = j < M
    y = 0.0
    if BLOCK_K == D:
        y = load_rows(Y, j0, 0, M, D, BLOCK_N, BLOCK_K, True, PRECISION, INTERPRETED)
    c = load_or(C, j, is_column, 0.0)
    column_bias = load_or(COLUMN_BIAS, j, is_column, 0.0)
    column_names = load_names(COLUMN_NAMES, j, is_column, IDS)
    dots = inner_products(X, Y, x, y, i0, j0, N, M, D, BLOCK_M, BLOCK_N, BLOCK_K, True, PRECISION, INTERPRETED)
    similarity = similarities(dots, a, c, NORMED)
    return y, c, column_bias, column_names, similarity, base2_logits(similarity, scale, row_bias, column_bias, BIAS)
