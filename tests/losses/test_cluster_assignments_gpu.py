"""`cluster_infonce` with assignments on a CUDA device."""

import pytest
import torch
from torch import Tensor

from tests.losses.test_cluster_assignments import differentiate, formula, library, objective, problem
from tests.support.smoke import named

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICE = "cuda"
CALLS = {
    "views": {"views": 2, "kind": "converged", "peak": 40.0},
    "ids and bias": {"m": 201, "symmetric": True, "ids": True, "bias": True},
    "paired": {"m": 150, "paired": True, "d": 300},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=named)
@pytest.mark.parametrize("call", [pytest.param("views", marks=pytest.mark.smoke), "ids and bias", "paired"])
def test_obeys_the_formula(call, dtype) -> None:
    """In float64; a GPU adds up float32 products in another order."""
    arguments = problem(130, **({"d": 40, "c": 90} | CALLS[call]), dtype=dtype)
    leaves = tuple(k for k, v in arguments.items() if isinstance(v, Tensor) and v.is_floating_point())
    truth, expected = differentiate(formula, arguments, leaves, objective, torch.float64)
    there = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    got, gradients = differentiate(library, there, leaves, objective)
    allowed = {torch.float32: 2e-4, torch.float16: 2**-9, torch.bfloat16: 2**-6}[dtype]
    assert (got.cpu().double() - truth).abs() <= 1e-5 * (1 + truth.abs())
    for name, value in expected.items():
        error = (gradients[name].cpu().double() - value).norm()
        assert error <= (allowed if name in ("embeddings", "contrasts") else 2e-4) * (value.norm() + 1e-6), name
