"""hypothesis strategies: a few plain numbers describe a problem, and a seed draws its tensors."""

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

SIZES = st.one_of(st.sampled_from([1, 2, 3, 7, 127, 129]), st.integers(1, 40))
# Of problems for Triton's interpreter, which takes seconds for a few tiles: they have 64 rows and columns there.
INTERPRETED_SIZES = st.one_of(st.sampled_from([1, 3, 63, 64, 65]), st.integers(1, 40))
INTERPRETED_WIDTHS = st.sampled_from([1, 2, 7, 16, 31, 33, 65])
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
)
PATTERNS = ("pairs", "huge", "negatives", "distinct", "same", "random")
KINDS = ("random", "converged")
FIELDS = ("lse_all", "lse_pos", "lse_neg", "sum_pos", "sum_all")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cluster_ids(pattern: str, n: int, g: torch.Generator) -> Tensor:
    """[n] int64: pairs, one huge cluster and some others, negative ids, all distinct, all the same, n / 4 at random."""
    if pattern == "pairs":
        return (torch.arange(n) // 2)[torch.randperm(n, generator=g)]
    if pattern == "huge":
        return torch.where(torch.rand(n, generator=g) < 0.8, 5, torch.randint(0, 5, (n,), generator=g))
    if pattern == "negatives":
        return torch.randint(-3, 4, (n,), generator=g)
    if pattern == "distinct":
        return torch.randperm(n, generator=g) * 1000
    if pattern == "same":
        return torch.full((n,), 3)
    return torch.randint(0, n // 4 + 1, (n,), generator=g)


def rows(kind: str, groups: Tensor, d: int, g: torch.Generator, *, unit: bool) -> Tensor:
    """[n, d] float64. random: independent rows. converged: rows of a group lie close together, as late in training.

    unit: norms near 1; otherwise they vary by a factor of 6, for the library to normalise.
    """
    n = len(groups)
    if kind == "converged":
        _, group = groups.unique(return_inverse=True)
        base = torch.randn(len(groups), d, generator=g, dtype=torch.float64)
        x = base[group] + 0.3 * torch.randn(n, d, generator=g, dtype=torch.float64)
    else:
        x = torch.randn(n, d, generator=g, dtype=torch.float64)
    x = x / d**0.5
    return x if unit else x * (0.5 + 2.5 * torch.rand(n, 1, generator=g, dtype=torch.float64))


@dataclass(frozen=True)
class StatsProblem:
    """A call of contrastive_stats. m = None: self-contrast. scales: logit scales, one or more."""

    n: int
    m: int | None
    d: int
    kind: str
    pattern: str | None
    dtype: torch.dtype
    contrast_dtype: torch.dtype
    normalize_anchors: bool
    normalize_contrasts: bool
    bias: bool
    ids: bool
    both: bool
    want: tuple[str, ...]
    scales: tuple[float, ...]
    scale_tensor: bool
    seed: int

    def arguments(self) -> dict[str, Any]:
        g = generator(self.seed)
        m = 0 if self.m is None else self.m
        clusters = cluster_ids(self.pattern or "pairs", self.n + m, g)
        unit = not (self.normalize_anchors or self.normalize_contrasts)
        x = rows(self.kind, clusters, self.d, g, unit=unit)
        arguments: dict[str, Any] = {
            "anchors": x[: self.n].to(self.dtype),
            "want": self.want,
            "both": self.both,
            "normalize_anchors": self.normalize_anchors,
            "normalize_contrasts": self.normalize_contrasts,
        }
        if self.pattern is not None:
            arguments["anchor_clusters"] = clusters[: self.n]
        accumulation = torch.float64 if torch.float64 in (self.dtype, self.contrast_dtype) else torch.float32
        if self.m is not None:
            arguments["contrasts"] = x[self.n :].to(self.contrast_dtype)
            if self.pattern is not None:
                arguments["contrast_clusters"] = clusters[self.n :]
            if self.ids:
                arguments["anchor_ids"] = torch.randint(-1, 4, (self.n,), generator=g)
                arguments["contrast_ids"] = torch.randint(-1, 4, (self.m,), generator=g)
        if self.bias:
            size = self.n if self.m is None else self.m
            arguments["contrast_bias"] = torch.randn(size, generator=g, dtype=torch.float64).to(accumulation)
        if len(self.scales) > 1:
            arguments["logit_scale"] = torch.tensor(self.scales, dtype=accumulation)
        else:
            arguments["logit_scale"] = (
                torch.tensor(self.scales[0], dtype=accumulation) if self.scale_tensor else self.scales[0]
            )
        return arguments

    @property
    def leaves(self) -> tuple[str, ...]:
        names = ["anchors"]
        if self.m is not None:
            names.append("contrasts")
        if self.bias:
            names.append("contrast_bias")
        if self.scale_tensor or len(self.scales) > 1:
            names.append("logit_scale")
        return tuple(names)


@st.composite
def stats_problems(draw: st.DrawFn, interpreted: bool = False) -> StatsProblem:
    """interpreted: of sizes for Triton's interpreter, and without float64, which is not its own."""
    sizes, widths = (INTERPRETED_SIZES, INTERPRETED_WIDTHS) if interpreted else (SIZES, SIZES)
    dtypes = DTYPES[1:] if interpreted else DTYPES
    kind = draw(st.sampled_from(KINDS))
    self_contrast = draw(st.booleans())
    dtype = draw(st.sampled_from(dtypes))
    normalize_anchors = draw(st.booleans())
    many = draw(st.integers(0, 3)) == 0
    scales = st.just(20.0) if kind == "converged" else st.sampled_from([1.0, 2.0, 10.0])
    return StatsProblem(
        n=draw(sizes),
        m=None if self_contrast else draw(sizes),
        d=draw(widths),
        kind=kind,
        pattern=draw(st.sampled_from([*PATTERNS, None])),
        dtype=dtype,
        contrast_dtype=dtype if self_contrast else draw(st.sampled_from([dtype, *dtypes])),
        normalize_anchors=normalize_anchors,
        normalize_contrasts=normalize_anchors if self_contrast else draw(st.booleans()),
        bias=draw(st.booleans()),
        ids=not self_contrast and draw(st.booleans()),
        both=not self_contrast and draw(st.booleans()),
        want=draw(st.one_of(st.just(FIELDS), st.sets(st.sampled_from(FIELDS), min_size=1).map(sorted).map(tuple))),
        scales=(draw(scales), 0.5, 3.0) if many else (draw(scales),),
        scale_tensor=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )


@dataclass(frozen=True)
class LossProblem:
    """A call of cluster_infonce. views = 0: embeddings [N, D].

    contrasts: None (self-contrast), "paired" (with the anchors), "clustered", or "list" (paired, in two tensors).
    """

    n: int
    views: int
    m: int
    d: int
    kind: str
    pattern: str | None
    dtype: torch.dtype
    contrast_dtype: torch.dtype
    contrasts: str | None
    form: str
    denominator: str
    margin: float
    symmetric: bool
    normalize: bool
    reduction: str
    temperature: float
    temperature_tensor: bool
    ids: bool
    bias: bool
    positives: bool
    weights: bool
    seed: int
    label_smoothing: float = 0.0

    def arguments(self) -> dict[str, Any]:
        g = generator(self.seed)
        views = max(self.views, 1)
        flat = self.n * views
        clusters = cluster_ids(self.pattern or "distinct", self.n, g)
        # Rows are placed by cluster; those without a cluster by sample.
        places = torch.where(clusters >= 0, clusters, -1 - torch.arange(self.n) - 10).repeat_interleave(views)
        m = 0 if self.contrasts is None else self.m
        if self.contrasts == "clustered":
            contrast_clusters = clusters[torch.randint(0, self.n, (m,), generator=g)]
            if self.pattern is None:
                contrast_clusters = torch.randint(-1, self.n, (m,), generator=g)
                places = torch.arange(self.n).repeat_interleave(views)
            contrast_places = contrast_clusters
        elif self.contrasts is not None:
            contrast_places = torch.cat([places, torch.randint(0, 5, (m - flat,), generator=g)])
        else:
            contrast_places = places[:0]
        all_places = torch.cat([places, contrast_places, places if self.positives else places[:0]])
        x = rows(self.kind, all_places, self.d, g, unit=not self.normalize)
        shape = (self.n, self.views, self.d) if self.views else (self.n, self.d)
        accumulation = torch.float64 if torch.float64 in (self.dtype, self.contrast_dtype) else torch.float32
        arguments: dict[str, Any] = {
            "embeddings": x[:flat].reshape(shape).to(self.dtype),
            "form": self.form,
            "denominator": self.denominator,
            "margin": self.margin,
            "label_smoothing": self.label_smoothing,
            "symmetric": self.symmetric,
            "normalize": self.normalize,
            "reduction": self.reduction,
            "temperature": self.temperature,
        }
        if self.temperature_tensor:
            arguments["temperature"] = torch.tensor(self.temperature, dtype=accumulation)
        if self.pattern is not None:
            arguments["clusters"] = clusters
        if self.contrasts is not None:
            y = x[flat : flat + m].to(self.contrast_dtype)
            arguments["contrasts"] = [y[: m // 2], y[m // 2 :]] if self.contrasts == "list" else y
            if self.contrasts == "clustered":
                arguments["contrast_clusters"] = contrast_clusters
            if self.ids:
                arguments["ids"] = torch.randint(-1, 6, (self.n,), generator=g)
                arguments["contrast_ids"] = torch.randint(-1, 6, (m,), generator=g)
        if self.positives:
            arguments["positives"] = x[flat + m :].reshape(shape).to(self.dtype)
        if self.bias:
            size = flat if self.contrasts is None else m
            arguments["contrast_bias"] = torch.randn(size, generator=g, dtype=torch.float64).to(accumulation)
        if self.weights:
            w = torch.rand(self.n, generator=g, dtype=torch.float64).to(accumulation)
            arguments["weights"] = w + 0.05
        return arguments

    @property
    def leaves(self) -> tuple[str, ...]:
        names = ["embeddings"]
        if self.contrasts in ("paired", "clustered"):
            names.append("contrasts")
        if self.positives:
            names.append("positives")
        if self.bias:
            names.append("contrast_bias")
        if self.temperature_tensor:
            names.append("temperature")
        if self.weights:
            names.append("weights")
        return tuple(names)


@st.composite
def loss_problems(draw: st.DrawFn, interpreted: bool = False) -> LossProblem:
    """interpreted: as in `stats_problems`."""
    sizes, widths = (INTERPRETED_SIZES, INTERPRETED_WIDTHS) if interpreted else (SIZES, SIZES)
    dtypes = DTYPES[1:] if interpreted else DTYPES
    kind = draw(st.sampled_from(KINDS))
    views = draw(st.sampled_from([0, 0, 1, 2, 3]))
    n = draw(sizes)
    if views > 1:
        n = max(n // views, 1)
    flat = n * max(views, 1)
    contrasts = draw(st.sampled_from([None, None, "paired", "clustered", "list"]))
    positives = draw(st.integers(0, 3)) == 0
    dtype = draw(st.sampled_from(dtypes))
    symmetric = contrasts is not None and draw(st.booleans())
    reduction = draw(st.sampled_from(["mean", "sum", "none"]))
    needs_clusters = contrasts is None and views < 2
    form = draw(st.sampled_from(["outside", "inside", "pairs"]))
    denominator = "all" if form == "pairs" else draw(st.sampled_from(["all", "negatives"]))
    margin = draw(st.sampled_from([0.0, 0.0, 0.2]))
    smoothed = (form, denominator, margin) == ("outside", "all", 0.0) and draw(st.booleans())
    if contrasts is None:
        m = 0
    elif symmetric and reduction == "none":
        m = flat
    elif contrasts == "clustered":
        m = draw(st.one_of(sizes, st.just(0)))
    else:
        m = flat + draw(st.sampled_from([0, 0, 1, 9]))
    return LossProblem(
        n=n,
        views=views,
        m=m,
        d=draw(widths),
        kind=kind,
        pattern=draw(st.sampled_from(PATTERNS if needs_clusters else (*PATTERNS, None, None))),
        dtype=dtype,
        contrast_dtype=dtype if contrasts is None else draw(st.sampled_from([dtype, dtype, *dtypes])),
        contrasts=contrasts,
        form=form,
        denominator=denominator,
        margin=margin,
        label_smoothing=0.1 if smoothed else 0.0,
        symmetric=symmetric,
        normalize=draw(st.booleans()),
        reduction=reduction,
        temperature=0.05 if kind == "converged" else draw(st.sampled_from([0.1, 0.5, 1.0])),
        temperature_tensor=draw(st.booleans()),
        ids=contrasts is not None and draw(st.booleans()),
        bias=draw(st.booleans()),
        positives=positives,
        weights=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )


def loss_problem(n: int = 9, views: int = 2, d: int = 6, contrasts: str | None = None, **changes: Any) -> LossProblem:
    """A plain problem with these changes."""
    defaults: dict[str, Any] = {
        "m": 0 if contrasts is None else n * max(views, 1) + 4,
        "kind": "random",
        "pattern": "random",
        "dtype": torch.float32,
        "contrast_dtype": torch.float32,
        "form": "outside",
        "denominator": "all",
        "margin": 0.0,
        "symmetric": False,
        "normalize": True,
        "reduction": "mean",
        "temperature": 0.1,
        "temperature_tensor": True,
        "ids": False,
        "bias": False,
        "positives": False,
        "weights": False,
        "seed": 0,
    }
    return LossProblem(n=n, views=views, d=d, contrasts=contrasts, **(defaults | changes))
