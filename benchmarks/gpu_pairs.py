"""SigLIP's loss in a GPU plan."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import pair_losses
from benchmarks.gpu_problems import Contestant, Memo, Verdict, _lacking, by_error, product, recalled, relative
from benchmarks.measure import Step
from benchmarks.pair_losses import Loss

BLOCK = 2048  # rows of logits that the truth stores at a time, in float64


@dataclass(frozen=True)
class PairProblem:
    case: pair_losses.Case
    suite: str = pair_losses.SUITE

    @property
    def name(self) -> str:
        return self.case.name

    @property
    def size(self) -> dict[str, Any]:
        return {"n": self.case.n, "m": self.case.n, "d": self.case.d, "dtype": self.case.dtype_name}

    @property
    def work(self) -> float:
        """One sweep: the product, and a product for the gradient of each set."""
        return 6.0 * self.case.n**2 * self.case.d

    def providers(self, device: torch.device) -> tuple[list[str], dict[str, str]]:
        found, missing = pair_losses.losses(self.case, device)
        return list(found), missing | _lacking(found)

    def pose(self, device: torch.device, memo: Memo) -> PosedPairs:
        return PosedPairs(self.case, device, memo)

    def check_seconds(self) -> float:
        return 1 + self.case.n**2 * (4 * self.case.d / 2e13 + 10 * 8 / 3e12)

    def tiny(self) -> PairProblem:
        return PairProblem(dataclasses.replace(self.case, n=24, d=16))


class PosedPairs:
    def __init__(self, case: pair_losses.Case, device: torch.device, memo: Memo) -> None:
        self.case, self.device, self.memo = case, device, memo
        self.sets = [case.inputs(device, seed) for seed in range(2)]
        self.yardstick = product(device, case.dtype)

    def contestant(self, name: str) -> Contestant:
        make, package = pair_losses.losses(self.case, self.device)[0][name]
        loss = make(self.case, self.device)
        steps: list[Step] = [partial(_step, loss, leaves) for leaves in self.sets]
        return Contestant(package, steps, partial(self._judge, loss, name.startswith("fastcl ")))

    def _judge(self, loss: Loss, is_fastcl: bool) -> Verdict:
        value, gradient, *_ = _step(loss, self.sets[0])
        right = recalled(self.memo, "truth", lambda: truth(*self.sets[0]), self.device)
        tolerance = 1e-5 if self.case.dtype == torch.float32 else 2.0**-7
        worst = max(relative(value, right[0]), relative(gradient, right[1]))
        return by_error(worst, tolerance, is_fastcl)


def _step(loss: Loss, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """The loss and all gradients, as new tensors: such a step can be captured as a graph."""
    value = loss(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves)


@torch.no_grad()
def truth(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """SigLIP's loss and the gradient of the images, in float64, by blocks of rows."""
    n, texts = len(image), text.double()
    total, gradients = torch.zeros((), dtype=torch.float64, device=image.device), []
    for start in range(0, n, BLOCK):
        rows = image[start : start + BLOCK].double()
        logits = scale.double() * rows @ texts.T + bias.double()
        logits.diagonal(offset=start).neg_()  # of a positive: log(1 + exp(-s))
        total += torch.logaddexp(logits, torch.zeros_like(total)).sum()
        slope = logits.sigmoid_()
        slope.diagonal(offset=start).neg_()
        gradients.append(scale.double() * slope @ texts / n)
    return total / n, torch.cat(gradients)
