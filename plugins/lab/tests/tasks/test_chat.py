"""Conversations: only what the assistant says is learned and scored."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from peftcore.errors import BadInput
from peftcore_lab.runs.reading import read
from peftcore_lab.runs.run import Run
from peftcore_lab.tasks.chat import ChatData
from peftcore_lab.tasks.task_catalogue import find


def test_only_answers_are_learned(talker: Path, chats: Path) -> None:
    run = read(Run, {}, [("model", str(talker)), ("task", "chat"), ("data.train", str(chats)), ("method", "lora")])
    prepared = find("chat").prepare(run, ChatData(train=str(chats)))
    tokenizer = transformers.AutoTokenizer.from_pretrained(talker)
    for row in prepared.train[:5]:
        learned = [token for token in row["labels"] if token != -100]
        assert tokenizer.decode(learned).split() in ([word, "[SEP]"] for word in ("fine", "lovely", "awful"))
        assert [label for label in row["labels"] if label != -100] == row["input_ids"][-len(learned) :]


def test_a_file_may_be_both_parts(talker: Path, chats: Path) -> None:
    given = [("model", str(talker)), ("task", "chat"), ("data.train", str(chats)), ("method", "lora")]
    prepared = find("chat").prepare(read(Run, {}, given), ChatData(train=str(chats), held_out=str(chats)))
    assert prepared.train == prepared.held_out and len(prepared.train) == 24


def test_templates(decoder: Path, talker: Path, chats: Path, tmp_path: Path) -> None:
    """That of a file, or ChatML, in place of the tokenizer's; without any it is said what to do."""
    path = tmp_path / "short.jinja"
    path.write_text("{% for m in messages %}{{ m.content }} [SEP] {% endfor %}", encoding="utf-8")

    def texts(model: Path, **options: Any) -> list[str]:
        given = [("model", str(model)), ("task", "chat"), ("data.train", str(chats)), ("method", "lora")]
        prepared = find("chat").prepare(read(Run, {}, given), ChatData(train=str(chats), **options))
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        return [tokenizer.decode(row["input_ids"]) for row in prepared.train]

    assert all(
        text.count("[SEP]") == 2 and not text.startswith("u ") for text in texts(talker, chat_template=str(path))
    )
    assert all("assistant" in text or "[UNK]" in text for text in texts(decoder, chat_template="chatml"))
    with pytest.raises(BadInput, match=r"no chat template; set data\.chat_template to chatml"):
        texts(decoder)
    with pytest.raises(BadInput, match=r"nowhere\.jinja cannot be read"):
        texts(decoder, chat_template="nowhere.jinja")


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
