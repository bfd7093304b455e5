"""Adapted models that share modules: an adapter that would do nothing, or go with another's, is refused."""

import copy
import pickle

import pytest
import torch
from torch import nn

import peftcore
from peftcore.errors import UnsupportedHost
from peftcore.testing.kit import fill
from peftcore.testing.tools import differences, trace


class Headed(nn.Module):
    """A backbone with a head of its own: an actor, a critic."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.head(self.backbone(x))
        return output


@pytest.fixture
def backbone() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval()


X = torch.linspace(-1, 1, 12).view(3, 4)


def adapted(model: nn.Module, target: str | list[str], name: str = "lora") -> peftcore.Injection:
    injection = peftcore.apply(model, "lora", target=target, rank=2, name=name)
    fill(injection, 0)
    return injection


@pytest.mark.parametrize("method", ["lora", "dora", "bitfit", "houlsby_adapter"])
def test_one_backbone_in_two_models_is_adapted_through_one_of_them(backbone: nn.Module, method: str) -> None:
    actor, critic = Headed(backbone).eval(), Headed(backbone).eval()
    injection = adapted(actor, ["backbone.0", "backbone.2"])
    before, outputs = trace(critic), actor(X)
    for act in (peftcore.apply, peftcore.plan):
        with pytest.raises(UnsupportedHost, match="another adapted model"):
            act(critic, method, target=nn.Linear)
    assert not differences(before, trace(critic)) and torch.equal(actor(X), outputs)
    injection.remove()
    critics, bare = adapted(critic, ["backbone.0", "backbone.2"]), copy.deepcopy(critic)
    peftcore.activate(bare)
    assert not torch.equal(critic(X), bare(X))
    critic(X).sum().backward()
    assert all(parameter.grad is not None for parameter in critics.parameters())


def test_a_model_inside_another_is_adapted_through_one_of_them(backbone: nn.Module) -> None:
    outer = Headed(backbone).eval()
    inner = adapted(backbone, "0")
    with pytest.raises(UnsupportedHost, match="itself an adapted model"):
        peftcore.apply(outer, "lora", target="backbone.2", rank=2)
    inner.remove()
    adapted(outer, "backbone.0")
    with pytest.raises(UnsupportedHost, match="another adapted model"):
        peftcore.apply(backbone, "lora", target="2", rank=2)


@pytest.mark.parametrize("outer_first", [False, True])
@pytest.mark.parametrize("leaves_first", ["inner", "outer"])
def test_each_of_two_that_share_no_module_stays_when_the_other_goes(
    backbone: nn.Module, outer_first: bool, leaves_first: str
) -> None:
    """They have one name, too."""
    outer = Headed(backbone).eval()
    plain = trace(outer)
    made = {}
    for which in ("outer", "inner") if outer_first else ("inner", "outer"):
        made[which] = adapted(outer, "head") if which == "outer" else adapted(backbone, "0")
    both, stays = outer(X), made["outer" if leaves_first == "inner" else "inner"]
    made[leaves_first].remove()
    stays.check()
    one = outer(X)
    with stays.disabled():
        bare = outer(X)
    assert not torch.equal(one, both) and not torch.equal(one, bare)
    stays.remove()
    assert not differences(plain, trace(outer))


class Encoder(nn.Module):
    """Torch's own encoder, whose fast path must not be taken while it is adapted."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.encoder(x)
        return output


@pytest.mark.parametrize("through", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_that_was_merged_and_unmerged_is_adapted_still(through: object) -> None:
    torch.manual_seed(0)
    model = Encoder().eval()
    injection = peftcore.apply(model, "lora", target=["linear1", "linear2", "in_proj_weight"], rank=2)
    fill(injection, 0)
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        expected = model(x)
        copied = through(model)  # type: ignore[operator]
        [other] = peftcore.injections(copied).values()
        copied(x)
        other.merge()
        torch.testing.assert_close(copied(x), expected)
        other.unmerge()
        torch.testing.assert_close(copied(x), expected)
