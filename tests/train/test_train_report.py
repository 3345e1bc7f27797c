"""The pictures: any names, few images, equal numbers."""

import numpy as np
import pytest
import torch
from matplotlib.collections import PathCollection
from scipy.spatial.distance import pdist

from fastcl.train import counted, report
from fastcl.train.data import ImageData
from fastcl.train.evaluate import Representation
from fastcl.train.study_tables import INFORMATION, PROBES

CLASSES = ("$x_$", "_background_noise_", "a$b", "")
NUMBERS = dict.fromkeys((*PROBES, *INFORMATION), 0.5)


def few(count: int) -> tuple[ImageData, np.ndarray]:
    """Images of four classes, so many of them held out, and the rows of these."""
    labels, held_out = np.arange(8) % 4, np.arange(count) % 4
    pixels = torch.zeros(8, 1, 8, 8), torch.zeros(count, 1, 8, 8)
    data = ImageData(pixels[0], labels, pixels[1], held_out, CLASSES, np.arange(8), 8)
    return data, np.random.default_rng(0).normal(size=(count, 5)).astype(np.float32)


@pytest.mark.parametrize("picture", ["accuracy", "neighbours", "prototypes", "information"])
def test_names_are_drawn_as_they_are(picture, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(report, "QUERIES", 2)
    monkeypatch.setattr(report, "SHOWN", 1)
    title, path = "a $x_$ b", tmp_path / f"{picture}.png"
    if picture == "accuracy":
        history, knn = [{"step": 1, "loss": 1.0, "knn": 0.5}], {"raw": 0.5, "untrained": 0.5}
        report.save_figure(report._accuracy(title, history, knn), path)
    elif picture == "neighbours":
        data, rows = few(2)
        wrong = np.full((8, 5), -1, dtype=np.float32)
        wrong[0] = rows[1]  # the nearest of both has a name with dollar signs, and is not of the second's class
        report.save_figure(report._neighbours(title, data, Representation(wrong, rows[[1, 1]])), path)
    elif picture == "prototypes":
        panel = {"name": "$x_$", "sizes": [0.5, 0.5], "prior": [0.5, 0.5]}
        report.draw_prototypes(tmp_path, title, [panel], np.array([0.5, 0.5]))
    else:
        report.draw_information(path, title, {"contrastive $x_$": {"$x_$.csv:$y_$": [NUMBERS]}})
    assert path.stat().st_size > 5000


def test_every_class_is_in_the_legend(tmp_path) -> None:
    data, rows = few(6)
    figure = report._embedding("a $x_$ b", data, rows, np.zeros(6, dtype=np.int64))
    figure.savefig(tmp_path / "embedding.png")
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == list(CLASSES)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_few_held_out_images_are_shown(count, tmp_path) -> None:
    data, rows = few(count)
    figure = report._embedding("title", data, rows, np.zeros(count, dtype=np.int64))
    figure.savefig(tmp_path / "embedding.png")
    title = figure.get_suptitle()
    assert title.startswith("title: t-SNE of 4 " if count == 4 else "title: principal components of ")
    assert title.endswith("image" if count == 1 else "images")
    places = figure.axes[1].collections[0].get_offsets()
    assert places.shape == (count, 2)
    assert np.isfinite(places).all()
    if count < 4:  # three rows lie on a plane: distances are kept
        assert np.sort(pdist(places)) == pytest.approx(np.sort(pdist(rows)), rel=1e-5)


@pytest.mark.parametrize("spread", [0.0, 1e-15, 0.3])
def test_points_of_one_accuracy_have_one_colour(spread, tmp_path, monkeypatch) -> None:
    kept = []
    monkeypatch.setattr(report, "save_figure", lambda figure, path: kept.append(figure))
    entries = {
        name: [{**NUMBERS, "linear_5": 0.5 + shift, "linear_all": 0.5 + shift}] * 3
        for name, shift in (("one", 0.0), ("other", spread))
    }
    report.draw_information(tmp_path / "plane.png", "title", {"contrastive": entries})
    drawn = [points for points in kept[0].axes[0].collections if isinstance(points, PathCollection)]
    for points in drawn:
        points.update_scalarmappable()
    colours = {tuple(colour) for points in drawn for colour in points.get_facecolors()}
    assert len(drawn) == 4
    assert len(colours) == (2 if spread == 0.3 else 1)


def test_one_is_singular() -> None:
    assert [counted(number, "epoch") for number in (0, 1, 2)] == ["0 epochs", "1 epoch", "2 epochs"]
