"""Letters and digits drawn from fonts: the same each time, kept in a cache, with facts that are true."""

import string

import numpy as np
import pytest

from fastcl.train import Config, OptionError, glyphs
from fastcl.train.data import check_clusters, fingerprint, load, prepared
from fastcl.train.loop import Run
from fastcl.train.methods.clusterings import fixed_clusters
from fastcl.train.options import settle

COUNT, SIDE = 248, 12


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("FASTCL_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def drawn():
    return glyphs.glyphs(COUNT, SIDE)


def test_every_character_comes_equally_often_in_many_faces(drawn) -> None:
    assert drawn["images"].shape == (COUNT, SIDE, SIDE)
    assert drawn["images"].dtype == np.uint8
    assert sorted(drawn["labels"]) == sorted(4 * (string.digits + string.ascii_letters))
    assert len(np.unique(drawn["family"])) == 7
    assert all(0 < (drawn[name] == 1).mean() < 1 for name in ("weight", "slant"))
    assert len(np.unique(drawn["images"].reshape(COUNT, -1), axis=0)) == COUNT  # no two are alike
    ink = drawn["images"].reshape(COUNT, -1).mean(axis=1)
    assert ink[drawn["weight"] == 1].mean() > 1.1 * ink[drawn["weight"] == 0].mean()


def test_facts_are_true_of_the_characters(drawn) -> None:
    def of(name: str, characters: str) -> list[int]:
        return np.unique(drawn[name][np.isin(drawn["labels"], list(characters))]).tolist()

    assert of("case", string.digits) == [0]
    assert of("case", string.ascii_uppercase) == [1]
    assert of("case", string.ascii_lowercase) == [2]
    assert of("holes", "CEFGHIJKLMNSTUVWXYZ12357cfhijklmnrstuvwxyz") == [0]
    assert of("holes", "ADOPR69bdeopq") == [1]
    assert of("holes", "B8") == [2]
    assert of("strokes", "OIcl8") == [1]
    assert of("strokes", "EMWw") == [4]
    assert set(glyphs.CHARACTERS) == set("".join(glyphs.STROKES.values()))
    assert len("".join(glyphs.STROKES.values())) == len(glyphs.CHARACTERS)


def test_the_cache_is_used_and_a_damaged_one_is_drawn_again(drawn, cache, monkeypatch) -> None:
    (path,) = cache.iterdir()
    content = path.read_bytes()
    assert all(np.array_equal(value, drawn[name]) for name, value in glyphs.draw(COUNT, SIDE).items())
    with monkeypatch.context() as patch:
        patch.setattr(glyphs, "draw", lambda *_: pytest.fail("drawn again"))
        assert np.array_equal(glyphs.glyphs(COUNT, SIDE)["images"], drawn["images"])
    path.write_bytes(content[:1000])
    monkeypatch.setattr(glyphs, "draw", lambda *_: drawn)
    assert np.array_equal(glyphs.glyphs(COUNT, SIDE)["images"], drawn["images"])
    with np.load(path) as stored:
        assert np.array_equal(stored["images"], drawn["images"])
    assert [entry.name for entry in cache.iterdir()] == [path.name]
    monkeypatch.setenv("FASTCL_CACHE", f"{__file__}/below")  # no folder can be made there
    assert np.array_equal(glyphs.glyphs(COUNT, SIDE)["holes"], drawn["holes"])


def test_where_the_cache_is(monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("FASTCL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert glyphs.cache() == tmp_path / "fastcl"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    assert glyphs.cache() == tmp_path / "home" / ".cache" / "fastcl"


def test_fonts_that_are_missing_are_named(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(glyphs.matplotlib, "get_data_path", lambda: str(tmp_path))
    with pytest.raises(OptionError, match=r"--data glyphs needs the fonts that matplotlib ships; .*DejaVuSans\.ttf"):
        glyphs.draw(1, 8)


def test_splits_and_long_tails_keep_the_facts_of_their_images(drawn) -> None:
    config = settle(Config(data="glyphs", glyphs=COUNT, side=SIDE))
    whole, thin = prepared(config), prepared(settle(Config(data="glyphs", glyphs=COUNT, side=SIDE, long_tail=3.0)))
    assert len(whole.test_labels) == round(0.3 * COUNT) + 1
    assert len(whole.classes) == 62
    assert len(thin.train_labels) < len(whole.train_labels)
    for images in (whole, thin):
        assert np.array_equal(images.train_images[:, 0].numpy(), drawn["images"][images.source_index])
        assert all(np.array_equal(values, drawn[n][images.source_index]) for n, values in images.facts.items())
    before = fingerprint(whole)
    whole.facts["holes"][0] += 1
    assert fingerprint(whole) != before


def test_clusters_of_facts() -> None:
    images = load("glyphs", None, 0, COUNT, SIDE)
    facts = images.facts
    both = fixed_clusters("weight+slant", images)
    assert len(np.unique(both)) == 4
    assert len(np.unique(np.stack([both, facts["weight"], facts["slant"]]), axis=1).T) == 4
    assert np.array_equal(fixed_clusters("attributes", images), fixed_clusters("case+holes+strokes", images))
    tags = fixed_clusters("tags", images)
    assert tags.sum(axis=1).tolist() == [len(facts)] * len(tags)
    share = (tags[0] & tags[1]).sum()
    assert share == sum(values[0] == values[1] for values in facts.values())


def test_labels_made_worse() -> None:
    images, other = (load("digits", None, seed) for seed in (0, 1))
    labels = images.train_labels
    merged, split, noisy = (fixed_clusters(option, images) for option in ("merged5", "split3", "noisy40"))
    assert [len(np.unique(labels[merged == cluster])) for cluster in np.unique(merged)] == [5, 5]
    assert [len(np.unique(split[labels == label])) for label in range(10)] == [3] * 10
    assert np.array_equal(split // 3, labels)
    assert 0.58 < (noisy == labels).mean() < 0.7  # a tenth of those drawn anew stay
    assert set(noisy) == set(range(10))
    # An image has the same cluster in every split.
    both = np.intersect1d(images.source_index, other.source_index, return_indices=True)[1:]
    for option, clusters in (("split3", split), ("noisy40", noisy)):
        assert np.array_equal(clusters[both[0]], fixed_clusters(option, other)[both[1]])


@pytest.mark.parametrize("option", ["noisy101", "split0", "merged", "split4.csv", "holes+colour"])
def test_names_that_are_no_clusters_are_refused(option) -> None:
    with pytest.raises(OptionError, match="--clusters must be"):
        check_clusters(option, "glyphs")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"clusters": "holes", "method": "clinfonce"},
            "--clusters holes is known of --data glyphs only; got --data di",
        ),
        ({"glyphs": 100}, "--glyphs goes with --data glyphs; got --data digits"),
        ({"side": 16}, "--side goes with --data glyphs; got --data digits"),
        ({"data": "glyphs", "root": "."}, "--root goes with --data cifar10, cifar100 or imagefolder"),
    ],
)
def test_options_that_do_not_go_together(given, message) -> None:
    with pytest.raises(OptionError, match=message):
        settle(Config(**given))


def test_a_run_on_glyphs_has_their_defaults_and_resumes(tmp_path) -> None:
    assert (settle(Config(data="glyphs")).glyphs, settle(Config(data="glyphs")).side) == (6200, 28)
    config = settle(
        Config(method="clinfonce", clusters="tags", data="glyphs", glyphs=COUNT, side=SIDE, epochs=1, batch_size=64)
    )
    run = Run(config, tmp_path / "run", False)
    run.train()
    assert len(Run(config, tmp_path / "run", True).history) == 1
