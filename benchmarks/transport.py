"""Suite ``sinkhorn``: assignments of rows to columns by fastcl and other solvers, with time and error of each.

Times are for a fixed number of iterations, after which solvers are not equally accurate. So the rows also hold the
distance of the column sums from the prior, and the error of the assignments against float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fastcl
from benchmarks import machine
from benchmarks.measure import Step, alternate, timer_for
from benchmarks.providers import _DEVICE_OF_BACKEND, _why_not, version
from fastcl.ops.backends.choose import AVAILABLE
from fastcl.ops.sinkhorn.op import PASSES

SUITE = "sinkhorn"
GIVEN = ", out="  # follows a backend's name: the assignments' memory is that of the call before
EAGER, LOOP, COPY = "eager, log domain", "SwAV's loop", "copy of the scores"
TRUTH_BLOCK = 1 << 26  # scores converted to float64 at once for the truth
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """N unit rows and K unit prototypes of dimension 64; scores are their cosines."""

    n: int
    k: int
    epsilon: float = 0.05
    n_iters: int = 3
    gradient: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        what = "forward + backward" if self.gradient else "forward"
        rounded = "" if self.dtype == torch.float32 else f", {str(self.dtype).removeprefix('torch.')}"
        return f"{self.n} x {self.k}, epsilon {self.epsilon:g}, {self.n_iters} iterations, {what}{rounded}"

    def points(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Drawn on the device."""
        g = torch.Generator(device).manual_seed(0)
        x, y = (F.normalize(torch.randn(size, 64, generator=g, device=device), dim=1) for size in (self.n, self.k))
        return x, y

    def weight(self, device: torch.device) -> Tensor | None:
        """The incoming gradient [N, K], drawn on the device; None where no gradient is asked for."""
        if not self.gradient:
            return None
        g = torch.Generator(device).manual_seed(1)
        return torch.randn(self.n, self.k, generator=g, device=device).to(self.dtype)


CASES = (Case(4096, 4096), Case(4096, 4096, gradient=True), Case(4096, 3000), Case(512, 300), Case(4096, 4096, 0.01))
QUICK = (Case(1024, 1024), Case(1024, 1024, gradient=True))


Solve = Callable[[Case, Tensor, Tensor, Tensor], Tensor]  # scores, points, prototypes -> assignments [N, K]


def _fastcl(backend: str, case: Case, scores: Tensor, x: Tensor, y: Tensor) -> Tensor:
    with fastcl.use_backend(backend):
        return fastcl.sinkhorn(scores, epsilon=case.epsilon, n_iters=case.n_iters).assignments


def _into(backend: str) -> Solve:
    """A backend that writes each result where the one before was."""
    room: dict[torch.Size, Tensor] = {}

    def solve(case: Case, scores: Tensor, x: Tensor, y: Tensor) -> Tensor:
        if scores.shape not in room:
            room[scores.shape] = torch.empty_like(scores)
        out = room[scores.shape]
        with fastcl.use_backend(backend):
            return fastcl.sinkhorn(scores, epsilon=case.epsilon, n_iters=case.n_iters, out=out).assignments

    return solve


def log_domain(case: Case, scores: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """As a competent user writes it: divides scores once, and takes two log-sum-exps per iteration."""
    m = scores / case.epsilon
    n, k = scores.shape
    u = m.new_zeros(n)
    for _ in range(case.n_iters):
        v = -math.log(k) - torch.logsumexp(m + u[:, None], 0)
        u = -math.log(n) - torch.logsumexp(m + v, 1)
    return torch.softmax(m + v, 1)


def kernel_domain(case: Case, scores: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """SwAV's loop; in place, as in its code, if no gradient is needed."""
    n, k = scores.shape
    q = torch.exp(scores / case.epsilon).T
    if case.gradient:
        q = q / q.sum()
        for _ in range(case.n_iters):
            q = q / q.sum(1, keepdim=True) / k
            q = q / q.sum(0, keepdim=True) / n
        return (q * n).T
    q /= q.sum()
    for _ in range(case.n_iters):
        q /= q.sum(1, keepdim=True)
        q /= k
        q /= q.sum(0, keepdim=True)
        q /= n
    q *= n
    return q.T


def _pot(method: str, case: Case, scores: Tensor, x: Tensor, y: Tensor) -> Tensor:
    import ot

    n, k = scores.shape
    a, b = scores.new_full((n,), 1 / n), scores.new_full((k,), 1 / k)
    solver = ot.bregman.sinkhorn_log if method == "sinkhorn_log" else ot.sinkhorn
    plan: Tensor = solver(a, b, -scores, case.epsilon, numItermax=case.n_iters, stopThr=0, warn=False)
    return plan * n


def _geomloss(case: Case, scores: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """GeomLoss, with its own schedule of epsilons and iterations; |x - y|^2 / 2 = 1 - <x, y> on unit rows."""
    if case.gradient:
        raise NotImplementedError("its potentials are functions of points, not of scores")
    from geomloss import SamplesLoss

    solver = SamplesLoss("sinkhorn", p=2, blur=case.epsilon**0.5, debias=False, potentials=True, backend="tensorized")
    _, g = solver(x, y)
    return torch.softmax((scores + g.reshape(-1)) / case.epsilon, 1)


def _ott(case: Case, scores: Tensor, x: Tensor, y: Tensor) -> Tensor:
    if case.gradient:
        raise NotImplementedError("its gradient is implicit, of another function than three iterations")
    if scores.is_cuda:
        raise NotImplementedError("handed arrays of the host here")
    import jax

    plan = _ott_solver(case.epsilon, case.n_iters)(scores.numpy())
    return torch.from_numpy(jax.device_get(plan).copy()) * len(scores)


_OTT: dict[tuple[float, int], Any] = {}


def _ott_solver(epsilon: float, n_iters: int) -> Any:
    """OTT-JAX's solver, compiled once per epsilon and number of iterations."""
    if (epsilon, n_iters) not in _OTT:
        import jax
        from ott.geometry import geometry
        from ott.problems.linear import linear_problem
        from ott.solvers.linear import sinkhorn

        solver = sinkhorn.Sinkhorn(min_iterations=n_iters, max_iterations=n_iters, inner_iterations=1, threshold=0.0)

        def solve(scores: Any) -> Any:
            problem = linear_problem.LinearProblem(geometry.Geometry(cost_matrix=-scores, epsilon=epsilon))
            return solver(problem).matrix

        _OTT[epsilon, n_iters] = jax.jit(solve)
    return _OTT[epsilon, n_iters]


def providers(device: torch.device) -> tuple[dict[str, tuple[Solve, str]], dict[str, str]]:
    """Solvers by name, each with the package that gives its version; and missing solvers with the reason."""
    found: dict[str, tuple[Solve, str]] = {
        f"fastcl {backend}": (partial(_fastcl, backend), "fastcl")
        for backend in PASSES
        if backend in AVAILABLE
        and backend != "reference"
        and _DEVICE_OF_BACKEND.get(backend, device.type) == device.type
    }
    if device.type == "cpu" and "cpu" in AVAILABLE:
        found["fastcl cpu" + GIVEN] = _into("cpu"), "fastcl"
    found |= {EAGER: (log_domain, "torch"), LOOP: (kernel_domain, "torch")}
    missing = {}
    for name, module, package, solve in (
        ("POT sinkhorn_log", "ot", "POT", partial(_pot, "sinkhorn_log")),
        ("POT sinkhorn", "ot", "POT", partial(_pot, "sinkhorn")),
        ("GeomLoss", "geomloss", "geomloss", _geomloss),
        ("OTT-JAX", "ott.solvers.linear.sinkhorn", "ott-jax", _ott),
    ):
        reason = _why_not(module)
        if reason is None:
            found[name] = solve, package
        else:
            missing[name] = reason
    return found, missing


def step_of(solve: Solve, case: Case, scores: Tensor, x: Tensor, y: Tensor, weight: Tensor | None) -> Step:
    if not case.gradient:
        return lambda: solve(case, scores, x, y)
    leaf = scores.clone().requires_grad_()
    return lambda: torch.autograd.grad(solve(case, leaf, x, y), leaf, weight)


def true_potential(case: Case, scores: Tensor) -> Tensor:
    """The columns' potential divided by epsilon, [K] in float64: `log_domain` in blocks of rows."""
    n, k = scores.shape
    blocks = scores.split(max(TRUTH_BLOCK // k, 1))
    u = scores.new_zeros(n, dtype=torch.float64)
    v = scores.new_zeros(k, dtype=torch.float64)
    for _ in range(case.n_iters):
        columns = torch.full_like(v, -torch.inf)
        for block, part in zip(blocks, u.split(len(blocks[0])), strict=True):
            sums = torch.logsumexp(block.double() / case.epsilon + part[:, None], 0)
            columns = torch.logaddexp(columns, sums)
        v = -math.log(k) - columns
        u = -math.log(n) - torch.cat([torch.logsumexp(block.double() / case.epsilon + v, 1) for block in blocks])
    return v


def errors(case: Case, scores: Tensor, v: Tensor, got: Tensor) -> Row:
    """Errors of the assignments `got` [N, K]; v from `true_potential` gives the true ones."""
    masses, off, size, rows = torch.zeros_like(v), 0.0, 0.0, 0.0
    step = max(TRUTH_BLOCK // case.k, 1)
    for block, part in zip(scores.split(step), got.split(step), strict=True):
        expected, wide = torch.softmax(block.double() / case.epsilon + v, 1), part.double()
        masses += wide.sum(0)
        rows += (wide.sum(1) - 1).abs().sum().item()
        off += (wide - expected).square().sum().item()
        size += expected.square().sum().item()
    return {
        "marginal_error": (masses / case.n - 1 / case.k).abs().sum().item(),
        "row_error": rows / case.n,
        "error": math.sqrt(off / size),
    }


def measure(case: Case, device: torch.device, **effort: Any) -> list[Row]:
    """A row per solver. effort: options of `measure.alternate`."""
    found, missing = providers(device)
    if case.gradient:
        found = {name: entry for name, entry in found.items() if not name.endswith(GIVEN)}
    x, y = case.points(device)
    scores = (x @ y.T).to(case.dtype)
    weight = case.weight(device)
    v = true_potential(case, scores)
    common = {"suite": SUITE, "case": case.name, "n_iters": case.n_iters, "gradient": case.gradient, **_here(device)}
    rows: dict[str, Row] = {}
    steps: dict[str, Step] = {}
    for name, (solve, package) in found.items():
        row: Row = {**common, "provider": name, "version": version(package)}
        rows[name] = row
        step = step_of(solve, case, scores, x, y, weight)
        try:
            row |= errors(case, scores, v, solve(case, scores, x, y))
            step()
        except Exception as error:  # an error of one solver must not stop the others
            row |= {"status": "error", "reason": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
            continue
        row["status"] = "ok"
        steps[name] = step
    room = torch.empty_like(scores)
    steps[COPY] = lambda: room.copy_(scores)
    watch = machine.Others()
    samples = alternate(steps, timer_for(device), **effort)
    taken = watch.share()
    rows[COPY] = {**common, "provider": COPY, "version": version("torch"), "status": "yardstick"}
    for name in steps:
        low, middle, high = samples.percentiles(name)
        ratio = {other: samples.ratio(name, other)[1] for other in steps if other != name}
        rows[name] |= {"p20_ms": low * 1e3, "p50_ms": middle * 1e3, "p80_ms": high * 1e3, "ratio": ratio}
        rows[name] |= {"samples": len(samples.seconds[name]), "taken_by_others": taken}
    absent = [{**common, "provider": name, "status": "missing", "reason": reason} for name, reason in missing.items()]
    return [*rows.values(), *absent]


def _here(device: torch.device) -> Row:
    return {
        "processor": machine.processor(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": machine.commit(),
    }
