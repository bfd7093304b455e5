"""Losses of outputs that are no rows by themselves: each member's is the one that it has alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers
from fleet_toys import llama, next_token, texts
from torch import Tensor, nn

import peftcore
from peftcore.errors import TrainingError
from peftcore.testing.kit import fill
from peftcore.training import Fleet

PART = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
ROWS, TOKENS = 3, 6
"""Two members have as many rows together as there are tokens."""


def clip() -> Any:
    torch.manual_seed(0)
    words = {**PART, "vocab_size": 40, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
    config = transformers.CLIPConfig(
        text_config=words, vision_config={**PART, "image_size": 16, "patch_size": 8}, projection_dim=16
    )
    return transformers.CLIPModel(config).double().eval()


def pairs(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 40, (ROWS, TOKENS), generator=generator)
    return {"input_ids": ids, "pixel_values": torch.randn(ROWS, 3, 16, 16, generator=generator).double()}


def contrastive(output: Any, batch: Mapping[str, Any]) -> Tensor:
    own = torch.arange(len(batch["input_ids"]))
    ways = (output["logits_per_text"], output["logits_per_image"])
    return sum((nn.functional.cross_entropy(each, own) for each in ways), torch.zeros(()))


def joined(model: Any, name: str, data: Any, loss: Any, **options: Any) -> peftcore.Injection:
    with peftcore.activate(model):
        injection = peftcore.apply(model, "lora", name=name, target="all-linear")
    fill(injection, sum(map(ord, name)))
    injection.trainable(True)
    optimizer = injection.optimizer(torch.optim.SGD, lr=0.0)
    options["fleet"].join(injection, data, optimizer=optimizer, loss=loss, steps=2)
    return injection


@pytest.mark.parametrize("training", [False, True])
def test_a_contrastive_loss_is_of_own_rows_with_own_rows(training: bool) -> None:
    model = clip().train(training)
    fleet = Fleet(model)
    data = {name: pairs(seed) for seed, name in enumerate("ab")}
    for name, batch in data.items():
        joined(model, name, [batch], contrastive, fleet=fleet)
    before = torch.get_rng_state()
    fleet.step()
    assert torch.equal(torch.get_rng_state(), before), "learning what has rows draws nothing"
    for name, batch in data.items():
        with peftcore.activate(model, name):
            assert fleet.members[name].loss == pytest.approx(contrastive(model(**batch), batch).item(), rel=1e-9)


def test_what_is_as_long_as_the_batch_and_has_no_rows_is_not_cut() -> None:
    class Scored(nn.Module):
        """Gives weights of its tokens too, as many as there are rows."""

        def __init__(self) -> None:
            super().__init__()
            self.layer, self.weights = nn.Linear(4, 5), nn.Parameter(torch.rand(6), requires_grad=False)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"scores": self.layer(x), "weights": self.weights}

    torch.manual_seed(0)
    model = Scored().requires_grad_(False)
    fleet = Fleet(model)
    data = {name: {"x": torch.randn(3, 6, 4)} for name in "ab"}

    def loss(output: Any, batch: Mapping[str, Any]) -> Tensor:
        return (output["scores"].square().mean(-1) @ output["weights"]).mean()

    for name, batch in data.items():
        joined(model, name, [batch], loss, fleet=fleet)
    fleet.step()
    for name, batch in data.items():
        with peftcore.activate(model, name):
            assert fleet.members[name].loss == pytest.approx(loss(model(**batch), batch).item(), rel=1e-5)


def test_an_output_that_cannot_be_cut_is_named_when_a_loss_reads_it() -> None:
    model = llama()
    fleet = Fleet(model)

    def loss(output: Any, batch: Mapping[str, Any]) -> Tensor:
        return next_token(output, batch) + output["cache"].layers[0].keys.mean()

    model.config.use_cache = True
    for seed, name in enumerate("ab"):
        joined(model, name, texts(seed), loss, fleet=fleet)
    with pytest.raises(TrainingError, match="reads cache of the model's output, which is a DynamicCache"):
        fleet.step()


@pytest.mark.parametrize("reentrant", [True, False])
def test_learning_is_no_forward_that_backward_repeats(reentrant: bool) -> None:
    model = llama().train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    fleet = Fleet(model)
    for seed, name in enumerate("ab"):
        joined(model, name, texts(seed), next_token, fleet=fleet)
    fleet.step()
    assert all(member.step == 1 for member in fleet)
