"""The modules in which operators live: one level above the site, and never in a container."""

import torch
from core_toys import (
    Shift,
    perceptron,
    transformer,
)
from torch import Tensor, nn

import peftcore


def test_operators_live_one_level_up() -> None:
    model = transformer()
    peftcore.apply(model, "lora")
    assert model.get_submodule("layers.0.self_attn.peft.q_proj.lora").A.shape == (8, 8)
    assert [name for name, _ in model.layers[0].self_attn.named_children()][-1] == "peft"


def test_operators_of_the_hosts_own_children_live_on_the_host() -> None:
    model = perceptron()
    peftcore.apply(model, "lora", target="first")
    assert "peft.first.lora.A" in model.state_dict()


class Nested(nn.Module):
    """Containers between a site and the module that owns it."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Sequential(nn.Linear(4, 4))])
        self.named = nn.ModuleDict({"a": nn.Linear(4, 4)})

    def forward(self, x: Tensor) -> Tensor:
        for part in self.stack:
            x = part(x)
        return self.named["a"](x)


def test_operators_never_live_in_containers() -> None:
    model = Nested()
    injection = peftcore.apply(model, Shift, target=nn.Linear)
    assert [name for name, _ in model.named_children()] == ["stack", "named", "peft"]
    assert set(model.peft._modules) == {"stack__0__0", "stack__1__0", "named__a"}
    for container in (model.stack, model.stack[0], model.stack[1], model.named):
        assert "peft" not in container._modules
    x = torch.randn(3, 4)
    moved = model(x)
    injection.remove()
    assert not torch.allclose(moved, model(x), atol=1e-3)
