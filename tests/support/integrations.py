"""Shared by the tests of integrations: packages that may be absent, examples as modules, equal trainings."""

import importlib
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]


def package(name: str) -> Any:
    """The module of a package, with whose warnings at import we have nothing to do. Skips where it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"{name} is not installed", exc_type=ImportError)


def example(name: str) -> ModuleType:
    """A module of the folder `examples`."""
    path = str(ROOT / "examples")
    sys.path.insert(0, path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    finally:
        sys.path.remove(path)


def gradients(loss: Tensor, module: nn.Module) -> dict[str, Tensor]:
    """The value and the gradients of a module's parameters."""
    module.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    assert found
    return {"": loss.detach(), **found}


def same_training(one: nn.Module, other: nn.Module, tolerance: float) -> None:
    """The weights after two trainings agree, and both moved."""
    ours, theirs = (dict(module.named_parameters()) for module in (one, other))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(
            value, theirs[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
