"""The trainer's --clusters tags."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fastcl import ClusterInfoNCE
from fastcl.train import Config, OptionError, loop
from fastcl.train.__main__ import settle
from fastcl.train.data import attribute_tags, attributes
from fastcl.train.evaluate import cluster_information
from fastcl.train.loop import Run
from fastcl.train.methods.clusterings import cluster_ids
from fastcl.train.methods.contrastive import ClInfoNCE, MoCo
from tests.support.strategies import generator
from tests.support.training import weights

SHAPE = torch.Size((1, 8, 8))


@pytest.mark.parametrize("channels", [1, 3])
def test_each_value_of_a_fact_is_a_tag(channels: int) -> None:
    images = torch.rand(40, channels, 8, 8, generator=generator(0))
    tags, ids = attribute_tags(images), attributes(images)
    assert tags.shape == (40, 9)
    values = np.stack(np.unravel_index(ids, (3, 3, 3)), axis=1)
    for fact in range(3):
        assert np.array_equal(tags[:, 3 * fact : 3 * fact + 3].argmax(1), values[:, fact])
    assert (tags.sum(1) == 3).all()
    labels = np.arange(40) % 4
    assert cluster_information(labels, cluster_ids(tags)) == pytest.approx(cluster_information(labels, ids))


def test_sets_of_tags_are_clusters() -> None:
    tags = np.array([[1, 0], [0, 0], [1, 1], [1, 0]], dtype=bool)
    ids = cluster_ids(tags)
    assert ids[1] == -1
    assert ids[0] == ids[3] != ids[2] >= 0


def batch() -> tuple[Tensor, Tensor, Tensor]:
    g = generator(1)
    return torch.rand(6, 2, *SHAPE, generator=g), torch.rand(6, 9, generator=g) < 0.3, torch.arange(6)


def test_positives_of_a_view_share_a_tag() -> None:
    torch.manual_seed(0)
    views, tags, index = batch()
    method = ClInfoNCE(SHAPE, 0.2)
    loss = method(views, tags, index)
    z = torch.nn.functional.normalize(method.project(views).flatten(0, 1).double(), dim=1)
    sample, wide = index.repeat_interleave(2), tags.repeat_interleave(2, 0)
    others = ~torch.eye(12, dtype=torch.bool)
    positive = ((wide[:, None] & wide).any(-1) | (sample[:, None] == sample)) & others
    logits = (z @ z.T / 0.2).masked_fill(~others, -torch.inf)
    terms = logits.logsumexp(1) - torch.where(positive, logits, 0).sum(1) / positive.sum(1)
    torch.testing.assert_close(loss.double(), terms.mean(), rtol=1e-5, atol=1e-6)


def test_the_queue_of_moco_stores_tags() -> None:
    torch.manual_seed(0)
    views, tags, index = batch()
    method = MoCo(SHAPE, 0.2, tags=9)
    for step in range(2):
        method(views, tags.roll(step, 1), index + 6 * step).backward()
    queue = method.queue
    assert torch.equal(queue.clusters, torch.cat((tags, tags.roll(1, 1))).repeat_interleave(2, 0))
    stored, of_stored, ids = queue.embeddings, queue.clusters, queue.ids
    method.eval()
    loss = method(views, tags, index + 3)  # half of the images have their own keys in the queue
    with torch.no_grad():
        queries, keys = method.project(views), method.keys(views).flip(1)
    expected = ClusterInfoNCE(0.2)(
        queries, tags, positives=keys, contrasts=stored, contrast_clusters=of_stored, ids=index + 3, contrast_ids=ids
    )
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("method", ["clinfonce", "moco"])
def test_a_run_with_tags_learns_and_resumes(method: str, npz, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(loop, "knn_accuracy", lambda *_: 0.5)

    def run(name: str) -> Run:
        folder = tmp_path / name
        config = Config(method=method, clusters="tags", data=str(npz), epochs=3, batch_size=40)
        return Run(settle(config), folder, (folder / "checkpoint.pt").exists())

    whole, part = run("whole"), run("part")
    whole.train()
    losses = [line["loss"] for line in whole.history]
    assert np.isfinite(losses).all()
    if method == "clinfonce":  # moco's rises while its queue fills
        assert losses[-1] < losses[0]
    epoch = part._epoch
    part._epoch = lambda number, bar: epoch(number, bar) if number < 1 else pytest.fail("interrupted")
    with pytest.raises(pytest.fail.Exception, match="interrupted"):
        part.train()
    run("part").train()
    found, resumed = (weights(tmp_path / name) for name in ("whole", "part"))
    assert ("queue.tag_words" in found) == (method == "moco")
    for name, value in found.items():
        assert torch.equal(value, resumed[name]), name
    ids = whole.last_clusters()
    assert 2 <= len(np.unique(ids)) <= 27


@pytest.mark.parametrize(
    ("method", "clusters", "message"),
    [
        ("cluster-ce", "tags", "--clusters tags needs --method clinfonce or moco; got --method cluster-ce"),
        ("supcon", "tags", "--clusters tags needs --method clinfonce or moco; got --method supcon"),
        ("swav", "tags", "--clusters tags needs --method clinfonce or moco; got --method swav"),
        ("moco", "labels", "--clusters must be tags with --method moco; got labels"),
    ],
)
def test_methods_without_tags_say_so(method: str, clusters: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        settle(Config(method=method, clusters=clusters))
