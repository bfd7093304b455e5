"""Embeddings of sentences with the Trainer of sentence-transformers."""

import sys
from pathlib import Path

import transformers
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import nn

import peftcore
import small


def main(out: Path) -> tuple[nn.Module, list[float]]:
    transformers.set_seed(0)
    model = SentenceTransformer(small.save_encoder(str(out / "base")), device="cpu")
    adapter = peftcore.apply(model, "lora", target="all-linear")
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(out / "run"),
        num_train_epochs=6,
        per_device_train_batch_size=8,
        batch_sampler="no_duplicates",
        learning_rate=5e-3,
        save_strategy="no",
        logging_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict(small.pairs()),
        loss=MultipleNegativesRankingLoss(model),
    )
    trainer.train()
    adapter.save(out / "model")
    return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    print(main(Path(sys.argv[1]))[1][-1])
