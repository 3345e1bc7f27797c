"""Shared by the losses on assignments to prototypes: the prior that a user gives, and shares of processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..checks import INTEGER_DTYPES, ROW_DTYPES, check_device, check_mass_values, check_tensor
from ..distributed import World
from .modules import ExactModule

Prior = Tensor | Callable[[int], Tensor]


class GivenPrior(ExactModule):
    """A tensor or a function that gives the prior. A tensor moves with the loss but is never rounded to half precision,
    which cannot represent small masses."""

    masses: Tensor | None

    def __init__(self, prior: Prior | None, name: str = "prior") -> None:
        super().__init__()
        self.name = name
        if prior is not None and not isinstance(prior, Tensor) and not callable(prior):
            raise TypeError(f"{name}: expected a tensor, a function or None, got {type(prior).__name__}")
        if isinstance(prior, Tensor):
            _check(name, prior)
        self.make = None if isinstance(prior, Tensor) else prior
        self.register_buffer("masses", prior.detach() if isinstance(prior, Tensor) else None, persistent=False)

    @property
    def given(self) -> str:
        """The kind of prior, which processes compare."""
        return "function" if self.make is not None else "none" if self.masses is None else "masses"

    def extra_repr(self) -> str:
        if self.make is not None:
            return str(getattr(self.make, "__name__", type(self.make).__name__))
        return "uniform" if self.masses is None else f"masses [{self.masses.numel()}]"

    def forward(self, k: int, device: torch.device) -> Tensor | None:
        masses = self.masses if self.make is None else self.make(k)
        if masses is None:
            return None
        if isinstance(masses, Tensor):
            _check(self.name, masses)
        if not isinstance(masses, Tensor) or tuple(masses.shape) != (k,):
            got = list(masses.shape) if isinstance(masses, Tensor) else type(masses).__name__
            raise ValueError(f"{self.name}: expected a tensor of shape [{k}], one mass for each prototype, got {got}")
        if masses.is_meta:
            check_device(self.name, masses, device)
        check_mass_values(self.name, masses, alone=True)
        return masses.to(device)


def _check(name: str, masses: Tensor) -> None:
    check_tensor(name, masses)
    if masses.dtype not in ROW_DTYPES and masses.dtype not in INTEGER_DTYPES:
        raise TypeError(f"{name}: expected float64, float32, bfloat16, float16 or integers, got {masses.dtype}")


def process_group(module: Any) -> Any:
    """The process group over which a loss with `gather` computes, or None."""
    world = World.of(module.gather, getattr(module, "group", None))
    return None if world is None else world.group


def global_share(world: World | None, rows: list[int]) -> float:
    """W times this process's share of all rows: the mean over processes is then the mean over all rows."""
    return 1.0 if world is None else world.size * rows[world.rank] / max(sum(rows), 1)
