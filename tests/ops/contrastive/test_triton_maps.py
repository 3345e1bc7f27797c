"""The Triton kernels' walk over tiles and masks against lists of pairs; reads and writes of every memory place."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastcl
from fastcl.ops.backends import triton_launch, triton_tiles
from fastcl.ops.contrastive.triton import rows as triton_rows
from tests.support.strategies import FIELDS, cluster_ids, generator

triton = pytest.importorskip("triton")
if not triton_launch.INTERPRETED:
    pytest.skip("Triton is not interpreted here", allow_module_level=True)

import triton.language as tl  # noqa: E402

from fastcl.ops.backends.triton_kernels import (  # noqa: E402
    admissible_pairs,
    column_walk,
    in_cluster,
    interior_tile,
    load_names,
    mixed_tile,
    rounded,
)


@triton.jit
def walk_kernel(START, END, INTERIOR, MIXED, N, M, TILES, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                SELF: tl.constexpr, CLUSTERS: tl.constexpr, IDS: tl.constexpr):  # fmt: skip
    """Counts the visits of each tile, INTERIOR and MIXED [row blocks, TILES]."""
    block = tl.program_id(0)
    interior, mixed, first, hole, last, full = column_walk(
        START, END, block * BLOCK_M, N, M, BLOCK_M, BLOCK_N, SELF, CLUSTERS, IDS
    )
    for step in range(0, interior):
        place = INTERIOR + block * TILES + interior_tile(step, first, hole)
        tl.store(place, tl.load(place) + 1)
    for step in range(0, mixed):
        place = MIXED + block * TILES + mixed_tile(step, first, last, full)
        tl.store(place, tl.load(place) + 1)


@triton.jit
def mask_kernel(START, END, ROW_NAMES, COLUMN_NAMES, ADMISSIBLE, POSITIVE, N, M, WIDTH, BLOCK_M: tl.constexpr,
                BLOCK_N: tl.constexpr, SELF: tl.constexpr, CLUSTERS: tl.constexpr, IDS: tl.constexpr):  # fmt: skip
    """The masks of every tile, one beside the other: [rows, WIDTH], both rounded up to tiles."""
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_names = load_names(ROW_NAMES, i, i < N, IDS)
    column_names = load_names(COLUMN_NAMES, j, j < M, IDS)
    admissible = admissible_pairs(i, j, N, M, row_names, column_names, 0.0, 0.0, SELF, IDS, 0)
    places = i[:, None] * WIDTH + j[None, :]
    tl.store(ADMISSIBLE + places, admissible.to(tl.int8))
    if CLUSTERS:
        start = tl.load(START + i, mask=i < N, other=0)
        end = tl.load(END + i, mask=i < N, other=0)
        tl.store(POSITIVE + places, (admissible & in_cluster(j, start, end)).to(tl.int8))


@st.composite
def arrangements(draw: st.DrawFn) -> dict[str, Any]:
    self_contrast = draw(st.booleans())
    n = draw(st.integers(1, 40))
    return {
        "n": n,
        "m": n if self_contrast else draw(st.integers(1, 40)),
        "self_contrast": self_contrast,
        "pattern": draw(st.sampled_from([None, "pairs", "huge", "negatives", "distinct", "same"])),
        "ids": not self_contrast and draw(st.booleans()),
        "blocks": (draw(st.sampled_from([4, 8, 32])), draw(st.sampled_from([4, 8, 16]))),
        "seed": draw(st.integers(0, 1000)),
    }


@settings(max_examples=60)
@given(arrangements())
def test_each_pair_is_visited_once_and_masked_as_it_is(a: dict[str, Any]) -> None:
    n, m, (block_m, block_n) = a["n"], a["m"], a["blocks"]
    g = generator(a["seed"])
    x = y = None
    if a["pattern"] is not None:
        clusters = cluster_ids(a["pattern"], n if a["self_contrast"] else n + m, g).clamp(min=-1)
        x, y = clusters[:n], clusters if a["self_contrast"] else clusters[n:]
    ids = (torch.randint(-1, 20, (n,), generator=g), torch.randint(-1, 20, (m,), generator=g)) if a["ids"] else None
    parts = {f"{prefix}order": torch.arange(k) for prefix, k in (("", n), ("contrast_", m))}
    for prefix, k in (("", n), ("contrast_", m)):
        parts |= {prefix + name: torch.full((k,), 777, dtype=torch.int32) for name in ("clusters", "names")}
    triton_rows.number_clusters(x, None if a["self_contrast"] else y, parts)
    triton_rows.name_ids(*(ids or (None, None)), parts)
    prefix = "" if a["self_contrast"] else "contrast_"
    own, row_order = parts["clusters"] if x is not None else None, parts["order"]
    other, column_order = parts[prefix + "clusters"], parts[prefix + "order"]
    names = (parts["names"][row_order], parts["contrast_names"][column_order]) if ids else (None, None)
    bounds = (None, None)
    if own is not None:
        bounds = tuple(torch.searchsorted(other, own, out_int32=True, right=right) for right in (False, True))
    flags = {"SELF": a["self_contrast"], "CLUSTERS": own is not None, "IDS": a["ids"]}

    rows, tiles = -(-n // block_m), -(-m // block_n)
    interior, mixed = (torch.zeros(rows, tiles, dtype=torch.int32) for _ in range(2))
    walk_kernel[(rows,)](*bounds, interior, mixed, n, m, tiles, block_m, block_n, **flags)
    assert torch.equal(interior + mixed, torch.ones_like(mixed))

    admissible, positive = (torch.zeros(rows * block_m, tiles * block_n, dtype=torch.int8) for _ in range(2))
    mask_kernel[(rows, tiles)](*bounds, *names, admissible, positive, n, m, tiles * block_n, block_m, block_n, **flags)
    expected = torch.zeros_like(admissible, dtype=torch.bool)
    allowed = torch.ones(n, m, dtype=torch.bool)
    if a["self_contrast"]:
        allowed.fill_diagonal_(False)
    if ids:
        left, right = ids[0][row_order], ids[1][column_order]
        allowed &= (left[:, None] != right) | (left == -1)[:, None]
    expected[:n, :m] = allowed
    assert torch.equal(admissible.bool(), expected)
    same = torch.zeros_like(expected)
    if x is not None:
        left, right = x[row_order], y[column_order]
        same[:n, :m] = allowed & (left[:, None] == right) & (left != -1)[:, None]
    assert torch.equal(positive.bool(), same)

    # Interior tiles need no mask: no positive, no forbidden pair, no end of columns.
    plain = torch.zeros(rows * block_m, tiles * block_n, dtype=torch.bool)
    plain[:n, :m] = allowed
    plain[n:, :m] = True  # rows beyond the end are not stored
    plain &= ~same
    plain = plain.view(rows, block_m, tiles, block_n).all(3).all(1)
    assert not (interior.bool() & ~plain).any()


def test_most_tiles_of_many_pairs_are_interior() -> None:
    """Otherwise the walk would be right and slow."""
    n, block = 512, 16
    own = torch.arange(n) // 2 * 2
    bounds = [torch.searchsorted(own, own, out_int32=True, right=right) for right in (False, True)]
    interior, mixed = (torch.zeros(n // block, n // block, dtype=torch.int32) for _ in range(2))
    walk_kernel[(n // block,)](*bounds, interior, mixed, n, n, n // block, block, block, True, True, False)
    assert torch.equal(mixed, torch.eye(n // block, dtype=torch.int32))


# Writers and readers


class Watch:
    """Records every place that kernels load and store, by launch and program."""

    def __init__(self) -> None:
        self.launches: list[tuple[str, dict[str, Any]]] = []
        self._writers: dict[int, tuple[int, ...]] = {}
        self._readers: dict[int, set[tuple[int, ...]]] = {}
        self.tensors: list[Tensor] = []  # tensors of the launch

    @contextmanager
    def watching(self) -> Iterator[None]:
        builder = triton.runtime.interpreter.InterpreterBuilder
        load, store, launch = builder.create_masked_load, builder.create_masked_store, triton_launch.launch

        def watched_load(this, ptrs, mask, *rest):
            self._loads(this.grid_idx, ptrs, mask)
            return load(this, ptrs, mask, *rest)

        def watched_store(this, ptrs, value, mask, *rest):
            self._stores(this.grid_idx, ptrs, mask)
            return store(this, ptrs, value, mask, *rest)

        def watched_launch(name, shape, grid, given):
            kernel = triton_launch.kernel_named(name)
            tensors = {k: v for k, v in given.items() if isinstance(v, Tensor) and k in kernel.arg_names}
            self.tensors = list(tensors.values())
            self._writers, self._readers = {}, {}
            launch(name, shape, grid, given)
            self._judge(name)
            self.launches.append((name, {k: self._written(t) for k, t in tensors.items()}))

        with (
            mock.patch.object(builder, "create_masked_load", watched_load),
            mock.patch.object(builder, "create_masked_store", watched_store),
            mock.patch.object(triton_launch, "launch", watched_launch),
        ):
            yield

    def _places(self, ptrs: Any, mask: Any) -> list[int]:
        addresses, chosen = np.broadcast_arrays(ptrs.data, mask.data)
        places = addresses[chosen.astype(bool)]
        inside = np.zeros(places.shape, dtype=bool)
        for t in self.tensors:
            inside |= (places >= t.data_ptr()) & (places < t.data_ptr() + t.numel() * t.element_size())
        assert inside.all(), "a kernel reaches beyond its tensors"
        return places.tolist()

    def _loads(self, program: tuple[int, ...], ptrs: Any, mask: Any) -> None:
        for place in self._places(ptrs, mask):
            self._readers.setdefault(place, set()).add(program)

    def _stores(self, program: tuple[int, ...], ptrs: Any, mask: Any) -> None:
        places = self._places(ptrs, mask)
        assert len(set(places)) == len(places), "one store writes twice to a place"
        for place in places:
            assert self._writers.setdefault(place, program) == program, "two programs write to a place"

    def _judge(self, name: str) -> None:
        for place, writer in self._writers.items():
            assert self._readers.get(place, {writer}) == {writer}, f"{name}: a program reads what another one writes"

    def _written(self, tensor: Tensor) -> float:
        """The share of the tensor's places that the launch has written."""
        size = tensor.element_size()
        places = range(tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * size, size)
        return sum(place in self._writers for place in places) / max(len(places), 1)


CALLS: dict[str, dict[str, Any]] = {
    "self-contrast": {"n": 71},
    "self-contrast, bias": {"n": 71, "bias": True},
    "both ways": {"n": 71, "m": 135, "both": True, "ids": True, "bias": True},
    "both ways, no clusters": {"n": 135, "m": 66, "both": True, "clusters": False},
    "queue": {"n": 71, "m": 135, "queue": True},
    "long rows": {"n": 66, "m": 65, "d": 150},
    "wide logits": {"n": 71, "m": 66, "both": True, "scale": 300.0},
}


OUTPUTS = {
    "labels_kernel": {"LABELS"},
    "first_kernel": {"LABELS"},
    "order_kernel": {"NUMBERS", "ORDER"},
    "longest_kernel": {"LONGEST"},
    "total_kernel": {"TOTAL"},
    "scale_kernel": {"GRADIENT"},
    "rows_kernel": {"ROWS", "NORMS", "ROW_NORMS", "LENGTHS", "START", "END", "ROW_NAMES", "ROW_BIAS"},
    "statistics_kernel": {"STATISTICS"},
    "two_way_kernel": {"STATISTICS", "PARTIAL_SUMS"},
    "running_kernel": {"STATISTICS"},
    "weighted_kernel": {"STATISTICS", "WEIGHTED"},
    "fields_kernel": {"FIELDS", "COUNTS", "PARTS", "BASES"},
    "weights_kernel": {"WEIGHTS", "EXTREMES"},
    "side_kernel": {"SIDE", "ONE", "MIDDLE", "LIFT", "FACTOR"},
    "gradient_kernel": {"GRADIENT", "SIMILARITY_SUMS", "SUMS"},
    "finish_kernel": {"OUT"},
    "soft_statistics_kernel": {"STATISTICS"},
    "soft_gradient_kernel": {"GRADIENT", "SIMILARITY_SUMS", "SUMS"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("call", CALLS)
def test_each_output_has_one_writer_and_nobody_else_reads_it(call, dtype) -> None:
    """No kernel accesses memory beyond its tensors."""
    options = {"m": None, "d": 21, "both": False, "ids": False, "bias": False, "clusters": True, "queue": False}
    options |= {"scale": 5.0} | CALLS[call]
    n, m = options["n"], options["m"]
    g = generator(0)
    arguments: dict[str, Any] = {"anchors": torch.randn(n, options["d"], generator=g).to(dtype).requires_grad_()}
    if options["clusters"]:
        arguments["anchor_clusters"] = cluster_ids("negatives", n, g)
    if m is not None:
        arguments["contrasts"] = torch.randn(m, options["d"], generator=g).to(dtype)
        arguments["contrasts"].requires_grad_(not options["queue"])
        if options["clusters"]:
            arguments["contrast_clusters"] = cluster_ids("negatives", m, g)
        if options["ids"]:
            arguments |= {"anchor_ids": torch.arange(n), "contrast_ids": torch.arange(m) % 90}
    if options["bias"]:
        arguments["contrast_bias"] = torch.randn(m or n, generator=g).requires_grad_()
    if not options["queue"]:
        arguments["logit_scale"] = torch.tensor(options["scale"], requires_grad=True)
    watch = Watch()
    with fastcl.use_backend("triton"), watch.watching():
        s = fastcl.contrastive_stats(
            **arguments, want=FIELDS, both=options["both"], normalize_anchors=True, normalize_contrasts=m is not None
        )
        total = sum(
            torch.where(field.isfinite(), field, 0).sum()
            for side in (s, s.reverse) if side is not None for field in (getattr(side, name) for name in FIELDS)
        )  # fmt: skip
        total.backward()
    names = [name for name, _ in watch.launches]
    first = {"queue": "weighted_kernel"}.get(call, "two_way_kernel" if options["both"] else "statistics_kernel")
    assert (
        next(name for name in names if name not in ("labels_kernel", "first_kernel", "order_kernel", "rows_kernel"))
        == first
    )
    assert names[-1] == "finish_kernel"
    for name, written in watch.launches:
        runs = any(written.values())
        if name == "running_kernel":
            assert runs == (call == "wide logits")
        if runs:
            outputs = OUTPUTS[name]
            for argument, share in written.items():
                if call == "queue" and name == "gradient_kernel" and argument == "GRADIENT":
                    assert 0 < share < 1  # the forward has computed the gradient of rows without a positive
                else:
                    assert share == (argument in outputs), (name, argument)
    assert any(written["GRADIENT"] > 0 for name, written in watch.launches if name == "gradient_kernel")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "bias"), [(None, False), (None, True), (135, True)])
def test_soft_assignments_have_one_writer_too(m, bias, dtype) -> None:
    n, d, classes, g = 71, 21, 150, generator(0)
    arguments: dict[str, Any] = {
        "anchors": torch.randn(n, d, generator=g).to(dtype).requires_grad_(),
        "anchor_assignments": torch.rand(n, classes, generator=g).to(dtype),
        "logit_scale": torch.tensor(5.0, requires_grad=True),
    }
    if bias:
        arguments["contrast_bias"] = torch.randn(m or n, generator=g).requires_grad_()
    if m is not None:
        arguments |= {
            "contrasts": torch.randn(m, d, generator=g).to(dtype).requires_grad_(),
            "contrast_assignments": torch.rand(m, classes, generator=g).to(dtype),
            "anchor_ids": torch.arange(n),
            "contrast_ids": torch.arange(m) % 90,
        }
    watch = Watch()
    with fastcl.use_backend("triton"), watch.watching():
        s = fastcl.contrastive_stats(
            **arguments, both=m is not None, normalize_anchors=True, normalize_contrasts=m is not None
        )
        sum((side.lse_all - side.sum_pos).sum() for side in (s, s.reverse) if side is not None).backward()
    assert {name for name, _ in watch.launches} >= {"soft_statistics_kernel", "soft_gradient_kernel", "finish_kernel"}
    for name, written in watch.launches:
        for argument, share in written.items():
            assert share == (argument in OUTPUTS[name]), (name, argument)


def test_the_watch_sees_what_it_is_for() -> None:
    """One column block too many reads beyond the rows, and writes at the beginning of the next row."""
    x = torch.randn(40, 8, generator=generator(0), requires_grad=True)

    def run() -> None:
        with fastcl.use_backend("triton"), Watch().watching():
            fastcl.contrastive_stats(x, want=("lse_all",)).lse_all.sum().backward()

    run()
    narrow = triton_tiles.Tile(16, 32, 16, 16, 4, 1)
    with mock.patch.object(triton_rows, "tile", return_value=narrow):
        run()
        with (
            mock.patch.object(triton_rows, "blocks", lambda size, block: -(-size // block) + (block == 16)),
            pytest.raises(
                triton.runtime.errors.InterpreterError, match=r"two programs write to a place|beyond its tensors"
            ),
        ):
            run()


def test_the_watch_sees_a_read_beyond_the_end() -> None:
    memory, out = torch.zeros(256), torch.zeros(256)
    watch = Watch()
    watch.tensors = [memory[:255], out]
    with watch.watching(), pytest.raises(triton.runtime.errors.InterpreterError, match="beyond its tensors"):
        round_kernel[(1,)](memory, out, tl.float32, "ieee", 256)


# Rounding


@triton.jit
def round_kernel(X, OUT, DTYPE: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(OUT + i, rounded(tl.load(X + i), DTYPE, PRECISION, True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_interpreted_numbers_are_rounded_to_nearest(dtype) -> None:
    g = generator(0)
    x = torch.cat(
        [
            torch.randn(200, generator=g),
            torch.randn(50, generator=g) * 1e-6,
            torch.tensor([0.0, -0.0, 1.0, torch.inf, -torch.inf, torch.nan]),
        ]
    )
    x = x.to(torch.float32)
    out = torch.empty_like(x).expand(256).clone()
    padded = torch.zeros(256)
    padded[: len(x)] = x
    round_kernel[(1,)](padded, out, {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype], "ieee", 256)
    assert torch.equal(out.nan_to_num(nan=7.0), padded.to(dtype).float().nan_to_num(nan=7.0))


def test_tf32_keeps_ten_bits_of_the_fraction() -> None:
    x = torch.randn(256, generator=generator(0))
    out = torch.empty_like(x)
    round_kernel[(1,)](x, out, tl.float32, "tf32", 256)
    assert not torch.equal(out, x)
    assert ((out - x).abs() <= x.abs() * 2.0**-10).all()
    assert torch.equal(out.view(torch.int32) & 0x1FFF, torch.zeros(256, dtype=torch.int32))
