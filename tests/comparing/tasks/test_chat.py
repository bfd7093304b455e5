"""Conversations: only what the assistant says is learned and scored."""

import math
from pathlib import Path

import pytest
import torch
import transformers

from peftcore.comparing.runs.reading import read
from peftcore.comparing.runs.run import Run
from peftcore.comparing.tasks.catalogue import find
from peftcore.comparing.tasks.chat import ChatData


def test_only_answers_are_learned(talker: Path, chats: Path) -> None:
    run = read(Run, {}, [("model", str(talker)), ("task", "chat"), ("data.train", str(chats)), ("method", "lora")])
    prepared = find("chat").prepare(run, ChatData(train=str(chats)))
    tokenizer = transformers.AutoTokenizer.from_pretrained(talker)
    for row in prepared.train[:5]:
        learned = [token for token in row["labels"] if token != -100]
        assert tokenizer.decode(learned).split() in ([word, "[SEP]"] for word in ("fine", "lovely", "awful"))
        assert [label for label in row["labels"] if label != -100] == row["input_ids"][-len(learned) :]


def test_perplexity_weighs_tokens_not_batches(talker: Path, chats: Path) -> None:
    """The cost of each token a second time, in float64, one row at a time."""
    run = read(Run, {}, [("model", str(talker)), ("task", "chat"), ("data.train", str(chats)), ("method", "lora")])
    prepared = find("chat").prepare(run, ChatData(train=str(chats)))
    model = prepared.model.double().eval()
    costs = []
    for row in prepared.held_out:
        scores = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(-1)
        costs += [-scores[i, label].item() for i, label in enumerate(row["labels"][1:]) if label != -100]
    batch = prepared.collate(prepared.held_out)
    with torch.no_grad():
        reduced = prepared.reduce(model(**batch).logits, batch["labels"])
    found = prepared.metrics(transformers.EvalPrediction(reduced.numpy(), batch["labels"].numpy()))
    assert found["perplexity"] == pytest.approx(math.exp(sum(costs) / len(costs)), rel=1e-6)
