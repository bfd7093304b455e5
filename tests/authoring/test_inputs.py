"""What a look at data sees: vectors of called linear layers, without padding and without positions that no loss
counts."""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

import peftcore
from peftcore.author import Surgeon, sees_vectors, watched_inputs
from peftcore.errors import TargetError


class Tagger(nn.Module):
    """Embeds ids, and maps them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.second = nn.Embedding(10, 4), nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Any:
        return self.second(self.first(self.embed(ids)).mean(1))


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])
MASK = torch.tensor([[1, 1, 0], [0, 1, 1]])
LABELS = torch.tensor([[-100, 7, 7], [7, -100, 7]])


def seen(labelled: bool, **given: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model, found = Tagger(), {}
    names = {model.first: "first", model.second: "second"}

    def look(module: nn.Module, whole: Tensor, vectors: Tensor) -> None:
        found[names[module]] = vectors
        assert whole.shape[-1] == vectors.shape[-1] and not vectors.requires_grad

    with watched_inputs(model, names, look, labelled):
        model(IDS, **given)
    kept = {**found, "table": model.embed.weight.detach()}
    model(IDS + 1)  # nothing is shown any more
    assert all(found[name] is kept[name] for name in found)
    return kept


def test_padding_and_what_no_loss_counts_are_left_out() -> None:
    for given, labels, ids in (
        ({}, False, [1, 2, 3, 4, 5, 6]),
        ({"attention_mask": MASK}, False, [1, 2, 5, 6]),
        ({"attention_mask": MASK, "labels": LABELS}, False, [1, 2, 5, 6]),
        ({"attention_mask": MASK, "labels": LABELS}, True, [2, 6]),
    ):
        found = seen(labels, **given)
        assert torch.equal(found["first"], found["table"][ids])
        assert found["second"].shape == (2, 3)  # no positions any more, so no mask has their shape


def test_nested_inputs_and_low_precision() -> None:
    linear, found = nn.Linear(4, 2).bfloat16(), []
    rows = [torch.randn(2, 4).bfloat16(), torch.randn(3, 4).bfloat16()]
    with watched_inputs(linear, [linear], lambda module, given, vectors: found.append(vectors)):
        linear(torch.nested.nested_tensor(rows))
    assert torch.equal(found[0], torch.cat(rows).float())


def test_sites_that_see_vectors() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1), nn.Embedding(4, 4), nn.MultiheadAttention(4, 2))
    found: dict[str, bool] = {}

    class Options(peftcore.author.MethodConfig):
        method: str = "looking_at_sites"

    class Looking(peftcore.author.Method):
        name, target = "looking_at_sites", ("all-layers", "3.in_proj_weight")
        Config, tags = Options, peftcore.author.Tags(category="selective", paper="none")

        def inject(self, model: nn.Module, config: Any, surgeon: Surgeon) -> None:
            found.update({site.path: sees_vectors(site) for site in surgeon.sites()})

        @staticmethod
        def parameter_count(site: Any, config: Any) -> int:
            return 0

    with contextlib.suppress(TargetError):  # it puts nothing anywhere
        peftcore.plan(model, Looking)
    assert found["0"] and not any(found[path] for path in found if path not in ("0", "3.out_proj")) and len(found) > 3
