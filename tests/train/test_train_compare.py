"""The comparison of methods: what is trained, what the table says, and that finished runs are not repeated."""

import json
import shutil
import statistics

import numpy as np
import pytest
from PIL import Image

from fastcl.train import Config, compare, report
from fastcl.train.compare import COMPARISONS, INFORMATION, PROBES, contestants, main
from fastcl.train.files import claimed
from fastcl.train.loop import Run
from tests.support.training import COUNT, write_csv

pytestmark = pytest.mark.usefixtures("quick_probes")


@pytest.fixture(scope="module")
def finished(quick_probes, npz, tmp_path_factory):
    """A comparison over two seeds, with its command."""
    out = tmp_path_factory.mktemp("compare") / "out"
    command = ["--quick", "--data", str(npz), "--epochs", "1", "--batch-size", "40", "--out", str(out)]
    assert main(command) == 0
    return out, command


def test_the_folder_of_a_comparison(finished) -> None:
    out, _ = finished
    runs = sorted(path.name for path in out.iterdir() if path.is_dir())
    kinds = ["simclr", "clinfonce-kmeans-5", "clinfonce-sinkhorn-5", "clinfonce-attributes", "cluster-ce-kmeans-5",
             "cluster-ce-attributes", "supcon", "cluster-ce-labels"]  # fmt: skip
    assert runs == sorted(f"{kind}-seed{seed}" for kind in kinds for seed in (0, 1))
    for run in runs:
        outcome = json.loads((out / run / "probes.json").read_text())
        trained = outcome["trained"]
        assert all(0 < trained[probe] <= 1 for probe in PROBES)
        assert 0 <= trained["mutual_information"] <= np.log(10) + 1e-9
        assert ("raw" in outcome) == run.startswith("simclr")
        if run.startswith(("supcon", "cluster-ce-labels")):
            assert trained["conditional_entropy"] == pytest.approx(0, abs=1e-9)
        if run.startswith("simclr"):  # each of 105 images a cluster of its own
            total = trained["mutual_information"] + trained["conditional_entropy"]
            assert total == pytest.approx(np.log(105))
    text = (out / "compare.md").read_text()
    trained = [
        json.loads((out / f"clinfonce-attributes-seed{seed}" / "probes.json").read_text())["trained"] for seed in (0, 1)
    ]
    knn = [100 * line["knn"] for line in trained]
    row = next(line for line in text.splitlines() if line.startswith("| contrastive   | attributes"))
    assert f"| {statistics.mean(knn):.1f} ± {statistics.stdev(knn):.1f}" in row
    pixels = np.asarray(Image.open(out / "information.png").convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


def test_finished_runs_are_not_repeated(finished, tmp_path, monkeypatch, capsys) -> None:
    out, command = finished
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    command = [*command[:-1], str(copy)]
    (copy / "compare.md").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Run, "train", lambda self: pytest.fail("trained again"))
        assert main(command) == 0
    assert (copy / "compare.md").read_text() == (out / "compare.md").read_text()

    # One that was interrupted after its first epoch, and one before its first checkpoint: only these go on.
    before = (copy / "supcon-seed1" / "probes.json").read_text()
    (copy / "supcon-seed1" / "probes.json").unlink()
    shutil.rmtree(copy / "simclr-seed0")
    (copy / "simclr-seed0").mkdir()
    (copy / "simclr-seed0" / "config.json").write_text("{}")
    went, train = [], Run.train
    monkeypatch.setattr(Run, "train", lambda self: went.append((self.folder.name, len(self.history))) or train(self))
    assert main(command) == 0
    assert went == [("simclr-seed0", 0), ("supcon-seed1", 1)]
    assert (copy / "supcon-seed1" / "probes.json").read_text() == before
    assert (copy / "compare.md").read_text() == (out / "compare.md").read_text()
    assert "seed 1, 8 of 8" in capsys.readouterr().out


def test_an_interruption_says_how_to_go_on(npz, tmp_path, monkeypatch, capsys) -> None:
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "train", interrupted)
    assert main(["--quick", "--data", str(npz), "--out", str(tmp_path / "out")]) == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_folders_of_other_runs_are_refused(finished, npz, tmp_path, capsys) -> None:
    out, command = finished
    data = tmp_path / "few.npz"

    def message(*arguments: str) -> str:
        with pytest.raises(SystemExit) as exit_:
            main(list(arguments))
        assert exit_.value.code == 2
        errors = capsys.readouterr().err
        assert errors.count("\n") == 1
        return errors

    assert "trained with --temperature 0.1: choose another folder" in message(*command, "--temperature", "0.2")
    with np.load(npz) as arrays:
        np.savez(data, images=255 - arrays["images"], labels=arrays["labels"])
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    config = copy / "simclr-seed0" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"data": str(data)}))
    other = ["--quick", "--data", str(data), "--epochs", "1", "--batch-size", "40", "--out", str(copy)]
    assert "trained on other images" in message(*other)
    (copy / "simclr-seed0" / "probes.json").write_text("no json")
    assert "simclr-seed0/probes.json, which cannot be used" in message(*other)
    config.write_text("[]")
    assert "simclr-seed0/config.json, which cannot be used" in message(*other)


def test_damaged_numbers_and_folders_in_use_are_refused(finished, tmp_path, capsys) -> None:
    out, command = finished
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    command = [*command[:-1], str(copy)]
    with claimed(copy), pytest.raises(SystemExit):
        main(command)
    assert f"--out {copy} is in use by another process" in capsys.readouterr().err
    path = copy / "supcon-seed1" / "probes.json"
    content = json.loads(path.read_text())
    content["trained"]["knn"] /= 2
    path.write_text(json.dumps(content))
    with pytest.raises(SystemExit):
        main(command)
    assert "supcon-seed1/probes.json, which cannot be used: ValueError: the file is damaged" in capsys.readouterr().err


def test_what_would_fail_late_fails_first(finished, npz, tmp_path, monkeypatch, capsys) -> None:
    out, command = finished
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    shutil.rmtree(copy / "simclr-seed0")
    monkeypatch.setattr(Run, "train", lambda self: pytest.fail("trained before it was refused"))
    config = copy / "cluster-ce-labels-seed1" / "config.json"  # the last
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lr": 0.5}))
    with pytest.raises(SystemExit):
        main([*command[:-1], str(copy)])
    assert "cluster-ce-labels-seed1, trained with --lr 0.5: choose another folder" in capsys.readouterr().err
    path = tmp_path / "none.csv"
    path.write_text("kind\n" + '""\n' * COUNT)
    with pytest.raises(SystemExit):
        main([*command[:-1], str(tmp_path / "new"), "--auxiliary", f"{path}:kind"])
    assert f"--auxiliary must give images a cluster; {path}:kind has none" in capsys.readouterr().err


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
    with pytest.raises(SystemExit) as exit_:
        main(["--quick", "--data", str(npz), "--out", str(tmp_path / "out"), *arguments])
    assert exit_.value.code == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1


def test_contestants_and_comparisons(tmp_path) -> None:
    auxiliary = f"{write_csv(tmp_path / 'c.csv', 5)}:kind"
    chosen = contestants(auxiliary, [20, 10])
    assert {name for pairs in COMPARISONS.values() for pair in pairs for name in pair} <= chosen.keys()
    assert chosen["auxiliary"].clusters == auxiliary
    assert chosen["auxiliary"].folder == "clinfonce-c.csv_kind"
    assert chosen["kmeans"].title == "k-means 20"
    assert len({contestant.folder for contestant in chosen.values()}) == len(chosen) == 9
    assert len({(contestant.loss, contestant.title) for contestant in chosen.values()}) == len(chosen)


def test_the_table_has_means_spreads_and_differences_of_pairs() -> None:
    g = np.random.default_rng(0)
    chosen = contestants("attributes", [4])
    rows = {
        name: [dict(zip((*PROBES, *INFORMATION), g.random(6), strict=True)) for _ in range(3)]
        for name in ("raw", "untrained", *chosen)
    }
    text = compare.tables(rows, chosen, Config())
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert all(len(line) in (8, 6) for line in lines)

    def shown(values, places, sign=""):
        return f"{statistics.mean(values):{sign}.{places}f} ± {statistics.stdev(values):.{places}f}"

    (kmeans,) = (line for line in lines if line[:2] == ["contrastive", "k-means 4"])
    for place, probe in enumerate(PROBES, 2):
        assert kmeans[place] == shown([100 * line[probe] for line in rows["kmeans"]], 1)
    assert kmeans[6] == shown([line["mutual_information"] for line in rows["kmeans"]], 2)
    (against,) = (line for line in lines if line[1] == "contrastive, attributes minus cross-entropy, attributes")
    pairs = zip(rows["auxiliary"], rows["predicted auxiliary"], strict=True)
    assert against[0] == "contrasting against predicting"
    assert against[2] == shown([100 * (a["knn"] - b["knn"]) for a, b in pairs], 1, "+")
    one = compare.tables({name: lines[:1] for name, lines in rows.items()}, chosen, Config())
    assert "±" not in one
    assert "one seed" in one


def test_the_picture_takes_a_single_point(tmp_path) -> None:
    line = dict.fromkeys((*PROBES, *INFORMATION), 0.5)
    report.draw_information(tmp_path / "one.png", "title", {"contrastive": {"clusters": [line]}})
    assert (tmp_path / "one.png").stat().st_size > 5000
