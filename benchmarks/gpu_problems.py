"""What a GPU plan measures: losses, Sinkhorn and top-k behind one interface, with providers, checks and yardsticks.

A check comes before a time: the float64 truth of the very rows that are timed, or of a sample of the queries.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from benchmarks import nearest, providers, transport, truth
from benchmarks.cases import BOTH, KINDS, Case, Inputs
from benchmarks.measure import Step
from benchmarks.providers import CannotPoseError, Loss, Provider
from benchmarks.run import IMPRECISE, OK, WRONG, verdict
from fastcl.ops.backends.choose import MISSING

EAGER_HALF = "eager, half products"
BOTH_KINDS = 2**28  # pairs up to which converged rows are checked too
LARGE_SET = 2**25  # bytes of a set of inputs of which two are enough to miss the cache
SAMPLED = 64  # queries of a top-k whose truth is computed
PRODUCT_SIZE = {"cuda": 8192, "cpu": 128}  # of the square matrix product that is the yardstick


Memo = dict[str, Any]  # what the measurements of a problem share


class Verdict(NamedTuple):
    status: str
    reason: str | None
    errors: dict[str, Any]


class Contestant(NamedTuple):
    """steps: one call for each set of inputs. judge: checks the results; it makes the first call."""

    package: str
    steps: list[Step]
    judge: Callable[[], Verdict]


class Yardstick(NamedTuple):
    """A plain operation of torch that takes turns with a provider. work: its operations or bytes, in `unit`."""

    name: str
    step: Step
    work: float
    unit: str


class Posed(Protocol):
    """A problem with its tensors on the device."""

    yardstick: Yardstick

    def contestant(self, name: str) -> Contestant: ...


class Problem(Protocol):
    """work: the least operations, or bytes, of a step, in the yardstick's unit."""

    @property
    def suite(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def size(self) -> dict[str, Any]: ...
    @property
    def work(self) -> float: ...
    def providers(self, device: torch.device) -> tuple[list[str], dict[str, str]]: ...
    def pose(self, device: torch.device, memo: Memo) -> Posed: ...
    def check_seconds(self) -> float: ...
    def tiny(self) -> Problem: ...


def product(device: torch.device, dtype: torch.dtype) -> Yardstick:
    size = PRODUCT_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    name = f"product of {size} x {size} in {str(dtype).removeprefix('torch.')}"
    return Yardstick(name, lambda: a @ b, 2.0 * size**3, "flop")


def moved(value: Any, device: torch.device | str) -> Any:
    """The same record with its tensors on another device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(moved(part, device) for part in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {field.name: moved(getattr(value, field.name), device) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **changed)
    return value


def recalled(memo: Memo, name: str, compute: Callable[[], Any], device: torch.device) -> Any:
    """What is computed once for a problem, and kept on the host between its measurements."""
    if name not in memo:
        memo[name] = moved(compute(), "cpu")
    return moved(memo[name], device)


# Losses.


def gradients_step(loss: Loss, inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    """The loss and the gradients of its leaves, as new tensors: such a step can be captured as a graph."""

    def step() -> tuple[Tensor, ...]:
        value = loss(inputs)
        return value.detach(), *torch.autograd.grad(value, inputs.leaves)

    return step


def _half_products(case: Case) -> Loss:
    """Eager with products in the rows' own dtype, as under autocast."""
    if case.dtype.itemsize > 2:
        raise CannotPoseError("the same as eager: the rows are not of 16 bits")
    return providers._call(providers._PLAIN[case.loss], case, product=case.dtype)


@dataclass(frozen=True)
class LossProblem:
    case: Case

    @property
    def suite(self) -> str:
        return self.case.suite

    @property
    def name(self) -> str:
        return self.case.name

    @property
    def size(self) -> dict[str, Any]:
        return {"n": self.case.n, "m": self.case.m, "d": self.case.d, "dtype": self.case.dtype_name}

    @property
    def work(self) -> float:
        return self.case.flops(BOTH)

    def all_providers(self, device: torch.device) -> tuple[list[Provider], dict[str, str]]:
        found, missing = providers.providers(device)
        return [*found, Provider(EAGER_HALF, _half_products)], missing

    def providers(self, device: torch.device) -> tuple[list[str], dict[str, str]]:
        """Those that can compute the case."""
        found, missing = self.all_providers(device)
        names = []
        for provider in found:
            reason = self._why_not(provider)
            if reason is None:
                names.append(provider.name)
            else:
                missing[provider.name] = reason
        return names, missing

    def _why_not(self, provider: Provider) -> str | None:
        try:
            provider.pose(self.case)
        except CannotPoseError as reason:
            return f"cannot compute the case: {reason}"
        except Exception as reason:  # an error of one peer must not stop the others
            return f"{type(reason).__name__}: {reason}".splitlines()[0]
        return None

    def pose(self, device: torch.device, memo: Memo) -> PosedLoss:
        return PosedLoss(self, device, memo)

    def check_seconds(self) -> float:
        """A guess of the time that the truth takes: 20 TFLOP/s in float64, 30 passes over the logits at 3 TB/s."""
        pairs = self.case.n * self.case.m
        return len(_kinds(self.case)) * pairs * (6 * self.case.d / 2e13 + 30 * 8 / 3e12)

    def tiny(self) -> LossProblem:
        n, m = (24, 24) if self.case.n == self.case.m else (14, 40)
        return LossProblem(dataclasses.replace(self.case, n=n, m=m, d=16))


def _kinds(case: Case) -> tuple[str, ...]:
    return KINDS if case.n * case.m <= BOTH_KINDS else KINDS[:1]


class PosedLoss:
    def __init__(self, problem: LossProblem, device: torch.device, memo: Memo) -> None:
        case = problem.case
        self.case, self.problem, self.device, self.memo = case, problem, device, memo
        first = case.inputs("random", self.device)
        tensors = (first.anchors, first.contrasts, first.queue)
        count = 4 if sum(t.nbytes for t in tensors if t is not None) <= LARGE_SET else 2
        self.sets = [first, *(case.inputs("random", self.device, seed) for seed in range(1, count))]
        self.yardstick = product(self.device, case.dtype)

    def contestant(self, name: str) -> Contestant:
        found, _ = self.problem.all_providers(self.device)
        provider = next(provider for provider in found if provider.name == name)
        loss = provider.pose(self.case)
        steps: list[Step] = [gradients_step(loss, inputs) for inputs in self.sets]
        return Contestant(provider.package, steps, partial(self._judge, loss, provider))

    def _judge(self, loss: Loss, provider: Provider) -> Verdict:
        status, reason, found = OK, None, {}
        for kind in _kinds(self.case):
            inputs = self.sets[0] if kind == KINDS[0] else self.case.inputs(kind, self.device)
            value, *gradients = gradients_step(loss, inputs)()
            errors = self._truth(kind, inputs).judge(value, tuple(gradients))
            found[kind] = {"loss": errors.loss, "gradient": errors.gradient, "allowed": errors.gradient_allowed}
            if not errors.right:
                status, reason = verdict(kind, errors, provider.is_fastcl)
                if status == WRONG:
                    break
        return Verdict(status, reason, found)

    def _truth(self, kind: str, inputs: Inputs) -> truth.Truth:
        found: truth.Truth = recalled(self.memo, kind, lambda: truth.truth(self.case, inputs), self.device)
        return found


# Sinkhorn and top-k: the relative error of the result decides.


def by_error(error: float, tolerance: float, is_fastcl: bool) -> Verdict:
    """A peer may be a hundred times less precise; it is then marked."""
    errors = {"result": error, "allowed": tolerance}
    if error <= tolerance:
        return Verdict(OK, None, errors)
    near = error <= min(100 * tolerance, 0.1) and not is_fastcl
    return Verdict(IMPRECISE if near else WRONG, f"error {error:.1e}, allowed {tolerance:.0e}", errors)


def relative(got: Tensor, right: Tensor) -> float:
    return float((got.double() - right).norm() / right.norm())


def _lacking(names: dict[str, Any]) -> dict[str, str]:
    """fastcl's backends that are missing here."""
    return {f"fastcl {name}": reason for name, reason in MISSING.items() if f"fastcl {name}" not in names}


@dataclass(frozen=True)
class SinkhornProblem:
    case: transport.Case
    suite: str = transport.SUITE

    @property
    def name(self) -> str:
        return f"Sinkhorn, {self.case.name}"

    @property
    def size(self) -> dict[str, Any]:
        return {"n": self.case.n, "m": self.case.k, "dtype": str(self.case.dtype).removeprefix("torch.")}

    @property
    def work(self) -> float:
        """Of the forward: the scores are read once an iteration and once more, and the assignments written."""
        return self.case.n * self.case.k * self.case.dtype.itemsize * (self.case.n_iters + 2)

    def providers(self, device: torch.device) -> tuple[list[str], dict[str, str]]:
        found, missing = transport.providers(device)
        return list(found), missing | _lacking(found)

    def pose(self, device: torch.device, memo: Memo) -> PosedSinkhorn:
        return PosedSinkhorn(self.case, device, memo)

    def check_seconds(self) -> float:
        return 1 + self.case.n * self.case.k * 8 * 10 * (self.case.n_iters + 1) / 3e12

    def tiny(self) -> SinkhornProblem:
        return SinkhornProblem(dataclasses.replace(self.case, n=40, k=24))


class PosedSinkhorn:
    def __init__(self, case: transport.Case, device: torch.device, memo: Memo) -> None:
        self.case, self.device, self.memo = case, device, memo
        self.points = case.points(device)
        x, y = self.points
        first = (x @ y.T).to(case.dtype)
        count = 4 if first.nbytes <= LARGE_SET else 2
        self.scores = [first, *(first.roll(k, 0) for k in range(1, count))]  # of other rows, and as hard
        self.weight = case.weight(device)
        self.room = torch.empty_like(first)
        self.yardstick = Yardstick("copy of the scores", lambda: self.room.copy_(first), 2.0 * first.nbytes, "byte")

    def contestant(self, name: str) -> Contestant:
        solve, package = transport.providers(self.device)[0][name]
        steps = [transport.step_of(solve, self.case, scores, *self.points, self.weight) for scores in self.scores]
        return Contestant(package, steps, partial(self._judge, solve, steps[0], name.startswith("fastcl ")))

    def _judge(self, solve: transport.Solve, step: Step, is_fastcl: bool) -> Verdict:
        scores = self.scores[0]
        true = recalled(self.memo, "potential", lambda: transport.true_potential(self.case, scores), self.device)
        errors = transport.errors(self.case, scores, true, solve(self.case, scores, *self.points))
        worst = errors["error"]
        if self.weight is not None:
            exact = scores.double().requires_grad_()
            (right,) = torch.autograd.grad(
                transport.log_domain(self.case, exact, *self.points), exact, self.weight.double()
            )
            gradients: Any = step()
            worst = max(worst, relative(gradients[0], right))
        found = by_error(worst, 1e-4 if self.case.dtype == torch.float32 else 2.0**-7, is_fastcl)
        return found._replace(errors=found.errors | errors)


@dataclass(frozen=True)
class NearestProblem:
    case: nearest.Case
    suite: str = nearest.SUITE

    @property
    def name(self) -> str:
        return f"top-k, {self.case.name}"

    @property
    def size(self) -> dict[str, Any]:
        case = self.case
        return {"n": case.n, "m": case.m, "d": case.d, "dtype": str(case.dtype).removeprefix("torch.")}

    @property
    def work(self) -> float:
        return 2.0 * self.case.n * self.case.m * self.case.d

    def providers(self, device: torch.device) -> tuple[list[str], dict[str, str]]:
        found, missing = nearest.searches(device)
        return list(found), missing | _lacking(found)

    def pose(self, device: torch.device, memo: Memo) -> PosedNearest:
        return PosedNearest(self.case, device, memo)

    def check_seconds(self) -> float:
        return 1 + SAMPLED * self.case.m * 8 * 20 / 3e12

    def tiny(self) -> NearestProblem:
        return NearestProblem(dataclasses.replace(self.case, n=12, m=300, k=5, d=16))


class PosedNearest:
    def __init__(self, case: nearest.Case, device: torch.device, memo: Memo) -> None:
        self.case, self.device, self.memo = case, device, memo
        g = torch.Generator(device).manual_seed(0)
        self.keys = case.normal(case.m, g)
        self.queries = [case.normal(case.n, g) for _ in range(4)]
        self.yardstick = product(device, case.dtype)

    def contestant(self, name: str) -> Contestant:
        make, package = nearest.searches(self.device)[0][name]
        search = make(self.keys, self.case.k)
        steps: list[Step] = [partial(search, queries) for queries in self.queries]
        return Contestant(package, steps, partial(self._judge, search, name.startswith("fastcl ")))

    def _judge(self, search: nearest.Search, is_fastcl: bool) -> Verdict:
        some = torch.linspace(0, self.case.n - 1, min(SAMPLED, self.case.n), device=self.device).long()
        right = recalled(self.memo, "values", lambda: self._best(self.queries[0][some].double()), self.device)
        got = search(self.queries[0])[some].to(self.device)
        # Peers that multiply in the rows' dtype round their values to it.
        return by_error(relative(got, right), 1e-5 if is_fastcl else 1e-4, is_fastcl)

    def _best(self, rows: Tensor) -> Tensor:
        parts = self.keys.split(2**20)
        best = [torch.topk(rows @ part.double().T, min(self.case.k, len(part))).values for part in parts]
        return torch.topk(torch.cat(best, 1), self.case.k).values
