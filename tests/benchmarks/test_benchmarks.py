"""The benchmark harness finds a planted slow provider, a planted wrong one and a planted memory hog."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import formulas, gpu_plan, machine, measure, memory, peak, providers, run, truth
from benchmarks.cases import BOTH, FORWARD, KINDS, QUICK, SUITES, TEMPERATURE, Case, Inputs
from benchmarks.measure import alternate, clock_timer, percentiles, training_step
from benchmarks.providers import CannotPoseError, Provider
from benchmarks.run import TIMED, Row, Setting
from fastcl.ops.backends import choose
from fastcl.ops.contrastive.op import BACKENDS
from tests.support import oracle

CPU = torch.device("cpu")
TINY = Case("small", "self", 24, 24, 8)
SETTING = Setting(CPU, 1, {"float32": peak.Peak(1e9, "made up")}, "a processor", "a commit")
EFFORT = {"rounds": (5, 5), "seconds": 0.0}
MEGABYTE = 10**6


class Clock:
    """A clock that moves only when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0
        self.speed = 1.0

    def __call__(self) -> float:
        return self.now

    def takes(self, seconds: float) -> Callable[[], None]:
        def step() -> None:
            self.now += seconds * self.speed

        return step


# Providers, at module level, as they are pickled for another process.


def eager_loss(inputs: Inputs) -> Tensor:
    return formulas.self_contrast(inputs.anchors, inputs.clusters, TEMPERATURE)


def pose_eager(case: Case) -> Callable[[Inputs], Tensor]:
    return eager_loss


class _HogInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        torch.ones(200 * MEGABYTE // 4)
        return grad


def pose_hog(where: str, case: Case) -> Callable[[Inputs], Tensor]:
    def loss(inputs: Inputs) -> Tensor:
        if where == FORWARD:
            torch.ones(200 * MEGABYTE // 4)
            return eager_loss(inputs)
        return _HogInBackward.apply(eager_loss(inputs))

    return loss


def pose_too_large(case: Case) -> Callable[[Inputs], Tensor]:
    return lambda inputs: torch.ones(2**43).sum()


def pose_killed(case: Case) -> Callable[[Inputs], Tensor]:
    return lambda inputs: os.kill(os.getpid(), signal.SIGKILL)


def pose_raising(case: Case) -> Callable[[Inputs], Tensor]:
    def loss(inputs: Inputs) -> Tensor:
        raise ZeroDivisionError("planted")

    return loss


def pose_nothing(case: Case) -> Callable[[Inputs], Tensor]:
    raise CannotPoseError("planted reason")


def spoilt(how: str, inputs: Inputs) -> Tensor:
    loss = eager_loss(inputs)
    if how == "loss":
        return loss + 1e-3 * loss.detach()
    if how == "gradient":
        return 1.001 * loss - 0.001 * loss.detach()
    if how == "gradient of converged rows":
        return torch.where(loss.detach() < 1, 2 * loss - loss.detach(), loss)
    if how == "nan":
        return loss * torch.nan
    return loss.detach() + 0 * inputs.anchors.detach().sum().requires_grad_()


def pose_spoilt(how: str, case: Case) -> Callable[[Inputs], Tensor]:
    return partial(spoilt, how)


EAGER = Provider("eager", pose_eager)


# Times.


def test_percentiles_interpolate() -> None:
    assert percentiles([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == (2.0, 3.5, 5.0)
    assert percentiles([7.0]) == (7.0, 7.0, 7.0)


def test_ratios_are_taken_pair_by_pair() -> None:
    """While the machine slows down from round to round, a ratio of medians is one that no round measured."""
    samples = measure.Samples({"ours": [1.0, 4.0, 2.0], "theirs": [3.0, 12.0, 4.0]}, {})
    assert samples.ratio("ours", "theirs") == percentiles([3.0, 3.0, 2.0])
    assert np.median([3.0, 12.0, 4.0]) / np.median([1.0, 4.0, 2.0]) == 2.0


def test_alternation_finds_the_slow_step_whatever_the_machine_does_meanwhile() -> None:
    clock = Clock()
    order: list[str] = []

    def timer(step: measure.Step, calls: int) -> float:
        order.append(names[step])
        clock.speed = 1.0 + (len(order) - 1) // 2  # both calls of a pair run at the same speed
        return clock_timer(clock)(step, calls)

    steps = {"quick": clock.takes(0.01), "slow": clock.takes(0.03)}
    names = {step: name for name, step in steps.items()}
    for step in steps.values():
        step()
    samples = alternate(steps, timer, rounds=(6, 6))
    assert samples.ratio("quick", "slow") == pytest.approx((3, 3, 3))
    assert samples.percentiles("quick")[0] < samples.percentiles("quick")[2]
    rounds = order[-12:]
    assert rounds == ["quick", "slow", "slow", "quick"] * 3


def test_a_sample_is_of_as_many_calls_as_last_two_milliseconds() -> None:
    clock = Clock()
    samples = alternate({"short": clock.takes(1e-4), "long": clock.takes(0.5)}, clock_timer(clock))
    assert 20 <= samples.calls["short"] <= 21
    assert samples.calls["long"] == 1
    assert samples.percentiles("short")[1] == pytest.approx(1e-4)
    assert len(samples.seconds["short"]) == len(samples.seconds["long"]) == measure.ROUNDS[0]


def test_quick_steps_are_repeated_more_often() -> None:
    clock = Clock()
    samples = alternate({"only": clock.takes(0.1)}, clock_timer(clock), rounds=(5, 40), seconds=1.05)
    assert len(samples.seconds["only"]) == 10


def test_a_training_step_drops_gradients_and_takes_input_sets_in_turn() -> None:
    sets = [TINY.inputs("random", seed=seed) for seed in range(2)]
    step = training_step(eager_loss, sets, BOTH)
    step()
    first = sets[0].anchors.grad.clone()
    assert sets[1].anchors.grad is None
    step(), step()
    assert torch.equal(sets[0].anchors.grad, first)  # not twice as large
    training_step(eager_loss, sets, FORWARD)()
    assert sets[0].anchors.grad is None


# Truth and errors.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "case",
    [TINY, Case("", "self", 24, 24, 8, cluster_size=6), Case("", "two sets", 9, 9, 5), Case("", "queue", 7, 19, 6)],
    ids=lambda case: case.problem,
)
def test_truth_is_the_formula(case: Case, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truth, "BLOCK_BYTES", 5 * case.m * 8)
    inputs = case.inputs(kind)
    exact = truth.truth(case, inputs).exact
    leaves = [leaf.detach().double().requires_grad_() for leaf in inputs.leaves]
    options: dict[str, Any] = {"temperature": TEMPERATURE}
    if case.loss == "self":
        loss = oracle.cluster_infonce(leaves[0], inputs.clusters, **options)
    elif case.loss == "two sets":
        loss = oracle.cluster_infonce(leaves[0], contrasts=leaves[1], symmetric=True, **options)
    else:
        no_cluster = torch.full((case.m,), -1)
        loss = oracle.cluster_infonce(
            leaves[0], positives=inputs.keys, contrasts=inputs.queue, contrast_clusters=no_cluster, **options
        )
    loss.backward()
    torch.testing.assert_close(exact.loss, loss.detach(), rtol=1e-6, atol=0)
    for got, leaf in zip(exact.gradients, leaves, strict=True):
        torch.testing.assert_close(got, leaf.grad, rtol=1e-5, atol=1e-12)


def test_converged_rows_are_converged_and_random_rows_are_not() -> None:
    for case in (TINY, Case("", "two sets", 64, 64, 128), Case("", "queue", 64, 256, 128)):
        losses = {kind: truth.truth(case, case.inputs(kind)).exact.loss.item() for kind in KINDS}
        assert losses["converged"] < 0.1 < 1 < losses["random"]


def tiny_cases() -> list[Case]:
    """One of each problem and dtype of the suites, with and without clusters."""
    found = {}
    planned = [e.problem.case for e in gpu_plan.PLAN if isinstance(e.problem.case, Case)]
    for case in [*planned, *(case for suite in (*SUITES.values(), *QUICK.values()) for case in suite)]:
        n, m = (24, 24) if case.n == case.m else (14, 40)
        size = 2 if case.cluster_size == 2 else 6
        found[case.problem, case.dtype] = replace(case, n=n, m=m, d=16, cluster_size=size)
    return list(found.values())


@pytest.fixture
def _nothing_compiled() -> Iterator[None]:
    yield
    torch.compiler.reset()


# Warnings from torch 2.13's inductor and from torch 2.6's.
@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning",
    "ignore:Skipping serialization of skipfiles_inline_module_allowlist:UserWarning",
)
@pytest.mark.usefixtures("_nothing_compiled")
@pytest.mark.parametrize("case", tiny_cases(), ids=lambda case: case.name)
def test_every_provider_agrees_with_float64(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formulas, "block_rows", lambda m: 5)
    found, _ = providers.providers(CPU)
    posed = []
    for provider in found:
        if provider.name == providers.COMPILED and case.problem != "self-contrast, pairs":
            continue  # compiling takes seconds
        try:
            loss = provider.pose(case)
        except CannotPoseError:
            continue
        posed.append(provider.name)
        for kind in KINDS:
            inputs = case.inputs(kind)
            value = training_step(loss, [inputs], BOTH)().detach()
            errors = truth.truth(case, inputs).judge(value, tuple(leaf.grad for leaf in inputs.leaves))
            assert errors.near, (provider.name, kind, errors)
            assert errors.right or provider.name == providers.COMPILED, (provider.name, kind, errors)
    assert {"fastcl chunked", providers.EAGER, providers.CHUNKED} <= set(posed)
    assert (providers.LINEAR_CROSS_ENTROPY in posed) == (
        case.loss == "two sets" and hasattr(torch.nn, "LinearCrossEntropyOptions")
    )


def test_arithmetic_of_the_cases() -> None:
    assert Case("", "self", 10, 10, 3).flops(BOTH) == 4 * 10 * 10 * 3
    assert Case("", "self", 10, 10, 3).flops(FORWARD) == 10 * 10 * 3
    assert Case("", "two sets", 10, 20, 3).flops(BOTH) == 6 * 10 * 20 * 3
    assert Case("", "queue", 10, 20, 3).flops(BOTH) == 4 * 10 * 20 * 3


# Memory.


def peak_of(pose: Callable[..., Any], name: str = "planted") -> memory.Peak:
    return memory.measure(TINY, Provider(name, pose), CPU, 1)


@pytest.mark.parametrize("where", [FORWARD, BOTH])
def test_a_planted_memory_hog_is_found(where: str) -> None:
    honest, hog = peak_of(pose_eager), peak_of(partial(pose_hog, where))
    if honest.source != "VmHWM - VmRSS":
        pytest.skip(f"this system measures by {honest.source}")
    assert 0 <= honest.extra < 5 * MEGABYTE
    assert 195 * MEGABYTE < hog.extra - honest.extra < 210 * MEGABYTE


@pytest.mark.parametrize("pose", [pose_too_large, pose_killed])
def test_what_is_too_large_for_the_machine_is_reported_as_such(pose: Callable[..., Any]) -> None:
    with pytest.raises(memory.TooLargeError):
        peak_of(pose)


# A whole case.


@pytest.fixture
def measured_without_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "measure", lambda *_: memory.Peak(2000, "made up"))


def rows_of(*found: Provider, case: Case = TINY) -> dict[tuple[str, str], Row]:
    return {(row["provider"], row["direction"]): row for row in run.run(case, found, SETTING, **EFFORT)}


def test_a_planted_slow_provider_has_the_ratio_that_it_was_given(
    measured_without_processes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(run, "timer_for", lambda device: clock_timer(clock))

    def pose(seconds: float, case: Case) -> Callable[[Inputs], Tensor]:
        step = clock.takes(seconds)

        def loss(inputs: Inputs) -> Tensor:
            step()
            return eager_loss(inputs)

        return loss

    slow = Provider("fastcl planted", partial(pose, 0.040), "fastcl")
    rows = rows_of(Provider("eager", partial(pose, 0.010)), slow)
    for direction in (FORWARD, BOTH):
        row = rows["fastcl planted", direction]
        assert row["status"] == "ok"
        assert (row["p20_ms"], row["p50_ms"], row["p80_ms"]) == pytest.approx((40, 40, 40))
        assert row["ratio"]["eager"] == pytest.approx({"p20": 0.25, "p50": 0.25, "p80": 0.25})
        assert rows["eager", direction]["ratio"] == {}  # it is its own baseline; and fastcl is no baseline
        assert row["flops_per_second"] == pytest.approx(TINY.flops(direction) / 0.040)
        assert row["share_of_peak"] == pytest.approx(row["flops_per_second"] / 1e9)
        assert row["peak_extra_bytes"] == (None if direction == FORWARD else 2000)


def test_the_peak_takes_turns_and_is_nobodys_rival(
    measured_without_processes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(run, "timer_for", lambda device: clock_timer(clock))

    def pose(case: Case) -> Callable[[Inputs], Tensor]:
        step = clock.takes(0.010)

        def loss(inputs: Inputs) -> Tensor:
            step()
            return eager_loss(inputs)

        return loss

    # Half as fast as at the start of the run.
    slower = peak.Peak(1e9, "made up", clock.takes(0.004), 2e6)
    setting = Setting(CPU, 1, {"float32": slower}, "a processor", "a commit")
    rows = list(run.run(TINY, [Provider("planted", pose, "torch")], setting, **EFFORT))
    assert [row["provider"] for row in rows] == ["planted"] * 2
    for row in rows:
        assert row["ratio"] == {}
        assert row["peak_flops_per_second"] == pytest.approx(0.5e9)
        assert row["share_of_peak"] == pytest.approx(TINY.flops(row["direction"]) / 0.010 / 0.5e9)


@pytest.mark.parametrize("how", ["loss", "gradient", "gradient of converged rows", "nan", "no gradient"])
@pytest.mark.parametrize("package", ["fastcl", "torch"])
def test_a_planted_wrong_provider_gets_no_time(how: str, package: str, measured_without_processes: None) -> None:
    rows = rows_of(EAGER, Provider("planted", partial(pose_spoilt, how), package))
    for direction in (FORWARD, BOTH):
        row = rows["planted", direction]
        assert row["status"] == "wrong"
        assert "gradient" in row["reason"]
        for key in ("p20_ms", "p50_ms", "p80_ms", "flops_per_second", "share_of_peak", "peak_extra_bytes"):
            assert row[key] is None
        assert row["ratio"] == {}
        assert row["error"] or how == "no gradient"
        json.dumps(row, allow_nan=False)
        assert rows["eager", direction]["status"] == "ok"
        assert "planted" not in rows["eager", direction]["ratio"]


def test_only_a_peer_may_be_imprecise(measured_without_processes: None) -> None:
    """An error far below the terms that cancel, yet above the rule, as torch.compile makes on converged rows."""

    def pose(case: Case) -> Callable[[Inputs], Tensor]:
        return lambda inputs: eager_loss(inputs) + 5e-4

    rows = rows_of(EAGER, Provider("peer", pose), Provider("fastcl planted", pose, "fastcl"))
    assert rows["peer", BOTH]["status"] == "imprecise"
    assert "allowed" in rows["peer", BOTH]["reason"]
    assert rows["peer", BOTH]["p50_ms"] > 0
    assert rows["fastcl planted", BOTH]["status"] == "wrong"
    assert rows["fastcl planted", BOTH]["p50_ms"] is None


def test_one_that_raises_or_cannot_pose_the_case_stops_nobody() -> None:
    rows = rows_of(Provider("raising", pose_raising), Provider("nothing", pose_nothing), EAGER)
    assert rows["raising", BOTH]["status"] == "error"
    assert "ZeroDivisionError: planted" in rows["raising", BOTH]["reason"]
    assert (rows["nothing", BOTH]["status"], rows["nothing", BOTH]["reason"]) == ("cannot pose", "planted reason")
    assert rows["eager", BOTH]["status"] in TIMED
    assert rows["eager", BOTH]["p50_ms"] > 0
    assert rows["eager", BOTH]["memory_source"]


def test_nobody_waits_for_repetitions_of_a_call_that_takes_too_long(
    measured_without_processes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "PATIENCE", -1.0)
    rows = rows_of(EAGER)
    assert rows["eager", BOTH]["status"] == "too slow"
    assert rows["eager", BOTH]["reason"].startswith("a call takes ")
    assert rows["eager", BOTH]["p50_ms"] is None


def test_one_that_raises_only_when_it_is_timed_stops_nobody(measured_without_processes: None) -> None:
    def pose(case: Case) -> Callable[[Inputs], Tensor]:
        left = iter(KINDS)

        def loss(inputs: Inputs) -> Tensor:
            if next(left, None) is None:
                raise ZeroDivisionError("planted")
            return eager_loss(inputs)

        return loss

    rows = rows_of(EAGER, Provider("raising", pose))
    assert rows["raising", BOTH]["status"] == "error"
    assert rows["raising", BOTH]["p50_ms"] is None
    assert rows["eager", BOTH]["status"] == "ok"


# Peers and the machine.


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the system does not say")
def test_what_other_programs_take_is_not_what_this_one_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([(100.0, 20.0, 5.0), (200.0, 90.0, 45.0), (100.0, 20.0, 5.0), (200.0, 60.0, 45.0)])
    monkeypatch.setattr(machine.Others, "_read", staticmethod(lambda: next(readings)))
    assert machine.Others().share() == pytest.approx(0.3)
    assert machine.Others().share() == 0
    monkeypatch.undo()
    total, busy, own = machine.Others._read()
    assert total >= busy >= 0 < own


def test_peers_that_do_not_import_are_missing_with_their_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pytorch_metric_learning.losses", None)
    monkeypatch.setitem(__import__("sys").modules, "lightly.loss.ntx_ent_loss", None)
    found, missing = providers.providers(CPU)
    names = {provider.name for provider in found}
    for peer in ("pytorch-metric-learning", "lightly"):
        assert peer not in names
        assert missing[peer].startswith("ModuleNotFoundError: ")
    assert missing["fastcl cuda"]
    assert missing["Liger-Kernel"]
    rows = run.missing_rows(SETTING, missing)
    assert [(row["provider"], row["status"], row["reason"]) for row in rows] == [
        (name, "missing", reason) for name, reason in missing.items()
    ]


@pytest.mark.parametrize("name", ["Inf-CL", "cut-cross-entropy", "Liger-Kernel"])
def test_peers_for_a_gpu_are_posed_the_two_sets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins with these libraries' interfaces: their arguments give the loss of the case."""

    def entropy(x: Tensor, classes: Tensor, target: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(x @ classes.T, target, reduction="none")

    def flash(q: Tensor, k: Tensor, labels: Tensor, scale: float, head_dim: int) -> Tensor:
        return entropy(q.view(len(q), -1, head_dim).flatten(1) * scale, k, labels)

    def cut(e: Tensor, c: Tensor, targets: Tensor, filter_eps: None) -> Tensor:
        return entropy(e, c, targets).mean()

    def liger() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda weight, x, target: entropy(x, weight, target).mean()

    for module, function in (
        ("inf_cl", {"cal_flash_loss": flash}),
        ("cut_cross_entropy", {"linear_cross_entropy": cut}),
        ("liger_kernel", {}),
        ("liger_kernel.transformers", {"LigerFusedLinearCrossEntropyLoss": liger}),
    ):
        stand_in = ModuleType(module)
        stand_in.__dict__.update(function)
        monkeypatch.setitem(sys.modules, module, stand_in)
    found, missing = providers.providers(torch.device("cuda"))
    [peer] = [provider for provider in found if provider.name == name]
    assert name not in missing
    case = Case("two_set", "two sets", 24, 24, 8)
    inputs = case.inputs("random")
    expected = formulas.two_sets(inputs.anchors, inputs.contrasts, TEMPERATURE)
    torch.testing.assert_close(peer.pose(case)(inputs), expected)
    for other in (TINY, Case("memory", "queue", 4, 9, 8)):
        with pytest.raises(CannotPoseError):
            peer.pose(other)


def test_backends_appear_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("new", "triton"):
        monkeypatch.setitem(choose.AVAILABLE, name, "")
        monkeypatch.setitem(BACKENDS, name, BACKENDS["chunked"])
    found, missing = providers.providers(CPU)
    names = [provider.name for provider in found]
    assert "fastcl new" in names
    assert "fastcl reference" not in names
    assert missing["fastcl triton"] == "computes on cuda"
    [new] = [provider for provider in found if provider.name == "fastcl new"]
    inputs = TINY.inputs("random")
    torch.testing.assert_close(new.pose(TINY)(inputs), eager_loss(inputs))


@pytest.mark.skipif(shutil.which("cc") is None and shutil.which("gcc") is None, reason="no C compiler")
def test_peak_is_measured_by_the_c_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "WINDOWS", 2)
    monkeypatch.setattr(peak, "STEP_SECONDS", 0.005)
    peaks = peak.measure(CPU, 1)
    found = peaks["float32"]
    assert found.source.endswith("in C, 1 threads")
    assert found.flops_per_second > 1e8
    assert found.step is not None
    assert found.step() == found.flops > 0
    on_two = peak.measure(CPU, 2)["float32"]
    assert on_two.step is not None
    assert on_two.step() == on_two.flops
    assert all(p.flops_per_second >= peaks["float32"].flops_per_second for p in peaks.values())


@pytest.mark.parametrize("broken", [False, True])
def test_peak_without_a_compiler_that_works_is_a_matrix_product(
    broken: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(peak, "MATRIX_SIZES", {"cpu": (64, 128)})
    if broken:
        (tmp_path / "cc").write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / "cc").chmod(0o755)
    peaks = peak.measure(CPU, 1)
    assert set(peaks) == {"float32", "bfloat16"}
    for found in peaks.values():
        assert found.source.startswith("torch's best matrix product")
        assert found.flops_per_second > 1e6
