"""The trainer's methods with banks, clusterings and momentum, and those of two views without negatives."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import fastcl
from fastcl.train import Config, loop, systems
from fastcl.train.data import augment
from fastcl.train.loop import Run
from fastcl.train.methods import METHODS
from fastcl.train.methods.clustered import PCL, SCAN, DeepCluster
from fastcl.train.methods.contrastive import PIRL
from fastcl.train.methods.views import BYOL, SimSiam
from fastcl.train.options import settle

SHAPE = torch.Size((1, 8, 8))
SYSTEMS = ["vicreg", "barlow", "wmse", "simsiam", "byol", "ldreg", "pirl", "ascl", "deepcluster", "pcl", "scan"]


def short(npz: Path, folder: Path, **given: object) -> Run:
    config = {"data": str(npz), "epochs": 2, "batch_size": 40, "n_clusters": 5, "renew": 1, **given}
    return Run(settle(Config(**config)), folder, (folder / "checkpoint.pt").exists())


@pytest.mark.parametrize("method", SYSTEMS)
def test_trains_and_resumes_to_the_same_numbers(npz: Path, tmp_path: Path, method: str) -> None:
    run = short(npz, tmp_path / "whole", method=method)
    before = {name: value.clone() for name, value in run.method.encoder.state_dict().items()}
    run.train()
    after = run.method.state_dict()
    assert all(not torch.equal(value, run.method.encoder.state_dict()[name]) for name, value in before.items())

    parts = short(npz, tmp_path / "parts", method=method)
    epoch, done = parts._epoch, []

    def interrupted(*args: object) -> dict[str, object]:
        if done:
            raise KeyboardInterrupt
        done.append(args)
        return epoch(*args)

    parts._epoch = interrupted
    with pytest.raises(KeyboardInterrupt):
        parts.train()
    resumed = short(npz, tmp_path / "parts", method=method)
    assert len(resumed.history) == 1
    resumed.train()
    for name, value in resumed.method.state_dict().items():
        torch.testing.assert_close(value, after[name], rtol=0, atol=0, equal_nan=True)


def test_the_table_of_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def conduct(entries: list, base: Config, seeds: range, folder: Path) -> list[dict[str, object]]:
        assert base.epochs == 3
        assert [entry.options["method"] for entry in entries] == ["simclr", "simclr", "simclr", "barlow"]
        assert [entry.representation for entry in entries] == ["raw", "untrained", "trained", "trained"]
        return [
            {"group": "", "what": entry.what, "seed": seed, **dict.fromkeys(systems.PROBES, (k + seed) / 10)}
            for seed in seeds
            for k, entry in enumerate(entries)
        ]

    monkeypatch.setattr(systems, "conduct", conduct)
    page = tmp_path / "page.md"
    page.write_text(f"Before.\n{systems.START}\nold\n{systems.STOP}\nAfter.\n", encoding="utf-8")
    command = ["--methods", "simclr", "barlow", "--seeds", "2", "--epochs", "3", "--out", str(tmp_path / "systems")]
    assert systems.main([*command, "--page", str(page)]) == 0
    text = (tmp_path / "systems" / "systems.md").read_text(encoding="utf-8")
    stored = json.loads((tmp_path / "systems" / "systems.json").read_text(encoding="utf-8"))
    assert list(stored["rows"]) == ["raw", "untrained", "simclr", "barlow"]
    assert stored["rows"]["raw"][1] == dict.fromkeys(systems.PROBES, 0.1)
    assert page.read_text(encoding="utf-8") == f"Before.\n{systems.START}\n\n{text}\n{systems.STOP}\nAfter.\n"
    page.write_text("no place for it", encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        systems.main([*command, "--page", str(page)])
    cells = [[cell.strip() for cell in line.split("|")[1:3]] for line in text.splitlines() if line.startswith("| ")]
    assert cells[0] == ["method", "kNN"]
    assert cells[2:] == [
        ["raw pixels", "5.0 ± 7.1"],
        ["untrained encoder", "15.0 ± 7.1"],
        ["`simclr`", "25.0 ± 7.1"],
        ["`barlow`", "35.0 ± 7.1"],
    ]


def test_the_documentation_has_the_table_of_the_committed_rows() -> None:
    root = Path(__file__).parents[2]
    stored = json.loads((root / "benchmarks" / "results" / "amd-epyc-2-threads" / "systems.json").read_text())
    table = systems.table(stored["rows"], Config(**stored["config"]))
    page = (root / "docs" / "trainer.md").read_text(encoding="utf-8")
    assert f"{systems.START}\n\n{table}\n{systems.STOP}" in page


def test_every_method_is_listed_in_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "trainer.md").read_text(encoding="utf-8")
    assert [method for method in METHODS if f"`{method}`" not in page] == []


def test_pirl_draws_views_to_the_rows_of_earlier_steps() -> None:
    torch.manual_seed(0)
    method, views, index = PIRL(SHAPE, 0.1, images=9), torch.rand(4, 2, *SHAPE), torch.tensor([2, 0, 7, 5])
    method(views, None, index)
    stored = method.bank.rows.clone()
    assert method.bank.ids.tolist() == [0, 2, 5, 7]
    torch.manual_seed(1)
    loss = method(views, None, index)
    torch.manual_seed(1)
    bank = fastcl.MemoryBank(9, 128)
    bank.update(torch.arange(9), stored)
    bank.filled.copy_(method.bank.filled)
    expected = [method.loss(view, index, bank) for view in method.project(views).unbind(1)]
    torch.testing.assert_close(loss, torch.stack(expected).mean())


def test_byol_follows_and_simsiam_does_not() -> None:
    views, index = torch.rand(6, 2, *SHAPE), torch.arange(6)
    for kind in (SimSiam, BYOL):
        torch.manual_seed(0)
        method = kind(SHAPE, 0.1)
        loss = method(views, None, index)
        loss.backward()
        assert -1 <= loss <= 1
        slow = [parameter for name, parameter in method.named_parameters() if name.startswith("slow")]
        assert bool(slow) == (kind is BYOL)
        assert all(parameter.grad is None for parameter in slow)


def test_deepcluster_classifies_by_the_centroids_of_all_granularities() -> None:
    torch.manual_seed(0)
    method = DeepCluster(SHAPE, 0.1, images=12, n_clusters=3)
    images, views, index = torch.rand(12, *SHAPE), torch.rand(4, 2, *SHAPE), torch.tensor([2, 0, 7, 5])
    with torch.no_grad():
        method.renew(method.projector(method.encoder(images)), seed=0)
    assert method.counts == [3, 6, 12]
    rows = torch.nn.functional.normalize(method.project(views).flatten(0, 1), dim=1)
    terms = []
    for assignments, centroids, _ in method.clusterings():
        assert assignments.min() >= 0
        logits = rows @ torch.nn.functional.normalize(centroids, dim=1).T / 0.1
        terms.append(torch.nn.functional.cross_entropy(logits, assignments[index].repeat_interleave(2)))
    torch.testing.assert_close(method(views, None, index), torch.stack(terms).mean())


def test_pcl_is_moco_until_the_first_renewal() -> None:
    torch.manual_seed(0)
    method, views, index = PCL(SHAPE, 0.1, images=12, n_clusters=3), torch.rand(4, 2, *SHAPE), torch.arange(4)
    method.queue.enqueue(torch.randn(7, 128), ids=torch.arange(7) + 20)
    method.eval()
    with torch.no_grad():
        queries, keys = method.project(views), method.keys(views)
        alone = method.loss(queries, positives=keys.flip(1), contrasts=method.queue, ids=index)
        torch.testing.assert_close(method(views, None, index), alone)
        method.renew(torch.randn(12, 128), seed=0)
        assert method(views, None, index) > 0
        assert all(concentrations.mean() == pytest.approx(0.2) for *_, concentrations in method.clusterings())


def test_scan_is_simclr_until_it_knows_the_neighbours() -> None:
    torch.manual_seed(0)
    method, views = SCAN(SHAPE, 0.1, images=12, n_clusters=3), torch.rand(4, 2, *SHAPE)
    index = torch.tensor([2, 0, 7, 5])
    torch.testing.assert_close(method(views, None, index), method.loss(method.project(views)))
    assert torch.equal(method.partners(index), index)
    rows = torch.randn(12, 128)
    rows[:8] = rows[0]  # more equal rows than are searched for
    method.renew(rows, seed=0)
    cosines = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=2).fill_diagonal_(-2)
    torch.testing.assert_close(cosines.gather(1, method.neighbours), cosines.topk(5, dim=1).values)
    assert not bool((method.neighbours == torch.arange(12)[:, None]).any())
    drawn = torch.stack([method.partners(index) for _ in range(60)])
    for column, image in zip(drawn.T, index, strict=True):
        assert set(column.tolist()) == set(method.neighbours[image].tolist())
    anchors, neighbours = (method.head(method.encoder(view)) for view in views.unbind(1))
    torch.testing.assert_close(method(views, None, index), fastcl.SCANLoss(5.0)(anchors, neighbours))


def test_scan_trains_beside_the_views_of_neighbours(npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = short(npz, tmp_path / "run", method="scan", epochs=4)
    seen = []

    def watched(images: torch.Tensor, index: np.ndarray, *rest: int) -> torch.Tensor:
        seen.append((index, *rest))
        return augment(images, index, *rest)

    monkeypatch.setattr(loop, "augment", watched)
    run.train()
    for (own, _, epoch, first), (other, _, _, second) in zip(seen[::2], seen[1::2], strict=True):
        assert (first, second) == (0, 1)
        assert np.array_equal(own, other) == (epoch < 2)
