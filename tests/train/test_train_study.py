"""Studies: what is trained, what the tables say, and that finished runs are kept and not repeated."""

import json
import shutil
import statistics

import numpy as np
import pytest
import torch
from PIL import Image

from fastcl.train import Config, OptionError, evaluate, study
from fastcl.train.files import load_checkpoint, save_checkpoint
from fastcl.train.loop import Run
from fastcl.train.options import settle
from fastcl.train.studies import STUDIES, planned, settled
from fastcl.train.study import as_csv, main, read_csv
from fastcl.train.study_pictures import PICTURES
from fastcl.train.study_tables import DEFAULT, PROBES, USE, Entry, of_groups, tables
from tests.support.training import refused

NUMBERS = (*PROBES, "mutual_information", "conditional_entropy", "seconds", "head", "tail", "used", *USE, "variation",
           "lead")  # fmt: skip


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
    entries = STUDIES[name].entries(STUDIES[name].default)
    return [
        {"group": entry.group, "what": entry.what, "seed": seed, **{number: g.random() for number in NUMBERS}}
        for seed in range(3)
        for entry in entries
    ]


def test_finished_runs_are_kept_as_rows_and_not_repeated(finished, tmp_path, monkeypatch, capsys) -> None:
    out, command = finished
    entries = STUDIES["batch"].entries(Config(batch_size=6))
    assert sorted(path.name for path in out.iterdir()) == ["batch.csv", "batch.json", "batch.md", "batch.png", "rows"]
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
        return refused(capsys, main, *arguments)

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
    assert "--long-tail goes with priors and prototypes and compare; got clusters" in message(
        "clusters", *new, "--long-tail", "5"
    )
    assert "--batch-classes goes with compare; got batch" in message("batch", *new, "--batch-classes", "2")
    assert "--auxiliary goes with compare; got batch" in message("batch", *new, "--auxiliary", "attributes")
    assert "--n-clusters takes several with compare; got batch" in message("batch", *new, "--n-clusters", "5", "6")
    assert "--only must be the beginning of one of: contrast; PCL; predict; got 'swav'" in message(
        "clusters", *new, "--only", "contrast", "swav"
    )
    assert "invalid choice: 'cluster'" in message("cluster")
    assert "expected a study: clusters, priors, prototypes, batch, compare" in message("--seeds", "2")
    assert not (tmp_path / "new").exists()


def test_a_half_trained_run_of_other_options_is_refused_before_training(finished, npz, tmp_path, monkeypatch, capsys):
    out, command = finished
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    for size in (8, 96):  # the first is to be trained, the last was begun
        (copy / "rows" / f"simclr-{size}-seed0.json").unlink()
    last = {entry.what: entry for entry in STUDIES["batch"].entries(Config(batch_size=6))}["96"]
    config = settled(Config(data=str(npz), epochs=1, n_clusters=5, renew=1, batch_size=6), last, 0)
    run = Run(config, copy / "simclr-96-seed0", False)
    again = [*command[:-1], str(copy)]
    monkeypatch.setattr(Run, "train", lambda self: pytest.fail("trained before it was refused"))

    def message(*more: str) -> str:
        with pytest.raises(SystemExit):
            main([*again, *more])
        return capsys.readouterr().err

    checkpoint = run.folder / "checkpoint.pt"
    state = load_checkpoint(checkpoint)
    save_checkpoint({**state, "config": {**state["config"], "lr": 0.5}}, checkpoint)
    assert "simclr-96-seed0, trained with --lr 0.5: choose another folder" in message()
    save_checkpoint({**state, "data": "other"}, checkpoint)
    assert "simclr-96-seed0, trained on other images: choose another folder" in message()
    checkpoint.write_bytes(checkpoint.read_bytes()[:-5])
    assert "checkpoint.pt, which cannot be used: ValueError" in message()
    save_checkpoint(state, checkpoint)
    monkeypatch.undo()
    assert main(again) == 0


def test_a_part_of_a_study_is_not_taken_for_the_whole(npz, tmp_path, monkeypatch) -> None:
    out = tmp_path / "out"
    command = ["prototypes", "--quick", "--data", str(npz), "--epochs", "1", "--n-clusters", "10", "--batch-size", "10",
               "--long-tail", "2", "--out", str(out)]  # fmt: skip
    assert main([*command, "--only", "10"]) == 0
    names = [f"prototypes-part.{kind}" for kind in ("csv", "json", "md", "png")]
    assert sorted(path.name for path in out.iterdir()) == [*names, "rows"]
    rows = read_csv(out / "prototypes-part.csv")
    assert {row["group"] for row in rows} == {"10 prototypes"}
    assert "10 images a step; only 10.\n" in (out / "prototypes-part.md").read_text()
    about = json.loads((out / "prototypes-part.json").read_text())
    plan = planned(about.pop("study"), about)
    assert [(row["group"], row["what"]) for row in rows] == [(entry.group, entry.what) for entry in plan.entries]
    assert plan.base.epochs == 1
    # The whole study goes on with the rows of its part.
    went, train = [], Run.train
    monkeypatch.setattr(Run, "train", lambda self: went.append(self.folder.name) or train(self))
    assert main(command) == 0
    assert [name.split("-")[0] for name in went] == ["25"] * 3
    assert len(read_csv(out / "prototypes.csv")) == 6


def test_groups_are_known_by_their_beginning() -> None:
    entries = STUDIES["priors"].entries(DEFAULT)
    found = of_groups(entries, ["long tail", "batches, s"])
    assert {entry.group for entry in found} == {"long tail, swav", "long tail, msn", "batches, simclr", "batches, swav"}
    assert found == [entry for entry in entries if entry in found]
    assert of_groups(entries, []) == entries


@pytest.mark.parametrize("name", STUDIES)
def test_entries_are_runs_of_the_trainer(name, tmp_path) -> None:
    default = STUDIES[name].default
    entries = STUDIES[name].entries(default)
    rows = study.Rows(tmp_path)
    assert len({(entry.group, entry.what) for entry in entries}) == len(entries)
    assert len({rows.path(entry, 0) for entry in entries}) == len(entries)
    configs = [settled(default, entry, 1) for entry in entries]
    assert all(config.seed == 1 for config in configs)
    assert settle(configs[0]) == configs[0]
    # SwAV with a uniform prior is in two groups; baselines are measured beside the first that is trained.
    repeated = {"priors": 1, "compare": 2}
    assert len({repr(config) for config in configs}) == len(entries) - repeated.get(name, 0)
    known = {(entry.group, entry.what.split(" ")[0] + " *") for entry in entries}
    known |= {(entry.group, entry.what) for entry in entries}
    assert all(key in known for _, *pair in STUDIES[name].pairs for key in pair)


def test_a_row_has_head_tail_and_prototypes(npz, tmp_path) -> None:
    config = settle(Config(method="swav", data=str(npz), epochs=1, batch_size=20, n_clusters=10, long_tail=2.0))
    run = Run(config, tmp_path / "run", False)
    run.train()
    row = study.measured(run, 0.5)
    assert set(row) == set(NUMBERS)
    assert row["used"] == row["nearest"] / 10
    assert 1 <= row["nearest"] <= row["assigned"] <= row["share"] == 10 or row["assigned"] <= 10
    assert row["seconds"] == 0.5
    sizes = np.bincount(run.images.train_labels)
    hits = evaluate.linear_hits(run.representation("trained"), run.images, 5, config.seed)
    largest = np.argsort(-sizes, kind="stable")[:4]
    assert row["head"] == pytest.approx(hits[np.isin(run.images.test_labels, largest)].mean())
    plain = settle(Config(method="pcl", data=str(npz), epochs=1, batch_size=20, n_clusters=5, renew=1))
    untrained = Run(plain, tmp_path / "pcl", False)
    assert set(study.measured(untrained, 0.5)) == {*PROBES, "seconds"}
    raw = study.measured(untrained, None, "raw")
    assert set(raw) == set(PROBES)
    assert raw["knn"] == evaluate.knn_accuracy(evaluate.raw_pixels(untrained.images), untrained.images)


def test_the_use_of_prototypes() -> None:
    # Three images, the third nearly as near to the third prototype, which the prior gives half of all.
    cosines = torch.tensor([[0.9, 0.1, 0.0, -1.0], [0.8, 0.1, 0.0, -1.0], [0.0, 0.31, 0.3, -1.0]])
    masses = torch.tensor([0.25, 0.2, 0.5, 0.05])
    use = evaluate.prototype_use(cosines, masses, 5, 0.1)
    assert use["share"] == 3  # 1.25, 1.0 and 2.5 of 5 images, but 0.25
    assert use["nearest"] == 2
    assert use["assigned"] == 2  # the first and, by the prior, the third
    assert use["lead"] == pytest.approx((0.8 + 0.7 + 0.01) / 3)
    predicted = np.exp(cosines.double().numpy() / 0.1)
    mean = (predicted / predicted.sum(1, keepdims=True)).mean(0)
    assert use["variation"] == pytest.approx(0.5 * np.abs(mean - masses.numpy()).sum(), abs=1e-6)


@pytest.mark.parametrize("name", STUDIES)
def test_tables_and_pictures_are_made_of_rows(name, tmp_path) -> None:
    rows = made_up(name)
    path = tmp_path / "rows.csv"
    path.write_text(as_csv(rows))
    assert [list(row) for row in read_csv(path)] == [list(row) for row in rows]
    assert read_csv(path)[5]["knn"] == pytest.approx(rows[5]["knn"], abs=1e-5)
    plan = planned(name, {})
    text = tables(plan.study, rows, plan.heading)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    first = rows[0]
    (line,) = (line for line in lines if line[:2] == [first["group"], first["what"]])
    number = next(iter(plan.study.columns))
    scale = 1 if number in USE else 100
    values = [scale * row[number] for row in rows if (row["group"], row["what"]) == (first["group"], first["what"])]
    assert line[2] == f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
    trained = {
        "clusters": "6 epochs of 64 images a step",
        "priors": "6 or 18 epochs of 64 images a step, 20 prototypes",
        "prototypes": "18 epochs of 64 images a step",
        "batch": "6 epochs",
        "compare": "20 epochs of 256 images a step",
    }
    assert f"3 seeds; digits, {trained[name]}.\n" in text
    PICTURES[name](tmp_path / "picture.png", "title", rows)
    pixels = np.asarray(Image.open(tmp_path / "picture.png").convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    PICTURES[name](tmp_path / "one.png", "title", [row for row in rows if row["seed"] == 0])
    for group in {row["group"] for row in rows if row["group"]}:  # as --only leaves them
        PICTURES[name](tmp_path / "part.png", "title", [row for row in rows if row["group"] == group])


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
