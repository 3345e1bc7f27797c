"""Losses for sentence-transformers' Trainer: in-batch and mined negatives, one or both directions."""

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers

import fastcl


class RankingLoss(torch.nn.Module):
    """MultipleNegativesRankingLoss. Columns: anchor, positive and any number of negatives."""

    def __init__(self, model: SentenceTransformer, scale: float = 20.0, symmetric: bool = False, **options) -> None:
        super().__init__()
        self.model = model
        self.criterion = fastcl.ClusterInfoNCE(1 / scale, symmetric=symmetric, **options)  # gather=True: all devices

    def forward(self, sentence_features: list[dict[str, torch.Tensor]], labels: torch.Tensor | None) -> torch.Tensor:
        queries, *documents = (self.model(column)["sentence_embedding"] for column in sentence_features)
        # Document i belongs to query i. Those of further columns are negatives of every query.
        return self.criterion(queries, contrasts=torch.cat(documents))


def model_and_data() -> tuple[SentenceTransformer, Dataset]:
    torch.manual_seed(0)
    pairs = {"france": "paris", "germany": "berlin", "spain": "madrid"}
    columns = {
        "anchor": [f"what is the capital of {country}" for country in pairs],
        "positive": [f"it is {city}" for city in pairs.values()],
        "negative": [f"it lies on {city}" for city in reversed(pairs.values())],
    }
    words = sorted({word for texts in columns.values() for text in texts for word in text.split()})
    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate([*words, "?"])}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=16)], device="cpu")
    return model, Dataset.from_dict({name: texts * 8 for name, texts in columns.items()})


def main(out: str = "runs/with_sentence_transformers", make=RankingLoss, **options) -> SentenceTransformer:
    model, data = model_and_data()
    settings = {"num_train_epochs": 2, "learning_rate": 0.05, "logging_steps": 4, "use_cpu": True, "report_to": "none"}
    arguments = SentenceTransformerTrainingArguments(
        out, per_device_train_batch_size=6, save_strategy="no", disable_tqdm=True, **settings
    )
    loss = make(model, **options)
    SentenceTransformerTrainer(model=model, args=arguments, train_dataset=data, loss=loss).train()
    return model


if __name__ == "__main__":
    main()
