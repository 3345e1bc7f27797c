"""sentence-transformers: losses of the example, equal to the package's, alone and in its Trainer."""

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.support.integrations import ROOT, example, gradients, package, same_training

st = package("sentence_transformers")
package("datasets")
transformers = package("transformers")
losses = package("sentence_transformers.sentence_transformer.losses")
modules = package("sentence_transformers.sentence_transformer.modules")
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs

WORDS = [f"w{k}" for k in range(30)]


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> nn.Module:
    """A small BERT from a configuration, with a vocabulary of its own."""
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=35, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        hidden_dropout_prob=0, attention_probs_dropout_prob=0,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    rows = modules.Transformer(str(folder))
    return st.SentenceTransformer(modules=[rows, modules.Pooling(16)], device="cpu").double()


def columns(model: nn.Module, count: int, n: int = 7) -> list[dict[str, torch.Tensor]]:
    """An anchor, a positive and count - 2 negatives for each of n."""
    g = torch.Generator().manual_seed(count)
    drawn = torch.randint(0, len(WORDS), (count, n, 5), generator=g)
    return [model.tokenize([" ".join(WORDS[k] for k in text) for text in column]) for column in drawn.tolist()]


def agree(model: nn.Module, ours: nn.Module, theirs: nn.Module, count: int) -> None:
    found, expected = (gradients(loss(columns(model, count), None), model) for loss in (ours, theirs))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_in_batch_and_mined_negatives(bert, count) -> None:
    ranking = example("with_sentence_transformers").RankingLoss
    agree(bert, ranking(bert), losses.MultipleNegativesRankingLoss(bert), count)
    agree(bert, ranking(bert, scale=7.0), losses.MultipleNegativesRankingLoss(bert, scale=7.0), count)


def test_inner_products(bert) -> None:
    ours = example("with_sentence_transformers").RankingLoss(bert, scale=1.0, normalize=False)
    theirs = losses.MultipleNegativesRankingLoss(bert, scale=1.0, similarity_fct=st.util.dot_score)
    agree(bert, ours, theirs, 3)


@pytest.mark.parametrize("count", [2, 3])
def test_both_directions(bert, count) -> None:
    options = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    ours = example("with_sentence_transformers").RankingLoss(bert, symmetric=True)
    agree(bert, ours, losses.MultipleNegativesRankingLoss(bert, **options), count)
    if count == 2:
        agree(bert, ours, losses.MultipleNegativesSymmetricRankingLoss(bert), count)


def test_inside_their_matryoshka_loss(bert) -> None:
    def dims(inner: nn.Module) -> nn.Module:
        return losses.MatryoshkaLoss(bert, inner, matryoshka_dims=[16, 8, 4])

    ours = dims(example("with_sentence_transformers").RankingLoss(bert))
    agree(bert, ours, dims(losses.MultipleNegativesRankingLoss(bert)), 3)


def test_their_cached_loss_has_our_value(bert) -> None:
    ours = example("with_sentence_transformers").RankingLoss(bert)
    agree(bert, ours, losses.CachedMultipleNegativesRankingLoss(bert, mini_batch_size=3), 3)


def of_page(name: str) -> type[nn.Module]:
    """A class of docs/integrations/sentence-transformers.md."""
    page = (ROOT / "docs" / "integrations" / "sentence-transformers.md").read_text(encoding="utf-8")
    scope: dict = {"__name__": "page"}
    exec("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)), scope)
    return scope[name]


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("size", [2, 100])
def test_chunks(bert, count, size) -> None:
    theirs = losses.CachedMultipleNegativesRankingLoss(bert, mini_batch_size=3)
    agree(bert, of_page("CachedRankingLoss")(bert, chunk_size=size), theirs, count)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("options", [{}, {"margin": 0.05}, {"margin": 0.05, "rule": "relative"}])
def test_guide(bert, count, options) -> None:
    guide = copy.deepcopy(bert)
    for parameter in guide.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    named = {"margin_strategy" if name == "rule" else name: value for name, value in options.items()}
    theirs = losses.GISTEmbedLoss(bert, guide, temperature=0.05, **named)
    agree(bert, of_page("GuidedLoss")(bert, guide, 0.05, **options), theirs, count)


@pytest.mark.parametrize("symmetric", [False, True])
def test_their_trainer(tmp_path: Path, symmetric) -> None:
    run = example("with_sentence_transformers").main
    options = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"} if symmetric else {}
    theirs = run(str(tmp_path / "theirs"), losses.MultipleNegativesRankingLoss, **options)
    same_training(run(str(tmp_path / "ours"), symmetric=symmetric), theirs, 1e-4)
