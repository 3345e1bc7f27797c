"""Shared by the tests of `contrastive_stats`: the comparison with the formula, and a simple problem."""

from typing import Any

import torch
from torch import Tensor

import fastcl
from tests.support.backends import VARIANTS, running
from tests.support.oracle import CONSTANT_NORMS, TRUTH, contrastive_stats, differentiate, eager_evaluations
from tests.support.strategies import FIELDS, StatsProblem, generator
from tests.support.tolerances import accumulation_dtype, check


def as_dict(stats: fastcl.ContrastiveStats) -> dict[str, Tensor]:
    """The statistics in the oracle's form, without unwanted fields."""
    fields = {}
    for prefix, side in (("", stats), ("reverse.", stats.reverse)):
        if side is not None:
            named = {name: getattr(side, name) for name in (*FIELDS, "num_pos", "num_neg")}
            fields |= {prefix + name: value for name, value in named.items() if value is not None}
    return fields


def library_stats(**arguments: Any) -> dict[str, Tensor]:
    return as_dict(fastcl.contrastive_stats(**arguments))


def objective(fields: dict[str, Tensor]) -> Tensor:
    """A fixed random combination of all fields, without those of empty sets."""
    total = torch.zeros((), dtype=torch.float64)
    for k, name in enumerate(sorted(fields)):
        if "num" not in name:
            field = fields[name]
            weight = torch.randn(field.shape, generator=generator(k), dtype=torch.float64).to(field.dtype)
            total = total + (torch.where(field.isfinite(), field, 0) * weight).sum()
    return total


def check_stats(arguments: dict[str, Any], leaves: tuple[str, ...], backends: tuple[str, ...] = VARIANTS) -> None:
    """Values and gradients of every backend against the float64 formula, by the error rule."""
    dtypes = [arguments[name].dtype for name in ("anchors", "contrasts") if arguments.get(name) is not None]
    accumulation = accumulation_dtype(*dtypes)
    product = dtypes[0] if len(dtypes) == 1 else torch.promote_types(*dtypes)

    def evaluate(how):
        return differentiate(contrastive_stats, arguments, leaves, objective, how.dtype, how=how)

    truth, true_gradients = evaluate(TRUTH)
    _, cancelling = evaluate(CONSTANT_NORMS)
    draws = [evaluate(how) for how in eager_evaluations(accumulation)]
    for backend in backends:
        if backend == "triton" and accumulation == torch.float64:
            continue  # it is chunked, as `test_backends_agree_in_float64` checks
        with running(backend):
            got, gradients = differentiate(library_stats, arguments, leaves, objective)
        assert set(got) == set(truth)
        for name, value in truth.items():
            assert got[name].dtype == accumulation
            if "num" in name:
                assert torch.equal(got[name].double(), value), f"{backend} {name}"
            else:
                check(f"{backend} {name}", got[name], value, [d[name] for d, _ in draws], accumulation=accumulation)
        for name, value in true_gradients.items():
            assert gradients[name].dtype == arguments[name].dtype
            check(
                f"{backend} gradient of {name}",
                gradients[name],
                value,
                [g[name] for _, g in draws],
                accumulation=accumulation,
                half_rows=product if name in ("anchors", "contrasts") else None,
                magnitude=cancelling[name],
            )


def simple_problem(n: int = 9, m: int | None = 14, d: int = 6, seed: int = 0, **changes: Any) -> StatsProblem:
    defaults: dict[str, Any] = {
        "kind": "random",
        "pattern": "random",
        "dtype": torch.float32,
        "contrast_dtype": torch.float32,
        "normalize_anchors": True,
        "normalize_contrasts": True,
        "bias": m is not None,
        "ids": m is not None,
        "both": m is not None,
        "want": FIELDS,
        "scales": (5.0,),
        "scale_tensor": True,
    }
    return StatsProblem(n=n, m=m, d=d, seed=seed, **(defaults | changes))
