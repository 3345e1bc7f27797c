"""The trainer's probes are what they say."""

import math

import numpy as np
import pytest
import torch

from fastcl.train import evaluate
from fastcl.train.data import ImageData
from fastcl.train.evaluate import Representation, cluster_information, knn_accuracy, linear_accuracy
from fastcl.train.methods.clusterings import kmeans


def test_probes_learn_from_training_rows_alone(monkeypatch) -> None:
    """Held-out rows are scaled, clustered and classified by what was fitted to the training rows."""
    g = np.random.default_rng(0)
    data = made_data(np.arange(60) % 3, np.arange(30) % 3)
    rows = Representation(*(g.standard_normal((n, 4)).astype(np.float32) for n in (60, 30)))
    seen: dict[str, list[np.ndarray]] = {"scaler": [], "kmeans": [], "regression": []}

    class Scaler(evaluate.StandardScaler):
        def fit(self, x, *rest):
            seen["scaler"].append(x)
            return super().fit(x, *rest)

    class Regression(evaluate.LogisticRegression):
        def fit(self, x, y):
            seen["regression"].append(y)
            return super().fit(x, y)

    monkeypatch.setattr(evaluate, "StandardScaler", Scaler)
    monkeypatch.setattr(evaluate, "LogisticRegression", Regression)
    monkeypatch.setattr(evaluate, "kmeans", lambda x, *rest: seen["kmeans"].append(x) or kmeans(x, *rest))
    evaluate.probe(rows, data, 3, seed=1)
    first = [len(labels) for labels in seen["regression"]]
    assert first == [3] * 10 + [15] * 10 + [60]
    assert all(x is rows.train for x in (*seen["scaler"], *seen["kmeans"]))
    assert len(seen["kmeans"]) == 1


def test_few_label_draws_are_the_same_for_every_representation(monkeypatch) -> None:
    data = made_data(np.arange(60) % 3, np.arange(30) % 3)
    chosen: list[np.ndarray] = []

    class Regression(evaluate.LogisticRegression):
        def fit(self, x, y):
            chosen.append(np.sort(x[:, 0]))
            return super().fit(x, y)

    monkeypatch.setattr(evaluate, "LogisticRegression", Regression)
    place = np.arange(60, dtype=np.float32)[:, None]
    for seed in range(2):
        noise = np.random.default_rng(seed).standard_normal((60, 1)).astype(np.float32)
        rows = Representation(np.hstack([place, noise]), np.hstack([place, noise])[:30])
        linear_accuracy(rows, data, 1, seed=0)
    assert len(chosen) == 20
    for one, other in zip(chosen[:10], chosen[10:], strict=True):
        assert np.array_equal(one, other)
    assert not all(np.array_equal(chosen[0], other) for other in chosen[1:10])


def test_cluster_information_of_known_tables() -> None:
    labels = np.array([0, 0, 1, 1])
    assert cluster_information(labels, np.array([5, 5, 9, 9])) == pytest.approx((math.log(2), 0))
    assert cluster_information(labels, np.array([0, 1, 0, 1])) == pytest.approx((0, math.log(2)))
    assert cluster_information(labels, np.array([0, 1, 2, 3])) == pytest.approx((math.log(2), math.log(2)))
    assert cluster_information(labels, np.array([-1, -1, -1, -1])) == pytest.approx((math.log(2), math.log(2)))
    assert cluster_information(labels, np.array([7, 7, 7, 7])) == pytest.approx((0, 0))
    # Joint 3/8, 1/8, 1/8, 3/8: I = log 2 - h(1/4).
    eight = np.array([0, 0, 0, 0, 1, 1, 1, 1]), np.array([0, 0, 0, 1, 0, 1, 1, 1])
    h = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert cluster_information(*eight) == pytest.approx((math.log(2) - h, h))


def made_data(train_labels: np.ndarray, test_labels: np.ndarray) -> ImageData:
    blank = torch.zeros(1, 1, 8, 8)
    classes = tuple(map(str, range(int(train_labels.max()) + 1)))
    return ImageData(blank, train_labels, blank, test_labels, classes, np.arange(len(train_labels)), len(train_labels))


def test_accuracies_of_separable_and_of_meaningless_rows() -> None:
    g = np.random.default_rng(0)
    train, test = np.arange(300) % 3, np.arange(90) % 3
    data = made_data(train, test)
    corners = 20 * np.eye(3)
    clear = Representation(
        *((corners[ids] + g.standard_normal((len(ids), 3))).astype(np.float32) for ids in (train, test))
    )
    noise = Representation(*(g.standard_normal((len(ids), 8)).astype(np.float32) for ids in (train, test)))
    assert knn_accuracy(clear, data) == 1
    assert abs(knn_accuracy(noise, data) - 1 / 3) < 0.2
    for few in (1, 5, None):
        assert linear_accuracy(clear, data, few, 0) == 1
        assert abs(linear_accuracy(noise, data, few, 0) - 1 / 3) < 0.2
