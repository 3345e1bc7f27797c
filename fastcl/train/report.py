"""What a person looks at when a run is over: three pictures and a table."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from sklearn.manifold import TSNE
from sklearn.neighbors import NearestNeighbors

from fastcl.train import counted
from fastcl.train.data import ImageData, as_float
from fastcl.train.evaluate import Labels, Representation
from fastcl.train.files import save_figure

ROWS = {
    "knn": ("kNN accuracy", "%"),
    "linear_1": ("linear probe, 1 label a class", "%"),
    "linear_5": ("linear probe, 5 labels a class", "%"),
    "linear_all": ("linear probe, all labels", "%"),
    "mutual_information": ("I(label; k-means cluster)", "nats"),
    "conditional_entropy": ("H(k-means cluster | label)", "nats"),
    "rankme": ("RankMe", ""),
}
COLUMNS = ("raw", "untrained", "trained")
POINTS = 2000  # shown in the embedding, at most
LEAST = 4  # points that t-SNE can place
FEW = 25  # epochs, each of which gets a dot
QUERIES, SHOWN = 10, 8
Place = tuple[float, float]
_COLOURS = [colormaps["tab20"](place) for place in range(20)]


def table(results: dict[str, Any]) -> str:
    """The results of ``results.json`` as lines for the terminal."""
    lines = [f"{'on held-out images':<32}" + "".join(f"{name:>13}" for name in ("raw pixels", *COLUMNS[1:]))]
    for probe, (title, unit) in ROWS.items():
        scale, places = (100, 1) if unit == "%" else (1, 2)
        values = (f"{scale * results[probe][column]:.{places}f} {unit}".rstrip() for column in COLUMNS)
        lines.append(f"{title:<32}" + "".join(f"{value:>13}" for value in values))
    used = results["training_clusters"]
    if used is not None:
        lines.append(
            f"clusters trained with: {used['count']}, I(label; cluster) {used['mutual_information']:.2f} nats, "
            f"H(cluster | label) {used['conditional_entropy']:.2f} nats"
        )
    prototypes = results["prototypes"]
    if prototypes is not None:
        lines.append(
            f"prototypes, prior {prototypes['name']}: {sum(size > 0 for size in prototypes['sizes'])} of "
            f"{len(prototypes['sizes'])} in use, I(label; prototype) {prototypes['mutual_information']:.2f} nats"
        )
    return "\n".join(lines)


def draw(
    folder: Path,
    title: str,
    history: list[dict[str, Any]],
    results: dict[str, Any],
    images: ImageData,
    rows: Representation,
    clusters: Labels,
) -> None:
    """Write accuracy.png, embedding.png and neighbours.png of the trained rows; clusters ``[n]`` are the held-out."""
    save_figure(_accuracy(title, history, results["knn"]), folder / "accuracy.png")
    save_figure(_embedding(title, images, rows.test, clusters), folder / "embedding.png")
    save_figure(_neighbours(title, images, rows), folder / "neighbours.png")


def draw_prototypes(folder: Path, title: str, panels: list[dict[str, Any]], labels: NDArray[np.float64]) -> None:
    """Write prototypes.png: a panel a run, shares of training images by prototype, sorted, and the prior sorted alike.

    labels: shares of the classes, which a thin line shows, each spread over as many prototypes as fall to it.
    """
    figure = figure_of(5.2 * len(panels) + 0.6, 4.2, f"{title}: shares of training images by prototype")
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, panel in zip(grid, panels, strict=True):
        sizes, prior = np.array(panel["sizes"]), np.array(panel["prior"])
        places = np.arange(1, len(sizes) + 1)
        spread = np.interp(
            (places - 0.5) / len(places), (np.arange(len(labels)) + 0.5) / len(labels), np.sort(labels)[::-1]
        )
        axes.bar(places, 100 * sizes, color="C0", width=0.8, label="assigned")
        axes.plot(places, 100 * prior, color="C3", marker="o", markersize=3.5, label=f"prior ({panel['name']})")
        axes.plot(places, 100 * spread / spread.sum(), color="C7", linestyle="--", label="classes, spread alike")
        distance = 0.5 * np.abs(sizes - prior).sum()
        axes.set_title(f"prior {panel['name']}: total variation from it {distance:.2f}", fontsize=10, parse_math=False)
        axes.set(xlabel="prototypes, largest first", ylabel="share of training images (%)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for text in axes.legend(frameon=False).get_texts():
            text.set_parse_math(False)
        axes.grid(alpha=0.25, axis="y")
    save_figure(figure, folder / "prototypes.png")


def draw_information(path: Path, title: str, panels: dict[str, dict[str, list[dict[str, float]]]]) -> None:
    """Write accuracy on the plane of H(cluster | label) and I(label; cluster), after Tsai et al. 2022.

    panels: loss -> what the clusters are -> a line of numbers a seed. A large point is the mean over seeds, small ones
    are the seeds; a row of panels a probe.
    """
    probes = ("linear_5", "linear_all")
    figure = figure_of(5.6 * len(panels) + 1.2, 9.4, f"{title}: what clusters tell about labels, and what was learned")
    grid = figure.subplots(len(probes), len(panels), squeeze=False, sharex=True, sharey=True)
    everything = [lines for entries in panels.values() for lines in entries.values()]
    furthest, highest = (
        max(line[name] for lines in everything for line in lines)
        for name in ("conditional_entropy", "mutual_information")
    )
    for row, probe in zip(grid, probes, strict=True):
        means = [100 * np.mean([line[probe] for line in lines]) for lines in everything]
        scale = {"cmap": "viridis", "norm": _colour_scale(min(means), max(means))}
        for axes, (loss, entries) in zip(row, panels.items(), strict=True):
            captioned: list[Place] = []
            for what, lines in entries.items():
                x, y = (
                    np.array([line[name] for line in lines]) for name in ("conditional_entropy", "mutual_information")
                )
                accuracy = 100 * np.array([line[probe] for line in lines])
                place = x.mean(), y.mean()
                axes.scatter(x, y, c=accuracy, s=14, **scale)
                drawn = axes.scatter(*place, c=[accuracy.mean()], s=100, edgecolors="black", **scale)
                write_caption(axes, f"{what}: {accuracy.mean():.1f}", place, (furthest, highest), captioned)
            axes.set_title(f"{loss}, {ROWS[probe][0]}", fontsize=10, parse_math=False)
            axes.grid(alpha=0.25)
            axes.margins(0.08)
        figure.colorbar(drawn, ax=list(row), label=f"held-out accuracy (%), {ROWS[probe][0]}")
    for axes in grid[-1]:
        axes.set_xlabel("H(cluster | label) (nats): what is in the clusters besides")
    for axes in grid[:, 0]:
        axes.set_ylabel("I(label; cluster) (nats): what they tell about the label")
    save_figure(figure, path)


def write_caption(axes: Any, text: str, place: Place, ends: Place, captioned: list[Place]) -> None:
    """Write beside a point, on the side that has room, below the captions that are in the way. ends: of both axes."""
    near = [p for p in captioned if abs(p[0] - place[0]) < 0.3 * ends[0] and abs(p[1] - place[1]) < 0.03 * ends[1]]
    captioned.append(place)
    down = -3 - 11 * len(near)
    side: dict[str, Any] = {"xytext": (8, down)} if place[0] <= 0.8 * ends[0] else {"xytext": (-8, down), "ha": "right"}
    axes.annotate(text, place, textcoords="offset points", fontsize=8, parse_math=False, **side)


def figure_of(width: float, height: float, title: str) -> Figure:
    """An empty figure with a title, in inches."""
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    # Names of files and classes may have dollar signs, between which matplotlib would read a formula.
    figure.suptitle(title, fontsize=12, parse_math=False)
    return figure


def _colour_scale(low: float, high: float) -> Normalize:
    """Of accuracies in %. Those that the captions, with one decimal, show as equal get about the same colour."""
    if high - low < 0.1:
        return Normalize(low - 0.5, low + 1)  # low is not in the middle, where a rounding would change the colour
    return Normalize(low, high)


def _accuracy(title: str, history: list[dict[str, Any]], knn: dict[str, float]) -> Figure:
    figure = figure_of(10, 4.2, title)
    left, right = figure.subplots(1, 2)
    measured = [(line["step"], 100 * line["knn"]) for line in history if "knn" in line]
    left.plot(*zip(*measured, strict=True), marker="o", markersize=3.5, color="C0", label="trained encoder")
    left.axhline(100 * knn["raw"], color="C1", linestyle="--", label="raw pixels")
    left.axhline(100 * knn["untrained"], color="C7", linestyle=":", label="untrained encoder")
    left.set(xlabel="optimiser steps", ylabel="held-out kNN accuracy (%)")
    left.legend(loc="best", frameon=False)
    dots = "o" if len(history) <= FEW else None  # a single one is no line
    right.plot(
        [line["step"] for line in history], [line["loss"] for line in history], marker=dots, markersize=3.5, color="C0"
    )
    right.set(xlabel="optimiser steps", ylabel="training loss (nats)")
    for axes in (left, right):
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(y=0.08)
        axes.grid(alpha=0.25)
    return figure


def _embedding(title: str, images: ImageData, rows: NDArray[np.float32], clusters: Labels) -> Figure:
    chosen = np.random.default_rng(0).permutation(len(rows))[:POINTS]
    if len(chosen) < LEAST:
        how, axis, places = "principal components", "component", _principal_components(rows[chosen])
    else:
        perplexity = min(30.0, (len(chosen) - 1) / 3)
        how, axis = "t-SNE", "t-SNE"
        places = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(rows[chosen])
    figure = figure_of(12, 5.6, f"{title}: {how} of {counted(len(chosen), 'held-out image')}")
    names = [str(number) for number in range(clusters.max() + 1)]
    panels = (("label", images.test_labels, images.classes), ("k-means cluster", clusters, names))
    for axes, (what, ids, legend) in zip(figure.subplots(1, 2), panels, strict=True):
        present = np.unique(ids[chosen])
        # Up to twenty colours can be told apart, and named; beyond that they only show which points are together.
        few = len(present) <= 20
        handles = []
        for number in present:
            points = places[ids[chosen] == number]
            style = {"color": f"C{number}"} if len(legend) <= 10 else {"color": _COLOURS[number % 20]}
            handles.append(axes.scatter(*points.T, s=12, linewidths=0, **style))
        if few:
            drawn = axes.legend(
                handles, [""] * len(handles), title=what, loc="center left", bbox_to_anchor=(1, 0.5), markerscale=2,
                fontsize=8, frameon=False,
            )  # fmt: skip
            # Afterwards, because a legend may leave out labels that begin with an underscore.
            for text, number in zip(drawn.get_texts(), present, strict=True):
                text.set_parse_math(False)
                text.set_text(legend[number])
        axes.set_title(f"coloured by {what}" + ("" if few else f" ({len(present)}, colours repeat)"))
        axes.set(xlabel=f"{axis} 1 (no unit)", ylabel=f"{axis} 2 (no unit)", xticks=[], yticks=[])
    return figure


def _principal_components(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows ``[n, D]`` on the two directions in which they differ most, ``[n, 2]``; 0 where there are fewer."""
    left, values, _ = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    places = np.zeros((len(rows), 2), dtype=np.float32)
    count = min(2, len(values))
    places[:, :count] = (left * values)[:, :count]
    return places


def _neighbours(title: str, images: ImageData, rows: Representation) -> Figure:
    queries = np.unique(images.test_labels, return_index=True)[1][:QUERIES]
    shown = min(SHOWN, len(rows.train))
    nearest = NearestNeighbors(n_neighbors=shown, metric="cosine").fit(rows.train)
    found = nearest.kneighbors(rows.test[queries], return_distance=False)
    figure = figure_of(
        1 + shown, 0.6 + 1.1 * len(queries), f"{title}: held-out queries and their nearest training images"
    )
    grid = figure.subplots(len(queries), 1 + shown, squeeze=False)
    for axes, query, neighbours in zip(grid, queries, found, strict=True):
        truth = images.test_labels[query]
        _picture(axes[0], images.test_images[query], f"query: {images.classes[truth]}", "black")
        for place, neighbour in zip(axes[1:], neighbours, strict=True):
            label = images.train_labels[neighbour]
            _picture(place, images.train_images[neighbour], images.classes[label], "C2" if label == truth else "C3")
            if label != truth:
                place.set_title(
                    f"wrong: {images.classes[label]}", fontsize=8, color="C3", fontweight="bold", parse_math=False
                )
    return figure


def _picture(axes: Any, image: Any, caption: str, colour: str) -> None:
    pixels = as_float(image).permute(1, 2, 0).numpy()
    axes.imshow(pixels, cmap="gray_r" if pixels.shape[2] == 1 else None, vmin=0, vmax=1)
    axes.set_title(caption, fontsize=8, color=colour, parse_math=False)
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=2.5 if colour == "C3" else 1)
