"""Measures a case: memory, correctness, times; and makes its rows."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

import fastcl
from benchmarks import machine, memory, peak
from benchmarks.cases import BOTH, DIRECTIONS, KINDS, Case
from benchmarks.measure import PERCENTILES, Samples, alternate, timer_for, training_step
from benchmarks.providers import CannotPoseError, Loss, Provider, version
from benchmarks.truth import Errors, truth

OK, IMPRECISE, WRONG = "ok", "imprecise", "wrong"
FAILED, TOO_LARGE, TOO_SLOW, CANNOT_POSE, MISSING = "error", "too large", "too slow", "cannot pose", "missing"
TIMED = (OK, IMPRECISE)
PEAK = "peak"  # takes turns with the providers
PATIENCE = 8.0  # seconds of one call above which it is not repeated

Row = dict[str, Any]
Say = Callable[[str], None]


@dataclass
class Candidate:
    """A provider's state while a case is measured."""

    provider: Provider
    status: str = OK
    reason: str | None = None
    loss: Loss | None = None
    memory: memory.Peak | None = None
    errors: dict[str, Errors] = field(default_factory=dict)

    @property
    def timed(self) -> bool:
        return self.status in TIMED

    def mark(self, status: str, reason: object) -> None:
        text = f"{type(reason).__name__}: {reason}" if isinstance(reason, Exception) else str(reason)
        self.status, self.reason = status, (text.splitlines() or [""])[0][:300]


@dataclass(frozen=True)
class Setting:
    """What is the same for a whole run."""

    device: torch.device
    threads: int
    peaks: dict[str, peak.Peak]
    processor: str
    commit: str
    python: str = field(default_factory=platform.python_version)

    @classmethod
    def here(cls, device: torch.device) -> Setting:
        threads = torch.get_num_threads()
        return cls(device, threads, peak.measure(device, threads), machine.processor(device), machine.commit())

    def common(self, package: str | None) -> Row:
        versions = {"fastcl": fastcl.__version__, "torch": torch.__version__, "python": self.python}
        if package is not None:
            versions[package] = version(package)
        return {
            "device": self.device.type,
            "threads": self.threads,
            "processor": self.processor,
            "instruction_set": machine.instruction_set(self.device),
            "versions": versions,
            "commit": self.commit,
        }


def missing_rows(setting: Setting, missing: dict[str, str]) -> list[Row]:
    """A row for each provider that cannot be measured at all."""
    return [
        {"suite": None, "case": None, "provider": name, "status": MISSING, "reason": reason, **setting.common(None)}
        for name, reason in missing.items()
    ]


def run(
    case: Case,
    providers: Sequence[Provider],
    setting: Setting,
    say: Say = lambda _: None,
    **effort: Any,
) -> Iterator[Row]:
    """The rows of a case: one per provider and direction, also for failures. effort: options of `measure.alternate`."""
    torch.compiler.reset()  # graphs of earlier cases count against the limit, beyond which this case would run eagerly
    candidates = [Candidate(provider) for provider in providers]
    for candidate in candidates:
        _measure_memory(candidate, case, setting, say)
    _judge(candidates, case, setting, say)
    samples, others = {}, {}
    for direction in DIRECTIONS:
        say(f"{case.name}: {direction}")
        watch = machine.Others()
        samples[direction] = _time(candidates, case, direction, setting, effort)
        others[direction] = watch.share()
    for candidate in candidates:
        for direction in DIRECTIONS:
            row = _row(candidate, case, direction, samples[direction], setting)
            yield row | {"taken_by_others": others[direction]}


def _measure_memory(candidate: Candidate, case: Case, setting: Setting, say: Say) -> None:
    provider = candidate.provider
    say(f"{case.name}: memory of {provider.name}")
    try:
        provider.pose(case)
        candidate.memory = memory.measure(case, provider, setting.device, setting.threads)
    except CannotPoseError as reason:
        candidate.mark(CANNOT_POSE, str(reason))
    except memory.TooLargeError as reason:
        candidate.mark(TOO_LARGE, str(reason))
    except Exception as reason:  # an error of one provider must not stop the others
        candidate.mark(FAILED, str(reason) or type(reason).__name__)


def _judge(candidates: list[Candidate], case: Case, setting: Setting, say: Say) -> None:
    for kind in KINDS:
        say(f"{case.name}: truth of {kind} rows")
        inputs = case.inputs(kind, setting.device)
        judged = truth(case, inputs)
        for candidate in candidates:
            if not candidate.timed:
                continue
            say(f"{case.name}: error of {candidate.provider.name} on {kind} rows")
            try:
                candidate.loss = candidate.loss or candidate.provider.pose(case)
                loss, seconds = _once(training_step(candidate.loss, [inputs], BOTH), setting.device)
                gradients = tuple(leaf.grad for leaf in inputs.leaves)
                if any(gradient is None for gradient in gradients):
                    candidate.mark(WRONG, "no gradient reaches the rows")
                    continue
                errors = judged.judge(loss, gradients)  # type: ignore[arg-type]
            except Exception as error:
                candidate.mark(FAILED, error)
                continue
            candidate.errors[kind] = errors
            if not errors.right:
                candidate.mark(*verdict(kind, errors, candidate.provider.is_fastcl))
            if candidate.timed and kind == KINDS[-1] and seconds > PATIENCE:  # by the last kind everything is compiled
                candidate.mark(TOO_SLOW, f"a call takes {seconds:.0f} s")


def verdict(kind: str, errors: Errors, is_fastcl: bool) -> tuple[str, str]:
    """Status and reason of a result that breaks the rule.

    A peer that computes the right result less precisely is kept and marked, because without the fastest peer all others
    would look better than they are. fastcl's own backends must obey the rule.
    """
    reason = (
        f"{kind} rows: error of the loss {errors.loss:.1e} (allowed {errors.loss_allowed:.1e}), "
        f"of the gradient {errors.gradient:.1e} ({errors.gradient_allowed:.1e})"
    )
    return IMPRECISE if errors.near and not is_fastcl else WRONG, reason


def _once(step: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float]:
    """The step's result, and the seconds that it takes."""
    returned: list[Tensor] = []
    seconds = timer_for(device)(lambda: returned.append(step()), 1)
    return returned[0].detach(), seconds


def _time(candidates: list[Candidate], case: Case, direction: str, setting: Setting, effort: dict[str, Any]) -> Samples:
    """Times the providers that have not failed."""
    sets = [case.inputs("random", setting.device)]
    steps: dict[str, Callable[[], object]] = {}
    for candidate in candidates:
        if candidate.timed and candidate.loss is not None:
            step = training_step(candidate.loss, sets, direction)
            try:
                step()
            except Exception as error:
                candidate.mark(FAILED, error)
            else:
                steps[candidate.provider.name] = step
    peak_step = _peak(setting, case).step
    if peak_step is not None and steps:
        steps[PEAK] = peak_step
    return alternate(steps, timer_for(setting.device), **effort)


def _finite(numbers: dict[str, float]) -> dict[str, float | None]:
    """Replaces NaN and infinities, which JSON does not support, by None."""
    return {name: number if math.isfinite(number) else None for name, number in numbers.items()}


def _peak(setting: Setting, case: Case) -> peak.Peak:
    return setting.peaks.get(case.dtype_name, setting.peaks["float32"])


def _row(candidate: Candidate, case: Case, direction: str, samples: Samples, setting: Setting) -> Row:
    name = candidate.provider.name
    known = _peak(setting, case)
    row: Row = {
        "suite": case.suite,
        "case": case.name,
        "problem": case.problem,
        "provider": name,
        "direction": direction,
        "status": candidate.status,
        "reason": candidate.reason,
        "n": case.n,
        "m": case.m,
        "d": case.d,
        "dtype": case.dtype_name,
        "calls_per_sample": None,
        "samples": None,
        **{f"p{p}_ms": None for p in PERCENTILES},
        "ratio": {},
        "flops": case.flops(direction),
        "flops_per_second": None,
        "share_of_peak": None,
        "peak_flops_per_second": known.flops_per_second,
        "peak_source": known.source,
        "peak_extra_bytes": None,
        "gradient_bytes": case.gradient_bytes if direction == BOTH else 0,
        "memory_source": None,
        "error": {kind: _finite(asdict(errors)) for kind, errors in candidate.errors.items()},
        **setting.common(candidate.provider.package),
    }
    if not candidate.timed or name not in samples.seconds:
        return row
    p20, p50, p80 = samples.percentiles(name)
    speed = case.flops(direction) / p50
    share, peak_speed = speed / known.flops_per_second, known.flops_per_second
    if PEAK in samples.seconds:  # ratios within rounds, as for providers
        peak_speed = known.flops / samples.percentiles(PEAK)[1]
        share = case.flops(direction) / known.flops * samples.ratio(name, PEAK)[1]
    row |= {
        "calls_per_sample": samples.calls[name],
        "samples": len(samples.seconds[name]),
        "p20_ms": p20 * 1e3,
        "p50_ms": p50 * 1e3,
        "p80_ms": p80 * 1e3,
        "flops_per_second": speed,
        "share_of_peak": share,
        "peak_flops_per_second": peak_speed,
        "ratio": {
            other: dict(zip((f"p{p}" for p in PERCENTILES), samples.ratio(name, other), strict=True))
            for other in samples.seconds
            if other not in (name, PEAK) and not other.startswith("fastcl ")
        },
    }
    if candidate.memory is not None and direction == BOTH:
        row |= {"peak_extra_bytes": candidate.memory.extra, "memory_source": candidate.memory.source}
    return row
