"""Results of `cluster_infonce`, however they came about, against the plain formula."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import fastcl
from tests.support.oracle import CANCELLING, TRUTH, cluster_infonce, differentiate, eager_evaluations
from tests.support.strategies import generator
from tests.support.tolerances import accumulation_dtype, check


def combination(shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Fixed random factors of unreduced terms, float64."""
    return torch.rand(shape, generator=generator(5), dtype=torch.float64)


def objective(loss: Tensor) -> Tensor:
    """The loss itself; of unreduced terms a fixed random combination."""
    return loss if loss.dim() == 0 else (loss * combination(loss.shape).to(loss.dtype)).sum()


def judge(
    arguments: dict[str, Any],
    leaves: tuple[str, ...],
    found: Mapping[str, tuple[Tensor, dict[str, Tensor]]],
    formula: Callable[..., Tensor] = cluster_infonce,
) -> None:
    """Values and gradients, by who found them, against the float64 formula, by the error rule."""
    embeddings, contrasts = arguments["embeddings"], arguments.get("contrasts")
    dtypes = [embeddings.dtype]
    if contrasts is not None:
        dtypes += [part.dtype for part in (contrasts if isinstance(contrasts, list) else [contrasts])]
    accumulation = accumulation_dtype(*dtypes)
    product = dtypes[0]
    for dtype in dtypes[1:]:
        product = torch.promote_types(product, dtype)
    # A product in float64 may still be asked for in float32, the dtype of the embeddings.
    expected_dtype = torch.float64 if embeddings.dtype == torch.float64 else torch.float32

    def evaluate(how):
        return differentiate(formula, arguments, leaves, objective, how.dtype, how=how)

    truth, true_gradients = evaluate(TRUTH)
    parts = [evaluate(how) for how in CANCELLING]
    evaluated_in = expected_dtype if accumulation == torch.float64 else accumulation
    draws = [evaluate(how) for how in eager_evaluations(evaluated_in)]
    for who, (got, gradients) in found.items():
        assert got.dtype == expected_dtype
        check(
            f"{who} loss",
            got,
            truth,
            [value for value, _ in draws],
            accumulation=evaluated_in,
            magnitude=sum(part.abs() for part, _ in parts),
        )
        for name, value in true_gradients.items():
            assert gradients[name].dtype == arguments[name].dtype
            check(
                f"{who} gradient of {name}",
                gradients[name],
                value,
                [g[name] for _, g in draws],
                accumulation=evaluated_in,
                half_rows=product if name in ("embeddings", "contrasts", "positives") else None,
                magnitude=sum(g[name].abs() for _, g in parts),
            )


def terms(*arguments: Any, **options: Any) -> Tensor:
    """The loss of each anchor."""
    return fastcl.functional.cluster_infonce(*arguments, reduction="none", **options)
