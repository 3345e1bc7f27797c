"""The trainer's methods with clusters: SupCon, prediction of clusters by cross-entropy, Sinkhorn's soft clusters."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastcl.train import Config, OptionError, loop
from fastcl.train.__main__ import main, settle
from fastcl.train.loop import Run
from fastcl.train.methods import clusterings
from fastcl.train.methods.clusterings import renumbered
from fastcl.train.methods.contrastive import ClusterPrediction
from fastcl.train.methods.prototypes import SinkhornClInfoNCE
from tests.support.training import options, weights

SHAPE = torch.Size((1, 8, 8))


def short(npz, folder, **given) -> Run:
    config = {"data": str(npz), "epochs": 2, "batch_size": 40, "n_clusters": 5, "renew": 1, **given}
    return Run(settle(Config(**config)), folder, (folder / "checkpoint.pt").exists())


def test_supcon_is_clinfonce_with_the_labels_for_clusters(npz, tmp_path) -> None:
    runs = [short(npz, tmp_path / "one", method="supcon")]
    runs.append(short(npz, tmp_path / "two", method="clinfonce", clusters="labels"))
    for run in runs:
        run.train()
    assert runs[0].config.clusters == "labels"
    for name, value in runs[0].method.state_dict().items():
        assert torch.equal(value, runs[1].method.state_dict()[name]), name


def test_cluster_prediction_is_cross_entropy_on_features() -> None:
    torch.manual_seed(0)
    method = ClusterPrediction(SHAPE, 0.1, classes=4)
    views, clusters = torch.rand(6, 2, *SHAPE), torch.tensor([3, -1, 0, 1, -1, 3])
    loss = method(views, clusters, torch.arange(6))
    loss.backward()
    known = clusters >= 0
    (linear,) = method.projector
    terms = []
    for view in views[known].unbind(1):
        logits = method.encoder(view).double() @ linear.weight.double().T + linear.bias.double()
        terms.append(-logits.log_softmax(1).gather(1, clusters[known][:, None]))
    torch.testing.assert_close(loss.double(), torch.cat(terms).mean(), rtol=1e-5, atol=1e-6)
    assert all(parameter.grad is not None for parameter in method.parameters())


def test_cluster_prediction_without_a_cluster_in_the_batch() -> None:
    method = ClusterPrediction(SHAPE, 0.1, classes=4)
    loss = method(torch.rand(3, 2, *SHAPE), torch.full((3,), -1), torch.arange(3))
    loss.backward()
    assert loss.item() == 0
    assert all(not parameter.grad.any() for parameter in method.parameters())


@pytest.mark.parametrize(("clusters", "classes"), [("kmeans", 5), ("attributes", None), ("labels", 10)])
def test_a_classifier_has_a_class_for_each_cluster(npz, tmp_path, clusters, classes) -> None:
    run = short(npz, tmp_path / "run", method="cluster-ce", clusters=clusters)
    run.train()
    classes = classes or 1 + run.clusters.max()
    assert run.method.projector[0].weight.shape[0] == classes
    assert set(run.last_clusters()) <= set(range(classes))


def test_a_classifier_begins_with_clusters_of_the_untrained_encoder(npz, tmp_path, monkeypatch) -> None:
    fitted = []
    kmeans = clusterings.kmeans
    monkeypatch.setattr(loop, "kmeans", lambda rows, count, seed: fitted.append(rows) or kmeans(rows, count, seed))
    run = short(npz, tmp_path / "run", method="cluster-ce", epochs=4, renew=3)
    untrained = run.representation("untrained").train
    run.train()
    assert len(fitted) == 2
    np.testing.assert_array_equal(fitted[0], untrained)


def test_a_resumed_classifier_keeps_its_classes(npz, tmp_path) -> None:
    short(npz, tmp_path / "whole", method="cluster-ce", epochs=3).train()
    part = short(npz, tmp_path / "part", method="cluster-ce", epochs=3)
    epoch = part._epoch
    part._epoch = lambda number, bar: epoch(number, bar) if number < 2 else pytest.fail("interrupted")
    with pytest.raises(pytest.fail.Exception, match="interrupted"):
        part.train()
    short(npz, tmp_path / "part", method="cluster-ce", epochs=3).train()
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(tmp_path / "part")[name]), name


def test_renumbered_clusters_keep_their_numbers_and_their_images() -> None:
    g = np.random.default_rng(0)
    before = g.integers(0, 6, 200)
    shuffled = g.permutation(6)[before]
    assert np.array_equal(renumbered(shuffled, before), before)
    changed = np.where(g.random(200) < 0.2, g.integers(0, 6, 200), shuffled)
    after = renumbered(changed, before)
    assert (after == before).mean() > 0.75
    assert len(np.unique(np.stack([after, changed]), axis=1).T) == len(np.unique(changed))  # the same partition
    fewer = renumbered(np.minimum(before, 3), before)
    assert np.array_equal(fewer[before < 3], before[before < 3])
    assert len(np.unique(renumbered(before, np.zeros(200, dtype=np.int64)))) == 6


def test_sinkhorn_clusters_are_the_soft_formula() -> None:
    """Rows of all views against each other, each pair as positive as its assignments overlap; all in float64."""
    torch.manual_seed(0)
    method = SinkhornClInfoNCE(SHAPE, 0.2, torch.tensor([0.5, 0.25, 0.25]))
    views = torch.rand(7, 2, *SHAPE)
    loss = method(views, None, torch.arange(7))
    loss.backward()
    own = method.prototypes.grad
    rows = method.project(views).detach().double().requires_grad_()
    prototypes = method.prototypes.detach().double().requires_grad_()
    units = F.normalize(rows, dim=-1)
    scores = (units @ F.normalize(prototypes, dim=1).T).mean(1)
    f = torch.zeros(7, 1, dtype=torch.float64)
    for _ in range(3):
        g = 0.05 * (method.masses.double().log() - ((scores + f) / 0.05).logsumexp(0))
        f = 0.05 * (-np.log(7) - ((scores + g) / 0.05).logsumexp(1, keepdim=True))
    assignments = ((scores + g) / 0.05).softmax(1).repeat_interleave(2, 0)
    logits = units.flatten(0, 1) @ units.flatten(0, 1).T / 0.2
    self_ = torch.eye(14, dtype=torch.bool)
    weight = (assignments @ assignments.T).masked_fill(self_, 0)
    expected = (logits.masked_fill(self_, -torch.inf).logsumexp(1) - (weight * logits).sum(1) / weight.sum(1)).mean()
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(own.double(), prototypes.grad, rtol=1e-3, atol=1e-5)
    assert all(parameter.grad is not None for parameter in method.parameters())


def test_a_run_with_sinkhorn_clusters_tells_of_its_prototypes(npz, tmp_path, capsys) -> None:
    assert main([*options(npz, tmp_path / "run", 2), "--method", "clinfonce", "--clusters", "sinkhorn"]) == 0
    assert "prototypes, prior uniform" in capsys.readouterr().out
    assert (tmp_path / "run" / "prototypes.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "supcon", "clusters": "kmeans"}, "--method supcon has the labels for clusters; got"),
        ({"method": "cluster-ce", "clusters": "sinkhorn"}, "--clusters sinkhorn needs --method clinfonce"),
        ({"method": "simclr", "clusters": "sinkhorn"}, "--clusters needs a method that uses them"),
        ({"method": "clinfonce", "prior": "uniform"}, "--prior needs a method with prototypes: swav, msn, pmsn, dino"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(given, message) -> None:
    with pytest.raises(OptionError, match=message):
        settle(Config(**given))


def test_a_classifier_needs_clusters(npz, tmp_path) -> None:
    (tmp_path / "c.csv").write_text("id\n" + "-1\n" * 150)
    with pytest.raises(OptionError, match="--clusters must give --method cluster-ce a cluster"):
        short(npz, tmp_path / "run", method="cluster-ce", clusters=f"{tmp_path / 'c.csv'}:id")
    assert not (tmp_path / "run").exists()
