"""MoV: the kit; numbers of the authors' modules (for-ai/parameter-efficient-moe at e2683fe, src/mov.py and
src/routing.py, run once in float32, flax's own dense layer standing in for flaxformer's); the equation in float64, by
hooks on a copy of the host; heads; what is refused."""

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from peft_pairs import difference
from torch import Tensor, nn

import peftcore
from peftcore.errors import NotMergeable, UnsupportedSite
from peftcore.testing import conformance
from peftcore.testing.hosts import HOSTS
from peftcore.testing.kit import fill

HEADS_TOLD = {"unet": {"experts": 3, "head": 4}, "dit": {"experts": 3, "head": 8}}


@conformance("mov", options={"*": {"experts": 3}, **HEADS_TOLD})
def test_conformance(check: Callable[[], None]) -> None:
    check()


def wave(*shape: int, step: float) -> Tensor:
    """Numbers that are the same everywhere: sin(0), sin(step), sin(2 step), ..."""
    return (torch.arange(math.prod(shape), dtype=torch.float64) * step).sin().view(shape)


AUTHORS: dict[str, dict[str, list[float]]] = {  # flattened
    "feed-forward": {
        "y": [
            0.0, 1.0544996, 1.3907945, 0.2322772, -0.3051148, -1.2822540, -0.8754249, 0.0109969, 0.7589865, 1.3163558,
        ],
        "gain": [
            -0.4601870, -0.2533318, 0.2487459, 0.4002802, 0.0141881, -0.4539948, -0.3476095, 0.0133558,
            0.2536206, 0.1880461, -0.0608996, 0.0798753, 0.3022879, 0.2169708, -0.2001691,
        ],
        "router": [
            0.3493231, 0.0295943, -0.3125308, -0.4181389, -0.2073078, -0.2951494, -0.2396093, -0.0027377,
            0.2362057, 0.2963934, -0.0541738, 0.2100150, 0.3152686, 0.1819333, -0.0890856,
        ],
    },
    "attention": {
        "y": [
            0.0, 1.4372032, 0.9468917, 0.7017702, -0.5821878, -0.2704234,
            -0.5309087, 0.0242277, 0.9518871, 1.7723534, 0.3358460, -0.1008023,
        ],
        "gain": [
            -0.4412032, 0.1905615, 0.7467423, -0.0780011, 0.0403960, 0.1479479, -0.2333506, 0.0150454, 0.1912789,
            0.1035105, -0.0183010, -0.0558084, 0.4447317, -0.1385663, -0.3745954, 0.2010473, -0.1974209, -0.4725033,
        ],
        "router": [
            0.1768698, -0.0699011, -0.2637723, 0.0809711, -0.0347735, -0.1242023, -0.2578410, 0.1046746, 0.3879746,
        ],
    },
}  # fmt: skip


@pytest.mark.parametrize(("place", "heads", "head"), [("feed-forward", 1, 5), ("attention", 2, 3)])
def test_numbers_of_the_authors(place: str, heads: int, head: int) -> None:
    """The output, then the gradients: behind a layer that does nothing, so that a is what comes in."""
    width = heads * head
    model = nn.Sequential(nn.Linear(width, width, bias=False)).double()
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
    for name, found in {"y": y, "gain": op.gain.grad, "router": op.router.grad}.items():
        assert difference(found.flatten(), torch.tensor(AUTHORS[place][name], dtype=torch.float64)) < 1e-6, name


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
