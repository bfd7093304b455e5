"""Random numbers of adapters that rows go to: by their own seeds, and nobody else's generators move."""

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftcore
from peftcore.author import Method, MethodConfig, Operator, Site, Surgeon, Tags
from peftcore.forward.context.row_random_numbers import Streams, seeded

CPU = torch.device("cpu")


class Noise(Operator):
    """Adds noise before and after the module's own forward."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        before = torch.randn(len(x), 1)
        return call(x) + self.scale * (before + torch.randn(len(x), 1))


class NoisyConfig(MethodConfig):
    method: Literal["noisy"] = "noisy"


class Noisy(Method):
    name = "noisy"
    Config = NoisyConfig
    tags = Tags(category="additive", paper="-", random=True, identity_at_init=False)
    target = ("all-linear",)

    def inject(self, model: nn.Module, config: NoisyConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, Noise)

    @staticmethod
    def parameter_count(site: Site, config: NoisyConfig) -> int:
        return 1


class Drop(nn.Module):
    """A parametrization that draws, so that the base's own forward does."""

    def forward(self, weight: Tensor) -> Tensor:
        return F.dropout(weight, 0.5)


def model(draws: bool = False) -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).train()
    for each in made if draws else ():
        nn.utils.parametrize.register_parametrization(each, "weight", Drop())
    for name in "ab":
        peftcore.apply(made, Noisy, name=name, target=["0", "1"])
    return made


def routed(made: nn.Module, names: list[Any], x: Tensor, **seeds: int) -> Tensor:
    with peftcore.route(made, names, seeds=seeds):
        output: Tensor = made(x)
    return output


def test_rows_draw_what_they_draw_alone() -> None:
    made, x = model(), torch.randn(5, 3)
    both = routed(made, ["a", "b", "a", "b", "b"], x, a=1, b=2)
    for name, rows, seed in (("a", [0, 2], 1), ("b", [1, 3, 4], 2)):
        torch.testing.assert_close(both[rows], routed(made, [name] * len(rows), x[rows], **{name: seed}))
    assert not torch.allclose(both, routed(made, ["a", "b", "a", "b", "b"], x, a=1, b=3))


def test_target_modules_draw_each_their_own() -> None:
    made, x = model(), torch.zeros(2, 3)
    for each in made:
        nn.init.zeros_(each.bias)
    seen: list[Tensor] = []
    for each in made:
        each.register_forward_hook(lambda module, args, output: seen.append(output - args[0] @ module.weight.T))
    routed(made, ["a", "a"], x, a=1)
    assert not torch.allclose(seen[0], seen[1])


def test_torchs_generator_goes_on_where_it_was() -> None:
    made, x = model(), torch.randn(4, 3)
    before = torch.get_rng_state()
    routed(made, ["a", "b", "a", None], x, a=1, b=2)
    assert torch.equal(torch.get_rng_state(), before)
    routed(made, ["a", "b", "a", None], x, a=1)  # b has no seed, so it draws as ever
    assert not torch.equal(torch.get_rng_state(), before)


def test_where_nothing_draws_no_generator_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A LoRA without dropout is plain mathematics; with it, it draws by its seed."""
    made, x = nn.Sequential(nn.Linear(3, 3)).train(), torch.randn(4, 3)
    still = peftcore.apply(made, "lora", name="still", target=["0"], rank=2)
    peftcore.apply(made, "lora", name="drops", target=["0"], rank=3, dropout=0.5)
    seen: list[int] = []
    monkeypatch.setattr(Streams, "seed", lambda self, seed: seen.append(seed))
    routed(made, ["still"] * 4, x, still=1)
    assert not seen and still.active
    routed(made, ["still", "drops", "still", "drops"], x, still=1, drops=2)
    assert len(seen) == 1


def test_the_model_draws_as_ever() -> None:
    """It takes from torch's generator what it takes in a pass without adapters, in the middle of what an adapter does,
    too."""
    made, x = model(draws=True), torch.randn(4, 3)
    torch.manual_seed(5)
    bare = routed(made, [None] * 4, x)
    after = torch.get_rng_state()
    for names in (["a", "b", "a", None], ["a", "b", "a", "b"]):  # without a bare row it runs inside of what "a" does
        torch.manual_seed(5)
        noisy = routed(made, names, x, a=1, b=2)
        assert torch.equal(torch.get_rng_state(), after)
        assert torch.allclose(bare[3], noisy[3]) is (names[3] is None) and not torch.allclose(bare[:3], noisy[:3])


def test_where_rows_cannot_be_told_apart_draws_are_their_own_too() -> None:
    made, x = model(), torch.randn(1, 3)
    one, two = (routed(made, ["a"], x, a=seed) for seed in (1, 2))
    torch.testing.assert_close(one, routed(made, ["a"], x, a=1))
    assert not torch.allclose(one, two)


def test_without_a_name_a_route_keeps_the_seeds_of_the_others() -> None:
    from peftcore.forward.choice.active_adapters import Route

    route = Route(("a", "b", "c"), torch.tensor([0, 1, 2]), 1, (0, 1, 2), seeds=(5, None, 7))
    assert route.without("a").seeds == (None, 7) and route.without("c").seeds == (5, None)


def test_a_seeded_block_moves_nothing() -> None:
    state = torch.get_rng_state()
    with seeded(3, CPU):
        one = torch.rand(2)
    with seeded(3, CPU):
        assert torch.equal(torch.rand(2), one)
    assert torch.equal(torch.get_rng_state(), state)
    streams = Streams(CPU)
    states = streams.states()
    torch.rand(1)
    streams.set(states)
    assert torch.equal(torch.get_rng_state(), state)
