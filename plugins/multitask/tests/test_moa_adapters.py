"""Mixture of adapters: the kit; its equation, a token and an expert at a time, with gradients; the balancing loss, with
padding; what is picked; what is refused."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftcore
from peftcore.errors import ConfigError, NotMergeable
from peftcore.testing import HOSTS, conformance
from peftcore.testing.kit import fill

OPTIONS: dict[str, Any] = {"experts": 3, "bottleneck": 4}


@conformance("moa_adapters", options={"*": {"experts": 3, "bottleneck": 5}, "llama": {"experts": 3, "top_k": 2}})
def test_conformance(check: Callable[[], None]) -> None:
    check()


def mixed(t: dict[str, Tensor], h: Tensor, top_k: int | None) -> Tensor:
    """What becomes of one token ``[d]``."""
    scores = [(t["gate"][e] * h).sum().exp() for e in range(3)]
    chosen = sorted(range(3), key=lambda e: -scores[e].item())[: top_k or 3]
    y = h
    for e in chosen:
        inner = t["down"][e] @ h + t["down_bias"][e]
        inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
        y = y + scores[e] / sum(scores[c] for c in chosen) * (t["up"][e] @ inner + t["up_bias"][e])
    return y


@pytest.mark.share(3)
@pytest.mark.parametrize("top_k", [None, 2, 1])
@pytest.mark.parametrize("name", ["bert", "llama", "unet"])
def test_the_equation(name: str, top_k: int | None) -> None:
    """By hooks in a copy of the host, with gradients of parameters."""
    model, inputs = HOSTS[name].build()
    base, _ = HOSTS[name].build()
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    base.double().eval().requires_grad_(False).load_state_dict(model.double().eval().requires_grad_(False).state_dict())
    injection = peftcore.apply(model, "moa_adapters", **OPTIONS, top_k=top_k, joins="matrix", dtype="float64")
    fill(injection)
    for path, op in injection.operators.items():
        t, dim = dict(op.named_parameters()), 1 if isinstance(base.get_submodule(path), nn.Conv2d) else -1

        def after(module: Any, args: Any, h: Tensor, t: dict[str, Tensor] = t, dim: int = dim) -> Tensor:
            x = h.movedim(dim, -1)
            return (
                torch.stack([mixed(t, each, top_k) for each in x.reshape(-1, x.shape[-1])]).view_as(x).movedim(-1, dim)
            )

        base.get_submodule(path).register_forward_hook(after)
    ours, expected = (HOSTS[name].output(each(**inputs)) for each in (model, base))
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-10)
    direction, parameters = torch.randn_like(ours), list(injection.parameters())
    found = [torch.autograd.grad((each * direction).sum(), parameters, allow_unused=True) for each in (ours, expected)]
    for one, other in zip(*found, strict=True):
        other = torch.zeros_like(one) if other is None else other
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_leaves_padding_out(side: str) -> None:
    """A padded batch has the loss of its tokens: the equation over each sub-block, by hooks."""
    model, inputs = HOSTS["llama"].build()
    model.double().train()
    options = {**OPTIONS, "top_k": 2, "balance": 0.1, "joins": "matrix", "dtype": "float64"}
    injection = peftcore.apply(model, "moa_adapters", **options)
    fill(injection)
    ids = inputs["input_ids"][:, :5]
    mask = torch.ones_like(ids)
    mask[0, slice(2) if side == "left" else slice(3, None)] = 0
    expected = torch.tensor(0.0, dtype=torch.float64)
    plain: dict[str, Tensor] = {}
    for path, op in injection.operators.items():

        def around(module: Any, args: Any, y: Tensor, op: Any = op, path: str = path) -> None:
            h = nn.functional.linear(args[0], module.weight, module.bias).detach()  # what the matrix itself gives
            plain[path] = (h[mask == 1] @ op.gate.detach().T).softmax(-1)

        model.get_submodule(path).register_forward_hook(around)
    model(input_ids=ids, attention_mask=mask)
    for p in plain.values():
        picked = (p >= p.sort(-1).values[:, -2:-1]).double()
        expected = expected + 0.1 * 3 * (picked.sum(0) / picked.sum() * p.mean(0)).sum()
    torch.testing.assert_close(injection.losses(), expected, rtol=1e-10, atol=1e-12)


def test_how_it_starts_and_what_it_reports() -> None:
    model, inputs = HOSTS["bert"].build()
    injection = peftcore.apply(model, "moa_adapters", experts=4, top_k=1)
    for op in injection.operators.values():
        assert not any(each.any() for each in (op.up, op.up_bias, op.down_bias))
        assert all(0.2 < each.abs().max() <= 0.25 for each in (op.gate, op.down))  # 1 / sqrt(16)
    with injection.reporting():
        model(**inputs)
    assert len(injection.report().routers) == len(injection.operators) == 4
    with pytest.raises(NotMergeable):
        injection.merge()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"experts": 2, "top_k": 3}, "top_k=3 is more than the 2 experts"),
        ({"balance": 0.1}, "nothing to balance: set top_k"),
    ],
)
def test_what_is_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        peftcore.apply(HOSTS["bert"].build()[0], "moa_adapters", **options)
