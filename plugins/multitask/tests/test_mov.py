"""MoV: the kit; numbers of the authors' modules; the equation in float64, by hooks on a copy of the host; heads; what
is refused."""

import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_pairs import difference
from torch import Tensor, nn

import peftcore
from peftcore.errors import NotMergeable, UnsupportedSite
from peftcore.testing import against, conformance, frozen, same_defaults, same_start
from peftcore.testing.hosts import HOSTS
from peftcore.testing.kit import fill

NUMBERS = Path(__file__).parent / "numbers" / "mov.json"
CODE: Any = {"repository": "for-ai/parameter-efficient-moe", "commit": "e2683fe", "script": "src/mov.py"}
HEADS_TOLD = {"unet": {"experts": 3, "head": 4}, "dit": {"experts": 3, "head": 8}}


@conformance("mov", options={"*": {"experts": 3}, **HEADS_TOLD})
def test_conformance(check: Callable[[], None]) -> None:
    check()


def wave(*shape: int, step: float) -> Tensor:
    """Numbers that are the same everywhere: sin(0), sin(step), sin(2 step), ..."""
    return (torch.arange(math.prod(shape), dtype=torch.float64) * step).sin().view(shape)


@pytest.mark.parametrize(("place", "heads", "head"), [("feed-forward", 1, 5), ("attention", 2, 3)])
@against("authors", "mov", **CODE)
def test_numbers_of_the_authors(place: str, heads: int, head: int) -> None:
    """The output, then the gradients: behind a layer that does nothing, so that a is what comes in."""
    width = heads * head
    model = nn.Sequential(nn.Linear(width, width, bias=False)).double().eval()
    model[0].weight.data = torch.eye(width).double()
    target = {"scale_inputs": ["0"]} if heads == 1 else {"head": head}
    with torch.no_grad():
        injection = peftcore.apply(model, "mov", target="0", experts=3, dtype="float64", **target)
        (op,) = injection.operators.values()
        if heads > 1:  # a plain layer has no role, so its output is one head
            op.gain = nn.Parameter(torch.ones(heads, 3, head).double())
            op.router = nn.Parameter(torch.ones(3, head).double())
        op.gain.copy_(1 + wave(heads, 3, head, step=1.7))
        op.router.copy_(wave(3, head, step=0.7))
    y = model(wave(1, 2, width, step=0.9))
    (y * wave(1, 2, width, step=0.3)).sum().backward()
    numbers = frozen(NUMBERS)[place]
    for name, found in {"y": y, "gain": op.gain.grad, "router": op.router.grad}.items():
        assert difference(found.flatten(), torch.tensor(numbers[name], dtype=torch.float64)) < 1e-6, name


@against("authors", "mov", **CODE, part="start")
def test_start_is_the_authors() -> None:
    model = nn.Sequential(nn.Linear(2000, 4))
    injection = peftcore.apply(model, "mov", target="0", scale_inputs=["0"], experts=20)
    for name, told in frozen(NUMBERS, "start").items():
        same_start(getattr(injection.operators["0"], name), told)


@against("authors", "mov", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    model = nn.Sequential(nn.Linear(5, 4))
    op = peftcore.apply(model, "mov", target="0", scale_inputs=["0"], experts=3).operators["0"]
    trained = {name: each.numel() for name, each in op.named_parameters() if each.requires_grad}
    assert trained == frozen(NUMBERS, "trains")


@against("authors", "mov", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    injection = peftcore.apply(nn.Sequential(nn.Linear(5, 4)), "mov", target="0")
    same_defaults(injection.config, frozen(NUMBERS, "defaults"))


def mixed(a: Tensor, gain: Tensor, router: Tensor) -> Tensor:
    """The equation, a head at a time."""
    parts = []
    for index, part in enumerate(a.split(gain.shape[-1], -1)):
        shares = (part @ router.T).exp()
        shares = shares / shares.sum(-1, keepdim=True)
        parts.append(part * sum(shares[..., e : e + 1] * gain[index, e] for e in range(len(router))))
    return torch.cat(parts, -1)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_the_equation(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = HOSTS[name].build()
    base = model.double().eval()
    model, plain = deepcopy(base), base(**inputs).logits
    injection = peftcore.apply(model, "mov", experts=3, dtype="float64")
    fill(injection)
    with torch.no_grad():
        for op in injection.operators.values():
            op.router.normal_()
    for site in injection.sites:
        op = injection.operators[site.path]
        gain, router = op.gain.detach(), op.router.detach()
        module = base.get_submodule(site.module_path)
        if site.role == "mlp.down":
            assert len(gain) == 1
            module.register_forward_pre_hook(lambda m, args, g=gain, r=router: (mixed(args[0], g, r),))
            continue
        assert gain.shape[-1] == 8 and router.shape == (3, 8)
        start, stop = site.slices[0] if site.slices else (0, site.out_features)

        def scale(
            m: Any, args: Any, y: Tensor, g: Tensor = gain, r: Tensor = router, at: slice = slice(start, stop)
        ) -> Tensor:
            return torch.cat([y[..., : at.start], mixed(y[..., at], g, r), y[..., at.stop :]], -1)

        module.register_forward_hook(scale)
    expected = base(**inputs).logits
    assert difference(expected, plain) > 1e-2
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-9, atol=1e-9)


def test_channels_of_convolutions_are_routed_by_position() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(4, 6, 3)).double()
    x = torch.randn(2, 4, 7, 6).double()
    for options, before in (({}, False), ({"scale_inputs": ["0"]}, True)):
        model = deepcopy(base)
        injection = peftcore.apply(model, "mov", target="0", experts=3, dtype="float64", **options)
        fill(injection)
        (op,) = injection.operators.values()

        def scaled(a: Tensor, op: Any = op) -> Tensor:
            return mixed(a.movedim(1, -1), op.gain, op.router).movedim(-1, 1)

        expected = base(scaled(x)) if before else scaled(base(x))
        torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


def test_what_is_refused() -> None:
    model, _ = HOSTS["llama"].build()
    injection = peftcore.apply(model, "mov")
    with pytest.raises(NotMergeable):
        injection.merge()
    injection.remove()
    with pytest.raises(UnsupportedSite, match="heads of 3"):
        peftcore.apply(model, "mov", head=3)
    encoder, _ = HOSTS["encoder"].build()
    with pytest.raises(UnsupportedSite):
        peftcore.apply(encoder, "mov")
    with pytest.raises(UnsupportedSite, match="no input"):
        peftcore.apply(nn.Sequential(nn.Embedding(5, 3)), "mov", target="0", scale_inputs=["0"])
