"""The training loop and the run folder."""

import dataclasses
import functools
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from fastcl.train import Config, OptionError, counted, report
from fastcl.train.batches import batches_of_few_classes, check_batch_classes
from fastcl.train.data import VIEWS, ImageData, augment, fingerprint, prepared
from fastcl.train.evaluate import (
    Labels,
    Representation,
    assigned,
    cluster_information,
    embed,
    knn_accuracy,
    probe,
    raw_pixels,
    represent,
)
from fastcl.train.files import append, load_checkpoint, save_checkpoint, write
from fastcl.train.methods import kind_of
from fastcl.train.methods.clustered import SCAN, Clustered
from fastcl.train.methods.clusterings import Clusters, cluster_ids, fixed_clusters, kmeans, renumbered
from fastcl.train.methods.contrastive import PIRL, ClusterPrediction, MoCo
from fastcl.train.methods.method import Method
from fastcl.train.methods.prototypes import PrototypeMethod, prototype_masses
from fastcl.train.processes import Processes
from fastcl.train.tensorboard import Board

WARM_UP = 0.1  # the share of all steps over which the learning rate rises
WEIGHT_DECAY = 1e-4
MEASUREMENTS = 20  # of the kNN accuracy in a run, about


def usable_device(name: str, processes: Processes) -> torch.device:
    """The device of that name; OptionError where it cannot hold a number."""
    try:
        device = torch.device(processes.device(name))
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise OptionError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def other_prototypes(folder: Path) -> dict[str, Any]:
    """What another run's results.json says of its prototypes."""
    try:
        prototypes: dict[str, Any] = json.loads((folder / "results.json").read_text())["prototypes"]
        numbers = {name: [float(share) for share in prototypes[name]] for name in ("prior", "sizes")}
        return {"name": str(prototypes["name"]), **numbers}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OptionError(f"--beside must name the folder of a finished run with prototypes; got {folder}") from error


def check_n_clusters(n_clusters: int, images: ImageData) -> None:
    count = len(images.train_labels)
    if n_clusters > count:
        raise OptionError(f"--n-clusters must be at most the number of training images, {count}; got {n_clusters}")


class Run:
    """A training run and its folder: what happens next is a function of the config and of the checkpoint alone."""

    def __init__(self, config: Config, folder: Path, resumed: bool, processes: Processes | None = None) -> None:
        """processes: None: this one alone. Only the first of several writes into the folder."""
        self.config, self.folder, self.processes = config, folder, processes or Processes()
        self.device = usable_device(config.device, self.processes)
        # Without this a resumed run on a GPU could choose other convolution kernels, and other roundings.
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        self.images = prepared(config)
        count = len(self.images.train_labels)
        check_n_clusters(config.n_clusters, self.images)
        self.batch = min(config.batch_size, count)
        if config.batch_classes is not None:
            check_batch_classes(config.batch_classes, self.batch, self.images)
        smallest = min(map(len, self._batches(0)))
        if smallest < self.processes.size:
            raise OptionError(f"--batch-size must be at least the number of processes; got {smallest}")
        self.steps = len(self._batches(0))  # of an epoch, the same in each
        self.clusters: Clusters | None = None
        if config.clusters not in (None, "kmeans", "sinkhorn"):
            self.clusters = fixed_clusters(config.clusters, self.images)
        self.method = self._initial()
        self.processes.gathering(self.method)
        self.optimiser = torch.optim.AdamW(self.method.parameters(), lr=config.lr, weight_decay=WEIGHT_DECAY)
        self.history: list[dict[str, Any]] = []
        self.board: Board | None = None
        if resumed:
            self._restore()
        elif self.processes.first:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OptionError(f"--out {folder} cannot be made: {error}") from error
            write(folder / "config.json", json.dumps(dataclasses.asdict(config), indent=2) + "\n")
            self._save(self.history)
        if self.processes.first:
            self._write_metrics()

    def _initial(self) -> Method:
        """The method as it is before training; drawn on the CPU, so that every device starts with the same weights."""
        torch.manual_seed(self.config.seed)
        shape = self.images.train_images.shape[1:]
        kind = kind_of(self.config.method, self.config.clusters)
        options: dict[str, Any] = {}
        if issubclass(kind, ClusterPrediction):
            options["classes"] = self._classes()
        if issubclass(kind, MoCo) and self.clusters is not None:
            options["tags"] = self.clusters.shape[1]
        if issubclass(kind, (Clustered, SCAN, PIRL)):
            options["images"] = len(self.images.train_labels)
        if issubclass(kind, (Clustered, SCAN)):
            options["n_clusters"] = self.config.n_clusters
        if self.config.prior is not None:
            options["masses"] = prototype_masses(self.config.prior, self.config.n_clusters, self.images.train_labels)
        return kind(shape, self.config.temperature, **options).to(self.device)

    def _classes(self) -> int:
        if self.config.clusters == "kmeans":
            return self.config.n_clusters
        assert self.clusters is not None
        if self.clusters.max() < 0:
            raise OptionError(f"--clusters must give --method cluster-ce a cluster; {self.config.clusters} has none")
        return 1 + int(self.clusters.max())

    def _batches(self, epoch: int) -> list[NDArray[np.int64]]:
        """The places of each batch's images among the training images; a function of the seed and the epoch."""
        generator = np.random.default_rng([self.config.seed, epoch])
        if self.config.batch_classes is not None:
            return batches_of_few_classes(self.images.train_labels, self.batch, self.config.batch_classes, generator)
        # The images left over have their turn in another epoch's order.
        order = generator.permutation(len(self.images.train_labels))
        return [order[start : start + self.batch] for start in range(0, len(order) - self.batch + 1, self.batch)]

    def _save(self, history: list[dict[str, Any]]) -> None:
        state = {
            "config": self._identity(),
            "method": self.method.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "clusters": None if self.clusters is None else torch.from_numpy(self.clusters),
            "history": history,
            "data": self.fingerprint,
        }
        save_checkpoint(state, self.folder / "checkpoint.pt")

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the images, which never change."""
        return fingerprint(self.images)

    def _identity(self) -> dict[str, Any]:
        """The config without what may differ between two parts of a run."""
        return {name: value for name, value in dataclasses.asdict(self.config).items() if name != "device"}

    def _write_metrics(self) -> None:
        """metrics.jsonl as the history has it: an interruption may fall between the checkpoint and its line there."""
        write(self.folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.history))

    def keep(self) -> int:
        """After an interruption at any moment: bring metrics.jsonl to the checkpoint's state; returns its epochs."""
        self.history = load_checkpoint(self.folder / "checkpoint.pt")["history"]
        self._write_metrics()
        return len(self.history)

    def _restore(self) -> None:
        path = self.folder / "checkpoint.pt"
        try:
            state = load_checkpoint(path)
            for name, value in self._identity().items():
                if state["config"][name] != value:
                    raise OptionError(
                        f"--resume {self.folder}: config.json has {name} {value}, but the checkpoint was trained with "
                        f"{state['config'][name]}"
                    )
            if state["data"] != self.fingerprint:
                raise OptionError(
                    f"--data {self.config.data} no longer holds the images that {self.folder} was trained on"
                )
            self.method.load_state_dict(state["method"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.clusters = None if state["clusters"] is None else state["clusters"].numpy()
            self.history = [dict(line) for line in state["history"]]
        except OptionError:
            raise
        except Exception as error:  # a damaged file may raise anything on its way through zip, pickle and torch
            what = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise OptionError(f"--resume found no usable checkpoint at {path}: the file is damaged ({what})") from error

    def summary(self) -> str:
        training, held_out = len(self.images.train_labels), len(self.images.test_labels)
        few = self.config.batch_classes
        up_to, classes = ("up to ", f" of at most {few} classes") if few else ("", "")
        return (
            f"{self.folder}: {training} training images, {held_out} held out; "
            f"{counted(self.config.epochs, 'epoch')} of {counted(self.steps, 'step')} of "
            f"{up_to}{self.batch} images ({VIEWS * self.batch} rows){classes}"
        )

    def train(self) -> None:
        """Train the epochs that are left. The checkpoint is always the state after the last whole epoch."""
        config = self.config
        done = len(self.history)
        # None: without a terminal. Where a shell closed it (2>&-), standard error is None.
        hidden = None if self.processes.first and sys.stderr is not None else True
        with tqdm(total=config.epochs * self.steps, initial=done * self.steps, unit="step", disable=hidden) as bar:
            for epoch in range(done, config.epochs):
                line = self._epoch(epoch, bar)
                if not self.processes.first:
                    self.history.append(line)
                    continue
                if (epoch + 1) % max(1, config.epochs // MEASUREMENTS) == 0 or epoch + 1 == config.epochs:
                    line["knn"] = knn_accuracy(self.representation("trained"), self.images)
                self._save([*self.history, line])
                self.history.append(line)
                if bar.disable and "knn" in line:  # no terminal: a line now and then in place of the bar
                    print(
                        f"epoch {epoch + 1}/{config.epochs}  loss {line['loss']:.3f}  kNN {line['knn']:.1%}", flush=True
                    )
                append(self.folder / "metrics.jsonl", json.dumps(line))
                if self.board is not None:
                    self.board.add(line)

    def _epoch(self, epoch: int, bar: Any) -> dict[str, Any]:
        config = self.config
        if (
            config.clusters == "kmeans"
            and epoch % config.renew == 0
            and not (epoch == 0 and self.method.instances_first)
        ):
            found = self.processes.from_first(self._kmeans)
            self.clusters = found if self.clusters is None else renumbered(found, cluster_ids(self.clusters))
        if self.method.is_due(epoch, config.epochs, config.renew):
            self.method.renew(
                torch.from_numpy(self.processes.from_first(self._projections)).to(self.device), config.seed
            )
        # A method that draws random numbers draws the same ones after a resume.
        torch.manual_seed(config.seed * 1_000_003 + epoch + 1)
        self.method.train()
        losses = []
        for step, batch in enumerate(self._batches(epoch)):
            rate = self._rate(epoch * self.steps + step)
            loss = self._step(batch, epoch, rate)
            if not math.isfinite(loss):
                raise OptionError(f"the loss became {loss} in epoch {epoch + 1}: try a lower --lr than {config.lr}")
            losses.append(loss)
            bar.update()
            bar.set_postfix(epoch=epoch + 1, loss=f"{loss:.3f}")
        if not all(bool(parameter.isfinite().all()) for parameter in self.method.parameters()):
            raise OptionError(
                f"the weights are no longer finite in epoch {epoch + 1}: try a lower --lr than {config.lr}"
            )
        return {"epoch": epoch + 1, "step": (epoch + 1) * self.steps, "loss": float(np.mean(losses)), "lr": rate}

    def _kmeans(self) -> NDArray[np.int64]:
        rows = embed(self.method.encoder, self.images.train_images, self.device)
        self._check_features(rows)
        labels: NDArray[np.int64] = kmeans(rows, self.config.n_clusters, self.config.seed).assignments.numpy()
        return labels

    def _projections(self) -> NDArray[np.float32]:
        rows = embed(nn.Sequential(self.method.encoder, self.method.projector), self.images.train_images, self.device)
        self._check_features(rows)
        return rows

    def _rate(self, step: int) -> float:
        total = self.config.epochs * self.steps
        return (
            self.config.lr * min(1.0, (step + 1) / (WARM_UP * total)) * (0.5 + 0.5 * math.cos(math.pi * step / total))
        )

    def _step(self, index: NDArray[np.int64], epoch: int, rate: float) -> float:
        index = self.processes.share(index)
        partners = self.method.partners(torch.from_numpy(index)).numpy()
        views = []
        for view, places in zip(range(VIEWS), (index, partners), strict=True):
            chosen = self.images.train_images[torch.from_numpy(places)].to(self.device)
            views.append(augment(chosen, places, self.config.seed, epoch, view))
        clusters: Tensor | None = None
        if self.clusters is not None:
            clusters = torch.from_numpy(self.clusters[index]).to(self.device)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            loss = self.method(torch.stack(views, dim=1), clusters, torch.from_numpy(index).to(self.device))
        self.optimiser.zero_grad()
        loss.backward()
        self.processes.average(self.method.parameters())
        self.optimiser.step()
        return self.processes.mean(loss)

    def representation(self, name: str) -> Representation:
        """The images as ``raw`` pixels, or through the ``untrained`` or the ``trained`` encoder."""
        if name == "raw":
            return raw_pixels(self.images)
        method = self._initial() if name == "untrained" else self.method
        rows = represent(method.encoder, self.images, self.device)
        self._check_features(rows.train, rows.test)
        return rows

    def _check_features(self, *features: NDArray[np.float32]) -> None:
        """Finite weights may be so large that the features overflow."""
        if not all(np.isfinite(rows).all() for rows in features):
            raise OptionError(f"the features are no longer finite: try a lower --lr than {self.config.lr}")

    def last_clusters(self) -> Labels:
        """Ids ``[n]`` of what training used last: clusters, sets of tags or nearest prototypes; -1 for none."""
        if isinstance(self.method, PrototypeMethod):
            return assigned(self.method, self.images.train_images, self.device)
        return np.full(len(self.images.train_labels), -1) if self.clusters is None else cluster_ids(self.clusters)

    def finish(self, beside: Path | None = None) -> dict[str, Any]:
        """Probe the raw pixels, the untrained and the trained encoder; write results.json and the pictures.

        beside: the folder of another finished run, whose prototypes' sizes are drawn next to this one's.
        """
        config, images = self.config, self.images
        rows = {name: self.representation(name) for name in report.COLUMNS}
        probes = {name: probe(rows[name], images, config.n_clusters, config.seed) for name in report.COLUMNS}
        results: dict[str, Any] = {
            row: {name: values[row] for name, (values, _) in probes.items()} for row in report.ROWS
        }
        results["training_clusters"] = None
        if self.clusters is not None:
            ids = cluster_ids(self.clusters)
            information, entropy = cluster_information(images.train_labels, ids)
            count = len(np.unique(ids[ids >= 0]))
            results["training_clusters"] = {
                "count": count, "mutual_information": information, "conditional_entropy": entropy
            }  # fmt: skip
        results["prototypes"] = None
        if isinstance(self.method, PrototypeMethod):
            nearest = assigned(self.method, images.train_images, self.device)
            information, entropy = cluster_information(images.train_labels, nearest)
            sizes = np.bincount(nearest, minlength=len(self.method.prototypes)) / len(nearest)
            results["prototypes"] = {
                "name": config.prior, "prior": sorted(self.method.masses.tolist(), reverse=True),
                "sizes": sorted(sizes.tolist(), reverse=True),
                "mutual_information": information, "conditional_entropy": entropy,
            }  # fmt: skip
            panels = [results["prototypes"]] + ([other_prototypes(beside)] if beside else [])
            labels = np.bincount(images.train_labels) / len(images.train_labels)
            report.draw_prototypes(self.folder, f"{Path(config.data).stem} {config.method}", panels, labels)
        write(self.folder / "results.json", json.dumps(results, indent=2) + "\n")
        title = " ".join(part for part in (Path(config.data).stem, config.method, config.clusters) if part)
        report.draw(self.folder, title, self.history, results, images, rows["trained"], probes["trained"][1])
        return results
