"""solo-learn's functions: against the files of the package, and against the formulas of its later versions.

The release on PyPI, 1.0.2, requires torch 1.9.1, and its package imports libraries that need it. The files of its
losses import only torch, so `pip install --no-deps --target FOLDER solo-learn` and the folder on the path are enough.
"""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from tests.support.integrations import example

ours = example("with_solo_learn")
INDEXES = torch.arange(7).repeat(2)
LABELS = torch.tensor([0, 1, 0, 1, 2, 2, 0]).repeat(2)


def file_of(name: str) -> ModuleType:
    found = importlib.util.find_spec("solo")
    path = Path(found.submodule_search_locations[0], "losses", f"{name}.py") if found else Path("/nowhere")
    if not path.exists():
        pytest.skip("solo-learn is not installed")
    spec = importlib.util.spec_from_file_location(f"solo_losses_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drawn(n: int = 7, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 5, generator=g, dtype=torch.float64).requires_grad_()


def agree(found: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    results = [(value.detach(), *torch.autograd.grad(value, leaves)) for value in (found, expected)]
    torch.testing.assert_close(*results)


def simclr(z: Tensor, indexes: Tensor, temperature: float) -> Tensor:
    """simclr_loss_func of version 1.0.6, on one process."""
    z = normalize(z, dim=-1)
    sim = (z @ z.T / temperature).exp()
    alike = indexes[:, None] == indexes
    pos = (sim * (alike & ~torch.eye(len(z), dtype=torch.bool))).sum(1)
    neg = (sim * ~alike).sum(1)
    return -(pos / (pos + neg)).log().mean()


def test_simclr_of_the_package() -> None:
    z = drawn(14)
    theirs = file_of("simclr").simclr_loss_func(z[:7], z[7:], 0.2)
    agree(ours.simclr_loss_func(z, INDEXES, 0.2), theirs, [z])


def test_simclr_of_later_versions() -> None:
    """L_in without 1 / |P|: with several positives the value differs by the mean of log |P|, the gradient does not."""
    z = drawn(14)
    agree(ours.simclr_loss_func(z, INDEXES, 0.2), simclr(z, INDEXES, 0.2), [z])
    count = (LABELS[:, None] == LABELS).sum(1) - 1
    agree(ours.simclr_loss_func(z, LABELS, 0.2) - count.log().mean(), simclr(z, LABELS, 0.2), [z])
    assert count.log().mean() > 1


def test_moco_takes_rows_as_they_are() -> None:
    query, key, queue = drawn(), drawn(seed=1).detach(), normalize(drawn(11, 2), dim=1).detach().T
    theirs = file_of("moco").moco_loss_func(query, key, queue, 0.2)
    agree(ours.mocov2plus_loss_func(query, key, queue, 0.2), theirs, [query])


def test_moco_v3_multiplies_by_twice_the_temperature() -> None:
    query, key = drawn(), drawn(seed=1)
    logits = normalize(query, dim=1) @ normalize(key, dim=1).detach().T / 0.3
    expected = cross_entropy(logits, torch.arange(7)) * (2 * 0.3)
    agree(ours.mocov3_loss_func(query, key, 0.3), expected, [query])


def test_nnclr() -> None:
    p, near = drawn(), drawn(seed=1)
    agree(ours.nnclr_loss_func(near, p, 0.2), file_of("nnclr").nnclr_loss_func(near, p, 0.2), [near, p])


def test_the_example_learns() -> None:
    assert ours.main(20) < 2
