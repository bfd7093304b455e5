"""The loss of one adapter, of its own rows."""

from typing import Any

import pytest
import torch
import transformers
from fleet_toys import llama, texts
from torch import nn

from peftcore.errors import TrainingError
from peftcore.fleets.losses import counted, kind_of, loss_of, numbers, shares

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}


def models() -> dict[str, Any]:
    torch.manual_seed(0)
    bert = transformers.BertConfig(**SIZES, num_labels=3)
    vit = transformers.ViTConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                                 image_size=4, patch_size=2, num_channels=1, num_labels=3)  # fmt: skip
    ids = torch.randint(0, 50, (4, 5))
    spans = torch.where(torch.rand(4, 5) < 0.4, -100, ids % 3)
    return {
        "causal": (llama(), {"input_ids": ids, "labels": torch.where(spans < 0, -100, ids)}),
        "masked": (transformers.BertForMaskedLM(bert), {"input_ids": ids, "labels": torch.where(spans < 0, -100, ids)}),
        "sequence": (transformers.BertForSequenceClassification(bert), {"input_ids": ids, "labels": ids[:, 0] % 3}),
        "token": (transformers.BertForTokenClassification(bert), {"input_ids": ids, "labels": spans}),
        "image": (
            transformers.ViTForImageClassification(vit),
            {"pixel_values": torch.rand(4, 1, 4, 4), "labels": ids[:, 0] % 3},
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["causal", "masked", "sequence", "token", "image"])
def test_it_is_the_one_that_the_model_computes(name: str) -> None:
    model, batch = models()[name]
    model.eval()
    loss = loss_of(model)
    for rows in (slice(0, 4), slice(1, 3)):
        own = {key: each[rows] for key, each in batch.items()}
        inputs = {key: each for key, each in own.items() if key != "labels"}
        torch.testing.assert_close(loss(model(**inputs), own), model(**own).loss, rtol=1e-5, atol=1e-6)
    with pytest.raises(TrainingError, match="labels"):
        loss(model(**inputs), inputs)


def test_other_models_say_themselves() -> None:
    """T5's loss is one that transformers lists under a name by which it would be computed otherwise."""
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=16, d_ff=32, num_layers=1, num_heads=2, d_kv=8, vocab_size=50)
    )
    for model in (t5, nn.Linear(2, 2)):
        assert kind_of(model) is None
        with pytest.raises(TrainingError, match="loss=lambda output, batch"):
            loss_of(model)


def test_what_a_loss_is_the_mean_over() -> None:
    labels = torch.tensor([[1, 2, -100], [-100, 4, 5]])
    assert counted({"labels": labels}, 2, shifted=False) == 4
    assert counted({"labels": labels}, 2, shifted=True) == 3
    assert counted({"labels": labels[:, 0]}, 2, shifted=True) == 2
    assert counted({"labels": labels.float()}, 2, shifted=False) == 2
    assert counted({}, 7, shifted=True) == 7


def test_shares_of_a_step() -> None:
    assert shares([3, 1], True) == [0.75, 0.25]
    assert shares([3, 1], False) == shares([0, 0], True) == [0.5, 0.5]
    assert numbers([torch.tensor(2.0, requires_grad=True), torch.tensor(3.0)]) == [2.0, 3.0] and numbers([]) == []
    assert texts(1)[0].keys() == {"input_ids", "attention_mask", "labels"}
