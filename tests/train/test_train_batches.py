"""--batch-classes: batches of few classes, and every image in one of them."""

import numpy as np
import pytest
import torch

from fastcl.train import Config, evaluate, report
from fastcl.train.__main__ import main
from fastcl.train.batches import batches_of_few_classes
from fastcl.train.loop import Run
from tests.support.training import metrics, options, weights


@pytest.mark.parametrize("few", [1, 2, 3, 10])
@pytest.mark.parametrize("sizes", [[30] * 10, [200, 40, 40, 7, 3, 1, 1, 1, 1, 1], [9, 2, 2, 2, 2, 2, 2, 2, 2, 2]])
def test_batches_are_of_few_classes_and_have_every_image(few, sizes) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), sizes))
    counts = set()
    for seed in range(5):
        batches = batches_of_few_classes(labels, 12, few, np.random.default_rng(seed))
        assert all(len(np.unique(labels[batch])) <= few for batch in batches)
        assert all(0 < len(batch) <= 12 for batch in batches)
        assert np.array_equal(np.sort(np.concatenate(batches)), np.arange(len(labels)))
        counts.add(len(batches))
    assert len(counts) == 1


def test_even_classes_make_full_batches_of_different_company() -> None:
    labels = np.arange(400) % 10
    batches = batches_of_few_classes(labels, 16, 2, np.random.default_rng(0))
    assert {len(batch) for batch in batches} == {16}
    pairs = [tuple(np.unique(labels[batch])) for batch in batches]
    assert {len(pair) for pair in pairs} == {2}
    assert len(set(pairs)) > 12
    first = batches_of_few_classes(labels, 16, 2, np.random.default_rng(0))
    assert all(np.array_equal(one, other) for one, other in zip(batches, first, strict=True))
    other = batches_of_few_classes(labels, 16, 2, np.random.default_rng(1))
    assert not all(np.array_equal(one, two) for one, two in zip(batches, other, strict=True))


@pytest.fixture
def quick(monkeypatch) -> None:
    monkeypatch.setattr(report, "draw", lambda *_: None)
    monkeypatch.setattr(evaluate, "DRAWS", 1)


@pytest.mark.usefixtures("quick")
def test_a_run_of_few_classes_goes_on_to_the_same_numbers(npz, tmp_path, monkeypatch, capsys) -> None:
    seen: list[np.ndarray] = []
    step, epoch = Run._step, Run._epoch

    def noted(self, index, *rest):
        assert len(np.unique(self.images.train_labels[index])) <= 3
        seen.append(index)
        return step(self, index, *rest)

    def interrupted(self, number, bar):
        if number == 1:
            raise KeyboardInterrupt
        return epoch(self, number, bar)

    command = ["--method", "supcon", "--batch-classes", "3"]
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_step", noted)
        assert main([*options(npz, tmp_path / "whole", epochs=2), *command]) == 0
    assert "of up to 40 images (80 rows) of at most 3 classes" in capsys.readouterr().out
    half = len(seen) // 2
    for part in (seen[:half], seen[half:]):
        assert np.array_equal(np.sort(np.concatenate(part)), np.arange(105))
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_epoch", interrupted)
        assert main([*options(npz, tmp_path / "parts", epochs=2), *command]) == 130
    assert main(["--resume", str(tmp_path / "parts")]) == 0
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(tmp_path / "parts")[name]), name


def test_more_classes_than_there_are_is_refused(npz, tmp_path, capsys) -> None:
    for given, message in ((["11"], "number of classes, 10,"), (["5", "--batch-size", "4"], "images a step, 4; got 5")):
        with pytest.raises(SystemExit):
            main([*options(npz, tmp_path / "run"), "--batch-classes", *given])
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_without_the_option_batches_are_slices_of_one_order(npz, tmp_path) -> None:
    run = Run(Config(data=str(npz), batch_size=40, n_clusters=5, seed=3), tmp_path / "run", False)
    order = np.random.default_rng([3, 7]).permutation(105)
    assert [batch.tolist() for batch in run._batches(7)] == [order[:40].tolist(), order[40:80].tolist()]
