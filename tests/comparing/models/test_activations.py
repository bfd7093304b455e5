"""What a forward keeps for its backward, counted by hand."""

import torch
from torch import Tensor, nn

from peftcore.comparing.models.activations import kept, named_tensors


def test_what_a_forward_keeps_by_hand() -> None:
    """The input, for the first weight's gradient, and what ReLU returns, which it and the second layer share."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    def run(inputs: dict[str, Tensor]) -> Tensor:
        return model(inputs["x"])

    inputs = {"x": torch.ones(3, 4)}
    assert kept(named_tensors(model), run, inputs) == 4 * (3 * 4 + 3 * 8)
    model[0].requires_grad_(False)
    assert kept(named_tensors(model), run, inputs) == 4 * 3 * 8
    model.requires_grad_(False)
    assert kept(named_tensors(model), run, inputs) == 0
