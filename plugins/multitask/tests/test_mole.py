"""MoLE: the kit; the equation a second time, token by token, with gradients; LoRAs out of files; the balancing loss of
a model without padding; how it starts and what it refuses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from merging_toys import X, applied, equal, host, moved
from torch import Tensor, nn

import peftcore
from peftcore.errors import NotMergeable, UnsupportedSite
from peftcore.testing import HOSTS, conformance
from peftcore.testing.kit import fill
from peftcore_multitask import gather

TARGET = {"target": ["first", "second"]}
LORA = {"method": "lora", "rank": 3, **TARGET}
PART = {"method": "lora", "rank": 3}


@conformance(
    "mole",
    options={"*": {"parts": [PART] * 2}, "bert": {"parts": [PART] * 3, "train_parts": False}},
    expected_failures={
        "every_trainable_tensor_learns-bert": "gates weigh nothing while fresh parts add nothing",
        "every_trainable_tensor_learns-unet": "temperatures learn behind gates, and these behind what parts add: later "
        "than in three steps in some layers",
    },
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def gated(x: Tensor, op: Any, weights: list[float]) -> tuple[Tensor, Tensor]:
    """What is added, for one token after the other, and the gates."""
    rows, every = [], []
    for token in x:
        added = [w * s * (B @ (A @ token)) for w, (A, B, s) in zip(weights, [p.factors() for p in op.parts.values()],
                                                                   strict=True)]  # fmt: skip
        seen = torch.cat(added)
        scores = op.gate @ (seen / (seen * seen).sum().sqrt()) / op.temperature
        shares = scores.exp() / scores.exp().sum()
        rows.append(sum(share * each for share, each in zip(shares, added, strict=True)))
        every.append(shares)
    return torch.stack(rows), torch.stack(every)


@pytest.mark.parametrize("training", [False, True])
def test_equation(training: bool) -> None:
    """Outputs, and gradients of gates, temperatures, factors and inputs; the report has the gates."""
    model, base, weights = host().train(training), host(), [1.0, -2.0, 0.5]
    parts = [LORA, {**LORA, "rank": 2, "alpha": 5.0}, LORA]
    injection = applied(model, "mole", parts=parts, weights=weights)
    for operator in injection.operators.values():
        op: Any = operator
        with torch.no_grad():
            op.gate.normal_()
            op.temperature.fill_(0.7)
    x = X.clone().requires_grad_()
    with injection.reporting():
        ours = model(x)
    other = X.clone().requires_grad_()
    first, gates = gated(other, injection.operators["first"], weights)
    hidden = torch.tanh(base.first(other) + first)
    expected = base.second(hidden) + gated(hidden, injection.operators["second"], weights)[0]
    assert equal(ours, expected) and moved(model)
    assert injection.report().routers[0].shares == pytest.approx(gates.mean(0).tolist(), rel=1e-9)
    held, direction = list(injection.parameters()), torch.randn_like(ours)
    found = torch.autograd.grad((ours * direction).sum(), [x, *held])
    for gradient, wanted in zip(found, torch.autograd.grad((expected * direction).sum(), [other, *held]), strict=True):
        assert wanted.abs().max() > 1e-6 and equal(gradient, wanted)


def test_loras_out_of_files(tmp_path: Path) -> None:
    """Of other libraries, too; they stay as they are, and the gates train; all comes back out of one file."""
    model = host()
    for seed in range(3):
        options = {"rank": seed + 1, "name": f"a{seed}", **TARGET}
        applied(model, "lora", seed, **options).save(tmp_path / f"a{seed}", format="peft" if seed == 1 else "peftcore")
    other = host()
    mole = gather(other, "mole", {tmp_path / f"a{seed}": 1.0 for seed in range(3)}, train_parts=False)
    assert not any(p.requires_grad for p in mole.parameters())
    mole.trainable()
    assert mole.summary().irregular == ()
    trains = {name for op in mole.operators.values() for name, each in op.named_parameters() if each.requires_grad}
    assert trains == {"gate", "temperature"} and moved(other)
    optimizer, before = mole.optimizer(torch.optim.SGD, lr=1.0), other(X).detach()
    other(X).square().sum().backward()
    optimizer.step()
    assert not equal(other(X), before)
    with pytest.raises(NotMergeable):
        mole.merge()
    mole.save(tmp_path / "mole")
    again = host()
    peftcore.load(again, tmp_path / "mole")
    assert torch.equal(again(X), other(X))


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_of_a_model_leaves_padding_out(side: str) -> None:
    """A padded batch has the loss of its tokens, over all modules that have an expert: by hooks."""
    torch.manual_seed(0)
    model, inputs = HOSTS["llama"].build()
    model.double().train()
    parts = [PART, {**PART, "target": ["mlp.up"]}, {**PART, "target": ["mlp.up", "attn.q"]}]
    injection = peftcore.apply(model, "mole", parts=parts, balance=0.3, dtype="float64")
    fill(injection)
    seen: list[tuple[Any, Tensor]] = []
    for path, op in injection.operators.items():
        op.gate.data *= 10  # type: ignore[operator]
        module = model.get_submodule(path)
        module.register_forward_pre_hook(lambda m, args, op=op: seen.append((op, args[0].detach())))
    ids = inputs["input_ids"][:, :5]
    mask = torch.ones_like(ids)
    mask[0, slice(2) if side == "left" else slice(3, None)] = 0
    model(input_ids=ids, attention_mask=mask)
    found = injection.losses()
    of_experts: dict[str, list[Tensor]] = {"0": [], "1": [], "2": []}
    for op, x in seen:
        _, gates = gated(x[mask == 1], op, [1.0] * len(op.parts))
        for name, mean in zip(op.parts, gates.mean(0), strict=True):
            of_experts[name].append(mean)
    assert len(of_experts["1"]) == 2 and len(of_experts["2"]) == 4
    expected = -0.3 * sum(torch.stack(means).mean().log() for means in of_experts.values())
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert found > 0.1
    with torch.no_grad():
        model.eval()(input_ids=ids)
    assert not injection.losses()


def test_how_it_starts_and_what_it_refuses() -> None:
    injection = peftcore.apply(host(), "mole", parts=[LORA] * 3, train_parts=False)
    op: Any = injection.operators["first"]
    assert op.gate.shape == (3, 24) and op.temperature.tolist() == [1.0]
    torch.testing.assert_close(op.gate.norm(dim=1), torch.full((3,), 0.01))
    assert not any(each.requires_grad for each in op.parts.parameters())
    for parts, words in (
        ([LORA, {"method": "ia3", **TARGET}], "not a product of two factors, and MoLE"),
        ([{"method": "lora", "target": ["0"]}] * 2, "not a linear layer that is called by itself"),
    ):
        model = host() if "first" in parts[0]["target"] else nn.Sequential(nn.Conv1d(4, 4, 3))
        with pytest.raises(UnsupportedSite, match=words):
            peftcore.apply(model, "mole", parts=parts)
        assert not peftcore.injections(model)
