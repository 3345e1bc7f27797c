"""The benchmark command, its rows, and the pages made from them, committed ones included."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import cases, peak, plots, providers, report
from benchmarks.cases import BOTH, DIRECTIONS, KINDS, Case
from benchmarks.run import Row

ROOT = Path(__file__).parents[2]
RESULTS = sorted(path.parent for path in (ROOT / "benchmarks" / "results").glob("*/rows.jsonl"))
EVERY_ROW = {"suite", "case", "provider", "status", "reason", "device", "threads", "processor", "instruction_set"} | {
    "versions",
    "commit",
}
MEASURED = {"direction", "problem", "n", "m", "d", "dtype", "samples", "calls_per_sample", "ratio", "error"} | {
    *("p20_ms", "p50_ms", "p80_ms", "flops", "flops_per_second", "share_of_peak", "peak_flops_per_second"),
    *("peak_source", "peak_extra_bytes", "gradient_bytes", "memory_source", "taken_by_others"),
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Row]]:
    """Runs the command on two tiny cases, without torch.compile, which takes seconds. Returns folder and rows."""
    folder = tmp_path_factory.mktemp("results") / "a-machine"
    everybody = providers.providers

    def few(device: torch.device) -> Any:
        found, missing = everybody(device)
        return [p for p in found if p.name in ("fastcl chunked", "eager", "checkpointed")], missing

    printed: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        tiny = {"small": tuple(Case("small", "self", n, n, 128) for n in (16, 32))}
        patch.setattr(cases, "QUICK", tiny)
        patch.setattr(providers, "providers", few)
        patch.setattr(peak, "WINDOWS", 2)
        patch.setattr("builtins.print", lambda *args, **_: printed.append(args[0]))
        assert command.main(["--suite", "small", "--quick", "--json", "--out", str(folder)]) == 0
    return folder, [json.loads(line) for line in printed if not line.startswith("written to")]


def test_rows_are_complete(measured: tuple[Path, list[Row]]) -> None:
    folder, rows = measured
    assert report.read_rows(folder) == rows  # as printed
    missing = [row for row in rows if row["status"] == "missing"]
    assert missing
    for row in missing:
        assert set(row) == EVERY_ROW
        assert row["reason"]
    timed = [row for row in rows if row["status"] in ("ok", "imprecise")]
    assert {(row["n"], row["provider"], row["direction"]) for row in timed} >= {
        (n, provider, direction)
        for n in (16, 32)
        for provider in ("fastcl chunked", "eager")
        for direction in DIRECTIONS
    }
    for row in timed:
        assert set(row) == EVERY_ROW | MEASURED
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["samples"] >= 5
        assert row["flops_per_second"] == pytest.approx(row["flops"] / row["p50_ms"] * 1e3)
        assert row["share_of_peak"] > 0
        assert row["peak_flops_per_second"] > 0
        assert set(row["error"]) == set(KINDS)
        assert (row["peak_extra_bytes"] is not None) == (row["direction"] == BOTH)
        assert (row["memory_source"] is not None) == (row["direction"] == BOTH)
        assert {"fastcl", "torch", "python"} <= set(row["versions"])
        assert row["commit"]
        assert row["processor"]
        assert set(row["ratio"]) == ({"eager"} if row["provider"] != "eager" else set())
    for row in rows:
        if row["suite"] and row not in timed:
            assert row["status"] == "cannot pose"
            assert row["p50_ms"] is None


def test_the_run_leaves_page_and_plots(measured: tuple[Path, list[Row]]) -> None:
    folder, rows = measured
    page = (folder / report.PAGE).read_text()
    assert page == report.page(rows, list(plots.CAPTIONS))
    for name in plots.CAPTIONS:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
        assert f"]({name})" in page
    assert "missing: fastcl cuda" in page
    assert "checkpointed: cannot pose (the whole case is one block)" in page


def test_report_can_be_generated_again(measured: tuple[Path, list[Row]], capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = measured
    before = (folder / report.PAGE).read_text()
    (folder / report.PAGE).unlink()
    (folder / plots.TIME).unlink()
    assert command.main(["--report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == before.strip()
    assert (folder / report.PAGE).read_text() == before
    assert (folder / plots.TIME).exists()


def test_readme_block_goes_between_the_markers(measured: tuple[Path, list[Row]], tmp_path: Path) -> None:
    folder, _ = measured
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n\n{report.BEGIN.format('old')}\nold\n{report.END}\n\nafter\n")
    for _ in range(2):
        report.write_readme(folder, readme)
        text = readme.read_text()
        assert text.startswith("before\n\n<!--")
        assert text.endswith(f"{report.END}\n\nafter\n")
        assert text.count("N=32, D=128") == 1
        assert "old" not in text
    readme.write_text("nothing here")
    with pytest.raises(ValueError, match="expected the markers"):
        report.write_readme(folder, readme)


def test_rows_of_other_suites_stay_and_those_of_other_machines_do_not(
    measured: tuple[Path, list[Row]], tmp_path: Path
) -> None:
    _, rows = measured
    other = [{**row, "suite": "infonce"} for row in rows if row["suite"]]
    report.write_rows(tmp_path, rows, ["small"])
    report.write_rows(tmp_path, other, ["infonce"])
    assert [row["suite"] for row in report.read_rows(tmp_path)] == ["infonce"] * len(other) + ["small"] * len(other)
    report.write_rows(tmp_path, rows, ["small"])
    together = report.read_rows(tmp_path)
    assert len(together) == len(rows) + len(other)
    elsewhere = [{**row, "processor": "another"} for row in rows]
    report.write_rows(tmp_path, elsewhere, ["small"])
    assert report.read_rows(tmp_path) == elsewhere


def test_with_only_the_other_cases_of_a_suite_stay(measured: tuple[Path, list[Row]], tmp_path: Path) -> None:
    _, rows = measured
    report.write_rows(tmp_path, rows, ["small"])
    again = [{**row, "commit": "another"} for row in rows if row["suite"] is None or row["n"] == 32]
    report.write_rows(tmp_path, again, ())
    kept = report.read_rows(tmp_path)
    assert len(kept) == len(rows)
    assert {row["commit"] for row in kept if row["suite"] is None or row["n"] == 32} == {"another"}
    assert "another" not in {row["commit"] for row in kept if row["suite"] and row["n"] == 16}


def with_ratio(rows: list[Row], p20: float, p50: float, p80: float) -> list[Row]:
    """The rows of one case, with another ratio of fastcl to eager."""
    chosen = copy.deepcopy([row for row in rows if row.get("n") == 32 and row["direction"] == BOTH])
    for row in chosen:
        if row["provider"] == "fastcl chunked":
            row["ratio"]["eager"] = {"p20": p20, "p50": p50, "p80": p80}
    return chosen


def test_the_table_says_in_words_who_wins(measured: tuple[Path, list[Row]]) -> None:
    def verdict(*ratio: float, status: str = "ok") -> str:
        chosen = with_ratio(measured[1], *ratio)
        for row in chosen:
            if row["provider"] == "eager":
                row["status"] = status
        best = report.ours(chosen)
        assert best is not None
        summary = "\n".join(report.summary(chosen, [("small", best["case"])]))
        words = report.verdict(best, chosen)
        assert words in summary
        return words

    def against(*peers: tuple[float, float, float]) -> str:
        ratio = {f"peer {i}": dict(zip(("p20", "p50", "p80"), values, strict=True)) for i, values in enumerate(peers)}
        return report.verdict({"ratio": ratio}, [{"provider": name, "status": "ok"} for name in ratio])

    assert against((0.1, 0.3, 1.2), (0.7, 0.8, 0.9)) == "**peer 1 wins**, 1.2x faster than fastcl"
    assert against((2.0, 2.1, 2.2), (0.9, 1.1, 1.2)) == "fastcl and peer 1 are even"
    assert against((2.0, 2.1, 2.2), (3.0, 3.1, 3.2)) == "fastcl, 2.1x faster than peer 0"
    assert verdict(2.9, 3.0, 3.1) == "fastcl, 3x faster than eager"
    assert verdict(0.4, 0.5, 0.6) == "**eager wins**, 2x faster than fastcl"
    assert verdict(0.4, 0.5, 0.6, status="imprecise") == "**eager (imprecise) wins**, 2x faster than fastcl"
    assert verdict(0.9, 1.1, 1.2) == "fastcl and eager are even"
    assert verdict(0.4, 0.5, 0.6, status="wrong") == "fastcl, alone"


def test_a_page_says_that_the_machine_was_not_quiet(measured: tuple[Path, list[Row]]) -> None:
    for share, said in ((0.01, False), (0.37, True)):
        rows = [{**row, "taken_by_others": share} if row["suite"] else row for row in measured[1]]
        assert ("other programs took up to 37 % of it" in report.page(rows, [])) == said


def test_wrong_providers_show_their_error_and_no_time(measured: tuple[Path, list[Row]]) -> None:
    rows = copy.deepcopy(measured[1])
    for row in rows:
        if row["provider"] == "fastcl chunked":
            row.update(status="wrong", reason="random rows: error of the loss 1.0e+00", p50_ms=None, ratio={})
    page = report.page(rows, [])
    assert "- fastcl chunked: wrong (random rows: error of the loss 1.0e+00)" in page
    assert "| fastcl chunked |" not in page
    assert "none was measured" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "nonsense"], "invalid choice: 'nonsense'"),
        (["--device", "abacus"], "invalid choice: 'abacus'"),
        (["--only", "nonsense"], "no case of these suites has 'nonsense' in its name"),
        (["--report", "nowhere"], "nowhere holds no rows.jsonl"),
    ],
)
def test_bad_options_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        command.main(arguments)
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--device", "cuda"])
    assert "finds no CUDA device" in capsys.readouterr().err


def test_without_its_packages_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "NEEDED", {"no_such_module": "no-such-package"})
    assert command.main([]) == 2
    assert 'benchmarks need no-such-package: pip install ".[bench]"' in capsys.readouterr().err


def test_suites_are_chosen_by_name() -> None:
    assert [case.suite for case in cases.cases(["memory", "small"], quick=True)] == ["memory", "small"]
    with pytest.raises(ValueError, match="expected some of infonce, two_set, small, memory, got nonsense"):
        cases.cases(["nonsense"], quick=False)


def test_there_are_committed_results() -> None:
    assert RESULTS


@pytest.mark.parametrize("folder", RESULTS, ids=lambda path: path.name)
def test_committed_pages_equal_what_their_rows_generate(folder: Path) -> None:
    pictures = [name for name in plots.CAPTIONS if (folder / name).exists()]
    assert (folder / report.PAGE).read_text() == report.page(report.read_rows(folder), pictures)


def test_readme_table_equals_what_its_rows_generate() -> None:
    text = (ROOT / "README.md").read_text()
    blocks = [report.readme_block(folder, ROOT) for folder in RESULTS]
    assert sum(block in text for block in blocks) == 1
