"""The study of Cl-InfoNCE's comparisons: what is trained, what the table says, and what is refused before training."""

import json
import shutil
import statistics

import numpy as np
import pytest
from PIL import Image

from fastcl.train import Config, report, study
from fastcl.train.compare import main
from fastcl.train.comparison import baselines, comparison
from fastcl.train.files import claimed
from fastcl.train.loop import Run
from fastcl.train.studies import settled
from fastcl.train.study import read_csv
from fastcl.train.study_tables import INFORMATION, PROBES, grouped, tables
from tests.support.training import COUNT, refused, write_csv

pytestmark = pytest.mark.usefixtures("quick_probes")


@pytest.fixture(scope="module")
def finished(quick_probes, npz, tmp_path_factory):
    """A comparison over two seeds, with its command."""
    out = tmp_path_factory.mktemp("compare") / "out"
    command = ["--quick", "--data", str(npz), "--epochs", "1", "--batch-size", "40", "--seeds", "2", "--out", str(out)]
    assert main(command) == 0
    return out, command


def test_the_folder_of_a_comparison(finished) -> None:
    out, _ = finished
    kinds = ["raw-pixels", "untrained-encoder", "contrastive-instances-SimCLR", "contrastive-k-means-5",
             "contrastive-Sinkhorn-5", "contrastive-attributes", "cross-entropy-k-means-5", "cross-entropy-attributes",
             "contrastive-labels-SupCon", "cross-entropy-labels"]  # fmt: skip
    rows = sorted(path.name for path in (out / "rows").iterdir())
    assert rows == sorted(f"{kind}-seed{seed}.json" for kind in kinds for seed in (0, 1))
    files = [f"compare.{kind}" for kind in ("csv", "json", "md", "png")]
    assert sorted(path.name for path in out.iterdir()) == [*files, "rows"]
    found = grouped(read_csv(out / "compare.csv"))
    assert all(0 < row[probe] <= 1 for own in found.values() for row in own for probe in PROBES)
    for (group, what), own in found.items():
        for row in own:
            assert ("mutual_information" in row) == bool(group)
            if what.startswith("labels"):
                assert row["conditional_entropy"] == pytest.approx(0, abs=1e-9)
            if what.startswith("instances"):  # each of 105 images a cluster of its own
                total = row["mutual_information"] + row["conditional_entropy"]
                assert total == pytest.approx(np.log(105), abs=1e-4)
    text = (out / "compare.md").read_text()
    knn = [100 * row["knn"] for row in found["contrastive", "attributes"]]
    line = next(line for line in text.splitlines() if line.startswith("| contrastive   | attributes"))
    assert f"| {statistics.mean(knn):.1f} ± {statistics.stdev(knn):.1f}" in line
    pixels = np.asarray(Image.open(out / "compare.png").convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    about = json.loads((out / "compare.json").read_text())
    assert (about["study"], about["auxiliary"], about["counts"]) == ("compare", "attributes", [5])


def test_the_command_is_the_study_of_that_name(finished, tmp_path, monkeypatch) -> None:
    out, command = finished
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    (copy / "compare.md").unlink()
    monkeypatch.setattr(Run, "train", lambda self: pytest.fail("trained again"))
    assert study.main(["compare", *command[:-1], str(copy)]) == 0
    assert (copy / "compare.md").read_text() == (out / "compare.md").read_text()
    given = []
    monkeypatch.setattr(study, "main", lambda argv: given.append(argv) or 0)
    monkeypatch.setattr("sys.argv", ["compare.py", "--quick"])
    assert main() == 0
    assert given == [["compare", "--quick"]]


def test_baselines_are_measured_without_training(finished, tmp_path, monkeypatch, capsys) -> None:
    out, command = finished
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    for name in ("raw-pixels", "untrained-encoder"):
        (copy / "rows" / f"{name}-seed1.json").unlink()
    monkeypatch.setattr(Run, "train", lambda self: pytest.fail("trained"))
    assert main([*command[:-1], str(copy)]) == 0
    assert (copy / "compare.md").read_text() == (out / "compare.md").read_text()
    assert "20 of 20: cross-entropy-labels-seed1 is there" in capsys.readouterr().out


def test_a_step_takes_all_images_where_they_are_few(npz, tmp_path) -> None:
    command = ["--quick", "--data", str(npz), "--epochs", "1", "--batch-size", "500", "--only", "cross-entropy"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    rows = read_csv(tmp_path / "out" / "compare-part.csv")
    assert [row["what"] for row in rows] == ["k-means 5", "attributes", "labels"]


def test_folders_of_other_runs_are_refused(finished, npz, tmp_path, capsys) -> None:
    out, command = finished
    assert "trained with --temperature 0.1: choose another folder" in refused(
        capsys, main, *command, "--temperature", "0.2"
    )
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    path = copy / "rows" / "raw-pixels-seed0.json"
    kept = json.loads(path.read_text())
    del kept["sha256"]
    path.write_text(json.dumps({**kept, "data": "other", "sha256": study._digest({**kept, "data": "other"})}))
    command = [*command[:-1], str(copy)]
    assert "trained on other images" in refused(capsys, main, *command)
    path.write_text("[]")
    assert "raw-pixels-seed0.json, which cannot be used" in refused(capsys, main, *command)
    with claimed(copy):
        assert f"--out {copy} is in use by another process" in refused(capsys, main, *command)


def test_what_would_fail_late_fails_first(finished, npz, tmp_path, monkeypatch, capsys) -> None:
    _, command = finished
    monkeypatch.setattr(Run, "train", lambda self: pytest.fail("trained before it was refused"))
    path = tmp_path / "none.csv"
    path.write_text("kind\n" + '""\n' * COUNT)
    new = [*command[:-1], str(tmp_path / "new")]
    line = refused(capsys, main, *new, "--auxiliary", f"{path}:kind")
    assert f"--auxiliary must give images a cluster; {path}:kind has none" in line
    assert "--batch-classes" in refused(capsys, main, *new, "--batch-classes", "11")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--auxiliary", "labels"], "--auxiliary must be attributes or FILE.csv:COLUMN; got labels"),
        (["--auxiliary", "tags"], "--auxiliary must be attributes or FILE.csv:COLUMN; got tags"),
        (["--auxiliary", "colour"], "must be kmeans, attributes, tags, labels, sinkhorn, labels made worse"),
        (["--auxiliary", "nofile.csv:kind"], "--auxiliary nofile.csv"),
        (["--n-clusters", "1"], "expected an integer of at least 2, got '1'"),
        (["--n-clusters", "5", "100000"], "--n-clusters must be at most the number of training images"),
        (["--seeds", "0"], "expected an integer of at least 1, got '0'"),
        (["--data", "mnist"], "--data must be digits"),
    ],
)
def test_bad_options_end_in_one_line(arguments, message, npz, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(Run, "train", lambda self: pytest.fail("trained before it was refused"))
    line = refused(capsys, main, "--quick", "--data", str(npz), "--batch-size", "40", "--out", str(tmp_path / "out"),
                   *arguments)  # fmt: skip
    assert message in line


def test_what_is_trained(tmp_path) -> None:
    auxiliary = f"{write_csv(tmp_path / 'c.csv', 5)}:kind"
    chosen = comparison(auxiliary, [20, 10, 20])
    base = Config(long_tail=3.0, batch_classes=4, data=str(tmp_path / "images.npz"))
    entries = {(entry.group, entry.what): entry for entry in chosen.entries(base)}
    assert len(entries) == len(chosen.entries(base)) == 11
    assert {key for _, *pair in chosen.pairs for key in pair} <= entries.keys()
    configs = {key: settled(base, entry, 1) for key, entry in entries.items()}
    assert all((config.long_tail, config.batch_classes, config.seed) == (3.0, 4, 1) for config in configs.values())
    assert configs["contrastive", "c.csv:kind"].clusters == auxiliary
    assert configs["cross-entropy", "c.csv:kind"].method == "cluster-ce"
    assert configs["contrastive", "k-means 10"].n_clusters == 10
    sinkhorn = configs["contrastive", "Sinkhorn 20"]
    assert (sinkhorn.clusters, sinkhorn.n_clusters, sinkhorn.prior) == ("sinkhorn", 20, "uniform")
    assert configs["contrastive", "labels (SupCon)"].clusters == "labels"
    trained = [entry.what for entry in entries.values() if entry.representation == "trained"]
    assert len(trained) == 9
    assert baselines(base) == [entries["", "raw pixels"], entries["", "untrained encoder"]]


def test_the_table_has_means_spreads_and_differences_of_pairs() -> None:
    g = np.random.default_rng(0)
    chosen = comparison("attributes", [4])
    names = (*PROBES, *INFORMATION)
    rows = [
        {"group": entry.group, "what": entry.what, "seed": seed, **{name: g.random() for name in names}}
        for seed in range(3)
        for entry in chosen.entries(chosen.default)
    ]
    text = tables(chosen, rows, "what")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert all(len(line) in (8, 5) for line in lines)
    found = grouped(rows)

    def shown(values, places, sign=""):
        return f"{statistics.mean(values):{sign}.{places}f} ± {statistics.stdev(values):.{places}f}"

    (kmeans,) = (line for line in lines if line[:2] == ["contrastive", "k-means 4"])
    own = found["contrastive", "k-means 4"]
    for place, probe in enumerate(PROBES, 2):
        assert kmeans[place] == shown([100 * row[probe] for row in own], 1)
    assert kmeans[6] == shown([row["mutual_information"] for row in own], 2)
    question = "contrasting against predicting: contrastive, attributes minus cross-entropy, attributes"
    (against,) = (line for line in lines if line[0] == question)
    pairs = zip(found["contrastive", "attributes"], found["cross-entropy", "attributes"], strict=True)
    assert against[1] == shown([100 * (a["knn"] - b["knn"]) for a, b in pairs], 1, "+")
    one = tables(chosen, [row for row in rows if row["seed"] == 0], "what")
    assert "±" not in one
    assert "one seed" in one


def test_the_picture_takes_a_single_point(tmp_path) -> None:
    line = dict.fromkeys((*PROBES, *INFORMATION), 0.5)
    report.draw_information(tmp_path / "one.png", "title", {"contrastive": {"clusters": [line]}})
    assert (tmp_path / "one.png").stat().st_size > 5000
