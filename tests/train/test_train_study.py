"""Studies: what is trained, what the tables say, and that finished runs are kept and not repeated."""

import json
import shutil
import statistics

import numpy as np
import pytest
from PIL import Image

from fastcl.train import Config, OptionError, compare, evaluate, study
from fastcl.train.loop import Run
from fastcl.train.options import settle
from fastcl.train.studies import STUDIES, Entry, heading, settled, tables
from fastcl.train.study import DEFAULT, as_csv, main, read_csv
from fastcl.train.study_pictures import PICTURES

NUMBERS = ("knn", "linear_5", "linear_all", "mutual_information", "conditional_entropy", "seconds", "head", "tail",
           "used")  # fmt: skip


pytestmark = pytest.mark.usefixtures("quick_probes")


@pytest.fixture(scope="module")
def finished(quick_probes, npz, tmp_path_factory):
    """The study of batch sizes, with its command."""
    out = tmp_path_factory.mktemp("study") / "out"
    command = ["batch", "--quick", "--data", str(npz), "--epochs", "1", "--n-clusters", "5", "--batch-size", "6",
               "--out", str(out)]  # fmt: skip
    assert main(command) == 0
    return out, command


def made_up(name: str) -> list[dict]:
    """Rows of three seeds for every entry of a study."""
    g = np.random.default_rng(0)
    entries = STUDIES[name].entries(DEFAULT)
    return [
        {"group": entry.group, "what": entry.what, "seed": seed, **dict(zip(NUMBERS, g.random(9), strict=True))}
        for seed in range(3)
        for entry in entries
    ]


def test_finished_runs_are_kept_as_rows_and_not_repeated(finished, tmp_path, monkeypatch, capsys) -> None:
    out, command = finished
    entries = STUDIES["batch"].entries(Config(batch_size=6))
    assert sorted(path.name for path in out.iterdir()) == ["batch.csv", "batch.md", "batch.png", "rows"]
    names = sorted(f"simclr-{entry.what}-seed0.json" for entry in entries)
    assert sorted(path.name for path in (out / "rows").iterdir()) == names
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    (copy / "rows" / "simclr-24-seed0.json").unlink()
    (copy / "batch.md").unlink()
    went, train = [], Run.train
    monkeypatch.setattr(Run, "train", lambda self: went.append(self.folder.name) or train(self))
    assert main([*command[:-1], str(copy)]) == 0
    assert went == ["simclr-24-seed0"]
    assert "simclr-96-seed0 is there" in capsys.readouterr().out

    def accuracies(folder):
        rows = read_csv(folder / "batch.csv")
        return [[row["what"], row["knn"], row["linear_5"], row["linear_all"]] for row in rows]

    assert accuracies(copy) == accuracies(out)
    assert len(accuracies(out)) == len(entries)


def test_an_interrupted_run_goes_on(finished, npz, tmp_path, monkeypatch, capsys) -> None:
    epoch = Run._epoch

    def interrupted(self, number, bar):
        if number == 1:
            raise KeyboardInterrupt
        return epoch(self, number, bar)

    _, command = finished
    command = [*(part if part != "1" else "2" for part in command[:-1]), str(tmp_path / "out")]
    monkeypatch.setattr(Run, "_epoch", interrupted)
    assert main(command) == 130
    assert "the same command goes on" in capsys.readouterr().err
    begun, before = [], Run.train
    monkeypatch.setattr(Run, "_epoch", epoch)
    monkeypatch.setattr(Run, "train", lambda self: begun.append(len(self.history)) or before(self))
    assert main(command) == 0
    assert begun == [1, 0, 0, 0]


def test_what_would_fail_late_fails_first(finished, npz, tmp_path, monkeypatch, capsys) -> None:
    out, command = finished
    monkeypatch.setattr(Run, "train", lambda self: pytest.fail("trained before it was refused"))

    def message(*arguments: str) -> str:
        with pytest.raises(SystemExit) as exit_:
            main(list(arguments))
        assert exit_.value.code == 2
        errors = capsys.readouterr().err
        assert errors.count("\n") == 1
        return errors

    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    path = copy / "rows" / "simclr-96-seed0.json"  # the last
    (copy / "rows" / "simclr-8-seed0.json").unlink()
    again = [*command[:-1], str(copy)]
    assert "trained with --temperature 0.1: choose another folder" in message(*again, "--temperature", "0.2")
    kept = json.loads(path.read_text())
    kept["row"]["knn"] /= 2
    path.write_text(json.dumps(kept))
    assert "ValueError: the file is damaged" in message(*again)
    new = ["--quick", "--data", str(npz), "--out", str(tmp_path / "new")]
    assert "--n-clusters must be at most the number of training images, 105; got 125" in message(
        "clusters", *new, "--n-clusters", "50"
    )
    assert "--prior counts needs --n-clusters of at least the number of classes, 10" in message(
        "priors", *new, "--n-clusters", "5", "--long-tail", "2"
    )
    assert "--data must be digits" in message("clusters", "--data", "mnist")
    assert "--out must be a new folder or a comparison's" in message("batch", *new[:-1], __file__)
    assert "images to train on are fewer than a step of 256" in message("batch", *new)
    assert "new folder or this study's" in message("clusters", *new[:-1], str(out))
    assert "--long-tail goes with the study priors" in message("clusters", *new, "--long-tail", "5")
    assert "compare comes first" in message("--seeds", "1", "compare")
    assert "invalid choice: 'cluster'" in message("cluster")
    assert "expected a study: clusters, priors, batch or compare" in message("--seeds", "2")
    assert not (tmp_path / "new").exists()


def test_compare_is_a_study(monkeypatch) -> None:
    given = []
    monkeypatch.setattr(study, "compare", lambda argv: given.append(argv) or 0)
    assert main(["compare", "--quick", "--auxiliary", "attributes"]) == 0
    assert given == [["--quick", "--auxiliary", "attributes"]]
    assert compare.main is not study.compare


@pytest.mark.parametrize("name", STUDIES)
def test_entries_are_runs_of_the_trainer(name, tmp_path) -> None:
    entries = STUDIES[name].entries(DEFAULT)
    rows = study.Rows(tmp_path)
    assert len({(entry.group, entry.what) for entry in entries}) == len(entries)
    assert len({rows.path(entry, 0) for entry in entries}) == len(entries)
    configs = [settled(DEFAULT, entry, 1) for entry in entries]
    assert all(config.seed == 1 for config in configs)
    assert (settle(configs[0]), len({repr(config) for config in configs})) == (
        configs[0],
        len(entries) - (name == "priors"),
    )
    known = {(entry.group, entry.what.split(" ")[0] + " *") for entry in entries}
    known |= {(entry.group, entry.what) for entry in entries}
    assert all(key in known for _, *pair in STUDIES[name].pairs for key in pair)


def test_a_row_has_head_tail_and_prototypes(npz, tmp_path) -> None:
    config = settle(Config(method="swav", data=str(npz), epochs=1, batch_size=20, n_clusters=10, long_tail=2.0))
    run = Run(config, tmp_path / "run", False)
    run.train()
    row = study.measured(run, 0.5)
    assert set(row) == set(NUMBERS)
    assert 0 < row["used"] <= 1
    assert row["seconds"] == 0.5
    sizes = np.bincount(run.images.train_labels)
    hits = evaluate.linear_hits(run.representation("trained"), run.images, 5, config.seed)
    largest = np.argsort(-sizes, kind="stable")[:4]
    assert row["head"] == pytest.approx(hits[np.isin(run.images.test_labels, largest)].mean())
    plain = settle(Config(method="pcl", data=str(npz), epochs=1, batch_size=20, n_clusters=5, renew=1))
    assert set(study.measured(Run(plain, tmp_path / "pcl", False), 0.5)) == {"knn", "linear_5", "linear_all", "seconds"}


@pytest.mark.parametrize("name", STUDIES)
def test_tables_and_pictures_are_made_of_rows(name, tmp_path) -> None:
    rows = made_up(name)
    path = tmp_path / "rows.csv"
    path.write_text(as_csv(rows))
    assert [list(row) for row in read_csv(path)] == [list(row) for row in rows]
    assert read_csv(path)[5]["knn"] == pytest.approx(rows[5]["knn"], abs=1e-5)
    text = tables(STUDIES[name], rows, heading(STUDIES[name], DEFAULT))
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    first = rows[0]
    (line,) = (line for line in lines if line[:2] == [first["group"], first["what"]])
    values = [100 * row["knn"] for row in rows if (row["group"], row["what"]) == (first["group"], first["what"])]
    assert line[2] == f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
    trained = {
        "clusters": "6 epochs of 64 images a step",
        "priors": "6 or 18 epochs of 64 images a step",
        "batch": "6 epochs",
    }
    assert f"3 seeds; digits, {trained[name]}.\n" in text
    PICTURES[name](tmp_path / "picture.png", "title", rows)
    pixels = np.asarray(Image.open(tmp_path / "picture.png").convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    PICTURES[name](tmp_path / "one.png", "title", [row for row in rows if row["seed"] == 0])


def test_differences_are_taken_seed_by_seed() -> None:
    rows = made_up("clusters")
    by = {(row["group"], row["what"], row["seed"]): row["linear_5"] for row in rows}
    text = tables(STUDIES["clusters"], [row for row in rows if row != rows[0]], "what")
    (line,) = (line for line in text.splitlines() if "k-means beats instances" in line)
    assert "contrast, k-means 20 minus contrast, instances" in line
    points = [100 * (by["contrast", "k-means 20", seed] - by["contrast", "instances", seed]) for seed in range(3)]
    assert f"{statistics.mean(points):+.1f} ± {statistics.stdev(points):.1f}" in line
    # A seed that one of the two has not is left out.
    (line,) = (line for line in text.splitlines() if "labels beat instances" in line)
    points = [100 * (by["contrast", "labels", seed] - by["contrast", "instances", seed]) for seed in (1, 2)]
    assert f"{statistics.mean(points):+.1f} ± {statistics.stdev(points):.1f}" in line


@pytest.mark.parametrize("prior", ["power_law:x", "power_law:", "power_law:1.2.3", "counts:1", "zipf"])
def test_priors_that_there_are_not(prior, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["batch", "--quick", "--prior", prior])
    from fastcl.train.__main__ import main as trainer

    with pytest.raises(SystemExit):
        trainer(["--method", "swav", "--prior", prior])
    assert f"expected uniform, power_law, power_law:EXPONENT or counts, got '{prior}'" in capsys.readouterr().err


def test_the_exponent_of_a_power_law() -> None:
    from fastcl.train.methods.prototypes import prototype_masses

    masses = prototype_masses("power_law:1", 4, np.arange(4))
    np.testing.assert_allclose(masses, np.array([1, 1 / 2, 1 / 3, 1 / 4]) * 12 / 25, rtol=1e-6)
    assert settled(DEFAULT, Entry("", "", {"method": "swav", "prior": "power_law:1"}), 0).prior == "power_law:1"
    with pytest.raises(OptionError, match="--prior needs a method with prototypes"):
        settled(DEFAULT, Entry("", "", {"method": "simclr", "prior": "power_law:1"}), 0)
