"""The plan for a GPU, rehearsed on the CPU: its order, its budget, planted faults, and what it leaves on disk."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import device, formulas, gpu_plan, gpu_report, gpu_run, nearest, transport
from benchmarks.__main__ import main
from benchmarks.cases import BF16, TEMPERATURE, Case, Inputs
from benchmarks.gpu_pairs import PairProblem
from benchmarks.gpu_plan import KERNELS, TIME, Entry
from benchmarks.gpu_problems import LossProblem, NearestProblem, SinkhornProblem, moved
from benchmarks.providers import CannotPoseError, Provider
from benchmarks.truth import truth

CPU = torch.device("cpu")
SELF = Entry(LossProblem(Case("infonce", "self", 24, 24, 8)), profiled=True)
SETS = Entry(LossProblem(Case("two_set", "two sets", 20, 20, 8)))
LATE = Entry(LossProblem(Case("infonce", "self", 12, 12, 8)), main=False)
STORE = Entry(NearestProblem(nearest.Case(6, 50, 4, 8)))
TRANSPORT = Entry(SinkhornProblem(transport.Case(30, 20)))


class Clock:
    """A clock that moves only when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def eager(inputs: Inputs) -> Tensor:
    return formulas.self_contrast(inputs.anchors, inputs.clusters, TEMPERATURE)


def posing(loss: Callable[[Inputs], Tensor]) -> Callable[[Case], Callable[[Inputs], Tensor]]:
    def pose(case: Case) -> Callable[[Inputs], Tensor]:
        if case.loss != "self":
            raise CannotPoseError("planted")
        return loss

    return pose


def raising(inputs: Inputs) -> Tensor:
    raise ZeroDivisionError("planted")


def out_of_memory(inputs: Inputs) -> Tensor:
    raise torch.OutOfMemoryError("planted")


@pytest.fixture
def providers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replaces the providers of losses; each is a name and a loss."""

    def use(**losses: Callable[[Inputs], Tensor]) -> None:
        found = [
            Provider(name.replace("_", " "), posing(loss), "fastcl" if name.startswith("fastcl") else "torch")
            for name, loss in losses.items()
        ]
        monkeypatch.setattr("benchmarks.providers.providers", lambda device: (list(found), {"a peer": "not here"}))

    monkeypatch.setattr(gpu_run, "EFFORT", {"rounds": (5, 5), "seconds": 0.0})
    monkeypatch.setattr(gpu_run, "ISSUED", {True: 1, False: 1})
    monkeypatch.setattr("benchmarks.measure.SAMPLE_SECONDS", 0.0)
    return use


def state(folder: Path, **options: Any) -> gpu_run.Run:
    given: dict[str, Any] = {"budget": 1e9, "start": time.monotonic(), "rehearsal": True}
    return gpu_run.Run(device.stand_in(), folder, **given | options)


def rows_of(folder: Path, *plan: Entry, **options: Any) -> dict[tuple[str, str], gpu_run.Row]:
    gpu_run.run(plan, state(folder, **options))
    rows = gpu_run.read(folder)
    found = {(row["provider"], row["what"]): row for row in rows}
    assert len(found) == len(rows) or len(plan) > 1
    return found


# The plan.


def test_the_plan_has_each_problem_once_and_the_goals_first() -> None:
    names = [entry.problem.name for entry in gpu_plan.PLAN]
    assert len(set(names)) == len(names)
    assert names[:4] == [
        "self-contrast, pairs, N=65536, D=256, bfloat16",
        "self-contrast, pairs, N=16384, D=128, float32",
        "two sets, 65536 x 65536, D=512, bfloat16",
        "queue, 4096 x 1048576, D=256, bfloat16",
    ]
    mains = [entry.main for entry in gpu_plan.PLAN]
    assert mains == sorted(mains, reverse=True)
    profiled = [entry.problem for entry in gpu_plan.PLAN if entry.profiled]
    assert {type(problem) for problem in profiled} == {LossProblem, NearestProblem, PairProblem, SinkhornProblem}
    assert all(entry.problem.check_seconds() < 10 for entry in gpu_plan.PLAN)


def test_fastcl_comes_first_then_eager_kernels_compile_and_peers_and_further_problems_last(providers) -> None:
    names = ("peer", "torch.compile", "eager", "fastcl chunked", "fastcl cuda", "fastcl triton")
    providers(**dict.fromkeys(names, eager))
    measurements, _ = gpu_plan.ordered((SELF, LATE), CPU)
    order = [(m.entry is SELF, m.provider, m.what) for m in measurements]
    expected = [("fastcl cuda", TIME), ("fastcl triton", TIME), ("eager", TIME)]
    kernels = [("fastcl cuda", KERNELS), ("fastcl triton", KERNELS)]
    rest = [("torch.compile", TIME), ("peer", TIME), ("fastcl chunked", TIME)]
    assert order == [
        *((True, *turn) for turn in (*expected, *kernels, *rest)),
        *((False, *turn) for turn in (*expected, *rest)),
    ]


def test_a_rehearsal_has_every_kind_of_problem() -> None:
    small = gpu_plan.tiny(gpu_plan.PLAN)
    assert {type(entry.problem) for entry in small} == {LossProblem, NearestProblem, PairProblem, SinkhornProblem}
    losses = {entry.problem.case.loss for entry in small if isinstance(entry.problem, LossProblem)}
    assert losses == {"self", "two sets", "queue"}
    assert all(entry.problem.size["n"] <= 40 for entry in small)


# Rows.


def test_a_row_tells_error_times_and_kernels(tmp_path, providers) -> None:
    providers(**{"fastcl cuda": eager, "eager": eager})
    rows = rows_of(tmp_path, SELF)
    row = rows["fastcl cuda", TIME]
    assert row["status"] == "ok", row
    assert row["error"]["random"]["gradient"] <= row["error"]["random"]["allowed"]
    assert set(row["error"]) == {"random", "converged"}
    for name in ("p20_ms", "p50_ms", "p80_ms", "host_ms", "yardstick_ms", "of_yardstick", "first_call_s", "took_s"):
        assert row[name] > 0, name
    assert row["sets"] == 4
    assert row["work"] == 4 * 24 * 24 * 8
    assert row["graph_p50_ms"] is None
    assert row["graph_reason"]
    assert rows["fastcl cuda", KERNELS]["kernels"][0]["us"] > 0
    assert rows["a peer", TIME]["status"] == "missing"


def test_a_wrong_provider_has_no_time_and_one_that_raises_stops_no_other(tmp_path, providers) -> None:
    losses = {
        "fastcl triton": lambda inputs: 1.01 * eager(inputs),
        "fastcl cuda": raising,
        "fastcl cpu": out_of_memory,
        "peer": lambda inputs: eager(inputs) * torch.nan,
        "eager": eager,
    }
    providers(**losses)
    rows = rows_of(tmp_path, SELF)
    for name, status in (("fastcl triton", "wrong"), ("fastcl cuda", "error"), ("fastcl cpu", "too large")):
        assert rows[name, TIME]["status"] == status
        assert rows[name, TIME]["reason"]
        assert "p50_ms" not in rows[name, TIME]
    assert "ZeroDivisionError: planted" in rows["fastcl cuda", TIME]["reason"]
    assert rows["fastcl cuda", KERNELS]["status"] == "error"
    assert rows["peer", TIME]["status"] == "wrong"
    assert rows["eager", TIME]["status"] == "ok"
    assert rows["eager", TIME]["p50_ms"] > 0
    page = gpu_report.page(gpu_run.read(tmp_path))
    assert "- fastcl triton, time: wrong (random rows: error of the loss" in page
    assert "| fastcl triton |" not in page


def test_a_provider_that_waits_or_is_too_slow_is_not_repeated(tmp_path, providers, monkeypatch) -> None:
    monkeypatch.setattr(gpu_run, "PATIENCE", -1.0)
    providers(eager=eager)
    row = rows_of(tmp_path, SELF)["eager", TIME]
    assert row["status"] == "too slow"
    assert "p50_ms" not in row


def test_a_graph_replays_all_sets_and_its_failure_is_told(tmp_path, providers, monkeypatch) -> None:
    captured = []

    def capture(steps):
        captured.append(len(steps))

        def replay() -> None:
            for step in steps:
                step()

        return replay

    providers(**{"fastcl cuda": eager})
    plain = device.stand_in()
    monkeypatch.setattr(device, "stand_in", lambda: replace(plain, capture=capture, peak_bytes=lambda step: 5000))
    row = rows_of(tmp_path / "a", SELF)["fastcl cuda", TIME]
    assert captured == [4]
    assert row["graph_p50_ms"] > 0
    assert row["graph_reason"] is None
    assert row["peak_extra_bytes"] == 5000
    monkeypatch.setattr(device, "stand_in", lambda: replace(plain, capture=raising))
    row = rows_of(tmp_path / "b", SELF)["fastcl cuda", TIME]
    assert row["status"] == "ok"
    assert row["graph_p50_ms"] is None
    assert "planted" in row["graph_reason"]


@pytest.mark.parametrize(
    "entry", [STORE, TRANSPORT, replace(TRANSPORT, problem=SinkhornProblem(transport.Case(30, 20, gradient=True)))]
)
def test_sinkhorn_and_topk_are_checked_and_timed(tmp_path, entry, monkeypatch) -> None:
    monkeypatch.setattr(gpu_run, "EFFORT", {"rounds": (1, 1), "seconds": 0.0})

    def no_values(keys: Tensor, k: int) -> nearest.Search:
        return lambda queries: torch.zeros(len(queries), k)

    off = no_values if entry is STORE else lambda case, scores, *_: scores.softmax(1)
    module, name = (nearest, "searches") if entry is STORE else (transport, "providers")
    found, missing = getattr(module, name)(CPU)
    found["fastcl cuda"] = found["off"] = off, "torch"
    monkeypatch.setattr(module, name, lambda device: (found, missing))
    rows = rows_of(tmp_path, entry)
    for name in ("fastcl chunked", "eager" if entry is STORE else transport.EAGER):
        assert rows[name, TIME]["status"] == "ok", rows[name, TIME]
        assert rows[name, TIME]["p50_ms"] > 0
        assert rows[name, TIME]["of_yardstick"] > 0
        assert rows[name, TIME]["error"]["result"] < 1e-5
    for name in ("off", "fastcl cuda"):
        assert rows[name, TIME]["status"] == "wrong", rows[name, TIME]
        assert "p50_ms" not in rows[name, TIME]
    assert "faiss-cpu, flat" in {key[0] for key in rows} or entry is not STORE


# The budget.


def test_what_no_longer_fits_is_named_and_what_is_shorter_still_runs(tmp_path, providers, monkeypatch) -> None:
    clock = Clock()

    def measured(run: gpu_run.Run, measurement: gpu_plan.Measurement) -> gpu_run.Row:
        clock.now += 4
        run.last[measurement.provider] = 4.0
        return gpu_run._row(run, measurement, "ok", None)

    monkeypatch.setattr(gpu_run, "measured", measured)
    providers(**{"fastcl triton": eager, "fastcl cuda": eager, "eager": eager, "torch.compile": eager})
    rows = rows_of(tmp_path, replace(SELF, profiled=False), clock=clock, start=clock.now, budget=15.0)
    status = {provider: row["status"] for (provider, _), row in rows.items()}
    assert status == {
        "a peer": "missing",
        "eager, half products": "missing",
        "fastcl triton": "ok",  # about 10 s of 15
        "fastcl cuda": "ok",
        "eager": "ok",
        "torch.compile": "skipped",
    }
    assert rows["torch.compile", TIME]["reason"] == "takes about 20 s, and 3 s of the budget are left"
    assert "- self-contrast, pairs, N=24, D=8, float32: torch.compile, time" in gpu_report.page(gpu_run.read(tmp_path))


def test_a_guess_follows_the_providers_last_measurement(tmp_path) -> None:
    run = state(tmp_path)
    [first] = [m for m in gpu_plan.ordered((SELF,), CPU)[0] if m.provider == "fastcl chunked"]
    before = gpu_run._needed(run, first)
    run.last["fastcl chunked"] = 30.0
    assert gpu_run._needed(run, first) - before == pytest.approx(30 * gpu_run.MARGIN - gpu_run.ANY_CALL)
    run.memos[SELF] = {"random": None}  # the truth is known
    assert gpu_run._needed(run, first) == 30 * gpu_run.MARGIN


def test_rows_are_on_disk_when_the_process_is_killed_and_are_not_measured_again(tmp_path, providers) -> None:
    calls = []

    def dying(inputs: Inputs) -> Tensor:
        calls.append("dying")
        raise KeyboardInterrupt

    def counted(inputs: Inputs) -> Tensor:
        calls.append("counted")
        return eager(inputs)

    providers(**{"fastcl triton": counted, "fastcl cuda": dying, "eager": eager})
    with pytest.raises(KeyboardInterrupt):
        gpu_run.run([SELF], state(tmp_path))
    rows = gpu_run.read(tmp_path)
    assert [row["provider"] for row in rows] == ["a peer", "eager, half products", "fastcl triton"]
    note = json.loads((tmp_path / gpu_run.NOTE).read_text())
    assert note["row"]["provider"] == "fastcl cuda"
    assert note["until"] > note["since"]
    with (tmp_path / gpu_run.ROWS).open("a") as file:
        file.write('{"case": "cut')
    gpu_run.append(tmp_path, note["row"])
    calls.clear()
    gpu_run.run([replace(SELF, profiled=False)], state(tmp_path))
    assert "counted" not in calls
    assert [row["provider"] for row in gpu_run.read(tmp_path)][2:] == ["fastcl triton", "fastcl cuda", "eager"]


def test_a_lost_device_ends_the_process_after_its_row(tmp_path, providers, monkeypatch) -> None:
    def release() -> None:
        if (tmp_path / gpu_run.ROWS).read_text().count("\n") > 0:
            raise RuntimeError("an illegal memory access")

    plain = device.stand_in()
    monkeypatch.setattr(device, "stand_in", lambda: replace(plain, release=release))
    providers(**{"fastcl triton": raising, "eager": eager})
    with pytest.raises(gpu_run.DeviceLostError, match="illegal memory access"):
        gpu_run.run([SELF], state(tmp_path))
    assert (tmp_path / gpu_run.NOTE).is_file()  # so the next process goes on
    assert gpu_run.read(tmp_path)[-1]["provider"] == "fastcl triton"


def test_the_page_says_what_the_rows_say() -> None:
    common = {
        "suite": "s",
        "case": "a case",
        "what": TIME,
        "rehearsal": False,
        "versions": {"torch": "2"},
        "reason": None,
    }
    common |= {"processor": "A GPU", "instruction_set": "compute capability 9.0", "commit": "abc"}
    times = {"p20_ms": 1.0, "p80_ms": 3.0, "host_ms": 0.2, "yardstick": "a product", "of_yardstick": 0.5}
    times |= {"first_call_s": 9.0, "error": {"random": {"loss": 1e-7, "gradient": 2e-5, "allowed": 1.0}}}
    ours = common | times | {"provider": "fastcl triton", "status": "ok", "p50_ms": 2.0, "graph_p50_ms": 0.25}
    rows = [
        ours | {"peak_extra_bytes": 70e6},
        ours
        | {"provider": "eager", "status": "imprecise", "p50_ms": 10.0, "graph_p50_ms": None, "graph_reason": "why"},
        common | {"provider": "fastcl cuda", "status": "wrong", "reason": "off"},
        common
        | {
            "provider": "fastcl triton",
            "what": KERNELS,
            "status": "ok",
            "kernels": [{"name": "k", "calls": 2, "us": 3.25}],
        },
        common | {"provider": "torch.compile", "status": "skipped"},
        common | {"provider": "faiss", "status": "missing", "reason": "not here"},
        common | {"case": "later", "provider": "eager", "status": "skipped"},
        {"suite": None, "case": "", "provider": "", "what": "run", "status": "error", "reason": "it died"},
    ]
    text = gpu_report.page(rows)
    for line in (
        "A GPU, compute capability 9.0; commit abc; torch 2",
        "**The run ended early**: it died.",
        "| fastcl triton | 2 ms (1 ms to 3 ms) | 250 µs | 200 µs |  | 50 % | 70 MB | 2e-05 | 9 s |",
        "| eager | 10 ms (1 ms to 3 ms) |  | 200 µs | 5x | 50 % |  | 2e-05† | 9 s |",
        "- fastcl cuda, time: wrong (off)",
        "- eager: no graph (why)",
        "| `k` | 2 | 3.25 |",
        "- a case: torch.compile, time",
        "- faiss: not here (1 of 2 cases)",
    ):
        assert line in text.splitlines(), line
    assert "## later" not in text


# Devices and truths.


def test_a_truth_moves_with_all_its_tensors() -> None:
    case = SELF.problem.case
    before = truth(case, case.inputs("random"))
    there = moved(before, "meta")
    assert there.exact.loss.is_meta
    assert all(gradient.is_meta for gradient in (*there.exact.gradients, *there.eager[0].unprojected))
    assert there.exact.terms == before.exact.terms
    assert there.dtype == case.dtype


def test_the_host_is_timed_without_waiting() -> None:
    clock, order = Clock(), []

    def step() -> None:
        clock.now += 0.25
        order.append("step")

    waiting = replace(device.stand_in(), synchronize=lambda: order.append("wait"))
    assert device.host_seconds(step, 3, waiting, clock) == pytest.approx(0.25)
    assert order == ["wait", "step", "step", "step"] * 5 + ["wait"]


def test_calls_rotate_between_sets() -> None:
    seen: list[int] = []
    call = device.rotating([lambda k=k: seen.append(k) for k in range(3)])
    for _ in range(4):
        call()
    assert seen == [0, 1, 2, 0]


def test_large_inputs_are_drawn_where_they_are_used(monkeypatch) -> None:
    """On the meta device nothing is drawn or moved, whatever the size."""

    class Generator:
        def __init__(self, device: Any) -> None:
            self.device = device

        def manual_seed(self, seed: int) -> "Generator":
            return self

    drawn = torch.randn
    monkeypatch.setattr(torch, "Generator", Generator)

    def on_device(*shape: Any, generator: Any = None, device: Any = None) -> Tensor:
        assert device is not None
        assert torch.device(device).type == "meta"
        return drawn(*shape, device=device)

    monkeypatch.setattr(torch, "randn", on_device)
    queue = Case("memory", "queue", 4096, 2**20, 256, BF16).inputs("random", "meta")
    assert queue.queue.is_meta
    assert transport.Case(32768, 131072).points(torch.device("meta"))[0].is_meta
    assert transport.Case(32768, 131072).weight(torch.device("meta")) is None
    assert nearest.Case(64, 10**7, 20).rows(torch.device("meta"))[1].is_meta


# The command.


def test_the_command_rehearses(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("FASTCL_BACKEND", "")
    arguments = ["--device", "cuda", "--rehearse", "--suite", "topk", "--budget", "120", "--out", str(tmp_path)]
    assert main(arguments) == 0
    rows = gpu_run.read(tmp_path)
    assert {row["suite"] for row in rows} == {"topk"}
    assert all(row["rehearsal"] for row in rows)
    timed = [row for row in rows if row["status"] == "ok" and row["what"] == TIME]
    assert {"eager", "fastcl chunked"} <= {row["provider"] for row in timed}
    assert not (tmp_path / gpu_run.NOTE).exists()
    assert "# Rehearsal of a GPU run, on the CPU" in capsys.readouterr().out
    page = (tmp_path / gpu_report.PAGE).read_text()
    (tmp_path / gpu_report.PAGE).unlink()
    assert main(["--report", str(tmp_path)]) == 0
    assert (tmp_path / gpu_report.PAGE).read_text() == page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "10"], "--budget: expected --device cuda, got --device cpu"),
        (["--rehearse"], "--rehearse: expected --device cuda, got --device cpu"),
        (["--device", "cuda", "--rehearse", "--quick"], "--quick: expected --device cpu, got --device cuda"),
        (["--device", "cuda", "--rehearse", "--suite", "distributed"], "--suite, --only: no problem of the plan"),
    ],
)
def test_options_that_do_not_go_together(arguments, message, capsys) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
